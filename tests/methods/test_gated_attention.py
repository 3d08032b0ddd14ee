from __future__ import annotations

import gc
import json
import math
import os
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")

import diffusers
from safetensors.torch import load_file, save_file

import sdcore
from sdcore.embedded import models
from sdcore.methods import cross_attention
from sdcore.methods.gated_attention import FILE, GatedAttention
from sdcore.methods.region_attention import Region, RegionAttention
from tests import pipelines

KIND = "text-to-image"
NAME = {"SD": "v1", "SDXL": "xl"}
TOKENS = 7


def unet(family: str) -> Any:
    torch.manual_seed(0)
    return models.unet(NAME[family]).eval().requires_grad_(False)


def inputs(family: str, rows: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    options = models.UNETS[NAME[family]]
    found = {
        "sample": random(rows, 4, 16, 8),  # not square: sides must not be mixed up
        "timestep": 300,
        "encoder_hidden_states": random(rows, TOKENS, options["cross_attention_dim"]),
    }
    if family == "SDXL":
        pooled = random(rows, models.TEXTS["xl"][1][0])
        found["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": random(rows, 6)}
    return found


def mixed(gates: GatedAttention, bias: float = 0.0) -> GatedAttention:
    """Such that about half of the gates are open, and all weights matter."""
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for head in gates.heads:
            for part in (head.phi, head.psi):
                for layer in (part[1], part[3]):
                    layer.weight.normal_(generator=generator).div_(layer.in_features**0.5)
                part[3].weight.mul_(4)
                part[3].bias.normal_(generator=generator)
            head.bias.fill_(bias)
    return gates


def processors(model: Any) -> dict[str, int]:
    return {name: id(part) for name, part in model.attn_processors.items()}


# ---------------------------------------------------------------------------------------------
# What gates do


@pytest.mark.parametrize("family", pipelines.FAMILIES)
@pytest.mark.parametrize("shared", ["stage", "all", "none"])
def test_new_ones_change_nothing(tokens: Any, family: str, shared: str) -> None:
    pipe = pipelines.pipeline(family, KIND, tokens)
    before, was = pipelines.images(pipe, KIND), processors(pipe.unet)
    gates = GatedAttention.for_unet(pipe.unet, shared=shared)
    with sdcore.patch(pipe, gates):
        assert pipelines.images(pipe, KIND).allclose(before, atol=1e-5)
    assert gates.open_fraction == dict.fromkeys(gates.layers, 1.0)
    assert processors(pipe.unet) == was
    assert pipelines.images(pipe, KIND).equal(before)


@pytest.mark.parametrize("family", pipelines.FAMILIES)
def test_closed_ones_leave_a_token_a_pixel(tokens: Any, family: str) -> None:
    pipe = pipelines.pipeline(family, KIND, tokens)
    before, was = pipelines.images(pipe, KIND), processors(pipe.unet)
    gates = mixed(GatedAttention.for_unet(pipe.unet), bias=-1e4)
    with sdcore.patch(pipe, gates):
        found = pipelines.images(pipe, KIND)
    count = pipe.tokenizer.model_max_length
    assert gates.open_fraction == pytest.approx(dict.fromkeys(gates.layers, 1 / count))
    assert (found - before).abs().max() > 1e-3
    assert processors(pipe.unet) == was
    assert not pipe.unet._forward_hooks and not pipe.unet._forward_pre_hooks
    assert pipelines.images(pipe, KIND).equal(before)


def expected_attention(gates: GatedAttention, name: str, attn: Any, x: Tensor, e: Tensor) -> Tensor:
    """By the formula, in float64."""
    head = gates.heads[gates.layers[name]].double()
    z = head.phi(x) @ head.psi(e).mT / gates.features**0.5 + head.bias
    gate = z > 0
    gate = gate | (z == z.amax(-1, keepdim=True)) & ~gate.any(-1, keepdim=True)
    q, k, v = (
        to(part).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        for to, part in ((attn.to_q, x), (attn.to_k, e), (attn.to_v, e))
    )
    powers = gate[:, None] * (q @ k.mT / q.shape[-1] ** 0.5).exp()
    return attn.to_out[0]((powers / powers.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("family", pipelines.FAMILIES)
@pytest.mark.parametrize("bias", [-30.0, 0.0])
def test_a_layer_is_what_the_formula_says(family: str, bias: float) -> None:
    model = unet(family).double()
    gates = mixed(GatedAttention.for_unet(model, features=24, hidden=40), bias).double()
    given = {
        key: value.double() if isinstance(value, Tensor) else value
        for key, value in inputs(family).items()
    }
    seen: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    parts = cross_attention.layers(model)
    hooks = [
        part.register_forward_hook(
            lambda _, args, more, out, name=name: seen.update(
                {name: (args[0], more["encoder_hidden_states"], out)}
            ),
            with_kwargs=True,
        )
        for name, part in parts.items()
    ]
    with torch.no_grad(), gates.attached(model):
        model(**given)
    for hook in hooks:
        hook.remove()
    outside = 0
    for name, (x, e, out) in seen.items():
        if name not in gates.layers:
            outside += 1
            continue
        with torch.no_grad():
            assert out.allclose(expected_attention(gates, name, parts[name], x, e), atol=1e-9)
    assert len(seen) == len(parts) and outside == len(parts) - len(gates.layers) > 0
    shares = gates.open_fraction
    assert all(0.99 < TOKENS * share < 0.9 * TOKENS for share in shares.values())
    assert any(TOKENS * share > 1.01 for share in shares.values()) == (bias == 0)


def test_both_prompts_are_gated(tokens: Any) -> None:
    """As published: the UNet's rows of the negative prompt are moved as well."""
    pipe = pipelines.pipeline("SD", KIND, tokens)
    outputs = []
    hook = pipe.unet.register_forward_hook(lambda *given: outputs.append(given[2][0].clone()))
    pipelines.images(pipe, KIND, num_inference_steps=1)
    with sdcore.patch(pipe, mixed(GatedAttention.for_unet(pipe.unet))):
        pipelines.images(pipe, KIND, num_inference_steps=1)
    hook.remove()
    plain, gated = outputs
    assert len(plain) == 2
    assert all((plain[row] - gated[row]).abs().max() > 1e-4 for row in range(2))


# ---------------------------------------------------------------------------------------------
# Which layers, which heads


def test_which_layers_share_a_head() -> None:
    model = unet("SD")
    every = list(cross_attention.layers(model))

    def blocks(gates: GatedAttention) -> set[tuple[str, int]]:
        return {(name.split(".attentions")[0], number) for name, number in gates.layers.items()}

    default = GatedAttention.for_unet(model)
    assert blocks(default) == {("down_blocks.2", 0), ("up_blocks.0", 0)}
    stages = GatedAttention.for_unet(model, every)
    assert list(stages.layers) == every
    numbers = dict(blocks(stages))
    assert numbers["down_blocks.1"] == numbers["up_blocks.1"]
    assert numbers["down_blocks.2"] == numbers["up_blocks.0"] != numbers["mid_block"]
    assert [head.widths for head in stages.heads] == [
        (model.config.block_out_channels[level], model.config.cross_attention_dim)
        for level in (1, 2, 2)
    ]
    by_width = dict(blocks(GatedAttention.for_unet(model, every, shared="all")))
    assert by_width["down_blocks.2"] == by_width["mid_block"] != by_width["down_blocks.1"]
    alone = GatedAttention.for_unet(model, every, shared="none")
    assert sorted(alone.layers.values()) == list(range(len(every)))
    some = GatedAttention.for_unet(model, ["mid_block", "up_blocks.0.attentions.1"])
    assert blocks(some) == {("up_blocks.0", 0), ("mid_block", 1)}
    assert all(".attentions.1." in name for name in some.layers if name.startswith("up"))
    assert GatedAttention.for_unet(model, "mid_block").layers == {
        name: 0 for name in every if name.startswith("mid_block.")
    }


def test_published_sizes() -> None:
    """SDXL's 50 layers and 465,921 parameters; and a UNet whose first block up has no text."""
    kinds = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    with torch.device("meta"):
        xl = diffusers.UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=kinds,
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
        )
        small = diffusers.UNet2DConditionModel(
            block_out_channels=(32, 64), down_block_types=kinds[1::-1],
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1,
            norm_num_groups=8, cross_attention_dim=16, attention_head_dim=2,
        )  # fmt: skip
    gates = GatedAttention.for_unet(xl)
    assert len(gates.layers) == 50 and len(gates.heads) == 1
    assert models.parameters(gates) == 465_921
    assert list(GatedAttention.for_unet(small).layers) == list(cross_attention.layers(small))


# ---------------------------------------------------------------------------------------------
# Training


def distance(model: Any, family: str, target: Tensor) -> Tensor:
    return (model(**inputs(family)).sample - target).square().mean()


@pytest.mark.parametrize("family", pipelines.FAMILIES)
def test_training(family: str) -> None:
    """Towards what other gates make of the UNet."""
    model = unet(family)
    before = model(**inputs(family)).sample
    was = processors(model), {key: value.clone() for key, value in model.state_dict().items()}
    teacher = mixed(GatedAttention.for_unet(model, features=16, hidden=16))
    with torch.no_grad(), teacher.attached(model):
        target = model(**inputs(family)).sample
    torch.manual_seed(1)
    gates = GatedAttention.for_unet(model, features=16, hidden=16, bias=0.5)
    first = {name: value.clone() for name, value in gates.named_parameters()}
    optimizer = torch.optim.Adam(gates.parameters(), lr=0.02)
    losses = []
    with gates.attached(model):
        for number in range(20):
            loss = distance(model, family, target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if number == 1:
                moved = {
                    name: not value.equal(first[name]) for name, value in gates.named_parameters()
                }
    assert all(moved.values()), moved
    assert losses[-1] < 0.7 * losses[0], losses
    assert min(gates.open_fraction.values()) < 1
    assert processors(model) == was[0]
    assert all(value.equal(was[1][key]) for key, value in model.state_dict().items())
    assert model(**inputs(family)).sample.equal(before)
    assert not any(value.grad is not None for value in model.parameters())


def test_the_published_gradient() -> None:
    """While all gates are open it is 10,000 times the other, which it does not resemble later: all
    gates that are closed have none. Forward, both are the same."""
    model = unet("SD")
    for prepare in (lambda gates: gates, mixed):
        outputs, gradients = [], []
        for ste in ("multiplicative", "additive"):
            torch.manual_seed(1)
            gates = prepare(GatedAttention.for_unet(model, "mid_block", ste=ste))
            with gates.attached(model):
                outputs.append(model(**inputs("SD")).sample)
            outputs[-1].square().mean().backward()
            gradients.append(gates.heads[0].psi[3].weight.grad)
        assert outputs[0].equal(outputs[1])
        assert gradients[0].any()
        same = gradients[1].allclose(1e4 * gradients[0], rtol=1e-3, atol=1e-3 * gradients[1].max())
        assert same == (prepare is not mixed)


@pytest.mark.parametrize("ste", ["multiplicative", "additive"])
def test_a_shared_head_gets_all_its_layers_gradients(ste: str) -> None:
    model = unet("SD").double()
    given = {
        key: value.double() if isinstance(value, Tensor) else value
        for key, value in inputs("SD").items()
    }
    one = mixed(GatedAttention.for_unet(model, features=16, hidden=16, ste=ste)).double()
    many = GatedAttention.for_unet(model, shared="none", features=16, hidden=16, ste=ste).double()
    assert len(one.heads) == 1 and len(many.heads) == len(one.layers) > 2
    for head in many.heads:
        head.load_state_dict(one.heads[0].state_dict())
    outputs = []
    for gates in (one, many):
        with gates.attached(model):
            out = model(**given).sample
        out.square().mean().backward()  # after the context as well
        outputs.append(out)
    assert outputs[0].equal(outputs[1])
    for name, value in one.heads[0].named_parameters():
        parts = [dict(head.named_parameters())[name].grad for head in many.heads]
        assert all(part is not None and part.any() for part in parts), name
        assert value.grad.allclose(sum(parts), rtol=1e-6, atol=1e-15), name


def test_text_is_read_once_a_call_and_head() -> None:
    model = unet("SD")
    gates = mixed(GatedAttention.for_unet(model, list(cross_attention.layers(model))))
    counts = dict.fromkeys(range(len(gates.heads)), 0)

    def count(number: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            counts[number] += 1

        return hook

    for number, head in enumerate(gates.heads):
        head.psi.register_forward_hook(count(number))
    assert len(gates.layers) > len(counts) > 1
    with gates.attached(model), torch.no_grad():
        first = model(**inputs("SD")).sample
        assert set(counts.values()) == {1}
        assert model(**inputs("SD")).sample.equal(first)
        assert set(counts.values()) == {2}
        for head in gates.heads:  # as an optimizer does: the text is the same, and psi is not
            head.psi[3].weight.neg_()
        assert not model(**inputs("SD")).sample.equal(first)


def test_gradient_checkpointing() -> None:
    model = unet("SD").train()
    gates = mixed(GatedAttention.for_unet(model))
    found = []
    for checkpointing in (False, True):
        (model.enable_gradient_checkpointing if checkpointing else lambda: None)()
        gates.zero_grad()
        with gates.attached(model):
            loss = model(**inputs("SD")).sample.square().mean()
            shares = gates.open_fraction
            with ThreadPoolExecutor(1) as pool:  # as autograd does it on a GPU
                pool.submit(loss.backward).result()
        assert gates.open_fraction == shares
        assert set(gates._seen.calls.values()) == {1}  # what backward computes again counts once
        found.append([loss.detach(), *(value.grad.clone() for value in gates.parameters())])
    for plain, again in zip(*found, strict=True):
        assert again.allclose(plain, rtol=1e-5, atol=1e-9)


def test_attached_ends_with_an_error() -> None:
    model = unet("SD")
    before, was = model(**inputs("SD")).sample, processors(model)
    gates = mixed(GatedAttention.for_unet(model))
    with pytest.raises(KeyboardInterrupt), gates.attached(model):
        assert not model(**inputs("SD")).sample.equal(before)
        raise KeyboardInterrupt
    assert processors(model) == was
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert model(**inputs("SD")).sample.equal(before)


# ---------------------------------------------------------------------------------------------
# Dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_half_precision_pipeline(tokens: Any, dtype: torch.dtype) -> None:
    """Heads in their own dtype."""
    pipe = pipelines.pipeline("SD", KIND, tokens).to(torch.bfloat16)
    gates = mixed(GatedAttention.for_unet(pipe.unet)).to(dtype)
    assert GatedAttention.for_unet(pipe.unet).heads[0].bias.dtype == torch.float32
    seen = []
    gates.heads[0].phi.register_forward_hook(lambda *given: seen.append(given[2].dtype))
    before = pipelines.images(pipe, KIND)
    with sdcore.patch(pipe, gates):
        found = pipelines.images(pipe, KIND)
    assert found.isfinite().all() and not found.equal(before)
    assert set(seen) == {dtype}
    assert all(0.1 < share < 0.9 for share in gates.open_fraction.values())


def test_autocast() -> None:
    """Heads in float32 nevertheless, and gradients for them."""
    model = unet("SD")
    gates = mixed(GatedAttention.for_unet(model))
    seen = []
    gates.heads[0].phi.register_forward_hook(lambda *given: seen.append(given[2].dtype))
    with gates.attached(model), torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs("SD")).sample.float().square().mean()
    loss.backward()
    assert set(seen) == {torch.float32}
    assert all(value.grad.any() for value in gates.parameters())


@pytest.mark.gpu
def test_on_a_gpu(tokens: Any) -> None:
    pipe = pipelines.pipeline("SD", KIND, tokens)
    gates = mixed(GatedAttention.for_unet(pipe.unet))
    with sdcore.patch(pipe, gates):
        pipelines.images(pipe, KIND)
    expected = gates.open_fraction
    pipe.to("cuda")
    assert GatedAttention.for_unet(pipe.unet).heads[0].bias.is_cuda
    with sdcore.patch(pipe, gates):
        with pytest.raises(ValueError, match="the gates are on cpu, and the UNet's input on cuda"):
            pipelines.images(pipe, KIND)
        gates.cuda()
        pipelines.images(pipe, KIND)
    assert gates.open_fraction == pytest.approx(expected, abs=0.02)
    pipe.unet.train().enable_gradient_checkpointing()
    given = {
        key: value.cuda() if isinstance(value, Tensor) else value
        for key, value in inputs("SD").items()
    }
    slopes = []
    for checkpointing in (True, False):
        if not checkpointing:
            pipe.unet.disable_gradient_checkpointing()
        gates.zero_grad()
        with gates.attached(pipe.unet):
            pipe.unet(**given).sample.square().mean().backward()
        slopes.append([value.grad.clone() for value in gates.parameters()])
    for again, plain in zip(*slopes, strict=True):
        assert again.allclose(plain, rtol=1e-4, atol=1e-7)


# ---------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_saved_and_loaded(tmp_path: Path, dtype: torch.dtype) -> None:
    model = unet("SD")
    every = list(cross_attention.layers(model))
    gates = mixed(GatedAttention.for_unet(model, every, features=16, hidden=24, ste="additive"))
    gates.to(dtype).save_pretrained(tmp_path / "new" / "folder")
    file = tmp_path / "new" / "folder" / FILE
    state = torch.get_rng_state()
    for path in (file.parent, file, str(file)):
        loaded = GatedAttention.from_pretrained(path)
        assert loaded.layers == gates.layers and loaded.ste == "additive"
        assert loaded.state_dict().keys() == gates.state_dict().keys()
        for (name, value), other in zip(gates.named_parameters(), loaded.parameters(), strict=True):
            assert value.equal(other) and other.dtype == dtype and other.requires_grad, name
    assert torch.get_rng_state().equal(state)
    outputs = []
    for one in (gates, loaded):
        with torch.no_grad(), one.attached(model):
            outputs.append(model(**inputs("SD")).sample)
    assert outputs[0].equal(outputs[1])
    with torch.no_grad():
        gates.heads[0].bias.fill_(7)
    gates.save_pretrained(file.parent)  # over the file that is in use
    assert loaded.heads[0].bias == 0
    assert GatedAttention.from_pretrained(file).heads[0].bias == 7


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> Path:
    """The file with its tensors and configuration changed."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    state, config = load_file(path), json.loads(metadata["config"])
    change(state, config)
    save_file(state, path, metadata | {"config": json.dumps(config)})
    return path


def test_foreign_and_damaged_files(tmp_path: Path) -> None:
    model = unet("SD")
    gates = GatedAttention.for_unet(model, features=16, hidden=16)
    path = tmp_path / FILE

    def refused(what: str) -> None:
        with pytest.raises(ValueError, match=what):
            GatedAttention.from_pretrained(path)

    with pytest.raises(FileNotFoundError, match="no file"):
        GatedAttention.from_pretrained(tmp_path)
    gates.save_pretrained(tmp_path)
    whole = path.read_bytes()
    for damaged in (b"", b"no such thing", whole[: len(whole) // 2], whole[:-3]):
        path.write_bytes(damaged)
        refused("no safetensors file, or damaged")
    save_file({"weight": torch.ones(2)}, path)
    refused("holds no gates: its metadata has the format None, not 'sdcore.GatedAttention 1'$")
    save_file(published(gates), path)
    refused("from_published reads it")
    changes = {
        "Missing key.*heads.0.phi.1.weight": lambda state, _: state.pop("heads.0.phi.1.weight"),
        "Unexpected key.*other": lambda state, _: state.update(other=torch.ones(1)),
        "size mismatch for heads.0.psi.3.bias": lambda state, _: state.update(
            {"heads.0.psi.3.bias": torch.ones(15)}
        ),
        "heads.0.bias holds torch.int64": lambda state, _: state.update(
            {"heads.0.bias": torch.tensor(4)}
        ),
        "damaged: 'layers'": lambda _, config: config.pop("layers"),
        "damaged: .*unexpected keyword argument 'more'": lambda _, config: config.update(more=1),
        "damaged: features must be at least 1": lambda _, config: config.update(features=0),
        "damaged: ste must be one of": lambda _, config: config.update(ste="other"),
        "damaged: layers must name": lambda _, config: config.update(layers={}),
    }
    for what, change in changes.items():
        path.write_bytes(whole)
        rewritten(path, change)
        refused(what)
    path.write_bytes(whole)
    GatedAttention.from_pretrained(path).check(type("Pipe", (), {"unet": model}))


def published(gates: GatedAttention) -> dict[str, Tensor]:
    """In the layout of the authors' code: each layer has all weights of its head."""
    names = {"phi": "feature_net", "psi": "token_net", "bias": "logit_bias"}
    return {
        f"{layer}.processor.gate_head.{names[part]}{rest}": value.detach().clone()
        for layer, number in gates.layers.items()
        for key, value in gates.heads[number].named_parameters()
        for part, rest in [(key.split(".")[0], key[len(key.split(".")[0]) :])]
    }


def checkpoint(gates: GatedAttention, **settings: Any) -> dict[str, Any]:
    config = {"stage": "mid", "threshold": 0.5, "negative_value": -1e4} | settings
    return {
        "format": "maskattn-sdxl-gates-v1",
        "checkpoint_kind": "trained",
        "maskattn_config": config,
        "selected_layers": sorted(f"{name}.processor" for name in gates.layers),
        "gate_state_dict": published(gates),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": []},
        "global_step": 3,
    }


def test_published_weights(tmp_path: Path) -> None:
    model = unet("SDXL")
    every = list(cross_attention.layers(model))
    gates = mixed(GatedAttention.for_unet(model, every, features=16, hidden=16), bias=0.25)
    assert published(gates).keys() >= {
        f"{every[0]}.processor.gate_head.{rest}"
        for rest in ("feature_net.0.weight", "token_net.3.bias", "logit_bias")
    }
    save_file(published(gates), tmp_path / "gates.safetensors")
    torch.save(checkpoint(gates), tmp_path / "gate_final.pt")
    with torch.no_grad(), gates.attached(model):
        expected = model(**inputs("SDXL")).sample
    for name in ("gates.safetensors", "gate_final.pt"):
        loaded = GatedAttention.from_published(tmp_path / name, model)
        assert len(loaded.heads) == len(gates.heads) == 3
        with torch.no_grad(), loaded.attached(model):
            assert model(**inputs("SDXL")).sample.equal(expected)
    torch.save(checkpoint(gates, threshold=0.75), tmp_path / "other.pt")
    other = GatedAttention.from_published(tmp_path / "other.pt", model, ste="additive")
    assert other.ste == "additive"
    for head in other.heads:  # sigmoid(z) = 0.75 where z = ln 3
        assert head.bias.item() == pytest.approx(0.25 - math.log(3))


def test_other_weights_than_published(tmp_path: Path) -> None:
    model = unet("SDXL")
    gates = GatedAttention.for_unet(model, features=16, hidden=16)

    def refused(what: str, given: Any, which: Any = model) -> None:
        path = tmp_path / "gates.pt"
        if isinstance(given, bytes):
            path.write_bytes(given)
        else:
            torch.save(given, path)
        with pytest.raises(ValueError, match=what):
            GatedAttention.from_published(path, which)

    whole = checkpoint(gates)
    layer = next(iter(gates.layers))
    key = f"{layer}.processor.gate_head.feature_net.0.weight"
    with pytest.raises(FileNotFoundError):
        GatedAttention.from_published(tmp_path / "none.pt", model)
    with pytest.raises(ValueError, match="ste must be one of"):
        GatedAttention.from_published(tmp_path / "none.pt", model, ste="other")
    refused("can't be read as weights", b"no such thing")
    refused("can't be read as weights", whole | {"format": os.system})  # code
    refused("not of the format", {"weight": torch.ones(2)})
    refused("lacks gate_state_dict", {**whole, "gate_state_dict": None})
    refused("holds no weights", whole | {"gate_state_dict": {}})
    refused("no weight of MaskAttn", whole | {"gate_state_dict": {"conv.weight": torch.ones(2)}})
    state = dict(whole["gate_state_dict"])
    del state[key]
    refused(
        f"has for {layer} too much or too little: phi.0.weight", whole | {"gate_state_dict": state}
    )
    for wrong in (torch.ones(3), torch.ones(()), torch.ones(64, dtype=torch.int32)):
        refused("is damaged: ", whole | {"gate_state_dict": state | {key: wrong}})
    refused("has the threshold 1", checkpoint(gates, threshold=1.0))
    refused("has the penalty -5", checkpoint(gates, negative_value=-5.0))
    refused("for another UNet", whole, unet("SD"))


# ---------------------------------------------------------------------------------------------
# Reports


def test_open_fraction_is_the_mean_of_a_run(tokens: Any) -> None:
    pipe = pipelines.pipeline("SD", KIND, tokens)
    gates = mixed(GatedAttention.for_unet(pipe.unet))
    with pytest.raises(ValueError, match="no gates were seen yet"):
        _ = gates.open_fraction
    each = []

    class Look(sdcore.Method):
        """Makes each call a second time, when the gates are done with the first."""

        def denoise(self, call, proceed):
            out = proceed(call)
            with torch.no_grad(), gates.attached(pipe.unet):
                pipe.unet(call.sample, call.timestep, call.encoder_hidden_states)
            each.append(gates.open_fraction)
            return out

    with sdcore.patch(pipe, gates):
        pipelines.images(pipe, KIND)
    whole = gates.open_fraction
    with sdcore.patch(pipe, gates, Look()):
        pipelines.images(pipe, KIND)
    assert len(each) == pipelines.STEPS
    for name, share in whole.items():
        assert 0.1 < share < 0.9
        assert share == pytest.approx(sum(one[name] for one in each) / len(each), abs=1e-6)
        assert len({one[name] for one in each}) > 1
    assert gates.open_fraction == whole


def test_without_watching(tokens: Any) -> None:
    pipe = pipelines.pipeline("SD", KIND, tokens)
    gates = mixed(GatedAttention.for_unet(pipe.unet))
    with sdcore.patch(pipe, gates):
        watched = pipelines.images(pipe, KIND)
        assert gates.open_fraction
        gates.watch = False
        assert pipelines.images(pipe, KIND).equal(watched)
    with pytest.raises(ValueError, match="no gates were seen"):
        _ = gates.open_fraction


def colors(path: Path) -> dict[tuple[int, ...], int]:
    from PIL import Image

    with Image.open(path) as image:
        assert min(image.size) > 100
        return {color: count for count, color in image.convert("RGB").getcolors(1 << 24)}


def test_maps(tokens: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pipe = pipelines.pipeline("SD", KIND, tokens)
    gates = mixed(GatedAttention.for_unet(pipe.unet))
    path, blue, gray = tmp_path / "maps.png", (0x1F, 0x5F, 0xBF), (0xE6, 0xE6, 0xE6)
    words = pipe.tokenizer.tokenize("a red circle")
    with pytest.raises(ValueError, match="no gates were seen yet"):
        gates.maps(path, words)
    with sdcore.patch(pipe, gates):
        pipelines.images(pipe, KIND)
    gates.maps(path, words)
    drawn = colors(path)
    assert drawn[blue] > 1000 and drawn[gray] > 1000
    # The share of blue is that of open gates.
    name = next(iter(gates.layers))
    gates.maps(path, {2: "$red$", 4: "$"}, layers=[name], row=0)
    drawn = colors(path)
    share = gates._seen.open[name][0][:, [2, 4]].float().mean().item()
    assert 0.1 < share < 0.9
    assert drawn[blue] / (drawn[blue] + drawn[gray]) == pytest.approx(share, abs=0.05)
    for what, options in {
        "layers must be of those seen; got 'other'": {"layers": ["other"]},
        "layers must be one at least": {"layers": []},
        "row must be within the 2 rows": {"row": 2},
        "words must be at positions 0 to": {"words": {99: "red"}},
        "words must be at .* got ..$": {"words": []},
    }.items():
        with pytest.raises(ValueError, match=what):
            gates.maps(path, **{"words": words} | options)
    with pytest.raises(TypeError, match="words must be a list"):
        gates.maps(path, "a red circle")


def test_maps_lie_as_pictures_do(tmp_path: Path) -> None:
    """Gates that are open on the left half alone, in latents that are higher than wide."""
    pytest.importorskip("matplotlib")
    from PIL import Image

    model = unet("SD")
    gates = GatedAttention.for_unet(model)
    with torch.no_grad(), gates.attached(model):
        model(**inputs("SD"))
    name = next(iter(gates.layers))
    seen = gates._seen.open[name]
    seen.view(2, 4, 2, TOKENS)[..., 1, :] = False
    gates.maps(tmp_path / "maps.png", {3: "red"}, layers=[name])
    with Image.open(tmp_path / "maps.png") as image:
        pixels = torch.tensor(np.asarray(image.convert("RGB"))).int()
    blue, gray = (
        (pixels == torch.tensor(color)).all(-1).nonzero().float()
        for color in ((0x1F, 0x5F, 0xBF), (0xE6, 0xE6, 0xE6))
    )
    # The edges of letters, left of the picture and above it, may have the color as well.
    gray = gray[(gray >= blue.amin(0)).all(-1)]
    assert len(gray) > 100 and blue[:, 1].max() < gray[:, 1].min()
    height, width = (blue.amax(0) - blue.amin(0)).tolist()
    assert height / width == pytest.approx(4, rel=0.15)


# ---------------------------------------------------------------------------------------------
# Refusals, and what stays behind


def test_a_unet_that_does_not_fit(tokens: Any) -> None:
    sd, xl = (pipelines.pipeline(family, KIND, tokens) for family in pipelines.FAMILIES)
    gates = GatedAttention.for_unet(sd.unet)
    name = next(iter(gates.layers))
    pattern = rf"another UNet: {name} has .* widths \(64, 160\); expected \(80, 128\)"
    with pytest.raises(ValueError, match=pattern):
        sdcore.patch(xl, gates)
    with pytest.raises(ValueError, match=pattern), gates.attached(xl.unet):
        pass
    lost = GatedAttention({"down_blocks.7.attn2": 0}, [(80, 128)])
    with pytest.raises(ValueError, match=r"no cross-attention down_blocks\.7"):
        sdcore.patch(sd, lost)
    for wrong in (sd, nn.Linear(2, 2)):
        with pytest.raises(TypeError, match=type(wrong).__name__):
            GatedAttention.for_unet(wrong)
    with (
        sdcore.patch(sd, GatedAttention.for_unet(sd.unet).to("meta")),
        pytest.raises(ValueError, match="the gates are on meta, and the UNet's input on cpu"),
    ):
        pipelines.images(sd, KIND)
    sdcore.patch(sd, gates).remove()


def test_settings() -> None:
    model = unet("SD")
    for error, what, options in (
        (ValueError, "shared must be one of stage, all, none; got 'some'", {"shared": "some"}),
        (ValueError, "no cross-attention's name begins with 'down_blocks.0'; this UNet has down_b",
         {"layers": ["down_blocks.0"]}),
        (ValueError, "no cross-attention's name begins with 'up'", {"layers": "up"}),
        (ValueError, "layers must name one layer at least", {"layers": []}),
        (ValueError, "features must be at least 1 and at most 256; got 257", {"features": 257}),
        (TypeError, "hidden must be an integer; got 1.5", {"hidden": 1.5}),
        (ValueError, "ste must be one of multiplicative, additive; got 'x'", {"ste": "x"}),
        (ValueError, "bias must be a finite number; got inf", {"bias": math.inf}),
    ):  # fmt: skip
        with pytest.raises(error, match=what):
            GatedAttention.for_unet(model, **options)
    with pytest.raises(ValueError, match="use all of 2 heads"):
        GatedAttention({"a": 0}, [(8, 8), (8, 8)])


@pytest.mark.parametrize("family", pipelines.FAMILIES)
def test_other_processors_are_refused(tokens: Any, family: str) -> None:
    pipe = pipelines.pipeline(family, KIND, tokens)
    gates = GatedAttention.for_unet(pipe.unet)
    attention = cross_attention.layers(pipe.unet)[next(iter(gates.layers))]
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    was = attention.processor
    attention.processor = IPAdapterAttnProcessor2_0(8, 8)
    with pytest.raises(TypeError, match="an IP-Adapter, with which a mask can't"):
        sdcore.patch(pipe, gates)
    with pytest.raises(TypeError, match="an IP-Adapter"), gates.attached(pipe.unet):
        pass
    attention.set_processor(was)
    with sdcore.patch(pipe, gates):
        pipelines.images(pipe, KIND)
        with (
            pytest.raises(TypeError, match="two methods that mask"),
            gates.attached(pipe.unet),
            gates.attached(pipe.unet),
        ):
            pass
    pipe.fuse_qkv_projections()
    with pytest.raises(TypeError, match="fused projections"):
        sdcore.patch(pipe, gates)


def test_one_method_masks_a_pipeline(tokens: Any) -> None:
    pipe = pipelines.pipeline("SD", KIND, tokens)
    gates = GatedAttention.for_unet(pipe.unet)
    region = RegionAttention(Region((1,), box=(0, 0, 0.5, 1)))
    with sdcore.patch(pipe, gates):
        with pytest.raises(ValueError, match="GatedAttention is on it, which masks the"):
            sdcore.patch(pipe, region)
        pipelines.images(pipe, KIND)
    original = type(pipe)
    with pytest.raises(ValueError, match="only one of them can"):
        sdcore.patch(pipe, region, gates)
    assert type(pipe) is original
    sdcore.patch(pipe, region).remove()


def test_nothing_holds_a_pipeline(tokens: Any) -> None:
    pipe = pipelines.pipeline("SD", KIND, tokens)
    gates = GatedAttention.for_unet(pipe.unet)
    with sdcore.patch(pipe, gates):
        pipelines.images(pipe, KIND)
    with gates.attached(pipe.unet):
        pipe.unet(**inputs("SD"))
    there = weakref.ref(pipe), weakref.ref(pipe.unet)
    del pipe
    gc.collect()
    assert [one() for one in there] == [None, None]
    assert gates.open_fraction
