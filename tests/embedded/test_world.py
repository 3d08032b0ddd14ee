import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from sdcore.embedded import world


def test_scenes_are_the_same_for_a_seed() -> None:
    some = world.scenes(20, 7)
    assert some == world.scenes(20, 7)
    assert some != world.scenes(20, 8)
    # On every platform: what this seed gave when this was written.
    assert world.caption(some[0]) == "an orange circle"


@pytest.mark.parametrize("things, held_out", [(1, False), (1, True), (2, False), (2, True)])
def test_combinations_kept_from_training_are_drawn_only_when_asked(
    things: int, held_out: bool
) -> None:
    for one in world.scenes(200, 0, things=things, held_out=held_out):
        kinds = [(thing.shape, thing.color, thing.texture) for thing in one.things]
        assert world.is_held_out(kinds, one.layout) == held_out


def test_one_combination_in_twenty_is_kept_from_training() -> None:
    pairs = [
        world.is_held_out([(a, c, "plain"), (b, d, "dotted")], layout)
        for a in world.SHAPES
        for b in world.SHAPES
        for c in world.COLORS
        for d in world.COLORS
        for layout in world.RELATIONS
    ]
    assert 0.04 < sum(pairs) / len(pairs) < 0.06


def test_layout_says_where_things_are() -> None:
    for one in world.scenes(400, 1):
        places = [(thing.x, thing.y) for thing in one.things]
        if one.layout in world.RELATIONS:
            assert world.relation_of(*places) == one.layout
        for thing in one.things:
            for at in (thing.x, thing.y):
                assert thing.radius < at < 1 - thing.radius
        if one.layout in world.ROWS:
            expected = {"row": "left of", "column": "above"}[one.layout]
            assert all(world.relation_of(*pair) == expected for pair in pairwise(places))


@pytest.mark.parametrize("x, y, cell", [(0.1, 0.1, "top left"), (0.5, 0.5, "center")])
def test_cells(x: float, y: float, cell: str) -> None:
    assert world.cell_of(x, y) == cell
    assert world.cell_of(1.0, 0.5) == "right"


def test_captions_name_what_there_is() -> None:
    rng = random.Random(0)
    seen = set()
    for one in world.scenes(300, 2):
        for text in (world.caption(one), world.caption(one, rng)):
            for thing in one.things:
                assert any(word in text for word in world._COLOR_WORDS[thing.color]), text
                assert any(word in text for word in world._SHAPE_WORDS[thing.shape]), text
                if thing.texture != "plain":
                    assert any(w in text for w in world._TEXTURE_WORDS[thing.texture]), text
            assert "ink" not in text.split()
            seen.add(text)
        assert "ink" in world.caption(replace(one, style="ink"), rng)
    assert len(seen) > 400


def test_a_relation_told_from_the_other_side_is_the_opposite() -> None:
    one = world.scenes(1, 3, things=2)[0]
    first, second = (world._SHAPE_WORDS[thing.shape] for thing in one.things)
    rng = random.Random(1)
    turned = 0
    for _ in range(100):
        text = world.caption(one, rng)
        order = min(text.find(w) for w in first if w in text) < min(
            text.find(w) for w in second if w in text
        )
        relation = one.layout if order else world._OPPOSITES[one.layout]
        turned += not order
        assert any(word in text for word in world._RELATION_WORDS[relation]), (text, one.layout)
    assert 10 < turned < 60


def test_things_have_their_colors_and_stand_out() -> None:
    some = world.scenes(200, 4)
    pictures = world.render(some)
    assert pictures.shape == (200, 3, world.SIZE, world.SIZE)
    assert pictures.min() >= 0 and pictures.max() <= 1
    for one, picture, covered in zip(some, pictures, world.masks(some), strict=True):
        ground = picture[:, covered.sum(0) == 0]
        for thing, mask in zip(one.things, covered, strict=True):
            inside = picture[:, mask == 1]
            rgb = torch.tensor(thing.rgb)
            # Stripes and dots leave half of it in its own color.
            assert ((inside - rgb[:, None]).norm(dim=0) < 1e-3).float().mean() > 0.25
            assert (ground.mean(1) - rgb).norm() > 0.2


def test_shapes_have_the_areas_that_geometry_gives() -> None:
    """In units of the radius squared, by counting pixels of a large picture."""
    one = world.scenes(1, 5, things=1)[0]
    areas = {"circle": 2.835, "square": 2.56, "triangle": 1.432, "ring": 2.101, "cross": 1.92}
    areas["star"] = 10 * 0.5 * 0.45 * 0.58779
    for shape, area in areas.items():
        thing = replace(one.things[0], shape=shape, x=0.5, y=0.5, radius=0.3)
        (covered,) = world.masks([replace(one, things=(thing,))], size=512)
        assert covered.mean() / 0.09 == pytest.approx(area, rel=0.005)


def test_pictures_of_any_size_show_the_same() -> None:
    some = world.scenes(20, 6)
    small, large = world.render(some), world.render(some, size=4 * world.SIZE)
    shrunk = torch.nn.functional.avg_pool2d(large, 4)
    assert (small - shrunk).abs().mean() < 0.005


def test_pictures_do_not_depend_on_each_other() -> None:
    some = world.scenes(12, 8) + world.scenes(4, 8, style="ink")
    together = world.render(some)
    for one, picture in zip(some, together, strict=True):
        torch.testing.assert_close(world.render([one])[0], picture, rtol=0, atol=1e-6)


def test_outlines_follow_the_edges() -> None:
    some = world.scenes(30, 9)
    for covered, line in zip(world.masks(some), world.outlines(some), strict=True):
        partly = ((covered > 0.2) & (covered < 0.8)).any(0)
        assert (line[0][partly] > 0.3).all()
        inside = torch.nn.functional.avg_pool2d(covered[None], 7, 1, 3)[0].amax(0) == 1
        assert (line[0][inside] == 0).all()


def test_ink_is_paper_lines_and_hatching() -> None:
    some = world.scenes(30, 10, style="ink")
    paper = torch.tensor(world.PAPER)[:, None, None]
    for one, picture, covered in zip(some, world.render(some), world.masks(some), strict=True):
        line = world.outlines([one])[0, 0]
        ground = (covered.sum(0) == 0) & (line == 0)
        torch.testing.assert_close(picture[:, ground], paper[..., 0].expand(-1, int(ground.sum())))
        assert picture[:, line == 1].mean() < 0.12


def test_bad_arguments() -> None:
    rng = random.Random(0)
    with pytest.raises(ValueError, match="things must be 1, 2 or 3; got 4"):
        world.scene(rng, things=4)
    with pytest.raises(ValueError, match="style must be one of"):
        world.scene(rng, style="oil")


def test_nothing_to_render() -> None:
    assert world.render([]).shape == (0, 3, world.SIZE, world.SIZE)
    assert world.outlines([]).shape == (0, 1, world.SIZE, world.SIZE)
