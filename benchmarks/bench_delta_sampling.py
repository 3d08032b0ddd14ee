"""What Delta Sampling costs in pipelines of full size, and what it does to pictures.

``python -m benchmarks.bench_delta_sampling [--device cuda] [--quick] [--csv FILE]``
``python -m benchmarks.bench_delta_sampling --quality [--device cuda] [--count N] [--csv FILE]
[--sheets FOLDER]``

Cost: steps of patched pipelines with random weights in bfloat16, with guidance, from end to end:
Stable Diffusion 1.5 and a LoRA carried to 2.1 (v prediction) at 512 pixels, and 1.5 and a
ControlNet to SDXL at 1024. Beside it a step of the plain target; three plain calls as published, in
plain PyTorch, within the same pipeline; the sum of the times of the three models, each alone in a
CUDA graph; and their time in the one graph that DeltaSampling replays. Predictions are compared
with those of the plain calls. On a CPU, and with --quick, the embedded models.

Quality: the embedded v1-ink and v1-edge carried from v1 to v2 at several strengths, with the
pipeline's guidance of source and adapted model and without any, by the reader, with 95 % intervals
(Wilson's): pictures in ink and captions that are all right, and how far pictures cover the outlines
that were drawn.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import sdcore
from benchmarks import bench_patching, measure, suite
from benchmarks.bench_region_attention import wilson
from benchmarks.measure import Row
from benchmarks.suite import Asked
from sdcore import embedded, figures
from sdcore.embedded import FOLDER, evaluate, models, reader, world
from sdcore.patching import Call

STEPS, TURNS = 12, 4  # of a run; runs
FEW_STEPS, FEW_TURNS = 4, 1  # with --quick
# https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5, unet/config.json
SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
# https://huggingface.co/stabilityai/stable-diffusion-2-1, unet/config.json
SD21 = {
    "sample_size": 64,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
SCALES = {"sd": 0.18215, "xl": 0.13025}
# By the guidance of source and adapted model; None is the pipeline's.
STRENGTHS = {None: (0.5, 1.0, 1.5, 2.0), 1: (1.0, 2.0)}
RANK = 16
PUBLISHED = "three calls, as published"
TOGETHER = "the three models in one graph"  # on a GPU
SHOWN = 5  # prompts, on a sheet


# ---------------------------------------------------------------------------------------------
# Cost


@dataclass
class Case:
    name: str
    target: Any
    source: Any
    adapted: Any  # as DeltaSampling takes it
    side: int  # pixels


def _text(width: int, layers: int, words: Any, device: str, project: bool = False) -> nn.Module:
    """One layer: texts are encoded once a run."""
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=width, num_hidden_layers=layers,
        num_attention_heads=width // 64, projection_dim=1280,
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
    )  # fmt: skip
    kind = CLIPTextModelWithProjection if project else CLIPTextModel
    return kind(config).to(device, torch.bfloat16).eval()


def _unet(device: str, options: dict[str, Any]) -> UNet2DConditionModel:
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return UNet2DConditionModel(**options).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)


def _pipeline(unet: nn.Module, kind: str, prediction: str, words: Any, device: str) -> Any:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32,) * 4, latent_channels=4, scaling_factor=SCALES[kind],
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1, prediction_type=prediction,
    )  # fmt: skip
    parts = {"vae": vae.to(device, torch.bfloat16), "unet": unet, "scheduler": scheduler}
    parts["tokenizer"] = words
    width = unet.config.cross_attention_dim
    if kind == "sd":
        parts["text_encoder"] = _text(width, 1, words, device)
        parts |= {"safety_checker": None, "feature_extractor": None}
        pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    else:
        parts |= {"tokenizer_2": words, "text_encoder": _text(768, 2, words, device)}
        parts["text_encoder_2"] = _text(1280, 2, words, device, project=True)
        pipe = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _lora(unet: nn.Module) -> dict[str, Tensor]:
    """Random, of all attention's layers."""
    found = {}
    generator = torch.Generator().manual_seed(2)
    for name, part in unet.named_modules():
        if name.rpartition(".")[2] in ("to_q", "to_k", "to_v") or name.endswith("to_out.0"):
            outer, inner = part.weight.shape
            for factor, shape in (("lora_A", (RANK, inner)), ("lora_B", (outer, RANK))):
                value = torch.randn(shape, generator=generator) / shape[1] ** 0.5
                found[f"unet.{name}.{factor}.weight"] = 4 * value
    return found


def cases(device: str, full: bool) -> list[Case]:
    torch.manual_seed(0)
    if not full:
        v1, v2 = (embedded.load(name, device=device) for name in ("v1", "v2"))
        lora = sdcore.LoRA(FOLDER / "v1-ink")
        for pipe in (v1, v2):
            pipe.set_progress_bar_config(disable=True)
        return [Case("embedded v1 and a LoRA to v2", v2, v1, lora, world.SIZE)]
    words = models.kept_vocabulary()
    old = _pipeline(_unet(device, SD15), "sd", "epsilon", words, device)
    new = _pipeline(_unet(device, SD21), "sd", "v_prediction", words, device)
    xl = _pipeline(_unet(device, bench_patching.SDXL), "xl", "epsilon", words, device)
    control = ControlNetModel.from_unet(old.unet).to(device, torch.bfloat16).eval()
    for part in (*control.controlnet_down_blocks, control.controlnet_mid_block):
        nn.init.normal_(part.weight, std=0.2)
    image = torch.rand(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(1))
    return [
        Case("SD 1.5 + LoRA to 2.1, 512²", new, old, sdcore.LoRA(_lora(old.unet)), 512),
        Case("SD 1.5 + ControlNet to SDXL, 1024²", xl, old, sdcore.Control(control, image), 1024),
    ]


class AsPublished(sdcore.DeltaSampling):
    """Three calls, and plain PyTorch; in the state and with the texts that DeltaSampling gives."""

    def denoise(self, call: Call, proceed: Callable[[Call], Tensor]) -> Tensor:
        own, asked = self._on[call.run.pipe], what_is_asked(self, call)
        target = proceed(call)
        found = three_calls(own, asked)[0]
        alpha, sigma = call.alpha, call.sigma
        clean = [(asked.sample.float() - sigma * one.float()) / alpha for one in found]
        delta = self.strength * (clean[1] - clean[0]) / own.ratio
        noisy = own.prediction == "epsilon"
        return (target.float() - delta * (alpha / sigma if noisy else 1 / sigma)).to(target.dtype)


class Compared(AsPublished):
    """How far DeltaSampling is from that at a run's first step, and how far the plain target."""

    def denoise(self, call: Call, proceed: Callable[[Call], Tensor]) -> Tensor:
        wanted = super().denoise(call, proceed)
        if not hasattr(self, "off"):
            ours = sdcore.DeltaSampling.denoise(self, call, proceed)
            self.off, self.moved = (
                float((one - wanted).norm() / wanted.norm()) for one in (ours, proceed(call))
            )
        return wanted


def what_is_asked(method: sdcore.DeltaSampling, call: Call) -> Any:
    own, state = method._on[call.run.pipe], call.run.of(method)
    if own.ratio != 1 and state.first is None:
        state.first = call.sample, call.sigma
    return own.asked(method, call, state)


def three_calls(own: Any, asked: Any) -> tuple[list[Tensor], list[Callable[[], Tensor]]]:
    """Source and adapted model in full, one after the other; and calls of each."""

    def call(leg: Any, number: int) -> Tensor:
        more: dict[str, Any] = {}
        inputs = {
            "timestep": asked.timesteps[number], "encoder_hidden_states": asked.contexts[number],
            "added_cond_kwargs": asked.added[number],
        }  # fmt: skip
        for control, image, scale in zip(leg.controls, asked.images, asked.scales, strict=False):
            down, middle = control.model(
                asked.sample, **inputs, controlnet_cond=image, conditioning_scale=scale,
                return_dict=False,
            )  # fmt: skip
            more["down_block_additional_residuals"] = down
            more["mid_block_additional_residual"] = middle
        return leg.unet(asked.sample, **inputs, **more, return_dict=False)[0]

    calls = [lambda: call(own.source, 0), lambda: call(own.adapted, 1)]
    return [one() for one in calls], calls


def run(case: Case, steps: int, **more: Any) -> Tensor:
    return case.target(
        "a red circle", num_inference_steps=steps, guidance_scale=5.0, height=case.side,
        width=case.side, generator=torch.Generator().manual_seed(0), output_type="latent", **more,
    ).images  # fmt: skip


def step_of(
    case: Case, method: sdcore.Method | None, device: str, turns: int, steps: int
) -> tuple[float, float]:
    """Milliseconds of a step, and half the range of their middle half: from the end of a step to
    that of the one after the next, halved, on the GPU's own clock."""
    marks: list[Any] = []

    def mark(*_: Any) -> dict[str, Any]:
        marks.append(measure_now(device))
        return {}

    taken = []
    with contextlib.ExitStack() as stack:
        if method is not None:
            stack.enter_context(sdcore.patch(case.target, method))
        run(case, 3)
        for _ in range(turns):
            marks.clear()
            run(case, steps, callback_on_step_end=mark)
            if device == "cuda":
                torch.cuda.synchronize()
            taken += [between(a, b) / 2 for a, b in zip(marks[1:], marks[3:], strict=False)]
    return measure.of_samples(taken)


def measure_now(device: str) -> Any:
    if device != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(first: Any, last: Any) -> float:
    return 1e3 * (last - first) if isinstance(first, float) else first.elapsed_time(last)


class Alone(sdcore.DeltaSampling):
    """Times the models' calls at a run's first step, each in a graph of its own, and then all
    three in one, as DeltaSampling has them."""

    def denoise(self, call: Call, proceed: Callable[[Call], Tensor]) -> Tensor:
        if not hasattr(self, "times"):
            own = self._on[call.run.pipe]
            legs = three_calls(own, what_is_asked(self, call))[1]
            asked = what_is_asked(self, call)
            together = own._at_once
            calls = [
                lambda: proceed(call),
                *legs,
                lambda: together(
                    call.passed(),
                    asked.sample,
                    asked.timesteps,
                    asked.contexts,
                    asked.added,
                    asked.images,
                    asked.scales,
                    asked.shared,
                ),
            ]
            where = str(call.sample.device.type)
            self.times = [
                measure.milliseconds(one, [()] * 3, where, graph=where == "cuda")[:2]
                for one in calls
            ]
        return proceed(call)


def cost(case: Case, asked: Asked) -> list[Row]:
    device = asked.device
    turns, steps = (FEW_TURNS, FEW_STEPS) if asked.quick else (TURNS, STEPS)
    given = (case.source, case.adapted)
    alone = Alone(*given)
    compared = {how: Compared(*given, graphs=how) for how in (True, False)}
    for method in (alone, *compared.values()):
        with sdcore.patch(case.target, method):
            run(case, 1)
    for how, one in compared.items():
        if not one.off < 0.1 * one.moved:
            raise measure.WrongError(
                f"{case.name}, graphs={how}: off by {one.off:.2g}, where all moved {one.moved:.2g}"
            )
    ways = {
        "plain target": None,
        PUBLISHED: AsPublished(*given, graphs=False),
        "DeltaSampling": sdcore.DeltaSampling(*given),
        "DeltaSampling, without graphs": sdcore.DeltaSampling(*given, graphs=False),
        "DeltaSampling, guidance_scale=1": sdcore.DeltaSampling(*given, guidance_scale=1),
        "DeltaSampling, refresh_every=2": sdcore.DeltaSampling(*given, refresh_every=2),
    }
    if asked.quick:
        ways = {name: ways[name] for name in ("plain target", PUBLISHED, "DeltaSampling")}
    taken = {name: step_of(case, method, device, turns, steps) for name, method in ways.items()}
    *each, together = alone.times
    total = sum(one[0] for one in each)
    sums = {}
    if asked.on_gpu:
        taken[TOGETHER] = together
        parts = " + ".join(f"{one[0]:.2f}" for one in each)
        sums = {f"the sum of graphs, {parts} ms": total}
    checks = {
        "DeltaSampling": f"off by {compared[True].off:.1e}",
        TOGETHER: f"off by {compared[True].off:.1e}",
        "DeltaSampling, without graphs": f"off by {compared[False].off:.1e}",
        "plain target": f"differs by {compared[False].moved:.1e}",
        PUBLISHED: "the reference",
    }
    made = []
    for name, (milliseconds, spread) in taken.items():
        made.append(
            Row(
                "delta_sampling", f"a step, {case.name}", name,
                str(case.target.unet.dtype).removeprefix("torch."), milliseconds, spread,
                "graph" if name == TOGETHER else "end to end",
                checks.get(name, "another result"),
                passed=True if checks.get(name, "").startswith("off by") else None,
                ratios={
                    other: time / milliseconds
                    for other, time in (
                        (PUBLISHED, taken[PUBLISHED][0]),
                        *sums.items(),
                        ("plain target", taken["plain target"][0]),
                    )
                },
            )
        )  # fmt: skip
    return made


def rows(asked: Asked) -> Iterator[Row]:
    if asked.has(torch.bfloat16 if asked.full_models else torch.float32):
        for case in cases(asked.device, asked.full_models):
            if asked.cases in case.name:
                yield from cost(case, asked)


# ---------------------------------------------------------------------------------------------
# Quality


def quality(count: int, device: str) -> tuple[list[dict[str, Any]], dict[str, dict[str, Tensor]]]:
    """Rows; and, of v1-ink and of v1-edge, pictures [H, W, 3] of the first prompts, one below the
    other: plain v2, the adapted model on v1, and each strength."""
    found = {name: embedded.load(name, device=device) for name in ("v1", "v2", "v1-ink", "v1-edge")}
    scenes = world.scenes(count, evaluate.SEED + 7, held_out=True)
    rng = random.Random(evaluate.SEED)
    prompts = [world.caption(one, rng) for one in scenes]
    outlines = world.outlines(scenes)
    rows, shown = [], {}
    for what in ("ink", "edge"):
        drawn = outlines if what == "edge" else None
        ways = {"plain v2": evaluate.generate(found["v2"], prompts, evaluate.SEED)}
        own = f"v1-{what}"
        ways[own] = evaluate.generate(found[own], prompts, evaluate.SEED, drawn)
        for scale, strength in ((a, b) for a, several in STRENGTHS.items() for b in several):
            guided = "" if scale is None else f"guidance_scale {scale}, "
            options = {"strength": strength, "guidance_scale": scale}
            ways[f"{own} to v2, {guided}strength {strength:g}"] = carried(
                found, prompts, drawn, **options
            )
        rows += [_judged(name, images, scenes, what) for name, images in ways.items()]
        shown[own] = {
            name.removeprefix(f"{own} to v2, ").replace(", ", "\n"): images[:SHOWN]
            .permute(0, 2, 3, 1)
            .flatten(0, 1)
            for name, images in ways.items()
        }
    return rows, shown


def carried(
    found: dict[str, Any], prompts: list[str], outlines: Tensor | None, **options: Any
) -> Tensor:
    """Pictures of v2 with what v1-ink adds to v1, or, with outlines, v1-edge."""
    pictures = []
    for first in range(0, len(prompts), evaluate.BATCH):
        part = slice(first, first + evaluate.BATCH)
        adapted: Any = sdcore.LoRA(FOLDER / "v1-ink")
        if outlines is not None:
            image = outlines[part].expand(-1, 3, -1, -1)
            adapted = sdcore.Control(found["v1-edge"].controlnet, image)
        with sdcore.patch(found["v2"], sdcore.DeltaSampling(found["v1"], adapted, **options)):
            pictures.append(evaluate.generate(found["v2"], prompts[part], evaluate.SEED + first))
    return torch.cat(pictures)


def _judged(name: str, images: Tensor, scenes: list[world.Scene], what: str) -> dict[str, Any]:
    readings = reader.read(images)
    verdicts = [reader.judge(*pair) for pair in zip(readings, scenes, strict=True)]
    count = len(scenes)
    row: dict[str, Any] = {"carried": what, "model": name, "prompts": count}
    for figure, good in (
        ("in ink", sum(one.style == "ink" for one in readings)),
        ("captions all right", sum(one.all_right for one in verdicts)),
    ):
        low, high = wilson(good, count)
        row |= {figure: f"{good / count:.3f}", f"{figure}, 95 %": f"{low:.3f} to {high:.3f}"}
    row["IoU with the outlines"] = f"{mean(evaluate.overlaps(images, scenes)):.3f}"
    return row


def main() -> None:
    parser = suite.parser_of(__doc__)
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--count", type=int, default=200, help="prompts")
    parser.add_argument("--sheets", type=Path, help="write sheets of pictures there")
    given = parser.parse_args()
    if not given.quality:
        suite.run(rows, given)
        return
    lines, shown = quality(given.count, given.device)
    measure.print_lines(list(lines[0]), [list(map(str, line.values())) for line in lines])
    if given.csv:
        measure.save_csv(lines, given.csv)
    if given.sheets:
        given.sheets.mkdir(parents=True, exist_ok=True)
        for own, pictures in shown.items():
            figures.draw_pictures(pictures).savefig(given.sheets / f"delta-{own}.png")


if __name__ == "__main__":
    main()
