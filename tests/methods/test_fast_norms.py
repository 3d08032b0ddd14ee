"""FastNorms and FastDecoder on pipelines and on bare models: the same results, and no trace."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")

import accelerate
import diffusers
from accelerate.hooks import remove_hook_from_module
from diffusers.models.resnet import ResnetBlock2D

import sdcore
from sdcore.methods import fast_decoder, fast_norms
from tests import pipelines
from tests.platforms import assert_as_good

METHODS = (sdcore.FastNorms, sdcore.FastDecoder)
EVERY = [(family, kind) for family in pipelines.FAMILIES for kind in pipelines.KINDS]
CLOSE = {"rtol": 0, "atol": 2e-4}  # of pictures in [0, 1]


def vae(
    dtype: torch.dtype = torch.float32, device: str = "cpu", **more: Any
) -> diffusers.AutoencoderKL:
    """Of the shape of Stable Diffusion's, and with biases and weights that a trained one could
    have."""
    torch.manual_seed(0)
    options = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (16, 32, 32),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 8,
        "sample_size": 32,
    }
    made = diffusers.AutoencoderKL(**options | more)
    for name, weight in made.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(weight, std=0.3)
        elif "norm" in name:
            nn.init.uniform_(weight, 0.5, 1.5)
    return made.to(device, dtype).eval()


def latents(
    dtype: torch.dtype = torch.float32, device: str = "cpu", rows: int = 2, side: int = 6
) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 4, side, side + 2, generator=generator).to(device, dtype)


def decode(model: Any, z: Tensor) -> Tensor:
    with torch.no_grad():
        return model.decode(z).sample


def forwards(model: nn.Module) -> int:
    """How many of its parts have one of ours at this moment."""
    return sum("forward" in vars(part) for part in model.modules())


class Counted:
    """Counts the calls of a function, which it replaces."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
        self.calls, real = 0, getattr(module, name)

        def function(*args: Any, **options: Any) -> Any:
            self.calls += 1
            return real(*args, **options)

        monkeypatch.setattr(module, name, function)


@pytest.fixture
def norms(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch, fast_norms, "group_norm_silu")


# ---------------------------------------------------------------------------------------------
# The same results


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_results_and_gradients_of_a_vae(
    method: type[sdcore.Method], dtype: torch.dtype, norms: Counted
) -> None:
    plain, z = vae(dtype), latents(dtype)
    exact = copy.deepcopy(plain).double()
    found = []
    for model, one in ((plain, z), (exact, z.double())):
        leaf = one.clone().requires_grad_()
        out = model.decode(leaf).sample
        found.append((out, *gradients(out, model, leaf)))
    with sdcore.patch(plain, method()):
        leaf = z.clone().requires_grad_()
        out = plain.decode(leaf).sample
        ours = (out, *gradients(out, plain, leaf))
    assert norms.calls == 2 * (3 * 2 + 2) + 2  # two of each block, the attention's, the last
    assert out.is_contiguous() or method is sdcore.FastNorms
    for a, b, c in zip(ours, *found, strict=True):
        # Sums of thousands of rounded products, in another order.
        assert_as_good(a, b, c, dtype, 16)


def gradients(out: Tensor, model: Any, z: Tensor) -> list[Tensor]:
    """To the latents, and to all weights that have one, as one."""
    weights = [one for name, one in model.named_parameters() if "decoder" in name]
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    first, *rest = torch.autograd.grad(out, [z, *weights], grad)
    return [first, torch.cat([one.flatten() for one in rest])]


@pytest.mark.parametrize("family", pipelines.FAMILIES)
def test_results_and_gradients_of_a_unet(tokens: Any, family: str, norms: Counted) -> None:
    unet = pipelines.pipeline(family, "text-to-image", tokens).unet
    config = unet.config
    sample, text = torch.randn(2, 4, 16, 16), torch.randn(2, 77, config.cross_attention_dim)
    more: dict[str, Any] = {}
    if family == "SDXL":
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        more = {"text_embeds": torch.randn(2, width), "time_ids": torch.randn(2, 6)}

    def call(sample: Tensor) -> tuple[Tensor, Tensor]:
        sample = sample.clone().requires_grad_()
        out = unet(sample, 500, text, added_cond_kwargs=more).sample
        return out, torch.autograd.grad(out.square().sum(), sample)[0]

    wanted = call(sample)
    with sdcore.patch(unet, sdcore.FastNorms()):
        found = call(sample)
        in_last = call(sample.contiguous(memory_format=torch.channels_last))
    blocks = sum(type(one) is ResnetBlock2D for one in unet.modules())
    others = sum(type(one) is nn.GroupNorm for one in unet.modules()) - 2 * blocks
    assert norms.calls == 2 * (2 * blocks + others)
    for a, b, c in zip(found, wanted, in_last, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(c, b, rtol=1e-4, atol=1e-4)


def test_blocks_that_scale_and_halve() -> None:
    """By a factor at the end, without SiLU of the time, and of those that are left as they are."""
    torch.manual_seed(0)
    options = {"in_channels": 8, "out_channels": 16, "temb_channels": 12, "groups": 4}
    x, time = torch.randn(2, 8, 6, 6), torch.randn(2, 12)
    for more, ours in (
        ({}, True),
        ({"output_scale_factor": 2.0, "skip_time_act": True}, True),
        ({"time_embedding_norm": "scale_shift"}, False),
        ({"down": True}, False),
        ({"non_linearity": "gelu"}, False),
        ({"temb_channels": None}, True),
    ):
        block = ResnetBlock2D(**options | more).eval()
        assert fast_norms.is_resnet(block) == ours
        given = None if block.time_emb_proj is None else time
        wanted = block(x, given)
        parts = fast_norms._replaced(block)
        with fast_norms.replaced_forwards(block, lambda parts=parts: parts):
            assert forwards(block) == (1 if ours else 2)
            torch.testing.assert_close(block(x, given), wanted, rtol=1e-5, atol=1e-5)
        assert forwards(block) == 0


def test_folded_kernels_are_upsampling_and_a_convolution() -> None:
    for size in ((4, 5), (1, 1), (1, 7)):
        x, weight = torch.randn(2, 3, *size).double(), torch.randn(5, 3, 3, 3).double()
        wanted = nn.functional.conv2d(
            nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"), weight, padding=1
        )
        kernel = fast_decoder.folded(weight)
        found = nn.functional.conv_transpose2d(x, kernel, stride=2, padding=1)
        torch.testing.assert_close(found, wanted)


def test_autocast() -> None:
    model, z = vae(), latents()
    exact = decode(copy.deepcopy(model).double(), z.double())
    with torch.autocast("cpu", torch.bfloat16):
        plain = decode(model, z)
        for method in METHODS:
            with sdcore.patch(model, method()):
                found = decode(model, z)
            assert_as_good(found.to(plain.dtype), plain, exact, torch.bfloat16, 4)


@pytest.mark.parametrize("method", METHODS)
def test_latents_of_another_scale(method: type[sdcore.Method], tokens: Any) -> None:
    """A VAE with means and deviations of its latents, in a pipeline that upcasts it."""
    pipe = pipelines.pipeline("SDXL", "text-to-image", tokens)
    pipe.vae = vae(latents_mean=[0.1] * 4, latents_std=[0.9] * 4, force_upcast=True)
    pipe.to(torch.float16)
    pipe.unet.float(), pipe.text_encoder.float(), pipe.text_encoder_2.float()
    with torch.autocast("cpu", enabled=False):
        before = decode(pipe.vae.float(), latents())
        with sdcore.patch(pipe, method()):
            found = pipelines.images(pipe, "text-to-image")
        wanted = pipelines.images(pipe, "text-to-image")
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert decode(pipe.vae, latents()).equal(before)


# ---------------------------------------------------------------------------------------------
# On, off, and what happens between


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("family", "kind"), [*EVERY, ("SD", "image-to-image"), ("SDXL", "inpainting")]
)
def test_no_trace_on_a_pipeline(
    tokens: Any, family: str, kind: str, method: type[sdcore.Method], norms: Counted
) -> None:
    pipe = pipelines.pipeline(family, kind, tokens)
    before, was = pipelines.images(pipe, kind), pipelines.trace(pipe)
    with sdcore.patch(pipe, method()):
        assert norms.calls == 0
        torch.testing.assert_close(pipelines.images(pipe, kind), before, **CLOSE)
        assert norms.calls > 0
        norms.calls = 0
        decode(pipe.vae, latents())  # outside of the pipeline's call
        assert norms.calls == 0
    assert pipelines.trace(pipe) == was
    assert pipelines.images(pipe, kind).equal(before)


@pytest.mark.parametrize("method", METHODS)
def test_no_trace_on_a_bare_model(method: type[sdcore.Method], norms: Counted) -> None:
    model, z = vae(), latents()
    before, was = decode(model, z), pipelines.trace(model)
    x = torch.rand(1, 3, 16, 24)
    whole = model(x).sample
    handle = sdcore.patch(model, method())
    assert isinstance(model, diffusers.AutoencoderKL) and repr(handle).endswith("AutoencoderKL>")
    torch.testing.assert_close(decode(model, z), before, rtol=1e-4, atol=1e-4)
    assert norms.calls > 0
    torch.testing.assert_close(model(x).sample, whole, rtol=1e-4, atol=1e-4)
    assert forwards(model) == 0
    with pytest.raises(ValueError, match=f"a {method.__name__} is on it already"):
        sdcore.patch(model, method())
    handle.remove()
    assert pipelines.trace(model) == was
    assert decode(model, z).equal(before)
    sdcore.patch(model, method())
    sdcore.unpatch(model)
    assert pipelines.trace(model) == was


def test_both_on_a_vae_and_on_its_pipeline(tokens: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    of_decoder = Counted(monkeypatch, fast_decoder, "normed")
    with sdcore.patch(pipe, sdcore.FastDecoder()):
        pipelines.images(pipe, "text-to-image")
    alone, of_decoder.calls = of_decoder.calls, 0
    before, was = pipelines.images(pipe, "text-to-image"), pipelines.trace(pipe)
    on_vae = sdcore.patch(pipe.vae, sdcore.FastDecoder())
    with on_vae, sdcore.patch(pipe, sdcore.FastNorms(), sdcore.FastDecoder()):
        torch.testing.assert_close(pipelines.images(pipe, "text-to-image"), before, **CLOSE)
    assert of_decoder.calls == alone > 0
    assert pipelines.trace(pipe) == was
    assert pipelines.images(pipe, "text-to-image").equal(before)


@pytest.mark.parametrize("method", METHODS)
def test_an_error_in_mid_call(method: type[sdcore.Method]) -> None:
    model, z = vae(), latents()
    before, was = decode(model, z), pipelines.trace(model)
    handle = sdcore.patch(model, method())
    with pytest.raises(RuntimeError, match="channels"):
        decode(model, torch.randn(1, 5, 4, 4))
    assert forwards(model) == 0
    handle.remove()
    assert pipelines.trace(model) == was
    assert decode(model, z).equal(before)


@pytest.mark.parametrize("method", METHODS)
def test_slices_and_tiles(method: type[sdcore.Method], norms: Counted) -> None:
    model, z = vae(), latents(rows=3, side=14)
    model.enable_slicing()
    before = decode(model, z)
    model.enable_tiling()
    tiled = decode(model, z)
    assert not tiled.equal(before)
    with sdcore.patch(model, method()):
        torch.testing.assert_close(decode(model, z), tiled, rtol=1e-4, atol=1e-4)
        calls, norms.calls = norms.calls, 0
        model.disable_tiling()
        torch.testing.assert_close(decode(model, z), before, rtol=1e-4, atol=1e-4)
    assert calls == 3 * 3 * norms.calls  # tiles of each


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["torch.compile(decoder)", "decoder.compile()", "vae.compile()"])
def test_a_compiled_decoder(
    method: type[sdcore.Method], when: str, how: str, norms: Counted
) -> None:
    torch._dynamo.reset()
    model, z = vae(), latents()
    before = decode(model, z)

    def put_on() -> None:
        if how == "torch.compile(decoder)":
            model.decoder = torch.compile(model.decoder, backend="eager")
        elif how == "decoder.compile()":
            model.decoder.compile(backend="eager", fullgraph=True)
        else:
            model.compile(backend="eager")

    if when == "before":
        put_on()
        decode(model, z)
    was = pipelines.trace(model)
    handle = sdcore.patch(model, method())
    if when == "after":
        put_on()
    for _ in range(2):
        torch.testing.assert_close(decode(model, z), before, rtol=1e-4, atol=1e-4)
    assert norms.calls > 0
    handle.remove()
    if when == "before":
        assert pipelines.trace(model) == was
    norms.calls = 0
    for _ in range(2):
        torch.testing.assert_close(decode(model, z), before, rtol=1e-5, atol=1e-5)
    assert norms.calls == 0


@pytest.mark.parametrize(
    ("when", "how"), [("before", "unet.compile()"), ("after", "torch.compile(unet)")]
)
def test_a_compiled_unet(tokens: Any, when: str, how: str, norms: Counted) -> None:
    torch._dynamo.reset()
    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    before = pipelines.images(pipe, "text-to-image")

    def put_on() -> None:
        if how == "unet.compile()":
            pipe.unet.compile(backend="eager")
        else:
            pipe.unet = torch.compile(pipe.unet, backend="eager")

    if when == "before":
        put_on()
        torch.testing.assert_close(pipelines.images(pipe, "text-to-image"), before, **CLOSE)
    was = pipelines.trace(pipe)
    handle = sdcore.patch(pipe, sdcore.FastNorms())
    if when == "after":
        put_on()
    torch.testing.assert_close(pipelines.images(pipe, "text-to-image"), before, **CLOSE)
    assert norms.calls > 0
    handle.remove()
    if when == "before":
        assert pipelines.trace(pipe) == was
    norms.calls = 0
    torch.testing.assert_close(pipelines.images(pipe, "text-to-image"), before, **CLOSE)
    assert norms.calls == 0


def test_a_bare_unet_that_is_compiled(tokens: Any, norms: Counted) -> None:
    """After it was patched; what torch.compile returned can't be."""
    torch._dynamo.reset()
    unet = pipelines.pipeline("SD", "text-to-image", tokens).unet
    given = torch.randn(2, 4, 8, 8), 500, torch.randn(2, 77, unet.config.cross_attention_dim)
    with torch.no_grad():
        before = unet(*given).sample
        with sdcore.patch(unet, sdcore.FastNorms()):
            compiled = torch.compile(unet, backend="eager")
            torch.testing.assert_close(compiled(*given).sample, before, rtol=1e-4, atol=1e-4)
            assert norms.calls > 0
            with pytest.raises(TypeError, match="patch the UNet2DConditionModel itself"):
                sdcore.patch(compiled, sdcore.FastNorms())
        assert unet(*given).sample.equal(before)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", ["sequential", "whole"])
@pytest.mark.parametrize("order", ["hook, patch", "patch, hook"])
def test_hooks_of_accelerate(
    tokens: Any, method: type[sdcore.Method], how: str, order: str
) -> None:
    pipe = pipelines.pipeline("SDXL", "text-to-image", tokens)
    before = pipelines.images(pipe, "text-to-image")
    parts = (pipe.unet, pipe.vae)

    def offload() -> None:
        for part in parts:
            if how == "sequential":
                accelerate.cpu_offload(part, execution_device="cpu")
            else:
                accelerate.cpu_offload_with_hook(part, execution_device="cpu")

    if order == "hook, patch":
        offload()
    with sdcore.patch(pipe, method()):
        if order == "patch, hook":
            offload()
        torch.testing.assert_close(pipelines.images(pipe, "text-to-image"), before, **CLOSE)
    assert pipelines.images(pipe, "text-to-image").equal(before)
    for part in parts:
        remove_hook_from_module(part, recurse=True)
    assert pipelines.images(pipe, "text-to-image").equal(before)


@pytest.mark.parametrize("method", METHODS)
def test_hooks_of_the_users_own(method: type[sdcore.Method], norms: Counted) -> None:
    """On a norm, a convolution, a block: each is called as often as before."""
    model, z = vae(), latents()
    seen: list[str] = []
    block = model.decoder.up_blocks[0].resnets[0]
    named = {"norm": block.norm1, "conv": block.conv2, "block": model.decoder.up_blocks[1]}
    handles = [
        part.register_forward_hook(lambda *_, name=name: seen.append(name))
        for name, part in named.items()
    ]
    before = decode(model, z)
    wanted, seen[:] = list(seen), []
    with sdcore.patch(model, method()):
        torch.testing.assert_close(decode(model, z), before, rtol=1e-4, atol=1e-4)
        assert seen == wanted
        assert norms.calls > 0
        for one in handles:
            one.remove()
        calls, norms.calls = norms.calls, 0
        torch.testing.assert_close(decode(model, z), before, rtol=1e-4, atol=1e-4)
        assert norms.calls > calls


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fused", [False, True])
def test_lora_on_convolutions(method: type[sdcore.Method], fused: bool) -> None:
    peft = pytest.importorskip("peft")
    model, z = vae(), latents()
    plain = decode(model, z)
    with sdcore.patch(model, method()):
        targets = ["conv1", "conv2", "conv_shortcut", "conv", "conv_in", "to_q", "to_out.0"]
        config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        layers = peft.inject_adapter_in_model(config, model.decoder)
        if fused:
            for part in layers.modules():
                if hasattr(part, "merge"):
                    part.merge()
        found = decode(model, z)
    wanted = decode(model, z)
    assert not torch.allclose(wanted, plain, atol=1e-2)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_fused_projections_and_other_processors() -> None:
    model, z = vae(), latents()
    before = decode(model, z)
    with sdcore.patch(model, sdcore.FastDecoder()):
        model.fuse_qkv_projections()
        torch.testing.assert_close(decode(model, z), before, rtol=1e-4, atol=1e-4)
        model.unfuse_qkv_projections()
        model.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
        torch.testing.assert_close(decode(model, z), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing(method: type[sdcore.Method], norms: Counted) -> None:
    model, z = vae().train(), latents().requires_grad_()
    model.enable_gradient_checkpointing()
    wanted = torch.autograd.grad(model.decode(z).sample.square().sum(), z)[0]
    with sdcore.patch(model, method()):
        found = torch.autograd.grad(model.decode(z).sample.square().sum(), z)[0]
        assert norms.calls == 0
        model.disable_gradient_checkpointing()
        decode(model, z)
        assert norms.calls > 0
    assert found.equal(wanted)


@pytest.mark.parametrize("method", METHODS)
def test_copies_and_pickles_are_unpatched(method: type[sdcore.Method], tmp_path: Any) -> None:
    model, z = vae(), latents()
    before = decode(model, z)
    with sdcore.patch(model, method()):
        model.save_pretrained(tmp_path)
        made = [
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            type(model).from_pretrained(tmp_path),
            type(model).from_config(model.config),
        ]
    for one in made:
        assert type(one) is diffusers.AutoencoderKL
        assert set(vars(one)) == set(vars(made[-1])) | (set(vars(one)) & {"_internal_dict"})
    for one in made[:3]:
        assert decode(one.eval(), z).equal(before)


@pytest.mark.parametrize("method", METHODS)
def test_other_threads_see_nothing(method: type[sdcore.Method], norms: Counted) -> None:
    """A call of the same decoder from elsewhere, while ours is in the middle of one."""
    model, z = vae(), latents()
    before = decode(model, z)
    there: list[Tensor] = []

    def elsewhere(*_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            with torch.no_grad():
                thread = threading.Thread(target=lambda: there.append(plain_decode()))
                thread.start()
                thread.join()

    def plain_decode() -> Tensor:
        calls = norms.calls
        with torch.no_grad():
            found = model.decoder(model.post_quant_conv(z))
        assert norms.calls == calls
        return found

    hook = model.decoder.conv_in.register_forward_hook(elsewhere)
    with sdcore.patch(model, method()):
        found = decode(model, z)
    hook.remove()
    assert there[0].equal(before)
    torch.testing.assert_close(found, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_two_threads_decode(method: type[sdcore.Method], norms: Counted) -> None:
    model = vae()
    given = [latents(rows=rows) for rows in (1, 2)]
    before = [decode(model, z) for z in given]
    wrong: list[Any] = []

    def work(z: Tensor, wanted: Tensor) -> None:
        for _ in range(5):
            if not torch.allclose(decode(model, z), wanted, rtol=1e-4, atol=1e-4):
                wrong.append(wanted.shape)

    with sdcore.patch(model, method()):
        threads = [
            threading.Thread(target=work, args=pair) for pair in zip(given, before, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    assert norms.calls == 2 * 5 * 18  # all norms of every call
    assert forwards(model) == 0


@pytest.mark.parametrize("method", METHODS)
def test_nothing_holds_a_model(method: type[sdcore.Method]) -> None:
    model, one = vae(), method()
    with sdcore.patch(model, one):
        decode(model, latents())
    gone = weakref.ref(model.decoder)
    del model
    gc.collect()
    assert gone() is None


def test_a_decode_of_its_own() -> None:
    """As torch.compile makes it. On a pipeline it stays what it is; a bare model is refused."""
    torch._dynamo.reset()
    model, z = vae(), latents()
    before = decode(model, z)
    model.decode = torch.compile(model.decode, backend="eager", fullgraph=True)
    method = sdcore.FastDecoder()
    with method.within(model):
        torch.testing.assert_close(decode(model, z), before, rtol=1e-5, atol=1e-5)
    for method in (sdcore.FastDecoder(), sdcore.FastNorms()):
        with pytest.raises(TypeError, match="it has a decode of its own in place of its class's"):
            sdcore.patch(model, method)
    del model.decode
    with sdcore.patch(model, method):
        torch.testing.assert_close(decode(model, z), before, rtol=1e-4, atol=1e-4)


def test_a_decoder_that_is_replaced_by_another() -> None:
    model, z = vae(), latents()
    with sdcore.patch(model, sdcore.FastDecoder()):
        model.decoder = diffusers.models.autoencoders.vae.DecoderTiny(
            4, 3, (1, 1), (8, 8), 2, "relu", "nearest"
        )
        found = decode(model, z)
    assert decode(model, z).equal(found)


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)]
)
def test_autocast_to_another_half(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    weights, cast = dtypes
    model, z = vae(weights), latents(weights)
    exact = decode(copy.deepcopy(model).double(), z.double())
    with torch.autocast("cpu", cast), sdcore.patch(model, sdcore.FastDecoder(), sdcore.FastNorms()):
        found = decode(model, z)
    assert (found.double() - exact).norm() < 0.05 * exact.norm()


def test_a_compiled_model_is_pickled(tmp_path: Any) -> None:
    model, z = vae(), latents()
    model.compile(backend="eager")
    before = decode(model, z)
    with sdcore.patch(model, sdcore.FastNorms()):
        made = pickle.loads(pickle.dumps(model))
    assert decode(made, z).equal(before)


def test_models_that_do_not_fit(tokens: Any) -> None:
    tiny = diffusers.AutoencoderTiny()
    for method, message in zip(METHODS, ("has no group norm", "the DecoderTiny of a"), strict=True):
        with pytest.raises(TypeError, match=message):
            sdcore.patch(tiny, method())
    unet = pipelines.pipeline("SD", "text-to-image", tokens).unet
    with pytest.raises(TypeError, match="got the NoneType of a UNet2DConditionModel"):
        sdcore.patch(unet, sdcore.FastDecoder())
    assert type(unet) is diffusers.UNet2DConditionModel


def test_values_that_are_not_finite() -> None:
    """They go where they go without."""
    model, z = vae(), latents()
    z[0, 0, 0, 0] = float("nan")
    before = decode(model, z)
    for method in METHODS:
        with sdcore.patch(model, method()):
            assert decode(model, z).isnan().equal(before.isnan())


# ---------------------------------------------------------------------------------------------
# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_on_a_gpu(
    method: type[sdcore.Method], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model, z = vae(dtype, "cuda", block_out_channels=(16, 32, 320)), latents(dtype, "cuda")
    model.requires_grad_(False)
    exact = copy.deepcopy(model).double()
    cotangent = torch.randn(2, 3, 24, 32, device="cuda")

    def call(model: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        leaf = z.clone().requires_grad_()
        out = model.decode(leaf).sample
        return out, torch.autograd.grad(out, leaf, cotangent.to(out))[0]

    plain, right, free = call(model, z), call(exact, z.double()), decode(model, z)
    with sdcore.patch(model, method()):
        for _ in range(3):  # from the second on by a graph
            for a, b, c in zip(call(model, z), plain, right, strict=True):
                assert_as_good(a, b.cpu(), c.cpu(), dtype, 16)
            assert_as_good(decode(model, z), free.cpu(), right[0].detach().cpu(), dtype, 16)
    assert decode(model, z).equal(free)


@pytest.mark.gpu
def test_graphs_are_kept_and_given_back() -> None:
    model, z = vae(torch.bfloat16, "cuda").requires_grad_(False), latents(torch.bfloat16, "cuda")
    method = sdcore.FastDecoder()
    with sdcore.patch(model, method):
        wanted = decode(model, z)
        assert len(method._graphs) == 1
        (kept,) = method._graphs.values()
        for _ in range(3):
            assert decode(model, z).equal(wanted)
        assert (kept.graphs.captures, kept.graphs.replays) == (1, 3)
        with torch.no_grad():
            model.decoder.conv_out.bias += 1  # in place: the graph reads it
        assert (decode(model, z) - wanted).mean().sub(1).abs() < 1e-2
        model.decoder.conv_out = copy.deepcopy(model.decoder.conv_out)
        decode(model, z)
        assert kept.graphs.captures == 2
        leaf = z.clone().requires_grad_()
        for _ in range(2):
            model.decode(leaf).sample.square().sum().backward()
        assert kept.graphs.captures == 3
        model.requires_grad_(True)
        model.decode(leaf).sample.square().sum().backward()
        assert kept.graphs.captures == 3
        assert model.decoder.conv_in.weight.grad is not None
    assert not method._graphs


@pytest.mark.gpu
def test_a_decoder_with_hooks_has_no_graph() -> None:
    model, z = vae(torch.bfloat16, "cuda").requires_grad_(False), latents(torch.bfloat16, "cuda")
    seen: list[int] = []
    method = sdcore.FastDecoder()
    with sdcore.patch(model, method):
        model.decoder.mid_block.register_forward_hook(lambda *_: seen.append(1))
        for _ in range(3):
            decode(model, z)
        (kept,) = method._graphs.values()
    assert (len(seen), kept.graphs.captures) == (3, 0)


@pytest.mark.gpu
def test_graphs_do_not_hold_a_decoder() -> None:
    model, z = vae(torch.bfloat16, "cuda"), latents(torch.bfloat16, "cuda")
    method = sdcore.FastDecoder()
    with method.within(model):
        for _ in range(2):
            decode(model, z)
    gone = weakref.ref(model.decoder)
    assert len(method._graphs) == 1
    del model
    gc.collect()
    assert gone() is None
    assert not method._graphs


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading(tokens: Any, method: type[sdcore.Method], how: str) -> None:
    pipe, one = pipelines.pipeline("SDXL", "text-to-image", tokens), method()
    with sdcore.patch(pipe, one):
        getattr(pipe, how)()
        found = [pipelines.images(pipe, "text-to-image") for _ in range(2)]
        kept = getattr(one, "_graphs", {}).values()
        assert not any(graph.graphs.captures for graph in kept)
    before = pipelines.images(pipe, "text-to-image")
    for one in found:
        torch.testing.assert_close(one, before, rtol=0, atol=2e-2)
    pipe.remove_all_hooks()
