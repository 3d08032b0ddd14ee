"""FastGEGLU on pipelines and on bare UNets: the same results, and no trace."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")

from diffusers.models.activations import GEGLU

import sdcore
from sdcore.graphs import variant
from sdcore.methods import fast_geglu
from tests import pipelines
from tests.platforms import assert_as_good

CLOSE = {"rtol": 0, "atol": 2e-4}  # of pictures in [0, 1]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that the op is called with."""
    found, real = [], fast_geglu.geglu

    def counted(x: Tensor) -> Tensor:
        found.append(tuple(x.shape))
        return real(x)

    monkeypatch.setattr(fast_geglu, "geglu", counted)
    return found


def unet_of(tokens: Any, family: str = "SD") -> Any:
    return pipelines.pipeline(family, "text-to-image", tokens).unet


def gated(unet: nn.Module) -> list[GEGLU]:
    return [part for part in unet.modules() if isinstance(part, GEGLU)]


def predicted(unet: Any, seed: int = 0) -> tuple[Tensor, Tensor]:
    """What it predicts, and the gradient to its sample."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(unet.device, unet.dtype)

    config = unet.config
    sample, text = drawn(2, 4, 16, 16), drawn(2, 77, config.cross_attention_dim)
    more: dict[str, Any] = {}
    if config.addition_embed_type == "text_time":
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        more = {"text_embeds": drawn(2, width), "time_ids": drawn(2, 6)}
    sample.requires_grad_()
    out = unet(sample, 500, text, added_cond_kwargs=more).sample
    return out.detach(), torch.autograd.grad(out.square().sum(), sample)[0]


def same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", pipelines.FAMILIES)
def test_results_and_gradients_of_a_unet(
    tokens: Any, family: str, dtype: torch.dtype, device: str, calls: list[Any]
) -> None:
    unet = unet_of(tokens, family).to(device, dtype)
    plain, exact = predicted(unet), predicted_exactly(unet)
    assert not calls
    with sdcore.patch(unet, sdcore.FastGEGLU()):
        found = predicted(unet)
    assert len(calls) == len(gated(unet)) > 0
    for a, b, c in zip(found, plain, exact, strict=True):
        # Layers after it round in another place.
        assert_as_good(a, b.cpu(), c.cpu(), dtype, 4)


def predicted_exactly(unet: Any) -> tuple[Tensor, ...]:
    """In float64, with the inputs as the dtype of the UNet has them."""
    wide = copy.deepcopy(unet).double()

    class Rounded:
        dtype, device, config = unet.dtype, unet.device, unet.config

        def __call__(self, sample: Tensor, timestep: int, text: Tensor, **more: Any) -> Any:
            more = {name: {key: one.double() for key, one in some.items()}
                    for name, some in more.items()}  # fmt: skip
            return wide(sample.double(), timestep, text.double(), **more)

    return predicted(Rounded())


@pytest.mark.parametrize("kind", pipelines.KINDS)
@pytest.mark.parametrize("family", pipelines.FAMILIES)
def test_no_trace_on_a_pipeline(tokens: Any, family: str, kind: str, calls: list[Any]) -> None:
    pipe = pipelines.pipeline(family, kind, tokens)
    before, was = pipelines.images(pipe, kind), pipelines.trace(pipe)
    with sdcore.patch(pipe, sdcore.FastGEGLU()):
        torch.testing.assert_close(pipelines.images(pipe, kind), before, **CLOSE)
        assert len(calls) == pipelines.STEPS * len(gated(pipe.unet))
        calls.clear()
        predicted(pipe.unet)  # outside of the pipeline's call
        assert not calls
    assert pipelines.trace(pipe) == was
    assert pipelines.images(pipe, kind).equal(before)


def test_no_trace_on_a_bare_unet(tokens: Any, calls: list[Any]) -> None:
    unet = unet_of(tokens)
    before, was = predicted(unet), pipelines.trace(unet)
    handle = sdcore.patch(unet, sdcore.FastGEGLU())
    same(predicted(unet), before)
    assert calls
    with pytest.raises(ValueError, match="a FastGEGLU is on it already"):
        sdcore.patch(unet, sdcore.FastGEGLU())
    with pytest.raises(RuntimeError):
        unet(torch.randn(1, 5, 8, 8), 500, torch.randn(1, 77, 1))
    handle.remove()
    assert pipelines.trace(unet) == was
    calls.clear()
    for a, b in zip(predicted(unet), before, strict=True):
        assert a.equal(b)
    assert not calls


@pytest.mark.parametrize("order", ["norms first", "norms last"])
def test_with_fast_norms(tokens: Any, order: str, calls: list[Any]) -> None:
    pipe = pipelines.pipeline("SDXL", "text-to-image", tokens)
    before, was = pipelines.images(pipe, "text-to-image"), pipelines.trace(pipe)
    methods = [sdcore.FastNorms(), sdcore.FastGEGLU()]
    with sdcore.patch(pipe, *(methods if order == "norms first" else methods[::-1])):
        torch.testing.assert_close(pipelines.images(pipe, "text-to-image"), before, **CLOSE)
    assert len(calls) == pipelines.STEPS * len(gated(pipe.unet))
    assert pipelines.trace(pipe) == was
    assert pipelines.images(pipe, "text-to-image").equal(before)


def test_graphs_know_which_forwards_are_in_them(tokens: Any) -> None:
    """One that was captured with one method's must not serve another's."""
    unet, seen = unet_of(tokens), []
    for method in (sdcore.FastNorms(), sdcore.FastGEGLU(), sdcore.FastGEGLU()):
        with method.within(unet):
            seen.append(variant.get())
    assert seen[0] != seen[1] == seen[2] and variant.get() is None


@pytest.mark.parametrize("fused", [False, True])
def test_lora_on_projections(tokens: Any, fused: bool, calls: list[Any]) -> None:
    peft = pytest.importorskip("peft")
    unet = unet_of(tokens)
    plain = predicted(unet)
    with sdcore.patch(unet, sdcore.FastGEGLU()):
        options = {"target_modules": ["net.0.proj", "net.2"], "init_lora_weights": False}
        layers = peft.inject_adapter_in_model(peft.LoraConfig(r=4, **options), unet)
        if fused:
            for part in layers.modules():
                if hasattr(part, "merge"):
                    part.merge()
        found = predicted(unet)
        assert len(calls) == len(gated(unet))
    wanted = predicted(unet)
    assert not torch.allclose(wanted[0], plain[0], atol=1e-2)
    same(found, wanted)


class Scaled(GEGLU):
    """Someone's own."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return 0.5 * super().forward(hidden_states)


def test_what_is_left_as_it_is(tokens: Any, calls: list[Any]) -> None:
    """Subclasses, and those with hooks or a forward of their own; a projection may have hooks."""
    unet, seen = unet_of(tokens), []
    parts = gated(unet)
    parts[0].__class__ = Scaled
    parts[1].register_forward_hook(lambda module, args, out: 0.5 * out)
    parts[2].forward = lambda x: 0.5 * GEGLU.forward(parts[2], x)
    parts[3].proj.register_forward_hook(lambda *_: seen.append(3))
    before, was = predicted(unet), pipelines.trace(unet)
    assert seen == [3]
    with sdcore.patch(unet, sdcore.FastGEGLU()):
        same(predicted(unet), before)
    assert len(calls) == len(parts) - 3 and seen == [3, 3]
    assert pipelines.trace(unet) == was


def test_gradient_checkpointing(tokens: Any, calls: list[Any]) -> None:
    unet = unet_of(tokens).train()
    unet.enable_gradient_checkpointing()
    wanted = predicted(unet)
    with sdcore.patch(unet, sdcore.FastGEGLU()):
        found = predicted(unet)
        assert not calls
    for a, b in zip(found, wanted, strict=True):
        assert a.equal(b)


def test_a_compiled_block(tokens: Any, calls: list[Any]) -> None:
    torch._dynamo.reset()
    unet = unet_of(tokens)
    before, counts = predicted(unet), []
    unet.mid_block.compile(backend="eager", fullgraph=True)
    same(predicted(unet), before)
    for _ in range(2):
        with sdcore.patch(unet, sdcore.FastGEGLU()):
            same(predicted(unet), before)
        counts.append(len(calls))
        same(predicted(unet), before)
        assert len(calls) == counts[-1]
    assert counts == [len(gated(unet)), 2 * len(gated(unet))]


def test_other_threads_see_nothing(tokens: Any, calls: list[Any]) -> None:
    """A call of the same part from elsewhere, while ours is in the middle of one."""
    unet, there = unet_of(tokens), []
    part = gated(unet)[0]
    x = torch.randn(2, 5, part.proj.in_features)
    wanted = part(x)

    def elsewhere(*_: Any) -> None:
        before = len(calls)
        thread = threading.Thread(target=lambda: there.append(part(x)))
        thread.start()
        thread.join()
        assert len(calls) == before

    unet.conv_in.register_forward_hook(elsewhere)
    with sdcore.patch(unet, sdcore.FastGEGLU()):
        predicted(unet)
    assert calls and there[0].equal(wanted)


def test_models_without_one(tokens: Any) -> None:
    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    with pytest.raises(TypeError, match="AutoencoderKL has no GEGLU"):
        sdcore.patch(pipe.vae, sdcore.FastGEGLU())
    for part in gated(pipe.unet):
        part.__class__ = Scaled
    with pytest.raises(TypeError, match="StableDiffusionPipeline has no GEGLU"):
        sdcore.patch(pipe, sdcore.FastGEGLU())
