import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sdcore.embedded import reader, world

pytest.importorskip("safetensors")


def seen(**changes: object) -> reader.Seen:
    one = reader.Seen("circle", "red", "plain", "plain", 0.5, 0.5, 0.2, {"style": 0.9})
    return replace(one, **changes)


@pytest.mark.parametrize("style", world.STYLES)
def test_renders_are_read_right(style: str) -> None:
    scenes = world.scenes(100, 77, style=style, held_out=True)
    readings = reader.read(world.render(scenes))
    verdicts = [reader.judge(*pair) for pair in zip(readings, scenes, strict=True)]
    for name in ("count", "colors", "shapes", "layout", "style"):
        assert sum(getattr(one, name) for one in verdicts) >= 95, name
    assert sum(one.all_right for one in verdicts) >= 93


def test_places_and_sizes() -> None:
    scenes = world.scenes(60, 78)
    for reading, one in zip(reader.read(world.render(scenes)), scenes, strict=True):
        if len(reading.things) != len(one.things):
            continue
        for thing in one.things:
            near = min(reading.things, key=lambda s, t=thing: math.hypot(s.x - t.x, s.y - t.y))
            assert math.hypot(near.x - thing.x, near.y - thing.y) < 0.04
            assert 0.7 * thing.radius < near.radius < 1.1 * thing.radius


def test_larger_pictures_are_read_alike() -> None:
    scenes = world.scenes(20, 79)
    small = reader.read(world.render(scenes))
    large = reader.read(world.render(scenes, size=256))
    alike = [
        [(a.shape, a.color) for a in one.things] == [(b.shape, b.color) for b in other.things]
        for one, other in zip(small, large, strict=True)
    ]
    assert sum(alike) >= 18


def test_what_is_none_of_the_shapes_is_told() -> None:
    """A circle and a square in one."""
    (one,) = world.scenes(1, 80, things=1)
    first = replace(one.things[0], shape="circle", color="red", texture="plain", x=0.4, y=0.5)
    first = replace(first, radius=0.2, rgb=world.COLORS["red"])
    second = replace(first, shape="square", x=0.6)
    ground = world.Background("plain", (0.9, 0.9, 0.9), (0.9, 0.9, 0.9), 0.0)
    (reading,) = reader.read(world.render([world.Scene((first, second), "single", ground)]))
    assert [thing.shape for thing in reading.things] == [reader.NONE]


def test_nothing_is_seen_where_nothing_is() -> None:
    for kind in world.BACKGROUNDS:
        grounds = [one for one in world.scenes(60, 81) if one.background.kind == kind][:8]
        bare = [replace(one, things=()) for one in grounds]
        readings = reader.read(world.render(bare))
        assert sum(reading.things == () for reading in readings) >= len(bare) - 1
    assert reader.read(torch.zeros(0, 3, 128, 128)) == []
    assert reader.read(torch.rand(1, 3, 128, 128))[0].style is None


def test_components_are_the_connected_parts() -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    found = torch.rand(4, 40, 50, generator=torch.Generator().manual_seed(0)) < 0.4
    for labels, mask in zip(reader.components(found), found, strict=True):
        expected, count = ndimage.label(mask.numpy(), ndimage.generate_binary_structure(2, 2))
        assert (labels > 0).equal(mask)
        pairs = set(zip(labels[mask].tolist(), expected[mask.numpy()].tolist(), strict=True))
        assert len(pairs) == count == len({a for a, _ in pairs})


@pytest.mark.parametrize(
    "changes, wrong",
    [
        ({}, None),
        ({"color": "blue"}, "colors"),
        ({"shape": "ring"}, "shapes"),
        ({"x": 0.95}, "layout"),
        ({"style": "ink", "certainty": {"style": 0.99}}, None),
    ],
)
def test_a_verdict_says_what_is_wrong(changes: dict[str, object], wrong: str | None) -> None:
    one = world.scenes(1, 82, things=2)[0]
    kinds = ({"shape": "circle", "color": "red"}, {"shape": "star", "color": "green"})
    things = tuple(replace(t, **kind) for t, kind in zip(one.things, kinds, strict=True))
    scene = replace(one, things=things, layout="left of")
    first, second = seen(x=0.2, **kinds[0]), seen(x=0.7, **kinds[1])
    reading = reader.Reading((second, replace(first, **changes)))  # in any order
    verdict = reader.judge(reading, scene)
    for name in ("colors", "shapes", "layout"):
        assert getattr(verdict, name) == (name != wrong), name
    assert verdict.all_right == (wrong is None)
    assert verdict.style == ("style" not in changes)


def test_another_number_of_things_is_all_wrong() -> None:
    one = world.scenes(1, 83, things=2)[0]
    verdict = reader.judge(reader.Reading((seen(),)), one)
    assert not (verdict.count or verdict.colors or verdict.shapes or verdict.layout)


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"floating point.*uint8"):
        reader.read(torch.zeros(1, 3, 128, 128, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]; got \[3, 128, 128\]"):
        reader.read(torch.zeros(3, 128, 128))


@pytest.mark.parametrize("content", ["cut", "other", "text"])
def test_a_damaged_or_foreign_file_is_refused(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "reader.safetensors"
    if content == "cut":
        path.write_bytes(reader.WEIGHTS.read_bytes()[:-1000])
    elif content == "other":
        save_file({"body.0.weight": torch.zeros(3)}, path)
    else:
        path.write_text("hello")
    monkeypatch.setattr(reader, "WEIGHTS", path)
    reader.classifier.cache_clear()
    try:
        with pytest.raises(ValueError, match="is not the reader's network"):
            reader.read(world.render(world.scenes(1, 0)))
    finally:
        reader.classifier.cache_clear()
