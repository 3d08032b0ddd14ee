"""The published methods that benchmarks compare with, in our own words."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

import diffusers

from benchmarks.baselines import sw_guidance
from sdcore.ops import random_rotations
from tests import pipelines


@pytest.fixture(autouse=True)
def seeded() -> None:
    np.random.seed(0)


def reference() -> Tensor:
    picture = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(4))
    return picture * torch.tensor([1.0, 0.5, 0.2])[:, None, None]


def pixels(picture: Tensor) -> Tensor:
    return picture.flatten(-2).reshape(3, -1).T


# ---------------------------------------------------------------------------------------------
# The loss


def test_rotations() -> None:
    drawn = torch.stack([sw_guidance.rotation() for _ in range(400)])
    torch.testing.assert_close(drawn @ drawn.mT, torch.eye(3).expand(400, 3, 3))
    torch.testing.assert_close(torch.linalg.det(drawn), torch.ones(400))
    # Uniform: the images of an axis have mean 0, and covariance 1/3.
    assert drawn.mean(0).abs().max() < 0.15
    assert (drawn[:, 0].T.cov() - torch.eye(3) / 3).abs().max() < 0.1


@pytest.mark.parametrize("count", [40, 25])
def test_losses(count: int) -> None:
    """Both are the sum over axes and the mean over rotations of W_1, by a definition of its own:
    the area between two distribution functions."""
    x, y = torch.rand(40, 3).double(), torch.rand(count, 3).double() ** 2
    rotations = random_rotations(4, 3, dtype=torch.float64)
    wanted = 0.0
    for direction in rotations.flatten(0, 1):
        ours, theirs = x @ direction, y @ direction
        ends = torch.cat([ours, theirs]).sort().values
        shares = [(one[:, None] <= ends[:-1]).double().mean(0) for one in (ours, theirs)]
        wanted += float(((shares[0] - shares[1]).abs() * ends.diff()).sum()) / 4
    if count == 40:
        found = sw_guidance.published_loss(x, y, rotations, resample=False)
        assert float(found) == pytest.approx(wanted, rel=1e-9)
        close = 1e-9
    else:
        close = 0.1  # of as many quantiles as the picture has pixels
    assert float(sw_guidance.vectorized_loss(x, y, rotations)) == pytest.approx(wanted, rel=close)


def test_the_bootstrap_reads_the_first_rows_alone() -> None:
    x, y = torch.rand(50, 3, requires_grad=True), torch.rand(20, 3)
    sw_guidance.published_loss(x, y).backward()
    assert x.grad is not None
    moved = x.grad.abs().sum(1) > 0
    assert moved[:20].all() and not moved[20:].any()


# ---------------------------------------------------------------------------------------------
# The loop


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("normalize", [False, True])
def test_an_iteration_is_a_step_of_gradient_descent(
    tokens: Any, prediction: str, normalize: bool
) -> None:
    """Of a function that is written out."""
    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(
        pipe.scheduler.config, prediction_type=prediction
    )
    pipe.scheduler.set_timesteps(2)
    t = pipe.scheduler.timesteps[0]
    for part in (pipe.text_encoder, pipe.unet, pipe.vae):
        part.double()
    texts = sw_guidance.encoded(pipe, "a red circle", "a star", 64, 64)
    generator = torch.Generator().manual_seed(1)
    x, u = (torch.randn(1, 4, 16, 16, generator=generator).double() for _ in range(2))
    rotations = random_rotations(3, 3, generator=generator)
    loss = functools.partial(sw_guidance.published_loss, rotations=rotations, resample=False)
    points = pixels(reference()).double()
    options = {"learning_rate": 0.5, "loss": loss, "normalize": normalize}
    after = sw_guidance.inner_step(pipe, x, u, t, texts, points, **options)

    def at(u: Tensor) -> Tensor:
        products = pipe.scheduler.alphas_cumprod[t]
        alpha, sigma = products.sqrt(), (1 - products).sqrt()
        said = pipe.unet(x + u, t, texts.context[1:]).sample
        if prediction == "epsilon":
            clean = (x + u - sigma * said) / alpha
        else:
            clean = alpha * (x + u) - sigma * said
        image = pipe.vae.decode(clean / pipe.vae.config.scaling_factor).sample
        return loss(pixels((image / 2 + 0.5).clamp(0, 1)), points)

    wanted = u.clone().requires_grad_()
    (grad,) = torch.autograd.grad(at(wanted), wanted)
    if normalize:
        grad = grad / grad.std()
    # Diffusers' scheduler has its products, and the time step's embedding, in float32.
    torch.testing.assert_close(u - after, 0.5 * grad, rtol=1e-5, atol=1e-5 * float(grad.std()))


def test_sides_and_overhead(tokens: Any) -> None:
    """The decoder is given random squares; what the SDXL script does besides changes nothing but
    the random numbers."""
    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    pipe.scheduler.set_timesteps(2)
    t = pipe.scheduler.timesteps[0]
    texts = sw_guidance.encoded(pipe, "a red circle", "", 64, 64)
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    points = pixels(reference())
    seen: list[tuple[int, ...]] = []
    hook = pipe.vae.decoder.register_forward_pre_hook(
        lambda module, given: seen.append(tuple(given[0].shape[2:]))
    )
    sw_guidance.guided_step(pipe, x, t, texts, points, inner_steps=4, sides=(8, 12))
    hook.remove()
    assert len(seen) == 4 and len(set(seen)) > 1
    assert all(high == wide and 8 <= high < 12 for high, wide in seen)
    rotations = random_rotations(2, 3)
    loss = functools.partial(sw_guidance.vectorized_loss, rotations=rotations)
    with_it, without = (
        sw_guidance.guided_step(
            pipe, x, t, texts, points, inner_steps=2, loss=loss, overhead=overhead
        )
        for overhead in (True, False)
    )
    assert with_it.equal(without)


def test_what_sdxl_is_told_after_guidance(tokens: Any) -> None:
    """The prompt's summary for both rows: a defect that is kept."""
    pipe = pipelines.pipeline("SDXL", "text-to-image", tokens)
    pipe.scheduler.set_timesteps(2)
    texts = sw_guidance.encoded(pipe, "a red circle", "a star", 64, 64)
    x, t = torch.randn(1, 4, 16, 16), pipe.scheduler.timesteps[0]
    asked = {name: one[1:].expand(2, -1) for name, one in texts.added.items()}
    mixed = sw_guidance.Texts(texts.context, asked)
    found = sw_guidance.step(pipe, x, t, texts, guided=True)
    torch.testing.assert_close(found, sw_guidance.step(pipe, x, t, mixed), rtol=0, atol=1e-3)
    assert not torch.allclose(found, sw_guidance.step(pipe, x, t, texts), rtol=0, atol=5e-3)


@pytest.mark.parametrize(("family", "apart"), [("SD", True), ("SDXL", False)])
def test_without_guidance_it_is_the_pipeline(tokens: Any, family: str, apart: bool) -> None:
    pipe = pipelines.pipeline(family, "text-to-image", tokens)
    made = pipelines.options("text-to-image")
    options = {"steps": pipelines.STEPS, "guided_steps": 0, "height": 64, "width": 64}
    found = sw_guidance.generate(
        pipe, made["prompt"], made["negative_prompt"], reference(), **options, apart=apart,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    wanted = pipelines.images(pipe, "text-to-image", guidance_scale=5.0)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "guidance"),
    [
        ("SD", {"learning_rate": 1000.0}),
        ("SD", sw_guidance.SD15 | {"sides": (12, 16), "learning_rate": 0.2, "inner_steps": 2}),
        ("SD", {"learning_rate": 1000.0, "loss": sw_guidance.vectorized_loss}),
        ("SDXL", sw_guidance.SDXL | {"inner_steps": 2}),
    ],
)
def test_images_come_nearer_to_the_reference(
    tokens: Any, family: str, guidance: dict[str, Any]
) -> None:
    pipe = pipelines.pipeline(family, "text-to-image", tokens)
    rotations = random_rotations(32, 3, generator=torch.Generator().manual_seed(5))
    options = {"steps": 2, "guided_steps": 1, "height": 64, "width": 64, "inner_steps": 2}

    def distance(**more: Any) -> float:
        torch.manual_seed(0)
        image = sw_guidance.generate(
            pipe, "a red circle", "a star", reference(), **options | guidance | more,
            generator=torch.Generator().manual_seed(1),
        )  # fmt: skip
        assert image.shape == (1, 3, 64, 64)
        assert not image.requires_grad
        return float(sw_guidance.vectorized_loss(pixels(image), pixels(reference()), rotations))

    assert distance() < 0.97 * distance(guided_steps=0)
