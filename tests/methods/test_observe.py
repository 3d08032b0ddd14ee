from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

import sdcore
from tests import pipelines


def norm(values: torch.Tensor) -> float:
    return values.double().square().mean().sqrt().item()


@pytest.mark.parametrize("family", pipelines.FAMILIES)
def test_records_are_what_the_unet_got_and_said(tokens: Any, family: str) -> None:
    pipe = pipelines.pipeline(family, "ControlNet", tokens)
    before = pipelines.images(pipe, "ControlNet")
    seen = []
    hook = pipe.unet.register_forward_hook(
        lambda _, given, found: seen.append((given[0].clone(), given[1], found[0].clone()))
    )
    observe = sdcore.Observe()
    with sdcore.patch(pipe, observe):
        assert pipelines.images(pipe, "ControlNet").equal(before)
    hook.remove()
    assert len(observe.records) == len(seen) == pipelines.STEPS
    for number, (record, (sample, timestep, out)) in enumerate(
        zip(observe.records, seen, strict=True)
    ):
        product = pipe.scheduler.alphas_cumprod[timestep].item()
        assert record.index == number
        assert record.timestep == timestep
        assert record.alpha == pytest.approx(product**0.5, rel=1e-5)
        assert record.sigma == pytest.approx((1 - product) ** 0.5, rel=1e-5)
        assert (record.rows, record.guided) == (2, True)
        assert record.input_norm == pytest.approx(norm(sample), rel=1e-4)
        assert record.output_norm == pytest.approx(norm(out), rel=1e-4)
        assert record.guidance_norm == pytest.approx(norm(out[1] - out[0]), rel=1e-3)
        assert 0 < record.milliseconds < 60_000


def test_without_guidance_and_a_run_that_fails(tokens: Any) -> None:
    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    observe = sdcore.Observe()

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(ValueError, match="nothing was observed yet"):
        _ = observe.records
    with sdcore.patch(pipe, observe):
        with pytest.raises(KeyboardInterrupt):
            pipelines.images(pipe, "text-to-image", callback_on_step_end=stop)
        pipelines.images(pipe, "text-to-image", guidance_scale=1.0)
    assert [len(run) for run in observe.runs] == [1, pipelines.STEPS]
    assert all(one.rows == 1 and not one.guided for one in observe.records)
    assert all(one.guidance_norm == 0 for one in observe.records)


@pytest.mark.gpu
def test_times_on_a_gpu(tokens: Any) -> None:
    pipe = pipelines.pipeline("SD", "text-to-image", tokens).to("cuda")
    observe = sdcore.Observe()
    with sdcore.patch(pipe, observe):
        pipelines.images(pipe, "text-to-image")
    assert all(0 < one.milliseconds < 60_000 for one in observe.records)


def test_chart(tokens: Any, tmp_path: Path) -> None:
    from PIL import Image

    pipe = pipelines.pipeline("SD", "text-to-image", tokens)
    observe = sdcore.Observe()
    path = tmp_path / "chart.png"
    with pytest.raises(ValueError, match="nothing was observed yet"):
        observe.chart(path)
    with sdcore.patch(pipe, observe):
        pipelines.images(pipe, "text-to-image")
    observe.chart(path)
    with Image.open(path) as image:
        assert image.width > image.height > 200
        assert len(image.convert("RGB").getcolors(1 << 20)) > 20
    first, second = tmp_path / "first.svg", tmp_path / "second.svg"
    with sdcore.patch(pipe, observe):
        pipelines.images(pipe, "text-to-image", guidance_scale=1.0)
    observe.chart(first, run=0)
    observe.chart(second)
    assert first.read_text().count("<path") > 5
    assert first.read_text() != second.read_text()
