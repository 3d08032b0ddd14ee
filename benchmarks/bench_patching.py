"""What a method that does nothing costs: a step of an SDXL pipeline with it and without it.

``python -m benchmarks.bench_patching [--device cuda] [--quick] [--csv FILE]``

On a GPU the UNet has the size of SDXL's, with random weights in bfloat16, for pictures of 1024
pixels, with guidance; on a CPU, and with --quick, that of the embedded one. Times are wall-clock,
of whole calls without decoding, divided by the steps. With and without take turns, and what is
added is the median of the neighbors' differences, with a 95 % interval. "host alone" has a UNet
that returns at once: what is added there is the host's work, an upper bound of what it can add
elsewhere. Results must agree bit for bit.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

import sdcore
from benchmarks import measure, suite
from benchmarks.suite import Asked
from sdcore import graphs
from sdcore.embedded import models

# Pairs of calls, and the steps of each: where the host is what takes long, times vary widely.
TURNS = {"host alone": (9, 200), "eager": (40, 3), "CUDA graph": (40, 3)}
# The same with --quick.
FEW_TURNS = {"host alone": (3, 10), "eager": (2, 1), "CUDA graph": (2, 1)}
REST = 0.15  # seconds before each call: back to back, steps in a graph varied by a tenth
# https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0, unet/config.json
SDXL = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


class NoOp(sdcore.Method):
    """Each part, and nothing in it."""

    def denoise(self, call: sdcore.patching.Call, proceed: Callable) -> torch.Tensor:
        return proceed(call)

    def step(self, step: sdcore.patching.Step, proceed: Callable) -> torch.Tensor:
        return proceed(step)

    def decode(
        self, run: sdcore.patching.Run, latents: torch.Tensor, proceed: Callable
    ) -> torch.Tensor:
        return proceed(latents)


def pipeline(device: str, full: bool) -> tuple[StableDiffusionXLPipeline, dict[str, Any]]:
    """One without text encoders, and what it is called with. ``full``: with a UNet as large as
    SDXL's."""
    torch.manual_seed(0)
    if full:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(device):
            unet = UNet2DConditionModel(**SDXL)
        torch.set_default_dtype(torch.float32)
        pooled = 1280
    else:
        unet, pooled = models.unet("xl").to(device), models.TEXTS["xl"][1][0]
    words = models.kept_vocabulary()
    pipe = StableDiffusionXLPipeline(
        vae=models.autoencoder("xl").to(device),
        unet=unet.eval(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=words,
        tokenizer_2=words,
        scheduler=models.scheduler("xl"),
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    dtype, width = unet.dtype, unet.config.cross_attention_dim
    side = unet.config.sample_size
    options = {
        "prompt_embeds": torch.randn(1, 77, width, device=device, dtype=dtype),
        "negative_prompt_embeds": torch.randn(1, 77, width, device=device, dtype=dtype),
        "pooled_prompt_embeds": torch.randn(1, pooled, device=device, dtype=dtype),
        "negative_pooled_prompt_embeds": torch.randn(1, pooled, device=device, dtype=dtype),
        "latents": torch.randn(1, 4, side, side, device=device, dtype=dtype),
        "height": side * pipe.vae_scale_factor,
        "width": side * pipe.vae_scale_factor,
        "output_type": "latent",
    }
    return pipe, options


def forward(unet: UNet2DConditionModel, how: str) -> Callable[..., Any]:
    real = unet.forward
    if how == "eager":
        return real
    if how == "host alone":
        kept: list[torch.Tensor] = []

        def other(sample: torch.Tensor, *args: Any, **options: Any) -> tuple[torch.Tensor]:
            if not kept:
                kept.append(0.1 * torch.ones_like(sample))
            return (kept[0],)
    else:
        captured = graphs.Graphs(real, "UNet")
        captured.state = graphs.module_state(unet)

        def other(*args: Any, **options: Any) -> tuple[torch.Tensor]:
            return captured(*args, **options)

    return functools.wraps(real)(other)


def rows_of(pipe: Any, options: dict[str, Any], how: str, asked: Asked) -> list[measure.Row]:
    turns, steps = (FEW_TURNS if asked.quick else TURNS)[how]

    def timed() -> tuple[float, torch.Tensor]:
        time.sleep(REST)
        start = time.perf_counter()
        out = pipe(**options, num_inference_steps=steps).images
        if asked.on_gpu:
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start) / steps, out

    pipe.unet.forward = forward(pipe.unet, how)
    timed()
    wanted = timed()[1]
    without, with_it, same = [], [], True
    for turn in range(2 * turns):
        # In the order a b b a, so that a drift of the clock does not count.
        if turn % 4 in (0, 3):
            milliseconds, found = timed()
            without.append(milliseconds)
        else:
            with sdcore.patch(pipe, NoOp()):
                milliseconds, found = timed()
            with_it.append(milliseconds)
        same &= found.equal(wanted)
    del pipe.unet.forward
    if not same:
        raise measure.WrongError(f"{how}: the results differ")
    added, low, high = median_interval([b - a for a, b in zip(without, with_it, strict=True)])
    share = 100 / statistics.median(without)
    side = options["latents"].shape[-1]
    what = f"SDXL, latents of {side}², 2 rows" if asked.full_models else "embedded xl, 2 rows"
    dtype = str(pipe.unet.dtype).removeprefix("torch.")
    return [
        measure.Row(
            "patching",
            f"a step, {what}, {how}",
            name,
            dtype,
            *measure.of_samples(times),
            "wall clock",
            check,
            passed=passed,
        )
        for name, times, check, passed in (
            ("without", without, "the reference", None),
            (
                "a method that does nothing",
                with_it,
                f"bit-identical; {1e3 * added:+.1f} µs, {share * added:+.2f} % "
                f"({share * low:+.2f} to {share * high:+.2f})",
                True,
            ),
        )
    ]


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """The median, and the values between which that of the population lies with 95 % certainty,
    whatever its distribution: by their ranks."""
    ordered, n = sorted(values), len(values)
    rank = max(0, math.floor((n - 1.96 * math.sqrt(n)) / 2))
    return statistics.median(ordered), ordered[rank], ordered[n - 1 - rank]


def rows(asked: Asked) -> Iterator[measure.Row]:
    if not asked.has(torch.bfloat16 if asked.full_models else torch.float32):
        return
    pipe, options = pipeline(asked.device, asked.full_models)
    for how in TURNS:
        if asked.cases in how and (how != "CUDA graph" or asked.on_gpu):
            yield from rows_of(pipe, options, how, asked)


if __name__ == "__main__":
    suite.main(rows, suite.parser_of(__doc__))
