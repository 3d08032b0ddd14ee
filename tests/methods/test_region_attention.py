"""Regions: where phrases are found, what attends to what, and when."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from PIL import Image

import sdcore
from sdcore import Region, RegionAttention, embedded
from sdcore.methods.cross_attention import layers
from tests import pipelines
from tests.test_patching import leaves_no_trace

TEXT = "text-to-image"
LEFT, RIGHT, ALL = (0, 0, 0.5, 1), (0.5, 0, 1, 1), (0, 0, 1, 1)
KINDS = (TEXT, "image-to-image", "inpainting", "ControlNet")
# The pipelines' prompt: start, a red circle left of a blue square, end.
RED_CIRCLE, BLUE_SQUARE = [2, 3], [6, 7, 8]


@pytest.fixture(scope="module")
def shared(tokens: Any) -> dict[str, Any]:
    """Pipelines for tests that change nothing of them."""
    return {family: pipelines.pipeline(family, TEXT, tokens) for family in pipelines.FAMILIES}


@pytest.fixture
def pipe(shared: dict[str, Any]) -> Iterator[Any]:
    yield shared["SD"]
    sdcore.unpatch(shared["SD"])


def two(**options: Any) -> RegionAttention:
    return RegionAttention(
        Region("red circle", box=LEFT), Region("a blue square", box=RIGHT), **options
    )


def latents(pipe: Any, method: Any = None, kind: str = TEXT, **more: Any) -> Tensor:
    if method is None:
        return pipelines.images(pipe, kind, output_type="latent", **more)
    with sdcore.patch(pipe, method):
        return pipelines.images(pipe, kind, output_type="latent", **more)


class Spy:
    """Keeps what the cross-attentions of a UNet are given and give."""

    def __init__(self, pipe: Any, place: str = "") -> None:
        self.calls: list[tuple[str, Any, Tensor, Tensor, Tensor]] = []
        self.hooks = [
            part.register_forward_hook(self.hook(name), with_kwargs=True)
            for name, part in layers(pipe.unet).items()
            if name.startswith(place)
        ]

    def hook(self, name: str) -> Any:
        def keep(part: Any, args: Any, options: Any, out: Tensor) -> None:
            text = options["encoder_hidden_states"]
            self.calls.append((name, part, args[0].clone(), text.clone(), out.clone()))

        return keep

    def __enter__(self) -> Spy:
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()


def dense(part: Any, given: Tensor, text: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """What a cross-attention gives if each pixel weighs each token by weights [B, N, T]; and the
    probabilities, [B, N, T], the mean of the heads."""
    query, key, value = (
        (states @ linear.weight.mT).unflatten(-1, (part.heads, -1)).double()
        for states, linear in ((given, part.to_q), (text, part.to_k), (text, part.to_v))
    )
    scores = torch.einsum("bnhd,bthd->bhnt", query, key) / query.shape[-1] ** 0.5
    powers = weights[:, None].double() * scores.exp()
    probs = powers / powers.sum(-1, keepdim=True)
    out = torch.einsum("bhnt,bthd->bnhd", probs, value).flatten(2).float()
    return part.to_out[0](out), probs.mean(1)


def left_and_right(
    pixels: int, tokens: int, base: float, red: list[int], blue: list[int]
) -> Tensor:
    """[pixels, tokens]: the weights of ``two()``, of which no pixel lies in no region."""
    side = round(pixels**0.5)
    weights = torch.full((pixels, tokens), base)
    for pixel in range(pixels):
        in_left = pixel % side < side // 2
        for token in red:
            weights[pixel, token] = float(in_left)
        for token in blue:
            weights[pixel, token] = float(not in_left)
    return weights


# ---------------------------------------------------------------------------------------------
# What attends to what


@pytest.mark.parametrize("family", pipelines.FAMILIES)
@pytest.mark.parametrize("base", [1.0, 0.3, 0.0])
def test_every_layer_attends_as_the_formula_says(
    shared: dict[str, Any], family: str, base: float
) -> None:
    pipe = shared[family]
    with Spy(pipe) as spy:
        latents(pipe, two(base=base), num_images_per_prompt=2)
    assert len(spy.calls) == pipelines.STEPS * len(layers(pipe.unet))
    for _, part, given, text, out in spy.calls:
        weights = torch.ones(4, given.shape[1], text.shape[1])
        # The second half of the rows is the prompt's.
        weights[2:] = left_and_right(*weights.shape[1:], base, RED_CIRCLE, BLUE_SQUARE)
        expected, _ = dense(part, given, text, weights)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", [1.0, 0.3, 0.0])
def test_pixels_in_no_region_and_in_two(pipe: Any, base: float) -> None:
    """Phrases may share tokens as well."""
    method = RegionAttention(
        Region("red circle", box=(0, 0, 1, 0.5)),
        Region("circle left", box=(0.25, 0.25, 1, 0.75)),
        base=base,
    )
    with Spy(pipe) as spy:
        latents(pipe, method, guidance_scale=1.0)
    sizes = set()
    for _, part, given, text, out in spy.calls:
        count, side = given.shape[1], round(given.shape[1] ** 0.5)
        sizes.add(side)
        weights = torch.ones(1, count, text.shape[1])
        for pixel in range(count):
            x, y = (pixel % side + 0.5) / side, (pixel // side + 0.5) / side
            first, second = y < 0.5, x > 0.25 and 0.25 < y < 0.75
            weights[0, pixel] = base if first or second else 1.0
            weights[0, pixel, 2] = float(first)
            weights[0, pixel, 3] = float(first or second)
            weights[0, pixel, 4] = float(second)
        torch.testing.assert_close(out, dense(part, given, text, weights)[0], rtol=1e-4, atol=1e-5)
    assert sizes == {8, 4}


@pytest.mark.parametrize("family", pipelines.FAMILIES)
def test_phrases_encoded_alone(shared: dict[str, Any], family: str) -> None:
    """With a softmax of their own, in the prompt's rows; shared where regions overlap."""
    pipe, alone = shared[family], 0.4
    method = RegionAttention(
        Region("red circle", box=(0, 0, 1, 0.5)),
        Region("blue square", box=(0.25, 0.25, 1, 0.75)),
        alone=alone,
        keep_maps=True,
    )
    with Spy(pipe) as spy:
        latents(pipe, method, num_images_per_prompt=2)
    phrases = pipe.encode_prompt(
        ["red circle", "blue square"],
        device="cpu",
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
    )[0]
    assert len(spy.calls) == pipelines.STEPS * len(layers(pipe.unet))
    for _, part, given, text, out in spy.calls:
        count, side = given.shape[1], round(given.shape[1] ** 0.5)
        shares = torch.zeros(4, count, 2)
        for pixel in range(count):
            x, y = (pixel % side + 0.5) / side, (pixel // side + 0.5) / side
            holds = [y < 0.5, x > 0.25 and 0.25 < y < 0.75]
            for region in range(2):
                shares[2:, pixel, region] = alone * holds[region] / max(1, sum(holds))
        every = torch.ones(4, count, text.shape[1])
        expected = (1 - shares.sum(2, keepdim=True)) * dense(part, given, text, every)[0]
        for region, phrase in enumerate(phrases):
            own = dense(part, given, phrase.expand(4, -1, -1), every)[0]
            expected += shares[..., region, None] * own
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert [plane.shape for plane in method.maps] == 2 * [(2, 8, 8)]


def test_phrases_encoded_alone_skip_layers_as_the_prompt_does(
    shared: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, pipe = [], shared["SDXL"]
    encode = pipe.encode_prompt

    def spy(*args: Any, **options: Any) -> Any:
        asked.append(options.get("clip_skip"))
        return encode(*args, **options)

    monkeypatch.setattr(pipe, "encode_prompt", spy)
    latents(pipe, two(alone=0.5), clip_skip=1)
    latents(pipe, two(alone=0.5))
    assert asked == [1, 1, None, None]  # the phrases, and the prompt


def test_a_phrases_embedding_reaches_its_region_alone(pipe: Any) -> None:
    with torch.no_grad():
        embeds, negative = pipe.encode_prompt(pipelines.options(TEXT)["prompt"], "cpu", 1, True)
    changed = embeds.clone()
    changed[:, RED_CIRCLE] += 1
    method = RegionAttention(Region(RED_CIRCLE, box=LEFT), Region(BLUE_SQUARE, box=RIGHT))
    outs = []
    for given in (embeds, changed):
        options = {"prompt": None, "negative_prompt": None, "num_inference_steps": 1}
        with Spy(pipe, "down_blocks.1.") as spy:
            options |= {"prompt_embeds": given, "negative_prompt_embeds": negative}
            latents(pipe, method, **options)
        outs.append(spy.calls[0][-1][1].unflatten(0, (8, 8)))
    assert outs[0][:, 4:].equal(outs[1][:, 4:])
    assert (outs[0][:, :4] - outs[1][:, :4]).abs().amax(-1).min() > 1e-3


def test_words_and_their_positions_are_the_same(pipe: Any) -> None:
    with torch.no_grad():
        embeds, negative = pipe.encode_prompt(pipelines.options(TEXT)["prompt"], "cpu", 1, True)
        other, _ = pipe.encode_prompt("a star", "cpu", 1, True)
    method = RegionAttention(Region(RED_CIRCLE, box=LEFT), Region(BLUE_SQUARE, box=RIGHT))
    given = {"prompt": None, "prompt_embeds": embeds, "negative_prompt": None}
    assert latents(pipe, method, **given, negative_prompt_embeds=other).equal(latents(pipe, two()))
    assert not latents(pipe, method, **given, negative_prompt_embeds=negative).equal(
        latents(pipe, two())
    )


@pytest.mark.parametrize("family", pipelines.FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_regions_that_cover_all_change_nothing(tokens: Any, family: str, kind: str) -> None:
    pipe = pipelines.pipeline(family, kind, tokens)
    before = pipelines.images(pipe, kind)
    everywhere = (Region("red circle", box=ALL), Region("a blue square", mask=torch.ones(8, 8)))
    with sdcore.patch(pipe, RegionAttention(*everywhere)):
        torch.testing.assert_close(pipelines.images(pipe, kind), before, rtol=0, atol=2e-4)
    with sdcore.patch(pipe, two()):
        assert (pipelines.images(pipe, kind) - before).abs().max() > 2e-3


def test_base_is_continuous(pipe: Any) -> None:
    """A mask of bits at both ends, and an added one between them."""
    for end, near in ((1.0, 1 - 1e-6), (0.0, 1e-12)):
        at_end = latents(pipe, two(base=end))
        torch.testing.assert_close(latents(pipe, two(base=near)), at_end, rtol=0, atol=1e-3)
    low, middle, high = (latents(pipe, two(base=base)) for base in (0.0, 0.2, 1.0))
    assert (middle - high).norm() < (low - high).norm()
    assert (middle - low).norm() < (low - high).norm()


@pytest.mark.parametrize(("family", "kind"), [("SD", TEXT), ("SDXL", "ControlNet")])
def test_removed_without_a_trace(tokens: Any, family: str, kind: str) -> None:
    pipe = pipelines.pipeline(family, kind, tokens)
    handles = []
    leaves_no_trace(
        pipe,
        kind,
        lambda pipe: handles.append(sdcore.patch(pipe, two(alone=0.5, keep_maps=True))),
        lambda pipe: handles[0].remove(),
    )


def test_a_compiled_unet_is_masked_too_and_compiled_once(tokens: Any) -> None:
    pipe = pipelines.pipeline("SD", TEXT, tokens)
    plain, wanted = latents(pipe), latents(pipe, two())
    torch._dynamo.reset()
    pipe.unet.compile(backend="eager")
    try:
        assert latents(pipe).equal(plain)
        assert latents(pipe, two()).equal(wanted) and not wanted.equal(plain)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert latents(pipe, two()).equal(wanted)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
        assert latents(pipe).equal(plain)
    finally:
        torch._dynamo.reset()


def test_without_a_trace_also_after_an_error(pipe: Any) -> None:
    before = latents(pipe)
    processors = {name: id(part.processor) for name, part in layers(pipe.unet).items()}
    method = two(keep_maps=True)
    latents(pipe, method)
    maps = method.maps

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    last = list(layers(pipe.unet).values())[-2]
    hook = last.register_forward_hook(stop)
    with sdcore.patch(pipe, method), pytest.raises(KeyboardInterrupt):
        pipelines.images(pipe, TEXT)
    hook.remove()
    assert {name: id(part.processor) for name, part in layers(pipe.unet).items()} == processors
    assert latents(pipe).equal(before)
    assert method.maps is maps  # of the run before


# ---------------------------------------------------------------------------------------------
# Rows, layers, steps


def test_two_prompts_with_the_phrase_in_other_places(pipe: Any) -> None:
    """Each row as its prompt alone; two pictures of each."""
    prompts = ["a red circle left of a blue square", "left of a blue square a star red circle"]
    noise = torch.randn(4, 4, 16, 16)
    together = latents(
        pipe,
        two(),
        prompt=prompts,
        negative_prompt=["a star"] * 2,
        num_images_per_prompt=2,
        latents=noise,
    )
    for number, prompt in enumerate(prompts):
        rows = slice(2 * number, 2 * number + 2)
        alone = latents(
            pipe, two(), prompt=prompt, num_images_per_prompt=2, latents=noise[rows].clone()
        )
        torch.testing.assert_close(together[rows], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layers_wanted", ["up_blocks", ["down_blocks.2", "mid_block"], "callable"])
def test_layers(pipe: Any, layers_wanted: Any) -> None:
    prefixes = [layers_wanted] if isinstance(layers_wanted, str) else layers_wanted
    if layers_wanted == "callable":
        prefixes, layers_wanted = ["up_blocks.1"], lambda name: name.startswith("up_blocks.1.")
    with Spy(pipe) as spy:
        latents(pipe, two(layers=layers_wanted))
    masked_ones = set()
    for name, part, given, text, out in spy.calls:
        plain, _ = dense(part, given, text, torch.ones(2, given.shape[1], text.shape[1]))
        if (plain[1] - out[1]).abs().max() > 1e-4:
            masked_ones.add(name)
        assert plain[0].allclose(out[0], atol=1e-5)
    assert masked_ones == {
        name for name in layers(pipe.unet) if any(name.startswith(one) for one in prefixes)
    }


def acts_at(pipe: Any, method: RegionAttention, **more: Any) -> list[bool]:
    """At which calls of the UNet its first cross-attention is masked."""
    with Spy(pipe, "down_blocks.1.") as spy:
        latents(pipe, method, **more)
    found = []
    for _, part, given, text, out in spy.calls:
        plain, _ = dense(part, given, text, torch.ones(len(given), given.shape[1], text.shape[1]))
        found.append(bool((plain - out).abs().max() > 1e-4))
    return found


def test_start_and_end(pipe: Any) -> None:
    four = {"num_inference_steps": 4}
    assert acts_at(pipe, two(), **four) == [True] * 4
    assert acts_at(pipe, two(end=0.5), **four) == [True, True, False, False]
    assert acts_at(pipe, two(start=0.5), **four) == [False, False, True, True]
    assert acts_at(pipe, two(start=0.25, end=0.3), **four) == [False, True, False, False]
    method = two(start=0.9, keep_maps=True)
    assert latents(pipe, method).equal(latents(pipe))
    with pytest.raises(ValueError, match="there are no maps: they are kept with keep_maps=True"):
        _ = method.maps


def test_a_callback_that_ends_guidance(pipe: Any) -> None:
    """From then on, all rows are the prompt's."""

    def stop(pipe: Any, index: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if index == 0:
            pipe._guidance_scale = 1.0
            given["prompt_embeds"] = given["prompt_embeds"].chunk(2)[1]
        return given

    method = two(keep_maps=True)
    options = {
        "callback_on_step_end": stop,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
        "num_images_per_prompt": 2,
    }
    with Spy(pipe) as spy:
        latents(pipe, method, **options)
    assert [len(call[2]) for call in spy.calls] == [4] * 7 + [2] * 14
    for _, part, given, text, out in spy.calls:
        weights = torch.ones(len(given), given.shape[1], text.shape[1])
        weights[-2:] = left_and_right(*weights.shape[1:], 1.0, RED_CIRCLE, BLUE_SQUARE)
        expected, _ = dense(part, given, text, weights)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert [tuple(one.shape) for one in method.maps] == [(2, 8, 8)] * 2


def test_one_object_on_two_pipelines(shared: dict[str, Any]) -> None:
    """Of other sizes, one after the other: nothing of a run stays."""
    method = two()
    tall = {"height": 96, "width": 64}
    expected = [latents(shared["SD"], two()), latents(shared["SDXL"], two(), **tall)]
    with sdcore.patch(shared["SD"], method), sdcore.patch(shared["SDXL"], method):
        for _ in range(2):
            assert latents(shared["SD"]).equal(expected[0])
            assert latents(shared["SDXL"], **tall).equal(expected[1])
    assert "masks" not in vars(method)


# ---------------------------------------------------------------------------------------------
# Maps


def mean_maps(spy: Spy, pictures: int, places: list[tuple[list[int], list[int]]]) -> Tensor:
    """[2, pictures, side, side], of ``two()`` and the calls of the two largest resolutions."""
    sides = sorted({round(call[2].shape[1] ** 0.5) for call in spy.calls})[-2:]
    largest, found = (sides[-1], sides[-1]), []
    for _, part, given, text, _ in spy.calls:
        side = round(given.shape[1] ** 0.5)
        if side not in sides:
            continue
        weights = torch.ones(len(given), given.shape[1], text.shape[1])
        for row in range(pictures):
            seen = left_and_right(*weights.shape[1:], 1.0, *places[row])
            weights[row - pictures] = seen
        probs = dense(part, given, text, weights)[1][-pictures:]
        planes = torch.stack(
            [
                torch.stack([probs[row][:, places[row][one]].sum(1) for row in range(pictures)])
                for one in (0, 1)
            ]
        ).unflatten(-1, (side, side))
        found.append(torch.nn.functional.interpolate(planes, largest, mode="bilinear"))
    return torch.stack(found).mean(0).float()


@pytest.mark.parametrize("family", pipelines.FAMILIES)
def test_maps(shared: dict[str, Any], family: str) -> None:
    pipe = shared[family]
    method = two(keep_maps=True)
    with Spy(pipe) as spy:
        latents(
            pipe,
            method,
            prompt=[
                "a red circle left of a blue square",
                "left of a blue square a star red circle",
            ],
            negative_prompt=["a star"] * 2,
            num_images_per_prompt=2,
        )
    expected = mean_maps(spy, 4, [(RED_CIRCLE, BLUE_SQUARE)] * 2 + [([8, 9], [3, 4, 5])] * 2)
    assert [one.shape for one in method.maps] == [(4, 8, 8)] * 2
    for found, wanted in zip(method.maps, expected, strict=True):
        assert found.device.type == "cpu"
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert found.min() >= 0 and 0.01 < found.max() <= 1


def test_maps_of_the_two_largest_resolutions_of_three(tokens: Any) -> None:
    pipe = pipelines.pipeline("SD", TEXT, tokens)
    config = {name: value for name, value in pipe.unet.config.items() if name[0] != "_"}
    config["down_block_types"] = ("CrossAttnDownBlock2D",) * 3
    pipe.unet = type(pipe.unet).from_config(config).eval()
    method = two(keep_maps=True, end=0.5)
    with Spy(pipe) as spy:
        latents(pipe, method, num_inference_steps=2)
    spy.calls = spy.calls[: len(spy.calls) // 2]  # the step in which it acts
    assert {call[2].shape[1] for call in spy.calls} == {256, 64, 16}
    expected = mean_maps(spy, 1, [(RED_CIRCLE, BLUE_SQUARE)])
    torch.testing.assert_close(torch.stack(method.maps), expected, rtol=1e-4, atol=1e-5)


def test_maps_in_a_region_without_the_rest_are_whole(pipe: Any) -> None:
    """Of a picture that is wider than high."""
    method = two(base=0.0, layers="up_blocks.1", keep_maps=True)
    latents(pipe, method, width=96)
    expected = torch.zeros(1, 8, 12)
    expected[..., :6] = 1
    torch.testing.assert_close(method.maps[0], expected)
    torch.testing.assert_close(method.maps[1], 1 - expected)


def test_no_maps_unless_asked(pipe: Any) -> None:
    method = two()
    latents(pipe, method)
    with pytest.raises(ValueError, match="there are no maps"):
        _ = method.maps


def test_maps_change_no_picture(pipe: Any) -> None:
    assert latents(pipe, two(keep_maps=True)).equal(latents(pipe, two()))


# ---------------------------------------------------------------------------------------------
# Phrases


def fails(pipe: Any, *regions: Region, match: str, **given: Any) -> None:
    """Before anything runs."""

    def reached(*_: Any) -> None:
        raise AssertionError("the text encoder ran")

    hook = pipe.text_encoder.register_forward_hook(reached)
    try:
        with (
            sdcore.patch(pipe, RegionAttention(*regions)),
            pytest.raises((ValueError, TypeError), match=match),
        ):
            pipelines.images(pipe, TEXT, **given)
    finally:
        hook.remove()


def test_phrases_that_are_not_there(pipe: Any) -> None:
    for phrase in ("green", "circle red", "squ", "a red circle left of a blue square a"):
        fails(
            pipe,
            Region(phrase, box=ALL),
            match=rf"the phrase '{phrase}' is not in the prompt, whose tokens are .* red</w>",
        )
    fails(
        pipe,
        Region("red circle", box=ALL),
        prompt=["a red circle", "a blue square"],
        negative_prompt=["", ""],
        match="'red circle' is not in the prompt, whose tokens are .* a</w> blue</w> square</w>",
    )


def test_phrases_are_whole_words(pipe: Any) -> None:
    """ "art" begins "arty", and is found where it stands alone."""
    fails(pipe, Region("art", box=ALL), prompt="some arty circle", match="is not in the prompt")
    method = RegionAttention(Region("Art", box=ALL), base=0.0, keep_maps=True)
    latents(pipe, method, prompt="some arty  ART ")
    assert method.maps[0].min() > 0.999


def test_phrases_that_are_there_twice(pipe: Any) -> None:
    fails(
        pipe,
        Region("a", box=ALL),
        match=r"the phrase 'a' is 2 times in the prompt '.*'; choose by occurrence=0 to 1",
    )
    fails(
        pipe,
        Region("a", box=ALL, occurrence=2),
        match=r"occurrence must be less than 2, .* 'a'; got 2",
    )
    for occurrence, place in ((0, 1), (1, 6)):
        words = RegionAttention(Region("a", box=LEFT, occurrence=occurrence))
        positions = RegionAttention(Region([place], box=LEFT))
        other = RegionAttention(Region([7 - place], box=LEFT))
        assert latents(pipe, words).equal(latents(pipe, positions))
        assert not latents(pipe, words).equal(latents(pipe, other))


def test_phrases_that_are_cut_off(pipe: Any) -> None:
    most = pipe.tokenizer.model_max_length
    filled = "a " * (most - 4)  # tokens 1 to most - 4
    region = Region("red circle", box=LEFT)
    assert acts_at(pipe, RegionAttention(region), prompt=filled + "red circle")[0]
    for more in ("a red circle", "a a red circle", "a a a a red circle"):
        fails(
            pipe,
            region,
            prompt=filled + more,
            match=rf"'red circle' is cut off: .* keeps tokens 1 to {most - 2}",
        )


def test_prompt_embeds(pipe: Any) -> None:
    embeds = torch.zeros(1, 40, 128)
    given = {"prompt": None, "negative_prompt": None, "prompt_embeds": embeds}
    given["negative_prompt_embeds"] = embeds
    fails(
        pipe,
        Region("red", box=ALL),
        match="the phrase 'red' can't be looked up in prompt_embeds; give the positions",
        **given,
    )
    fails(
        pipe,
        Region([3, 40], box=ALL),
        match=r"phrase must be positions of the prompt's 40 tokens, 0 to 39; got \(3, 40\)",
        **given,
    )
    fails(
        pipe,
        Region(range(20), box=LEFT),
        Region(range(20, 40), box=LEFT),
        match="the regions' phrases are all 40 tokens of the prompt",
        **given,
    )


def test_prompts_that_are_none(pipe: Any) -> None:
    match = "prompt must be a string or a list of strings; got"
    for prompt in (None, 3, [], [3]):
        fails(pipe, Region("red", box=ALL), prompt=prompt, match=match)
    words, pipe.tokenizer = pipe.tokenizer, None
    try:
        fails(pipe, Region("red", box=ALL), match="has no tokenizer")
    finally:
        pipe.tokenizer = words


def test_a_text_encoder_that_counts_otherwise(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As pipelines for long prompts do."""
    encode = type(pipe).encode_prompt

    def twice(self: Any, *args: Any, **options: Any) -> Any:
        return tuple(torch.cat([one, one], 1) for one in encode(self, *args, **options))

    monkeypatch.setattr(type(pipe), "encode_prompt", twice)
    with (
        sdcore.patch(pipe, two()),
        pytest.raises(ValueError, match="as 80 tokens, where its tokenizer gives 40"),
    ):
        pipelines.images(pipe, TEXT)


def test_the_two_texts_of_sdxl(shared: dict[str, Any]) -> None:
    pipe = shared["SDXL"]
    region = Region("red circle", box=LEFT)
    same = {"prompt": "a red circle", "prompt_2": "of red circle a star"}
    assert acts_at(pipe, RegionAttention(region), **same)[0]
    fails(
        pipe,
        region,
        prompt="a red circle",
        prompt_2="a star red circle",
        match=r"must be at one place for both tokenizers, .* tokens \[2, 3\] in 'a red circle' and "
        r"\[3, 4\] in 'a star red circle'",
    )
    fails(pipe, region, prompt_2="a star", match="is not in the prompt, whose tokens are .* star")
    fails(pipe, region, prompt_2=["red circle"] * 2, match="prompt_2 must be as many; got 1 and 2")


def test_sdxl_without_its_first_tokenizer(tokens: Any) -> None:
    """As the refiner: its only text is that of ``prompt``."""
    pipe = pipelines.pipeline("SDXL", TEXT, tokens)
    pipe.tokenizer = None
    given = {"prompt": "a star", "prompt_2": "a red circle"}
    fails(pipe, Region("red circle", box=ALL), **given, match="is not in the prompt, .* star</w>")


def test_textual_inversion(tokens: Any) -> None:
    """A word of three vectors shifts what comes after it."""
    pipe = pipelines.pipeline("SD", TEXT, copy.deepcopy(tokens))
    pipe.load_textual_inversion(torch.randn(3, 128), token="<dots>")
    prompt = {"prompt": "a <dots> left of a blue square"}
    for phrase, places in (("blue square", [8, 9]), ("a <dots>", [1, 2, 3, 4])):
        words = latents(pipe, RegionAttention(Region(phrase, box=LEFT)), **prompt)
        assert words.equal(latents(pipe, RegionAttention(Region(places, box=LEFT)), **prompt))
        assert not words.equal(latents(pipe, **prompt))


# ---------------------------------------------------------------------------------------------
# Regions


def test_inside() -> None:
    half = Region("a", box=(0.25, 0, 1, 0.5)).inside(4, 8)
    expected = torch.zeros(4, 8, dtype=torch.bool)
    expected[:2, 2:] = True
    assert half.equal(expected)
    # More than half of a pixel; half of it is too little.
    assert Region("a", box=(0, 0, 0.6, 1)).inside(1, 4).tolist() == [[True, True, False, False]]
    assert Region("a", box=(0, 0, 0.65, 1)).inside(1, 4).tolist() == [[True, True, True, False]]
    assert Region("a", box=(0, 0, 0.625, 1)).inside(1, 4).tolist() == [[True, True, False, False]]
    # A mask of which no side divides the other.
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[:, :3] = True
    found = Region("a", mask=mask).inside(2, 4)
    assert found.tolist() == [[True, True, False, False]] * 2
    assert (
        Region("a", mask=mask)
        .inside(6, 10)
        .equal(mask.repeat_interleave(2, 0).repeat_interleave(2, 1))
    )


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 8), (64, 40)])
def test_a_region_is_never_empty(size: tuple[int, int]) -> None:
    dot = torch.zeros(500, 500)
    dot[130, 410] = 1
    corner = (0.821, 0.26, 0.8212, 0.2601)
    at = int(0.2610 * size[0]), int(0.821 * size[1])
    for region in (Region("a", mask=dot), Region("a", box=corner)):
        found = region.inside(*size)
        assert found.sum() == 1
        assert found[at]
    # A line of which each pixel has as much stays one.
    line = Region("a", box=(0.5001, 0, 0.5002, 1)).inside(*size)
    assert line.sum() == size[0] and line[:, size[1] // 2].all()


def test_masks_of_every_kind(tmp_path: Any) -> None:
    inside = torch.zeros(6, 9, dtype=torch.bool)
    inside[1:4, 2:8] = True
    gray = Image.fromarray((inside.to(torch.uint8) * 255).numpy())
    clear = Image.new("RGBA", gray.size, (255, 255, 255, 255))
    clear.putalpha(gray)
    deep = Image.fromarray((inside.int() * 40000).numpy().astype("uint16"))
    gray.save(tmp_path / "mask.png")
    floats = inside.float() * 0.6 + 0.2
    every = [inside, inside[None], floats, floats[None].half(), gray, gray.convert("1"), clear]
    for mask in (*every, deep, tmp_path / "mask.png", str(tmp_path / "mask.png")):
        region = Region("a", mask=mask)
        assert region.mask.equal(inside)
    region = Region("a", mask=inside)
    inside[:] = True
    assert not region.mask.all()


def test_a_mask_of_another_shape(pipe: Any) -> None:
    wide = torch.ones(30, 40)
    with (
        sdcore.patch(pipe, RegionAttention(Region("red", mask=wide), start=0.9)),
        pytest.raises(ValueError, match="mask of 'red' is 40 × 30, and the latents are 16 × 16"),
    ):
        pipelines.images(pipe, TEXT)
    for near in (torch.ones(100, 101), torch.ones(101, 100)):
        latents(pipe, RegionAttention(Region("red", mask=near)))
    latents(pipe, RegionAttention(Region("red", mask=wide)), height=96, width=128)


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({}, TypeError, "either box or mask; got neither"),
        ({"box": ALL, "mask": torch.ones(2, 2)}, TypeError, "either box or mask; got both"),
        ({"box": (0.5, 0, 0.5, 1)}, ValueError, "0 ≤ left < right ≤ 1 .* got \\(0.5, 0, 0.5, 1\\)"),
        ({"box": (0, 0.7, 1, 0.2)}, ValueError, "0 ≤ top < bottom ≤ 1"),
        ({"box": (0, 0, 64, 64)}, ValueError, "box must be .* got \\(0, 0, 64, 64\\)"),
        ({"box": (-0.1, 0, 1, 1)}, ValueError, "box must be"),
        ({"box": (0, float("nan"), 1, 1)}, ValueError, "box must be"),
        ({"box": (0, 0, 1)}, ValueError, "box must be four numbers"),
        ({"box": "left"}, TypeError, "box must be four numbers"),
        ({"box": (0, 0, 1, True)}, TypeError, "box must be four numbers"),
        ({"box": 1}, TypeError, "box must be four numbers"),
        ({"mask": torch.zeros(2, 2)}, ValueError, "pixels inside; got 2 × 2 pixels, of which none"),
        ({"mask": torch.ones(3, 2, 2)}, ValueError, r"\[1, H, W\]; got \[3, 2, 2\]"),
        ({"mask": torch.ones(0, 2)}, ValueError, r"got \[0, 2\]"),
        ({"mask": 255 * torch.ones(2, 2)}, ValueError, r"in \[0, 1\]; got values from 255 to 255"),
        ({"mask": torch.full((2, 2), torch.nan)}, ValueError, "got values from nan"),
        ({"mask": torch.ones(2, 2).int()}, TypeError, "bool or floats .* got torch.int32"),
        ({"mask": [[1]]}, TypeError, "a tensor, an image of Pillow's or a path; got list"),
        ({"mask": "nowhere.png"}, ValueError, "nowhere.png"),
        ({"phrase": " ", "box": ALL}, ValueError, "phrase must hold a word; got ' '"),
        ({"phrase": [], "box": ALL}, ValueError, r"one position or more, from 0; got \[\]"),
        ({"phrase": [-1], "box": ALL}, ValueError, r"one position or more, from 0; got \[-1\]"),
        ({"phrase": ["red"], "box": ALL}, TypeError, "a string or a sequence of ints"),
        ({"phrase": 3, "box": ALL}, TypeError, "a string or a sequence of ints"),
        ({"box": ALL, "occurrence": -1}, ValueError, "occurrence must be 0 or more; got -1"),
        ({"box": ALL, "occurrence": 0.5}, TypeError, "occurrence must be an int or None; got 0.5"),
        ({"phrase": [1], "box": ALL, "occurrence": 0}, ValueError, "is for a phrase in words"),
    ],
)
def test_regions_that_are_none(given: dict[str, Any], error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        Region(**{"phrase": "red"} | given)


# ---------------------------------------------------------------------------------------------
# The method's arguments, and pipelines that it refuses


def test_62_regions(pipe: Any) -> None:
    """Each of a column and a position: all bits of the masks, and both ends of them."""
    region = [Region([2 + number % 30], box=LEFT) for number in range(61)]
    method = RegionAttention(*region, Region([35], box=RIGHT))
    with Spy(pipe) as spy:
        latents(pipe, method)
    _, part, given, text, out = spy.calls[0]
    weights = torch.ones(2, given.shape[1], text.shape[1])
    weights[1] = left_and_right(*weights.shape[1:], 1.0, list(range(2, 32)), [35])
    torch.testing.assert_close(out, dense(part, given, text, weights)[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="there must be 1 to 62 regions; got 63"):
        RegionAttention(*region, *region[:2])


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"base": 1.5}, ValueError, r"base must lie in \[0, 1\]; got 1.5"),
        ({"base": float("nan")}, ValueError, r"base must lie in \[0, 1\]; got nan"),
        ({"base": "1"}, TypeError, "base must be a number; got '1'"),
        ({"alone": -0.1}, ValueError, r"alone must lie in \[0, 1\]; got -0.1"),
        ({"start": -0.1}, ValueError, "start must lie"),
        ({"end": 2}, ValueError, "end must lie"),
        ({"start": 0.5, "end": 0.5}, ValueError, "start must be less than end; got 0.5 and 0.5"),
        ({"layers": 3}, TypeError, "layers must be None, the beginnings"),
        ({"layers": [3]}, TypeError, "layers must be None, the beginnings"),
        ({"layers": []}, ValueError, "layers must name one stage or more; got none"),
    ],
)
def test_arguments(given: dict[str, Any], error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        two(**given)


def test_what_does_not_go_with_alone() -> None:
    with pytest.raises(ValueError, match="alone is for phrases in words"):
        RegionAttention(Region([2, 3], box=LEFT), alone=0.5)
    with pytest.raises(
        ValueError, match=r"base must be 1 with alone, which hides nothing; got 0\.5"
    ):
        two(base=0.5, alone=0.5)


def test_regions_must_be_some() -> None:
    with pytest.raises(ValueError, match="1 to 62 regions; got 0"):
        RegionAttention()
    with pytest.raises(TypeError, match=r"regions must be objects of sdcore.Region; got 'red'"):
        RegionAttention("red")


def refuses(pipe: Any, method: RegionAttention, error: type, match: str) -> None:
    was = type(pipe)
    with pytest.raises(error, match=match):
        sdcore.patch(pipe, method)
    assert type(pipe) is was


def test_layers_that_are_not_there(pipe: Any) -> None:
    match = (
        "layers must name stages with cross-attention, down_blocks.1, down_blocks.2, up_blocks.0, "
        "up_blocks.1, mid_block, or parts of them; got "
    )
    for prefix in ("down_blocks.0", "up_block", "down_blocks.22"):
        refuses(pipe, two(layers=["mid_block", prefix]), ValueError, f"{match}'{prefix}'")
    refuses(pipe, two(layers=lambda name: False), ValueError, "layers must choose .* mid_block")


def test_processors_that_are_refused(tokens: Any) -> None:
    pipe = pipelines.pipeline("SD", TEXT, tokens)

    class IPAdapterAttnProcessor(torch.nn.Module):
        def forward(self, attn: Any, hidden_states: Tensor, *args: Any, **options: Any) -> Any:
            return hidden_states

    name, part = next(iter(layers(pipe.unet).items()))
    with sdcore.patch(pipe, two()):  # put on afterwards, it is met before a run
        plain = part.processor
        part.set_processor(IPAdapterAttnProcessor())
        with pytest.raises(TypeError, match="has an IP-Adapter, with which a mask can't"):
            pipelines.images(pipe, TEXT)
    refuses(pipe, two(), TypeError, f"{name} has an IP-Adapter")
    # Where it is not to mask, it doesn't matter.
    with sdcore.patch(pipe, two(layers="up_blocks")):
        pipelines.images(pipe, TEXT)
    del part._modules["processor"]
    part.processor = plain
    pipe.fuse_qkv_projections()
    refuses(pipe, two(), TypeError, f"{name} has fused projections")
    pipe.unfuse_qkv_projections()
    sdcore.patch(pipe, two()).remove()


def test_a_unet_without_cross_attention(tokens: Any) -> None:
    pipe = pipelines.pipeline("SD", TEXT, tokens)
    options = {
        "down_block_types": ("DownBlock2D",) * 3,
        "up_block_types": ("UpBlock2D",) * 3,
        "mid_block_type": "UNetMidBlock2D",
    }
    config = {name: value for name, value in pipe.unet.config.items() if name[0] != "_"}
    pipe.unet = type(pipe.unet).from_config(config | options)
    refuses(pipe, two(), TypeError, "UNet2DConditionModel has no cross-attention")


@pytest.mark.gpu
def test_phrases_alone_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    # TF32, in which convolutions are otherwise, alone moves these latents by 0.5.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    regions = Region("a red circle", box=(0, 0, 0.5, 1)), Region("a star", box=(0.5, 0, 1, 1))
    found = {}
    for device in ("cpu", "cuda"):
        pipe = embedded.load("v1", device=device)
        pipe.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 3, "output_type": "latent", "height": 64, "width": 64}
        for method in (None, RegionAttention(*regions, alone=0.4)):
            with contextlib.ExitStack() as stack:
                if method is not None:
                    stack.enter_context(sdcore.patch(pipe, method))
                generator = torch.Generator().manual_seed(0)
                image = pipe("a red circle and a star", generator=generator, **options).images
            found[device, method is None] = image.cpu()
    torch.testing.assert_close(found["cuda", False], found["cpu", False], rtol=2e-2, atol=2e-2)
    assert (found["cuda", False] - found["cuda", True]).abs().max() > 0.1
