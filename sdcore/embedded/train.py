"""Trains the embedded models.

``accelerate launch -m sdcore.embedded.train MODEL`` or ``python -m sdcore.embedded.train MODEL``

MODEL, in an order in which each has what it needs: ``autoencoder``, ``v1``, ``v2``, ``v1-ink``,
``v1-edge``, ``xl-autoencoder``, ``xl``. Minutes each on one GPU; on several, each takes its part of
a batch. A run that was cut off goes on from its last checkpoint. Pictures are made at the start and
stay in the GPU's memory. What comes out lies in ``--out``, in half precision; losses, and what they
took, in ``--runs``. With ``--minutes`` a run takes as many steps as end by then, pictures and
compilation included.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPTokenizer

from sdcore.embedded import FOLDER, checksums, load, models, tokenizer, world

CAPTIONS = 4  # of each scene
SNR_BOUND = 5.0  # of the weight of a timestep
NOISY_FROM, NOISY_SHARE = 700, 0.5
UNCONDITIONAL = 0.1  # share of prompts left empty, for guidance
SHRUNK = 0.2  # share of pictures of xl that were enlarged from fewer pixels
CHECKPOINT_SECONDS = 60
EAGER_STEPS = 3  # before a step is captured: what compiles or is looked up once has been
AT_ONCE = 500  # pictures that are made at a time


@dataclass(frozen=True)
class Plan:
    steps: int
    batch: int  # over all GPUs
    rate: float
    scenes: int
    decay: float = 0.999  # of the average of weights


PLANS = {
    "autoencoder": Plan(12_000, 32, 1e-3, 40_000),
    "v1": Plan(23_000, 192, 1e-3, 150_000),
    "v2": Plan(30_000, 192, 1e-3, 200_000),
    "v1-ink": Plan(3_000, 96, 1e-3, 20_000),
    "v1-edge": Plan(2_000, 96, 5e-4, 40_000),
    "xl-autoencoder": Plan(5_000, 32, 1e-3, 40_000),
    "xl": Plan(24_000, 128, 1e-3, 100_000),
}


# ---------------------------------------------------------------------------------------------
# What to learn from


@dataclass
class Pictures:
    """All on one device, and all of one length."""

    images: Tensor  # [N, 3, side, side], uint8
    tokens: Tensor  # [N, CAPTIONS, length]
    outlines: Tensor  # [N, 1, side, side], uint8; empty unless asked for
    sides: Tensor  # [N]: of how many pixels a picture was before it was enlarged


def pictures(
    count: int,
    seed: int,
    words: CLIPTokenizer,
    device: torch.device,
    pool: Executor,
    *,
    style: str = "plain",
    outlines: bool = False,
    shrunk: float = 0.0,
) -> Pictures:
    chunks = [min(AT_ONCE, count - first) for first in range(0, count, AT_ONCE)]
    images, drawn, tokens, sides = [], [], [], []
    rng = random.Random(seed)
    made = pool.map(
        _captioned,
        chunks,
        itertools.count(seed * 10**6),
        itertools.repeat(style),
        itertools.repeat(words),
    )
    for scenes, captions in tqdm(made, "pictures", len(chunks), leave=False):
        rendered = world.render(scenes, device=str(device))
        some = [
            rng.randrange(48, world.SIZE) if rng.random() < shrunk else world.SIZE for _ in scenes
        ]
        sides += some
        for i, side in enumerate(some):
            if side < world.SIZE:
                rendered[i] = _enlarged(rendered[i], side)
        images.append((255 * rendered).round().byte())
        if outlines:
            drawn.append((255 * world.outlines(scenes, device=str(device))).round().byte())
        tokens.append(torch.from_numpy(captions))
    empty = torch.empty(0, dtype=torch.uint8, device=device)
    return Pictures(
        torch.cat(images),
        torch.cat(tokens).to(device, torch.long),
        torch.cat(drawn) if drawn else empty,
        torch.tensor(sides, device=device),
    )


def _captioned(
    count: int, seed: int, style: str, words: CLIPTokenizer
) -> tuple[list[world.Scene], np.ndarray]:
    """Scenes, and the tokens of their captions: [count, CAPTIONS, length]."""
    rng = random.Random(seed)
    scenes = [world.scene(rng, style=style) for _ in range(count)]
    texts = [world.caption(one, rng) for one in scenes for _ in range(CAPTIONS)]
    return scenes, tokenized(words, texts).unflatten(0, (-1, CAPTIONS)).short().numpy()


def _enlarged(image: Tensor, side: int) -> Tensor:
    small = F.interpolate(image[None], (side, side), mode="bilinear", antialias=True)
    return F.interpolate(small, image.shape[1:], mode="bilinear")[0]


def tokenized(words: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    return words(
        list(texts),
        padding="max_length",
        truncation=True,
        max_length=words.model_max_length,
        return_tensors="pt",
    ).input_ids


def encoded(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Latents of all pictures, scaled as the UNet takes them."""
    found = []
    with torch.inference_mode():
        for some in images.split(AT_ONCE):
            mean = vae.encode(as_input(some)).latent_dist.mean
            found.append(mean * vae.config.scaling_factor)
    return torch.cat(found)


def as_input(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


# ---------------------------------------------------------------------------------------------
# Losses: each a module, so that several GPUs share its weights


class AutoencoderLoss(nn.Module):
    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor) -> Tensor:
        spread = self.vae.encode(images).latent_dist
        gap = self.vae.decode(spread.sample()).sample - images
        return gap.abs().mean() + gap.square().mean() + 1e-6 * spread.kl().mean()


class DenoisingLoss(nn.Module):
    """Of a UNet and its text encoders; or of a ControlNet beside a UNet that stays as it is.

    The mean square error of the clean latents, weighted with the square root of the signal-to-noise
    ratio (Yu et al., 2023, arXiv:2310.08442) up to SNR_BOUND (Hang et al., 2023, arXiv:2303.09556).
    Weighted with the ratio itself, what is decided in much noise, where things are, counts for
    nothing. NOISY_SHARE of the timesteps are drawn from NOISY_FROM on, where that is.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        texts: Sequence[nn.Module],
        scheduler: DDIMScheduler,
        control: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.denoiser, self.texts, self.control = denoiser, nn.ModuleList(texts), control
        self.prediction = scheduler.config.prediction_type
        self.register_buffer("alphas", scheduler.alphas_cumprod, persistent=False)

    def forward(self, latents: Tensor, tokens: Tensor, outlines: Tensor, sides: Tensor) -> Tensor:
        noise = torch.randn_like(latents)
        steps = self._timesteps(len(latents))
        alpha = self.alphas[steps]
        signal, spread = (part.sqrt()[:, None, None, None] for part in (alpha, 1 - alpha))
        noisy = signal * latents + spread * noise
        context, options = self._context(tokens, sides)
        if self.control is not None:
            down, middle = self.control(
                noisy, steps, context, controlnet_cond=outlines, return_dict=False
            )
            options |= {
                "down_block_additional_residuals": down,
                "mid_block_additional_residual": middle,
            }
        found = self.denoiser(noisy, steps, context, **options).sample
        ratio = alpha / (1 - alpha)
        weight = ratio.clamp(max=SNR_BOUND).sqrt()
        if self.prediction == "v_prediction":
            wanted, weight = signal * noise - spread * latents, weight / (ratio + 1)
        else:
            wanted, weight = noise, weight / ratio
        errors = (found.float() - wanted.float()).square().mean((1, 2, 3))
        return (weight * errors).mean()

    def _timesteps(self, count: int) -> Tensor:
        device = self.alphas.device
        any_of = torch.randint(0, models.TIMESTEPS, (count,), device=device)
        noisy = torch.randint(NOISY_FROM, models.TIMESTEPS, (count,), device=device)
        return torch.where(torch.rand(count, device=device) < NOISY_SHARE, noisy, any_of)

    def _context(self, tokens: Tensor, sides: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """What the UNet reads, as the pipelines make it."""
        if len(self.texts) == 1:
            return self.texts[0](tokens).last_hidden_state, {}
        both = [text(tokens, output_hidden_states=True) for text in self.texts]
        context = torch.cat([one.hidden_states[-2] for one in both], -1)
        whole = torch.full_like(sides, world.SIZE)
        zero = torch.zeros_like(sides)
        times = torch.stack([sides, sides, zero, zero, whole, whole], 1)
        conditions = {"text_embeds": both[1].text_embeds, "time_ids": times}
        return context, {"added_cond_kwargs": conditions}


# ---------------------------------------------------------------------------------------------
# Training


class Average:
    """Of the weights that are trained, over the steps, decaying."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.step = decay, 0
        self.now = {name: p.detach() for name, p in _trained(module).items()}
        self.weights = {name: p.clone() for name, p in self.now.items()}
        # What the newest weights count. On the device: a captured step reads it there.
        self.share = torch.zeros((), device=next(module.parameters()).device)

    def advance(self) -> None:
        self.step += 1
        self.share.fill_(1 - min(self.decay, (1 + self.step) / (10 + self.step)))

    def update(self) -> None:
        kept = list(self.weights.values())
        torch._foreach_mul_(kept, 1 - self.share)
        torch._foreach_add_(kept, torch._foreach_mul(list(self.now.values()), self.share))

    def copy_to(self, module: nn.Module) -> None:
        for name, p in _trained(module).items():
            p.data.copy_(self.weights[name])


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


class Step:
    """A step of training; on one GPU, after the first few, the replay of a CUDA graph.

    Its many kernels are so short that starting them one by one takes several times longer than
    they run. Several GPUs exchange their gradients, which stays outside a graph.
    """

    def __init__(
        self, loss: nn.Module, optimizer: Any, average: Average, accelerator: Accelerator
    ) -> None:
        self.loss, self.optimizer, self.average = loss, optimizer, average
        self.accelerator = accelerator
        alone = accelerator.num_processes == 1
        self.captures = alone and accelerator.device.type == "cuda"
        self.eager = EAGER_STEPS
        self.graph: torch.cuda.CUDAGraph | None = None
        self.batch: tuple[Tensor, ...] = ()
        self.value = torch.empty(0)

    def __call__(self, batch: tuple[Tensor, ...]) -> Tensor:
        """The loss, as a tensor that holds it until the next call."""
        if not self.captures or self.eager > 0:
            self.eager -= 1
            return self._run(batch)
        if self.graph is None:
            self._capture(batch)
        for kept, given in zip(self.batch, batch, strict=True):
            kept.copy_(given)
        self.graph.replay()
        return self.value

    def _run(self, batch: tuple[Tensor, ...]) -> Tensor:
        self.optimizer.zero_grad()
        with self.accelerator.autocast():
            value = self.loss(*batch)
        self.accelerator.backward(value)
        self.accelerator.clip_grad_norm_(self.loss.parameters(), 1.0)
        self.optimizer.step()
        self.average.update()
        return value.detach()

    def _capture(self, batch: tuple[Tensor, ...]) -> None:
        self.batch = tuple(given.clone() for given in batch)
        self.optimizer.zero_grad()  # so that the graph has gradients of its own, which it writes
        for group in self.optimizer.param_groups:
            group["capturable"] = True
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
            self.value = self._run(self.batch)


@contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    """A graph is captured on another stream than the default one, and warmed up there."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


class Pace:
    """How many steps end by a time (of :func:`time.monotonic`), by how fast they were."""

    def __init__(self, until: float) -> None:
        self.until = until
        self.marks: list[tuple[float, int]] = []

    def steps(self, done: int, planned: int, now: float) -> int:
        """Of the whole run, when ``done`` of them are. Once three tenths of the time are over it
        stays ``planned``, by which the rate falls, unless that would take too long."""
        self.marks.append((now, done))
        if len(self.marks) < 3:  # the first hundreds compile
            return planned
        begun = self.marks[1][0]
        since, before = self.marks[max(1, len(self.marks) - 16)]
        if now <= since or self.until <= begun:
            return done + 1
        each = (now - since) / (done - before)
        late = now + (planned - done) * each > self.until + 0.02 * (self.until - begun)
        if now - begun > 0.3 * (self.until - begun) and not late:
            return planned
        return max(done + 1, done + int((self.until - now) / each))


def fit(
    loss: nn.Module,
    batch_of: Callable[[torch.Generator, int], tuple[Tensor, ...]],
    plan: Plan,
    accelerator: Accelerator,
    run: Path,
    seed: int,
    until: float | None = None,
) -> None:
    """Trains ``loss``, and leaves in it the average of its weights.

    ``batch_of`` draws a batch of this size. What is drawn depends on seed and step alone, so that a
    run that goes on does what it would have done; but not if its steps are to end by ``until``.
    """
    device = accelerator.device
    loss.to(device, memory_format=torch.channels_last)
    with _own_stream(device):
        rate = torch.tensor(plan.rate, device=device)  # a captured step reads it there
        optimizer = torch.optim.AdamW(_trained(loss).values(), rate, weight_decay=0.01, fused=True)
        average = Average(loss, plan.decay)
        first = load_checkpoint(run, loss, optimizer, average)
        if device.type == "cuda":
            loss.compile(dynamic=False)  # most layers are small and bound by memory: they fuse
        shared, optimizer = accelerator.prepare(loss, optimizer)
        step_of = Step(shared, optimizer, average, accelerator)
        generator = torch.Generator(device)
        size = max(1, plan.batch // accelerator.num_processes)
        saved = started = time.monotonic()
        total, rows = torch.zeros((), device=device), 0
        pace = None if until is None else Pace(until)
        step, steps = first, plan.steps
        bar = tqdm(
            desc="steps", total=steps, initial=first, disable=not accelerator.is_main_process
        )
        while step < steps:
            drawn = (seed * 100 + accelerator.process_index) * 10**7 + step
            generator.manual_seed(drawn)
            batch = batch_of(generator, size)
            torch.manual_seed(drawn)
            for group in optimizer.param_groups:
                group["lr"].fill_(plan.rate * _schedule(step, steps))
            average.advance()
            total, rows = total + step_of(batch), rows + 1
            step += 1
            bar.update()
            last = step == steps
            if last or step % 100 == 0:
                mean = (accelerator.reduce(total, "mean") / rows).item()
                bar.set_postfix(loss=f"{mean:.4f}")
                if accelerator.is_main_process:
                    _log(run / "metrics.csv", step, mean, time.monotonic() - started)
                total, rows = torch.zeros_like(total), 0
                if pace is not None and not last:
                    found = torch.tensor(pace.steps(step, steps, time.monotonic()), device=device)
                    # One number for all processes, each of which has its own clock.
                    bar.total = steps = int(accelerator.reduce(found.double(), "mean").item())
                    last = step == steps
            due = last or time.monotonic() - saved > CHECKPOINT_SECONDS
            if accelerator.is_main_process and due:
                save_checkpoint(run, step, loss, optimizer, average)
                saved = time.monotonic()
        bar.close()
    average.copy_to(loss)
    loss.to(memory_format=torch.contiguous_format)  # as files hold it


def _schedule(step: int, steps: int) -> float:
    """Up over the first hundredth, then down along a cosine."""
    warm = max(1, steps // 100)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _log(path: Path, step: int, loss: float, seconds: float) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(["step", "loss", "seconds"])
        writer.writerow([step, f"{loss:.6f}", f"{seconds:.1f}"])


def save_checkpoint(
    run: Path, step: int, module: nn.Module, optimizer: torch.optim.Optimizer, average: Average
) -> None:
    """Weights, their average and the optimizer's state, in one safetensors file."""
    from safetensors.torch import save_file

    tensors = {f"weights.{name}": p.detach() for name, p in _trained(module).items()}
    tensors |= {f"average.{name}": value for name, value in average.weights.items()}
    for number, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            tensors[f"optimizer.{number}.{name}"] = torch.as_tensor(value)
    path = run / "checkpoint.safetensors"
    fresh = path.with_suffix(".new")
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    save_file(contiguous, fresh, {"step": str(step)})
    fresh.replace(path)  # a run that is cut off here has the one before


def load_checkpoint(
    run: Path, module: nn.Module, optimizer: torch.optim.Optimizer, average: Average
) -> int:
    """The step to go on from; 0 if there is no checkpoint."""
    from safetensors import safe_open

    path = run / "checkpoint.safetensors"
    if not path.exists():
        return 0
    state: dict[int, dict[str, Tensor]] = {}
    device = next(module.parameters()).device
    trained = _trained(module)
    order = list(trained.values())  # in which the optimizer numbers them
    with safe_open(path, "pt", device=str(device)) as file:
        for key in list(file.keys()):
            kind, name = key.split(".", 1)
            value = file.get_tensor(key)
            if kind == "weights":
                trained[name].data.copy_(value)
            elif kind == "average":
                average.weights[name].copy_(value)
            else:
                number, name = name.split(".", 1)
                like = order[int(number)]
                if value.shape == like.shape:  # strides as well: the fused optimizer needs them so
                    value = torch.empty_like(like).copy_(value)
                state.setdefault(int(number), {})[name] = value
        step = int(file.metadata()["step"])
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
    average.step = step
    return step


# ---------------------------------------------------------------------------------------------
# The models


@dataclass
class Run:
    """What training one model is given."""

    plan: Plan
    accelerator: Accelerator
    out: Path
    folder: Path
    seed: int
    pool: Executor  # of processes that make scenes
    until: float | None = None  # when steps are to end, of time.monotonic

    def pictures(self, words: CLIPTokenizer, **options: Any) -> Pictures:
        device = self.accelerator.device
        return pictures(self.plan.scenes, self.seed, words, device, self.pool, **options)

    def fit(self, loss: nn.Module, batch_of: Callable[..., tuple[Tensor, ...]]) -> None:
        fit(loss, batch_of, self.plan, self.accelerator, self.folder, self.seed, self.until)


def train_autoencoder(run: Run, name: str) -> None:
    """The autoencoder of ``name``, with the scale that gives its latents unit variance."""
    device = run.accelerator.device
    words = models.vocabulary(run.folder / "tokenizer")
    data = run.pictures(words)
    fewer = max(1, run.plan.scenes // 2)
    ink = pictures(fewer, run.seed + 1, words, device, run.pool, style="ink")
    images = torch.cat([data.images, ink.images])
    vae = models.autoencoder(name).to(device)

    def batch_of(generator: torch.Generator, size: int) -> tuple[Tensor, ...]:
        batch = as_input(images[_chosen(len(images), size, generator)])
        return (batch.contiguous(memory_format=torch.channels_last),)

    run.fit(AutoencoderLoss(vae), batch_of)
    scale = 1 / encoded(vae.eval(), images[:2000]).std().item()
    vae.register_to_config(scaling_factor=round(scale, 4))
    if run.accelerator.is_main_process:  # in full: the UNets are trained on its latents
        vae.save_pretrained(run.folder / "vae", safe_serialization=True)


def _chosen(count: int, size: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, count, (size,), generator=generator, device=generator.device)


def _denoising_batches(
    data: Pictures, latents: Tensor, words: CLIPTokenizer
) -> Callable[[torch.Generator, int], tuple[Tensor, ...]]:
    blank = tokenized(words, [""]).to(latents.device)

    def batch_of(generator: torch.Generator, size: int) -> tuple[Tensor, ...]:
        chosen = _chosen(len(latents), size, generator)
        tokens = data.tokens[chosen, _chosen(CAPTIONS, size, generator)]
        dropped = torch.rand(size, 1, generator=generator, device=latents.device) < UNCONDITIONAL
        drawn = data.outlines
        if len(drawn):
            drawn = drawn[chosen].float().expand(-1, 3, -1, -1) / 255
        batch = latents[chosen].contiguous(memory_format=torch.channels_last)
        return batch, torch.where(dropped, blank, tokens), drawn, data.sides[chosen]

    return batch_of


def train_base(run: Run, name: str) -> None:
    device = run.accelerator.device
    words = models.vocabulary(run.folder / "tokenizer")
    vae = _autoencoder(run, "xl-autoencoder" if name == "xl" else "autoencoder")
    shrunk = SHRUNK if name == "xl" else 0.0
    data = run.pictures(words, shrunk=shrunk)
    latents = encoded(vae, data.images)
    denoiser = models.unet(name).to(device)
    texts = [text.to(device) for text in models.text_encoders(name, words)]
    loss = DenoisingLoss(denoiser, texts, models.scheduler(name))
    run.fit(loss, _denoising_batches(data, latents, words))
    _save(models.pipeline(name, vae, denoiser, texts, words), run)
    if run.accelerator.is_main_process:
        for folder in run.out.glob("tokenizer*"):
            tokenizer.write(folder)  # older Transformers look for these files


def train_ink(run: Run) -> None:
    """A LoRA on v1's UNet, from pictures in ink alone."""
    from peft import LoraConfig, get_peft_model_state_dict

    base = _base(run)
    denoiser = base.unet.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]
    denoiser.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets))
    base.text_encoder.requires_grad_(False)
    data = run.pictures(base.tokenizer, style="ink")
    latents = encoded(base.vae, data.images)
    loss = DenoisingLoss(denoiser, [base.text_encoder], models.scheduler("v1"))
    run.fit(loss, _denoising_batches(data, latents, base.tokenizer))
    if run.accelerator.is_main_process:
        layers = get_peft_model_state_dict(denoiser)
        half = {key: value.half().contiguous() for key, value in layers.items()}
        StableDiffusionPipeline.save_lora_weights(run.out, unet_lora_layers=half)


def train_edge(run: Run) -> None:
    """A ControlNet beside v1's UNet, from outline drawings of its pictures."""
    device = run.accelerator.device
    base = _base(run)
    control = models.controlnet(base.unet).to(device)
    for part in (base.unet, base.text_encoder):
        part.requires_grad_(False)
    data = run.pictures(base.tokenizer, outlines=True)
    latents = encoded(base.vae, data.images)
    loss = DenoisingLoss(base.unet, [base.text_encoder], models.scheduler("v1"), control)
    run.fit(loss, _denoising_batches(data, latents, base.tokenizer))
    _save(control, run)


def _autoencoder(run: Run, name: str) -> AutoencoderKL:
    folder = run.folder.parent / name / "vae"
    if not folder.exists():
        raise SystemExit(f"{folder} is missing: train {name} first")
    found = AutoencoderKL.from_pretrained(folder, use_safetensors=True)
    return found.to(run.accelerator.device).requires_grad_(False).eval()


def _base(run: Run) -> StableDiffusionPipeline:
    if not (run.out.parent / "v1").exists():
        raise SystemExit(f"{run.out.parent / 'v1'} is missing: train v1 first")
    found = load("v1", device=str(run.accelerator.device), folder=run.out.parent)
    found.vae.requires_grad_(False)
    return found


def _save(part: Any, run: Run) -> None:
    """A model, or a pipeline, in half precision."""
    if run.accelerator.is_main_process:
        modules = getattr(part, "components", {"": part}).values()
        for module in modules:
            if isinstance(module, nn.Module):
                nn.Module.to(module, torch.float16)
        part.save_pretrained(run.out, safe_serialization=True)
        for path in run.out.rglob("config.json"):  # what was loaded says from where
            config = json.loads(path.read_text())
            config.pop("_name_or_path", None)
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


TRAINERS: dict[str, Callable[[Run], None]] = {
    "autoencoder": lambda run: train_autoencoder(run, "v1"),
    "v1": lambda run: train_base(run, "v1"),
    "v2": lambda run: train_base(run, "v2"),
    "v1-ink": train_ink,
    "v1-edge": train_edge,
    "xl-autoencoder": lambda run: train_autoencoder(run, "xl"),
    "xl": lambda run: train_base(run, "xl"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=TRAINERS)
    parser.add_argument("--out", type=Path, default=FOLDER, help="default: inside the package")
    parser.add_argument("--runs", type=Path, default=Path("build/embedded"))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--scenes", type=int)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    until = None if given.minutes is None else time.monotonic() + 60 * given.minutes
    plan = PLANS[given.model]
    asked = {name: getattr(given, name) for name in ("steps", "batch", "scenes")}
    plan = replace(plan, **{name: value for name, value in asked.items() if value is not None})
    # Before CUDA and threads are there, which a forked process could not use.
    with ProcessPoolExecutor(initializer=torch.set_num_threads, initargs=(1,)) as pool:
        pool.submit(int).result()
        precision = "bf16" if torch.cuda.is_available() else "no"
        run = Run(
            plan,
            Accelerator(mixed_precision=precision),
            given.out / given.model,
            given.runs / given.model,
            given.seed,
            pool,
            until,
        )
        torch.backends.cudnn.benchmark = True  # all batches have one shape
        run.folder.mkdir(parents=True, exist_ok=True)
        TRAINERS[given.model](run)
    if run.accelerator.is_main_process and run.out.exists():
        checksums.write(run.out)


if __name__ == "__main__":
    main()
