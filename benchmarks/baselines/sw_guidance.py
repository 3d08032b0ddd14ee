"""SW-Guidance (Lobashev, Larchenko, Guskov, 2025) as its published code computes it: the loss of
colors, the loop that guides by it, and whole images. In plain PyTorch and our own words.

The loss takes one one-dimensional problem at a time: both sets projected, a bootstrap of the
smaller set's size drawn with replacement on the host, the same indices for both, and two sorts.

Of the loop all is reproduced that takes time or changes results: the models' weights want
gradients, and so their activations are kept; random numbers come from NumPy on the host (seed
``numpy.random``, and see ``published_loss``) and are copied; the clean latents are what
``scheduler.step`` says; all is rounded to the latents' dtype. So are defects: a reference of more
pixels than the picture, or the other way round, is read in its first rows alone, and after guidance
the unconditional prediction is given the prompt's pooled embedding (``step``). Not reproduced:
text encoders and the VAE's encoder that the SDXL script moves to the host's memory for each image,
its resizing of the reference to 768², which is the caller's, and its last conversion to float16;
the SD 1.5 script's omission of the first and the last of its time steps, and its resampling
from earlier ones, which it has turned off. As it is published, the SD 1.5 script has a loss of
means and covariances selected; here it has the sliced Wasserstein loss that it defines, which is
the paper's.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sdcore.ops import random_rotations

# Of pixels [n, 3] of the picture and [m, 3] of the reference.
Loss = Callable[[Tensor, Tensor], Tensor]

ROTATIONS = 10
# For guided_step, by script.
SDXL = {"inner_steps": 8, "learning_rate": 100.0, "overhead": True}
SD15 = {"inner_steps": 10, "learning_rate": 0.04, "normalize": True, "sides": (48, 64)}


# ---------------------------------------------------------------------------------------------
# The loss


def bootstrap(x: Tensor, y: Tensor) -> Tensor:
    """Indices into both sets, drawn on the host and copied to the device of x."""
    fewer = min(len(x), len(y))
    return torch.randint(0, fewer, (fewer,)).to(x.device)


def loss(x: Tensor, y: Tensor, directions: Tensor, drawn: Tensor | None = None) -> Tensor:
    """Mean over directions [L, d] of W_1 between projections of x [n, d] and y [m, d].

    ``drawn``: what host_part returned, in the place of indices drawn in the call.
    """
    directions = directions.to(x.dtype)
    total = x.new_zeros(())
    for number, direction in enumerate(directions):
        chosen = bootstrap(x, y) if drawn is None else drawn[number]
        px, py = (x @ direction)[chosen], (y @ direction)[chosen]
        total = total + (px.sort().values - py.sort().values).abs().mean()
    return total / len(directions)


def host_part(x: Tensor, y: Tensor, directions: Tensor) -> Tensor:
    """What of the loss the host does: drawing the indices and copying them, [L, min(n, m)]."""
    drawn = torch.empty(len(directions), min(len(x), len(y)), dtype=torch.int64, device=x.device)
    for row in drawn:
        row.copy_(bootstrap(x, y))
    return drawn


def rotation() -> Tensor:
    """A uniform rotation [3, 3], by a quaternion drawn on the host."""
    drawn = np.random.normal(size=4)
    w, x, y, z = (drawn / np.linalg.norm(drawn)).tolist()
    return torch.tensor(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def published_loss(
    pixels: Tensor,
    reference: Tensor,
    rotations: Iterable[Tensor] | None = None,
    resample: bool = True,
) -> Tensor:
    """``loss``, summed over the axes of rotations and averaged over these, as the loop has it.

    Otherwise than in ``loss``, indices are drawn by NumPy, as published, which takes more than
    four times as long as drawing them by PyTorch, and are copied for each of the two sets.

    Args:
        pixels, reference: [n, 3], [m, 3].
        rotations: [3, 3] each, of which the rows are directions; None for ten random ones.
        resample: by a bootstrap; without it, there must be as many of one as of the other.
    """
    if rotations is None:
        rotations = (rotation() for _ in range(ROTATIONS))
    fewer = min(len(pixels), len(reference))
    total, count = 0.0, 0
    for one in rotations:
        turn = one.to(pixels.device).to(pixels.dtype).T
        both = pixels @ turn, reference @ turn
        for axis in range(3):
            ours, theirs = (some[:, axis] for some in both)
            if resample:
                chosen = np.random.randint(0, fewer, fewer)
                ours, theirs = ours[chosen], theirs[chosen]
            total = total + (ours.sort().values - theirs.sort().values).abs().mean()
        count += 1
    return total / count


def vectorized_loss(pixels: Tensor, reference: Tensor, rotations: Tensor | None = None) -> Tensor:
    """The same without the bootstrap, by one matrix product and one sort for each set, and without
    the host: what is left to do about it in PyTorch.

    Of a reference with another count of pixels than the picture's as many quantiles are taken.
    """
    if rotations is None:
        rotations = random_rotations(ROTATIONS, 3, device=pixels.device)
    directions = rotations.flatten(0, 1).to(pixels.dtype)
    ours, theirs = ((directions @ some.T).sort(1).values for some in (pixels, reference))
    count, there = ours.shape[1], theirs.shape[1]
    if count != there:
        ranks = (torch.arange(count, device=theirs.device, dtype=torch.float64) + 0.5) * there
        theirs = theirs[:, (ranks / count).long()]
    return (ours - theirs).abs().mean(1).sum() / len(rotations)


# ---------------------------------------------------------------------------------------------
# The loop


@dataclass(frozen=True)
class Texts:
    """What the UNet is told: rows of the negative prompt and of the prompt."""

    context: Tensor  # [2, tokens, width]
    added: dict[str, Tensor] = field(default_factory=dict)  # SDXL's, of two rows each

    def row(self, number: int) -> Texts:
        some = slice(number, number + 1)
        return Texts(self.context[some], {name: one[some] for name, one in self.added.items()})


def encoded(pipe: Any, prompt: str, negative_prompt: str | None, height: int, width: int) -> Texts:
    """Of a StableDiffusionPipeline or a StableDiffusionXLPipeline."""
    device = pipe.unet.device
    with torch.no_grad():
        found = pipe.encode_prompt(
            prompt=prompt, device=device, num_images_per_prompt=1, do_classifier_free_guidance=True,
            negative_prompt=negative_prompt,
        )  # fmt: skip
        context = torch.cat([found[1], found[0]])
        if pipe.unet.config.addition_embed_type != "text_time":
            return Texts(context)
        pooled = torch.cat([found[3], found[2]])
        ids = pipe._get_add_time_ids(
            (height, width), (0, 0), (height, width), dtype=context.dtype,
            text_encoder_projection_dim=pooled.shape[-1],
        )  # fmt: skip
    return Texts(context, {"text_embeds": pooled, "time_ids": ids.to(device).repeat(2, 1)})


def guided_step(
    pipe: Any,
    x: Tensor,
    t: Tensor,
    texts: Texts,
    reference: Tensor,
    *,
    inner_steps: int = 8,
    learning_rate: float = 100.0,
    loss: Loss = published_loss,
    normalize: bool = False,
    sides: tuple[int, int] | None = None,
    overhead: bool = False,
) -> Tensor:
    """The control u that a guided step adds to the sample, by gradient descent from 0.

    Args:
        pipe: whatever has ``unet``, ``vae`` and, as ``scheduler``, a DDIMScheduler that has its
            time steps set. (Others count their steps, and would count each iteration.)
        x: the sample [1, C, h, w] at time step t.
        texts: of which the prompt's row is used.
        reference: pixels [m, 3] in [0, 1], on the sample's device and in its dtype.
        inner_steps, learning_rate: of the descent.
        loss: ``published_loss``, ``vectorized_loss``, or one of your own.
        normalize: divide the gradient by its standard deviation.
        sides: the clean latents are resized to a random square before they are decoded; its side
            is the first of these or more, and less than the second.
        overhead: also do what the SDXL script does to no effect: means and covariances of 10,000
            pixels in each iteration; and afterwards collect garbage and give free GPU memory back,
            which the next iterations must ask for anew.
    """
    u = torch.zeros_like(x)
    for _ in range(inner_steps):
        side = None if sides is None else int(np.random.randint(*sides))
        how = learning_rate, loss, normalize, side, overhead
        u = inner_step(pipe, x, u, t, texts, reference, *how)
    if overhead:
        gc.collect()
        torch.cuda.empty_cache()
    return u


def inner_step(
    pipe: Any,
    x: Tensor,
    u: Tensor,
    t: Tensor,
    texts: Texts,
    reference: Tensor,
    learning_rate: float,
    loss: Loss,
    normalize: bool = False,
    side: int | None = None,
    overhead: bool = False,
) -> Tensor:
    """u after one iteration of ``guided_step``."""
    u = u.detach().requires_grad_()
    moved = x.detach() + u
    noise = predicted(pipe, moved, t, texts.row(1))
    # A whole step for the clean latents alone.
    clean = pipe.scheduler.step(noise, t, moved).pred_original_sample.to(x.dtype)
    if side is not None:
        clean = F.interpolate(clean, (side, side), mode="bicubic")
    image = pipe.vae.decode(clean / pipe.vae.config.scaling_factor, return_dict=False)[0]
    pixels = (image / 2 + 0.5).clamp(0, 1)[0].flatten(1)
    if overhead:
        chosen = np.random.randint(0, pixels.shape[1], 10_000)
        for some in (pixels, reference.T):
            some[:, chosen].mean(1)
            some[:, chosen].cov()
    (grad,) = torch.autograd.grad(loss(pixels.T, reference), u)
    if normalize:
        grad = grad / grad.std()
    return u.detach() - learning_rate * grad


def predicted(pipe: Any, x: Tensor, t: Tensor, texts: Texts) -> Tensor:
    return pipe.unet(
        x, t, encoder_hidden_states=texts.context, added_cond_kwargs=texts.added or None,
        return_dict=False,
    )[0]  # fmt: skip


@torch.no_grad()
def step(
    pipe: Any,
    x: Tensor,
    t: Tensor,
    texts: Texts,
    guidance_scale: float = 5.0,
    *,
    guided: bool = False,
    apart: bool = False,
) -> Tensor:
    """The sample after a step of the scheduler from x, which is x + u after guidance.

    Args:
        guided: what SDXL is told besides the text is then the prompt's for both rows, as published:
            the inner loop leaves the dictionary so.
        apart: predict for the two prompts in two calls of the UNet, as the SD 1.5 script does.
    """
    if guided:
        texts = Texts(texts.context, texts.row(1).added)
    if apart:
        empty, asked = (predicted(pipe, x, t, texts.row(number)) for number in range(2))
    else:
        empty, asked = predicted(pipe, torch.cat([x, x]), t, texts).chunk(2)
    noise = empty + guidance_scale * (asked - empty)
    return pipe.scheduler.step(noise, t, x, return_dict=False)[0]


def decoded(pipe: Any, x: Tensor) -> Tensor:
    """The picture [1, 3, H, W] in [0, 1]. Published with a graph for gradients, as guidance is."""
    image = pipe.vae.decode(x / pipe.vae.config.scaling_factor, return_dict=False)[0].detach()
    return (image.float() / 2 + 0.5).clamp(0, 1)


def generate(
    pipe: Any,
    prompt: str,
    negative_prompt: str | None,
    reference: Tensor,
    *,
    steps: int = 30,
    guided_steps: int = 28,
    guidance_scale: float = 5.0,
    height: int | None = None,
    width: int | None = None,
    generator: torch.Generator | None = None,
    latents: Tensor | None = None,
    apart: bool = False,
    **guidance: Any,
) -> Tensor:
    """An image [1, 3, H, W] in [0, 1], of which the first ``guided_steps`` of ``steps`` are guided.

    Args:
        pipe: a StableDiffusionPipeline or a StableDiffusionXLPipeline with a DDIMScheduler.
        reference: an image [3, H, W] in [0, 1]; published is one of as many pixels as the picture.
        latents: noise, in the place of what ``generator`` draws.
        apart: as in ``step``.
        guidance: for ``guided_step``, such as ``**SDXL`` or ``**SD15``.
    """
    unet = pipe.unet
    device, dtype = unet.device, unet.dtype
    height, width = (
        side or unet.config.sample_size * pipe.vae_scale_factor for side in (height, width)
    )
    texts = encoded(pipe, prompt, negative_prompt, height, width)
    pipe.scheduler.set_timesteps(steps, device=device)
    x = pipe.prepare_latents(
        1, unet.config.in_channels, height, width, dtype, device, generator, latents
    )
    pixels = reference.flatten(1).T.to(device, dtype)
    for number, t in enumerate(pipe.scheduler.timesteps):
        guided = number < guided_steps
        if guided:
            x = x + guided_step(pipe, x, t, texts, pixels, **guidance)
        x = step(pipe, x, t, texts, guidance_scale, guided=guided, apart=apart)
    return decoded(pipe, x)
