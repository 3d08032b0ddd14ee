"""Decoders with ``FastDecoder`` and with ``FastNorms``, and a UNet with ``FastNorms``.

``python -m benchmarks.bench_fast_decoder [--device cuda] [--quick] [--csv FILE]
[--cases PART] [--peers PART]``

On a GPU the VAE and the UNet have the sizes of SDXL's, with random weights, in bfloat16: decoding
for a picture of 1024 pixels; the same in float32, in which SDXL's pipelines decode; decoding with
the gradient to the latents, of 768 pixels, with frozen weights; and a guided step of the UNet for
1024. On a CPU, and with --quick, they are those of the embedded models, on a CPU in float32. Each
row twice: captured by hand in one CUDA graph, and wall-clock of whole calls ("end to end"), which
for ``FastDecoder`` are by its own graphs. Peers: the model as it is, and, but for --quick, in
bfloat16 ``torch.compile`` of the decoder; with --full, which takes ten minutes more, for decoding
also with ``mode="max-autotune"``; that makes CUDA graphs itself, and for the row of one by hand it
is compiled without.

Each result is compared with that of the model in float32, without TF32 (of float32 in float64): off
by at most twice what the model as it is is off by, plus epsilon. Share of the ceiling: that of a
plain matrix product of the same dtype in the same run, counting products and convolutions alone.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import sdcore
from benchmarks import measure, suite
from benchmarks.bench_patching import SDXL
from benchmarks.measure import Row
from benchmarks.suite import Asked
from sdcore.embedded import models

# https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0, vae/config.json
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}
COMPILED = {"torch.compile": None, "torch.compile, max-autotune": "max-autotune"}
SLOW_TO_COMPILE = ("torch.compile, max-autotune",)
CALLS = 9  # of which the median is told
Call = Callable[[Any, dict[str, Tensor]], Tensor]


@dataclass
class Case:
    name: str
    model: nn.Module
    peers: tuple[str, ...]  # of COMPILED, in which the decoder is
    inputs: dict[str, Tensor]
    call: Call
    methods: dict[str, tuple[sdcore.Method, sdcore.Method]]  # in one graph by hand; end to end


def decoded(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.decode(inputs["z"], return_dict=False)[0]


def pulled(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    z = inputs["z"].detach().requires_grad_()
    model.decode(z, return_dict=False)[0].backward(inputs["grad"])
    assert z.grad is not None
    return z.grad


def predicted(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    more = {"text_embeds": inputs["text_embeds"], "time_ids": inputs["time_ids"]}
    with torch.no_grad():
        return model(
            inputs["sample"], inputs["timestep"], inputs["text"], added_cond_kwargs=more,
            return_dict=False,
        )[0]  # fmt: skip


def fast() -> dict[str, tuple[sdcore.Method, sdcore.Method]]:
    norms = sdcore.FastNorms()
    by_hand, alone = sdcore.FastDecoder(graph=False), sdcore.FastDecoder()
    return {"FastNorms": (norms, norms), "FastDecoder": (by_hand, alone)}


def dtype_of(asked: Asked) -> torch.dtype:
    return torch.bfloat16 if asked.on_gpu else torch.float32


def cases(device: str, full: bool, wanted: str, dtype: torch.dtype) -> Iterator[Case]:
    """``full``: of SDXL's size, and not the embedded models."""
    torch.manual_seed(0)
    vae = AutoencoderKL(**VAE) if full else models.autoencoder("xl")
    # New ones have no biases' worth; trained ones have.
    for name, weight in vae.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(weight, std=0.1)
    # Diffusers' own `to` warns of layers that must stay in float32. There are none.
    vae = nn.Module.to(vae, device, dtype).eval().requires_grad_(False)
    sizes = (128, 96) if full else (16, 16)
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    z = torch.randn(1, vae.config.latent_channels, sizes[0], sizes[0], device=device, dtype=dtype)
    small = z[:, :, : sizes[1], : sizes[1]].contiguous()
    grad = torch.randn(1, 3, *(scale * size for size in small.shape[2:]), device=device).to(dtype)
    side = scale * sizes[0]
    name = f"decoding, {side}², {str(dtype).removeprefix('torch.')}"
    peers = tuple(COMPILED) if dtype == torch.bfloat16 else ()
    if wanted in name:
        yield Case(name, vae, peers, {"z": z}, decoded, fast())
    name = f"decoding, {side}², float32"
    if full and wanted in name:
        wide = copy.deepcopy(vae).float()
        yield Case(name, wide, (), {"z": z.float()}, decoded, fast())
    name = f"decoding with the gradient, {scale * sizes[1]}²"
    if wanted in name:
        yield Case(name, vae, peers[:1], {"z": small, "grad": grad}, pulled, fast())
    name = "a guided step of the UNet"
    if wanted in name:
        yield unet_case(name, device, dtype, full)


def unet_case(name: str, device: str, dtype: torch.dtype, full: bool) -> Case:
    torch.manual_seed(0)
    if full:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            unet = UNet2DConditionModel(**SDXL)
        torch.set_default_dtype(torch.float32)
    else:
        unet = models.unet("xl").to(device, dtype)
    config = unet.config
    width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    given = {
        "sample": (2, 4, config.sample_size, config.sample_size),
        "text": (2, 77, config.cross_attention_dim),
        "text_embeds": (2, width),
        "time_ids": (2, 6),
    }
    inputs = {key: torch.randn(size, device=device, dtype=dtype) for key, size in given.items()}
    inputs["timestep"] = torch.full((2,), 500.0, device=device)
    norms = sdcore.FastNorms()
    unet = unet.eval().requires_grad_(False)
    return Case(name, unet, (), inputs, predicted, {"FastNorms": (norms, norms)})


# ---------------------------------------------------------------------------------------------
# Ways


@contextlib.contextmanager
def compiled(case: Case, mode: str | None) -> Iterator[Any]:
    torch._dynamo.reset()
    decoder = case.model.decoder
    case.model.decoder = torch.compile(decoder, mode=mode, dynamic=False)
    try:
        yield case.model
    finally:
        case.model.decoder = decoder


Way = Callable[[], contextlib.AbstractContextManager[Any]]


def ways(case: Case, peers: str | None, left_out: Container[str]) -> dict[str, tuple[Way, Way]]:
    """Of each, in one graph by hand, and end to end. ``peers``: part of the names of those that are
    asked for, whatever is left out."""

    def plain() -> Any:
        return contextlib.nullcontext(case.model)

    @contextlib.contextmanager
    def patched(method: sdcore.Method) -> Iterator[Any]:
        with sdcore.patch(case.model, method):
            yield case.model

    found: dict[str, tuple[Way, Way]] = {"as it is": (plain, plain)}
    for name, (by_hand, alone) in case.methods.items():
        found[name] = (lambda m=by_hand: patched(m)), (lambda m=alone: patched(m))
    for name in case.peers:
        if name not in left_out if peers is None else peers in name:
            mode = COMPILED[name]
            in_graph = mode and f"{mode}-no-cudagraphs"
            found[name] = (lambda m=in_graph: compiled(case, m)), (lambda m=mode: compiled(case, m))
    return found


def wall_clock(call: Callable[[], Any], calls: int) -> tuple[float, float, str]:
    for _ in range(3):
        call()
    samples = []
    for _ in range(calls):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        samples.append((time.perf_counter() - start) * 1e3)
    return *measure.of_samples(samples), "end to end"


def exact(case: Case) -> Tensor:
    wider = torch.float64 if next(case.model.parameters()).dtype == torch.float32 else torch.float32
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        model = copy.deepcopy(case.model).to(wider)
        inputs = {key: one.to(wider) for key, one in case.inputs.items()}
        return case.call(model, inputs)
    finally:
        torch.backends.cudnn.allow_tf32 = before


def operations(case: Case) -> int:
    with FlopCounterMode(display=False) as counter:
        case.call(case.model, case.inputs)
    return counter.get_total_flops()


def measured(case: Case, asked: Asked) -> list[Row]:
    dtype = next(case.model.parameters()).dtype
    wanted = exact(case)
    # In TF32 where convolutions are.
    tf32 = torch.backends.cudnn.allow_tf32
    work = asked.ceilings.multiplying(operations(case), dtype, tf32)
    rows: list[Row] = []
    allowed, calls = 0.0, 3 if asked.quick else CALLS
    # Inductor takes minutes on a CPU.
    left_out = COMPILED if asked.quick else () if asked.full else SLOW_TO_COMPILE

    def measured_way(name: str, way: Way, in_graph: bool) -> Row:
        nonlocal allowed
        with way() as model:
            off = float((case.call(model, case.inputs).to(wanted) - wanted).norm())
            off /= float(wanted.norm())
            allowed = allowed or 2 * off + torch.finfo(dtype).eps
            if not off <= allowed:
                raise measure.WrongError(
                    f"{case.name}, {name}: off by {off:.2e}, allowed {allowed:.2e}"
                )

            def call(*_: Any) -> Tensor:
                return case.call(model, case.inputs)

            taken = (
                measure.milliseconds(call, [()], asked.device)
                if in_graph
                else wall_clock(call, calls)
            )
        what = "float64" if wanted.dtype == torch.float64 else "float32"
        return Row(
            "fast_decoder", f"{case.name}, {taken[2]}", name, measure.dtype_name(dtype), *taken,
            f"{what}, off by {off:.1e}", passed=True,
        ).against(work)  # fmt: skip

    for name, both in ways(case, asked.options.get("peers"), left_out).items():
        for in_graph, way in zip((True, False), both, strict=True):
            if in_graph and not asked.on_gpu:
                continue
            try:
                rows.append(measured_way(name, way, in_graph))
            except Exception as problem:  # a peer may fail in ways of its own
                if name not in COMPILED:
                    raise
                measure.skipped(f"{case.name}: {name}", str(problem))
    rows.sort(key=lambda row: row.timing)
    for row in rows:
        if row.implementation in case.methods:
            row.ratios = {
                other.implementation: other.milliseconds / row.milliseconds
                for other in rows
                if other.timing == row.timing and other.implementation not in case.methods
            }
    return rows


def rows(asked: Asked) -> Iterator[Row]:
    own = dtype_of(asked)
    known = (own, torch.float32) if asked.full_models else (own,)
    if not asked.has(*known):
        return
    for case in cases(asked.device, asked.full_models, asked.cases, own):
        if asked.dtype in (None, next(case.model.parameters()).dtype):
            yield from measured(case, asked)
        if asked.quick:  # decoding alone
            return


def main() -> None:
    parser = suite.parser_of(__doc__)
    peers = "those of torch.compile whose name holds this"
    parser.add_argument("--peers", default=argparse.SUPPRESS, help=peers)
    suite.main(rows, parser)


if __name__ == "__main__":
    main()
