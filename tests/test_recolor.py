from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sdcore import images
from sdcore.ops import random_rotations, sliced_wasserstein
from sdcore.recolor import recolor


def photo(name: str, size: int = 72) -> Tensor:
    return images.fit(images.read(images.find(name)), size)


SOURCE, REFERENCE = photo("motorcycle"), photo("rocket")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Images this small gain nothing from threads, which on a busy machine wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def colors(image: Tensor) -> Tensor:
    return image.reshape(-1, 3).double()


def sliced(x: Tensor, y: Tensor) -> float:
    axes = random_rotations(16, 3, torch.Generator().manual_seed(7)).flatten(0, 1)
    return sliced_wasserstein(colors(x), colors(y), directions=axes).item()


def transport(x: Tensor, y: Tensor, power: int) -> float:
    """Exact transport between two point sets, for the cost |x − y| to the power."""
    ot = pytest.importorskip("ot")
    return ot.emd2([], [], (torch.cdist(x, y) ** power).numpy(), numItermax=10**7)


def sample(image: Tensor, count: int = 500) -> Tensor:
    return colors(image)[torch.randperm(image.numel() // 3)[:count]]


@pytest.mark.parametrize(
    ("source", "reference"), [(SOURCE, REFERENCE), (photo("china"), photo("flower"))]
)
def test_palette_arrives(source: Tensor, reference: Tensor) -> None:
    result = recolor(source, reference, steps=100)
    assert sliced(result, reference) < sliced(source, reference) / 100

    one, other = sample(reference, 1000).split(500)
    floor = transport(one, other, 1)
    assert transport(sample(source), one, 1) > 5 * floor
    assert transport(sample(result), one, 1) < 1.5 * floor


def test_colors_keep_their_order() -> None:
    """Pixels travel hardly further than the optimal transport between the palettes.

    That is what tells a natural picture from one whose colors cross: Adam with its usual
    settings also reaches the palette, and moves pixels half again as far.
    """
    result = recolor(SOURCE, REFERENCE, steps=100)
    traveled = (colors(result) - colors(SOURCE)).square().sum(-1).mean().item()
    everything = sample(SOURCE, 1000), sample(result, 1000)
    assert traveled < 1.1 * transport(*everything, 2)


def test_equal_colors_stay_equal_and_near_ones_near() -> None:
    source = (SOURCE * 31).round() / 31
    result = recolor(source, REFERENCE, steps=40)
    before, both = colors(source), torch.cat([colors(source), colors(result)], 1)
    assert both.unique(dim=0).shape[0] == before.unique(dim=0).shape[0] < before.shape[0]

    distance, partner = torch.cdist(colors(SOURCE), colors(SOURCE)).fill_diagonal_(1).min(1)
    result = colors(recolor(SOURCE, REFERENCE, steps=60))
    apart = (result - result[partner]).norm(dim=-1)[distance < 2 / 255]
    assert len(apart) > 100
    assert apart.median() < 1.5 / 255


def test_result_range_shape_and_arguments_unchanged() -> None:
    source, reference = SOURCE.clone().requires_grad_(), REFERENCE.clone()
    with torch.no_grad():
        result = recolor(source, reference, steps=8)
    assert result.shape == SOURCE.shape and result.dtype == torch.float32
    assert result.min() >= 0 and result.max() <= 1
    assert not result.requires_grad and source.grad is None
    assert torch.equal(source, SOURCE) and torch.equal(reference, REFERENCE)
    assert not torch.equal(result, SOURCE)


def test_stays_in_range_where_steps_overshoot() -> None:
    black_and_white = torch.rand(16, 16, 1).round().expand(-1, -1, 3)
    result = recolor(SOURCE, black_and_white, steps=12, learning_rate=3)
    assert result.min() >= 0 and result.max() <= 1


def test_repeatable_for_a_seed() -> None:
    first, again, other = (recolor(SOURCE, REFERENCE, steps=5, seed=s) for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    recolor(SOURCE, REFERENCE, steps=2)
    assert torch.equal(before, torch.get_rng_state())


def test_strides_do_not_matter() -> None:
    planes = SOURCE.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not planes.is_contiguous()
    expected = recolor(SOURCE, REFERENCE, steps=3)
    torch.testing.assert_close(recolor(planes, REFERENCE, steps=3), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    source, reference = SOURCE.to(dtype), REFERENCE.to(dtype)
    result = recolor(source, reference, steps=20)
    assert result.dtype == dtype
    expected = recolor(source.float(), reference.float(), steps=20)
    # Binning may tip a pixel into the next bin, so not to the last bit.
    assert (result.float() - expected).abs().mean() < 1e-4 + torch.finfo(dtype).eps


def test_exact_and_binned_agree() -> None:
    binned = recolor(SOURCE, REFERENCE, steps=20)
    exact = recolor(SOURCE, REFERENCE, steps=20, method="exact")
    assert (binned - exact).abs().mean() < 1e-3


def test_to_a_single_color() -> None:
    color = torch.tensor([0.9, 0.2, 0.4])
    result = recolor(SOURCE, color.expand(1, 1, 3), steps=60)
    # A bin is at most √3 / 4096 wide.
    torch.testing.assert_close(result, color.expand_as(result), atol=1e-3, rtol=0)


def test_own_palette_changes_nothing() -> None:
    torch.testing.assert_close(recolor(SOURCE, SOURCE, steps=5), SOURCE, atol=1e-5, rtol=0)


@pytest.mark.parametrize("directions", [1, 2, 3, 7])
def test_number_of_directions(directions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(*args: Any, **options: Any) -> Tensor:
        seen.append(options["directions"])
        return sliced_wasserstein(*args, **options)

    monkeypatch.setattr("sdcore.recolor.sliced_wasserstein", spy)
    recolor(SOURCE, REFERENCE, steps=2, directions=directions)
    assert [axes.shape for axes in seen] == [(directions, 3)] * 2
    assert not torch.equal(*seen)


def test_progress_is_told_each_step() -> None:
    told: list[tuple[int, float]] = []
    recolor(
        SOURCE, REFERENCE, steps=30, progress=lambda step, value: told.append((step, value.item()))
    )
    assert [step for step, _ in told] == list(range(1, 31))
    assert told[-1][1] < told[0][1] / 100


OUTSIDE = torch.full((2, 2, 3), 1.5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"source": "a.png"}, TypeError, "source must be a tensor; got str"),
        ({"source": torch.zeros(2, 2, 3, dtype=torch.uint8)}, TypeError, "source.*torch.uint8"),
        ({"reference": torch.zeros(3, 2, 2)}, ValueError, r"reference.*\[H, W, 3\].*\(3, 2, 2\)"),
        ({"reference": torch.zeros(0, 2, 3)}, ValueError, "reference.*at least one pixel"),
        ({"source": OUTSIDE}, ValueError, r"source must lie in \[0, 1\].*1.5"),
        ({"reference": OUTSIDE - 2}, ValueError, r"reference must lie in \[0, 1\].*-0.5"),
        ({"source": OUTSIDE * torch.nan}, ValueError, r"source must lie in \[0, 1\].*nan"),
        ({"reference": REFERENCE.to("meta")}, ValueError, "reference must be on.*cpu; got meta"),
        ({"steps": 0}, ValueError, "steps must be at least 1; got 0"),
        ({"steps": 2.0}, TypeError, "steps must be an int; got float"),
        ({"directions": -3}, ValueError, "directions must be at least 1; got -3"),
        ({"directions": True}, TypeError, "directions must be an int; got bool"),
        ({"seed": -1}, ValueError, "seed must be at least 0; got -1"),
        ({"seed": 1 << 64}, ValueError, "seed must be at most 18446744073709551615"),
        ({"learning_rate": 0}, ValueError, "learning_rate must be positive and finite; got 0"),
        ({"learning_rate": float("nan")}, ValueError, "learning_rate.*got nan"),
        ({"learning_rate": "fast"}, TypeError, "learning_rate must be a number; got str"),
        ({"method": "sinkhorn"}, ValueError, "method must be one of.*'sinkhorn'"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"source": SOURCE, "reference": REFERENCE} | change
    with pytest.raises(error, match=message):
        recolor(**arguments)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    source, reference = SOURCE.cuda(), REFERENCE.cuda()
    result = recolor(source, reference, steps=100)
    assert result.device == source.device
    assert sliced(result.cpu(), REFERENCE) < sliced(SOURCE, REFERENCE) / 100
