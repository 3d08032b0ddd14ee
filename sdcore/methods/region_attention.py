"""Regions of a picture, each of which attends to its own phrase of the prompt."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from numbers import Integral, Real
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdcore.masks import RegionMask
from sdcore.methods.cross_attention import (
    CLAIM,
    Layer,
    Wanted,
    check_processor,
    layers,
    masked,
    side_of,
)
from sdcore.patching import Call, Method, Run

if TYPE_CHECKING:
    from PIL import Image

# A RegionMask has 64 bits: one is for the rest of the prompt, one for rows without a mask.
MOST_REGIONS = 62
# Above it more than half of a pixel is covered: shares are sums of fractions that were rounded.
HALF = 0.5 + 1e-9
# By how much a mask's ratio of width to height may differ from the picture's.
ASPECT = 0.02
# Of so many resolutions, the largest, maps are kept: further down a pixel stands for too much.
MAPPED = 2


@dataclass(frozen=True, eq=False)
class Region:
    """A part of the picture, and the phrase of the prompt that belongs to it.

    Args:
        phrase: words of the prompt, whole and as they follow each other there; or the positions of
            tokens in the encoded prompt, where 0 is the start token. A prompt that is given as
            ``prompt_embeds`` needs positions.
        box: (left, top, right, bottom), shares of width and height from the upper left corner.
        mask: in place of a box, what lies inside: a path or an image of Pillow's, where it is
            lighter than middle gray (laid on black where it is transparent), or a tensor [H, W] or
            [1, H, W] of bool or of floats in [0, 1], where it is greater than 0.5.
        occurrence: which one is meant, from 0, of several places where the prompt has the phrase.

    Raises:
        TypeError: an argument of the wrong type; both or neither of ``box`` and ``mask``.
        ValueError: values that the above rules out, or a mask in which nothing lies inside.
    """

    phrase: str | Sequence[int]
    _: KW_ONLY
    box: tuple[float, float, float, float] | None = None
    #: After construction, a tensor of bool [H, W] on the CPU.
    mask: Tensor | Image.Image | str | os.PathLike[str] | None = field(default=None, repr=False)
    occurrence: int | None = None

    def __post_init__(self) -> None:
        if (self.box is None) == (self.mask is None):
            given = "neither" if self.box is None else "both"
            raise TypeError(f"a Region takes either box or mask; got {given}")
        checked = {"phrase": _checked_phrase(self.phrase)}
        if self.box is not None:
            checked["box"] = _checked_box(self.box)
        else:
            checked["mask"] = _read_mask(self.mask)
        if self.occurrence is not None:
            _check_occurrence(self.occurrence, self.phrase)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def inside(self, height: int, width: int) -> Tensor:
        """[height, width], bool: where it covers more than half of a pixel of a picture of this
        size; or, if that is nowhere, where it covers the most of one."""
        if self.box is not None:
            left, top, right, bottom = self.box
            down, across = (top, bottom), (left, right)
            content = torch.ones(1, 1, dtype=torch.float64)
        else:
            assert isinstance(self.mask, Tensor)
            down, across = ([at / size for at in range(size + 1)] for size in self.mask.shape)
            content = self.mask.double()
        covered = _overlap(down, height) @ content @ _overlap(across, width).mT
        most = covered.max()
        return covered > HALF if most > HALF else covered > most * (1 - 1e-6)


class RegionAttention(Method):
    r"""Each region of the picture attends to its own phrase, and to no other region's.

    .. math::
        P_{nt} = \frac{g_{nt} \exp(S_{nt})}{\sum_u g_{nu} \exp(S_{nu})}, \quad
        g_{nt} = \begin{cases}
            1 & t \text{ is in the phrase of a region that holds } n \\
            0 & t \text{ is in phrases, of which no region holds } n \\
            \text{base} & t \text{ is in no phrase, and a region holds } n \\
            1 & t \text{ is in no phrase, and no region holds } n
        \end{cases}

    for pixel n and token t of the prompt in the cross-attention, with S its scores. Tokens in no
    phrase, "the rest", are the words between phrases and also the start, end and padding tokens.
    Where regions overlap, a pixel has the phrases of all. Rows of the negative prompt stay as they
    are.

    A text encoder mixes words: "owl" knows of the fox before it, and of where the prompt puts it.
    With ``alone`` nothing is hidden, and a pixel n in regions also attends to their phrases as the
    encoder gives them alone,

    .. math::
        O_n = (1 - \text{alone}) \operatorname{softmax}(Q_n K^T / \sqrt D) \, V + \text{alone} \cdot
        \operatorname{mean}_{r \ni n} \operatorname{softmax}(Q_n K_r^T / \sqrt D) \, V_r

    with K_r and V_r of the phrase of region r, and K and V of the prompt. ::

        method = sdcore.RegionAttention(
            sdcore.Region("a red fox", box=(0, 0, 0.5, 1)),
            sdcore.Region("a snowy owl", mask="owl.png"),
        )
        with sdcore.patch(pipe, method):
            pipe("a red fox and a snowy owl in a forest")

    Args:
        regions: 1 to 62 of :class:`Region`.
        base: how much the rest counts inside regions, in [0, 1]. With 1, the default, the attention
            is the pipeline's but for the phrases that are hidden. With 0 a region has its phrases
            alone, without the start token, at which most attention rests otherwise. Between 0 and
            1 it is added to the scores as a tensor [rows, 1, pixels, tokens] for each resolution; 0
            and 1 take a few bytes a pixel.
        alone: how much of a region is its phrases encoded alone, in [0, 1]; 0, the default, hides
            phrases instead. They must be words, and ``base`` 1. (Attention Couple's "base ratio" is
            1 less this.) All tokens, the prompt's and as many for each region, go through one
            ``masked_cross_attention``, whose kernels take up to 320.
        layers: which cross-attentions: None for all; parts of their names from the beginning, such
            as "mid_block" or ["down_blocks.2", "up_blocks"]; or a function that says it of a name.
        start, end: the shares of the run between which it acts, 0 ≤ start < end ≤ 1: in steps with
            start ≤ progress < end.
        keep_maps: whether :attr:`maps` are kept. This costs another attention for each.

    Works with pipelines of Stable Diffusion and SDXL, from text, from images, for inpainting and
    with ControlNet, several prompts and several pictures of each. SDXL's two tokenizers must agree
    on where a phrase is. A ControlNet's own attention is not changed, nor SDXL's pooled prompt.
    What the text encoder mixed stays mixed: a token knows of those before it, and the end and
    padding tokens of all.

    Raises:
        TypeError, ValueError: an argument that the above rules out. When it is put on, and again at
            each run: a UNet without cross-attention, ``layers`` that name none, an IP-Adapter,
            fused projections. Before a run: a phrase that the prompt has not, or has several times
            without ``occurrence``, or that is cut off where the tokenizer ends. At its first step:
            a mask of another shape than the picture, by more than 2 % in width to height.

    Cost: masks are made once in a run for each resolution, in O(regions · pixels). A UNet under
    ``torch.compile`` gives the same pictures, but its graph breaks at each masked layer.

    Related: Attention Couple and Regional Prompter, which give each region a prompt of its own.
    """

    claims = CLAIM
    inside_moves = True

    def __init__(
        self,
        *regions: Region,
        base: float = 1.0,
        alone: float = 0.0,
        layers: str | Sequence[str] | Callable[[str], bool] | None = None,
        start: float = 0.0,
        end: float = 1.0,
        keep_maps: bool = False,
    ) -> None:
        _check_regions(regions)
        for name, share in (
            ("base", base),
            ("alone", alone),
            ("start", start),
            ("end", end),
        ):
            _check_share(name, share)
        if not start < end:
            raise ValueError(f"start must be less than end; got {start} and {end}")
        if alone:
            _check_alone(regions, base)
        self.regions = regions
        self.base = float(base)
        self.alone = float(alone)
        self.span = float(start), float(end)
        self.layers = _checked_layers(layers)
        self.keep_maps = keep_maps
        self._maps: list[Tensor] = []

    @property
    def maps(self) -> list[Tensor]:
        """For each region, where the last run that ended well attended to its phrase: [pictures,
        h, w] of float32 on the CPU, in [0, 1].

        The probability of the phrase's tokens, summed, and the mean over heads, over the steps in
        which the method acted, and over its layers of the two largest resolutions. The smaller is
        enlarged to the other, bilinearly.

        Raises:
            ValueError: there are none.
        """
        if not self._maps:
            raise ValueError(
                "there are no maps: they are kept with keep_maps=True, by a run in which the "
                "method acts"
            )
        return self._maps

    def check(self, pipe: Any) -> None:
        self._names(pipe.unet)

    def begin(self, run: Run) -> None:
        state = run.of(self)
        state.names = self._names(run.pipe.unet)
        state.members = _members(self.regions, run.pipe, run.arguments)
        # Of any phrase in any of the prompts.
        state.tokens = state.members.any(2).any(0).nonzero()[:, 0].tolist()
        state.size = None
        state.wanted, state.sums = {}, {}
        state.phrases = _encoded(self.regions, run) if self.alone else None

    def denoise(self, call: Call, proceed: Callable[[Call], Tensor]) -> Tensor:
        state = call.run.of(self)
        if state.size is None:
            state.size = tuple(call.sample.shape[-2:])
            self._check_aspect(*state.size)
        if not self.span[0] <= call.progress < self.span[1]:
            return proceed(call)

        def wanted(layer: Layer) -> Wanted:
            found = self._wanted(state, call, layer)
            if not self.keep_maps:
                return found
            return replace(
                found,
                tokens=state.tokens,
                tell=lambda probs: _add(state, call.conditional, probs),
            )

        with masked(call.run.pipe.unet, state.names, wanted):
            return proceed(call)

    def end(self, run: Run, error: BaseException | None) -> None:
        state = run.of(self)
        if error is None:
            self._maps = list(_averaged(state.sums, state.size)) if state.sums else []

    def _names(self, unet: Any) -> list[str]:
        """Of the layers that are chosen and can be masked."""
        known = layers(unet)
        if not known:
            raise TypeError(f"{type(unet).__name__} has no cross-attention that could be masked")
        names = list(known)
        if callable(self.layers):
            names = [name for name in names if self.layers(name)]
            if not names:
                raise ValueError(f"layers must choose a cross-attention in {_stages(known)}")
        elif self.layers is not None:
            for prefix in self.layers:
                if not any(_under(name, prefix) for name in known):
                    raise ValueError(
                        f"layers must name stages with cross-attention, {_stages(known)}, or parts "
                        f"of them; got {prefix!r}"
                    )
            names = [name for name in names if any(_under(name, one) for one in self.layers)]
        for name in names:
            check_processor(name, known[name])
        return names

    def _check_aspect(self, height: int, width: int) -> None:
        for region in self.regions:
            if region.box is None:
                rows, columns = region.mask.shape
                if abs(columns * height / (rows * width) - 1) > ASPECT:
                    raise ValueError(
                        f"the mask of {region.phrase!r} is {columns} × {rows}, and the latents are "
                        f"{width} × {height}: their ratios of width to height must agree to 2 %"
                    )

    def _wanted(self, state: SimpleNamespace, call: Call, layer: Layer) -> Wanted:
        """Of the layer, from what was made before in this run if it is among that."""
        count, device = layer.hidden_states.shape[1], layer.hidden_states.device
        rows, own = len(call.sample), call.conditional
        key = count, rows, own.start, device
        if key not in state.wanted:
            height, width = side_of(count, *state.size)
            inside = [region.inside(height, width).flatten() for region in self.regions]
            members = _of_rows(state.members, own)
            if layer.text.shape[1] != members.shape[1]:
                raise ValueError(
                    f"the pipeline encoded the prompt as {layer.text.shape[1]} tokens, where its "
                    f"tokenizer gives {members.shape[1]}; so the phrases' positions are not known"
                )
            covers = torch.stack(inside, 1)
            if state.phrases is not None:
                found = _couple(state.phrases, covers, self.alone, members.shape[1], rows, own)
            else:
                make = _bits if self.base in (0, 1) else _bias
                found = Wanted(make(covers, members, self.base, rows, own, device))
            state.wanted[key] = found
        return state.wanted[key]


# ---------------------------------------------------------------------------------------------
# What a region is given


def _checked_phrase(phrase: Any) -> str | tuple[int, ...]:
    if isinstance(phrase, str):
        if not phrase.strip():
            raise ValueError(f"phrase must hold a word; got {phrase!r}")
        return phrase
    if not isinstance(phrase, Sequence) or any(
        isinstance(one, bool) or not isinstance(one, Integral) for one in phrase
    ):
        raise TypeError(
            f"phrase must be a string or a sequence of ints, positions of tokens; got {phrase!r}"
        )
    if len(phrase) == 0 or min(phrase) < 0:
        raise ValueError(f"phrase must be one position or more, from 0; got {phrase!r}")
    return tuple(int(one) for one in phrase)


def _check_occurrence(occurrence: Any, phrase: Any) -> None:
    if isinstance(occurrence, bool) or not isinstance(occurrence, Integral):
        raise TypeError(f"occurrence must be an int or None; got {occurrence!r}")
    if occurrence < 0:
        raise ValueError(f"occurrence must be 0 or more; got {occurrence}")
    if not isinstance(phrase, str):
        raise ValueError(f"occurrence is for a phrase in words; got {occurrence} with {phrase!r}")


def _checked_box(box: Any) -> tuple[float, ...]:
    if not isinstance(box, Sequence) or any(
        isinstance(one, bool) or not isinstance(one, Real) for one in box
    ):
        raise TypeError(f"box must be four numbers, (left, top, right, bottom); got {box!r}")
    if len(box) != 4:
        raise ValueError(f"box must be four numbers, (left, top, right, bottom); got {box!r}")
    left, top, right, bottom = (float(one) for one in box)
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise ValueError(
            "box must be (left, top, right, bottom) with 0 ≤ left < right ≤ 1 and "
            f"0 ≤ top < bottom ≤ 1; got {box!r}"
        )
    return left, top, right, bottom


def _read_mask(mask: Any) -> Tensor:
    """[H, W], bool, on the CPU."""
    if isinstance(mask, Tensor):
        found = _tensor_mask(mask)
    else:
        # Whoever has an image of Pillow's has imported Pillow; others may do without it.
        pillow = sys.modules.get("PIL.Image")
        is_path = isinstance(mask, (str, os.PathLike))
        if not is_path and (pillow is None or not isinstance(mask, pillow.Image)):
            raise TypeError(
                f"mask must be a tensor, an image of Pillow's or a path; got {type(mask).__name__}"
            )
        from sdcore import images

        with images.opened(Path(mask) if is_path else mask, str(mask) if is_path else "mask") as it:
            found = _picture_mask(it)
    if not found.any():
        raise ValueError(
            f"mask must have pixels inside; got {found.shape[1]} × {found.shape[0]} pixels, of "
            "which none is"
        )
    return found


def _tensor_mask(mask: Tensor) -> Tensor:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"mask must be bool or floats in [0, 1]; got {mask.dtype}")
    if mask.ndim not in (2, 3) or (mask.ndim == 3 and len(mask) != 1) or mask.numel() == 0:
        raise ValueError(f"mask must be [H, W] or [1, H, W]; got {list(mask.shape)}")
    flat = mask.detach().cpu().reshape(mask.shape[-2:])
    if flat.dtype == torch.bool:
        return flat.clone()
    low, high = (bound.item() for bound in flat.aminmax())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"mask must lie in [0, 1]; got values from {low:g} to {high:g}")
    return flat > 0.5


def _picture_mask(image: Image.Image) -> Tensor:
    import numpy as np

    from sdcore import images

    levels, white = images.gray_levels(image), 65535
    if levels is None:
        from PIL import Image

        layer = image.convert("RGBA")
        black = Image.new("RGBA", layer.size, "black")
        levels, white = np.asarray(Image.alpha_composite(black, layer).convert("L")), 255
    return torch.from_numpy(levels > white / 2)


def _overlap(edges: Sequence[float], count: int) -> Tensor:
    """[count, k]: of each of ``count`` equal parts of [0, 1], the share that lies between an edge
    and the next one of k + 1."""
    bounds = torch.arange(count + 1, dtype=torch.float64) / count
    at = torch.tensor(edges, dtype=torch.float64)
    low = torch.maximum(bounds[:-1, None], at[:-1])
    high = torch.minimum(bounds[1:, None], at[1:])
    return (high - low).clamp(min=0) * count


# ---------------------------------------------------------------------------------------------
# What the method is given


def _check_regions(regions: tuple[Any, ...]) -> None:
    for one in regions:
        if not isinstance(one, Region):
            raise TypeError(f"regions must be objects of sdcore.Region; got {one!r}")
    if not 1 <= len(regions) <= MOST_REGIONS:
        raise ValueError(f"there must be 1 to {MOST_REGIONS} regions; got {len(regions)}")


def _check_share(name: str, share: Any) -> None:
    if isinstance(share, bool) or not isinstance(share, Real):
        raise TypeError(f"{name} must be a number; got {share!r}")
    if not 0 <= share <= 1:
        raise ValueError(f"{name} must lie in [0, 1]; got {share}")


def _check_alone(regions: Sequence[Region], base: float) -> None:
    if base != 1:
        raise ValueError(f"base must be 1 with alone, which hides nothing; got {base}")
    for one in regions:
        if not isinstance(one.phrase, str):
            raise ValueError(
                f"alone is for phrases in words, which can be encoded; got positions {one.phrase}"
            )


def _checked_layers(given: Any) -> tuple[str, ...] | Callable[[str], bool] | None:
    if given is None or callable(given):
        return given
    prefixes = (given,) if isinstance(given, str) else given
    if not isinstance(prefixes, Sequence) or any(not isinstance(one, str) for one in prefixes):
        raise TypeError(
            "layers must be None, the beginnings of layers' names, or a function of a name; "
            f"got {given!r}"
        )
    if not prefixes:
        raise ValueError("layers must name one stage or more; got none")
    return tuple(prefixes)


def _under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def _stages(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(name.partition(".attentions.")[0] for name in names))


# ---------------------------------------------------------------------------------------------
# Where phrases are


def _members(regions: Sequence[Region], pipe: Any, arguments: dict[str, Any]) -> Tensor:
    """[prompts, tokens, regions], bool: the tokens of each region's phrase. Embeddings are taken
    for one prompt, since what is known of them is the same for all."""
    embeds = arguments.get("prompt_embeds")
    if embeds is None:
        prompts = _prompts(pipe, arguments)
        count = prompts[0][0][0].model_max_length
    else:
        prompts, count = [()], embeds.shape[1]
    found = torch.zeros(len(prompts), count, len(regions), dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        for column, region in enumerate(regions):
            found[row, _positions(pipe, region, prompt, count), column] = True
    if found.any(2).all(1).any():
        raise ValueError(
            f"the regions' phrases are all {count} tokens of the prompt; leave one to the rest, to "
            "which pixels in no region attend"
        )
    return found


def _prompts(pipe: Any, arguments: dict[str, Any]) -> list[tuple[tuple[Any, str], ...]]:
    """For each prompt, which tokenizers get which text: as SDXL's ``encode_prompt`` pairs them,
    also without its first tokenizer."""
    first = arguments.get("prompt")
    texts = []
    for text in (first, arguments.get("prompt_2") or first):
        rows = [text] if isinstance(text, str) else text
        if not isinstance(rows, list) or not rows or not all(isinstance(one, str) for one in rows):
            raise TypeError(f"prompt must be a string or a list of strings; got {text!r}")
        texts.append(rows)
    named = (getattr(pipe, name, None) for name in ("tokenizer", "tokenizer_2"))
    tokenizers = [one for one in named if one is not None]
    if not tokenizers:
        raise ValueError(
            f"this {type(pipe).__name__} has no tokenizer, so that it is not known where phrases "
            "are; give prompt_embeds, and phrases as positions of tokens"
        )
    texts = texts[: len(tokenizers)]
    if len(texts[0]) != len(texts[-1]):
        raise ValueError(
            f"prompt and prompt_2 must be as many; got {len(texts[0])} and {len(texts[-1])}"
        )
    return [tuple(zip(tokenizers, row, strict=True)) for row in zip(*texts, strict=True)]


def _positions(
    pipe: Any, region: Region, prompt: Sequence[tuple[Any, str]], count: int
) -> list[int]:
    """Of the phrase's tokens in this prompt, of which nothing is known if it came embedded."""
    if not isinstance(region.phrase, str):
        if max(region.phrase) >= count:
            raise ValueError(
                f"phrase must be positions of the prompt's {count} tokens, 0 to {count - 1}; "
                f"got {region.phrase}"
            )
        return list(region.phrase)
    if not prompt:
        raise ValueError(
            f"the phrase {region.phrase!r} can't be looked up in prompt_embeds; give the positions "
            "of its tokens instead, where 0 is the start token"
        )
    found = [_find(pipe, region, text, tokenizer) for tokenizer, text in prompt]
    if found[0] != found[-1]:
        raise ValueError(
            f"the phrase {region.phrase!r} must be at one place for both tokenizers, whose texts "
            f"lie side by side; got tokens {found[0]} in {prompt[0][1]!r} and {found[-1]} in "
            f"{prompt[-1][1]!r}"
        )
    return found[0]


def _find(pipe: Any, region: Region, text: str, tokenizer: Any) -> list[int]:
    phrase, most = region.phrase, tokenizer.model_max_length
    whole = _ids(pipe, text, tokenizer, special=True)
    part = _ids(pipe, phrase, tokenizer, special=False)
    size = len(part)
    places = range(len(whole) - size + 1) if part else ()
    starts = [at for at in places if whole[at : at + size] == part]
    if not starts:
        tokens = " ".join(tokenizer.convert_ids_to_tokens(whole))
        raise ValueError(f"the phrase {phrase!r} is not in the prompt, whose tokens are {tokens}")
    if region.occurrence is None and len(starts) > 1:
        raise ValueError(
            f"the phrase {phrase!r} is {len(starts)} times in the prompt {text!r}; choose by "
            f"occurrence=0 to {len(starts) - 1}, or make the phrase longer"
        )
    if (region.occurrence or 0) >= len(starts):
        raise ValueError(
            f"occurrence must be less than {len(starts)}, which is how often the prompt {text!r} "
            f"has the phrase {phrase!r}; got {region.occurrence}"
        )
    start = starts[region.occurrence or 0]
    # The last place is the end token's.
    if start + size > most - 1:
        raise ValueError(
            f"the phrase {phrase!r} is cut off: it ends at token {start + size - 1}, and this "
            f"{type(tokenizer).__name__} keeps tokens 1 to {most - 2}; make the prompt shorter"
        )
    return list(range(start, start + size))


def _ids(pipe: Any, text: str, tokenizer: Any, special: bool) -> list[int]:
    # A learned word of textual inversion may be several tokens.
    convert = getattr(pipe, "maybe_convert_prompt", None)
    if convert is not None:
        text = convert(text, tokenizer)
    return list(tokenizer(text, add_special_tokens=special, verbose=False).input_ids)


def _encoded(regions: Sequence[Region], run: Run) -> Tensor:
    """[regions, tokens, width]: each phrase as the pipeline encodes a prompt."""
    pipe = run.pipe
    options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    if run.arguments.get("clip_skip") is not None:
        options["clip_skip"] = run.arguments["clip_skip"]
    phrases = [str(region.phrase) for region in regions]
    with torch.no_grad():
        return pipe.encode_prompt(phrases, device=pipe._execution_device, **options)[0]


# ---------------------------------------------------------------------------------------------
# Masks and maps


def _of_rows(members: Tensor, own: slice) -> Tensor:
    """[rows of the prompts, tokens, regions]; rows of one prompt follow each other."""
    rows, prompts = own.stop - own.start, len(members)
    if rows % prompts:
        raise ValueError(f"the UNet was called with {rows} rows for {prompts} prompts")
    return members.repeat_interleave(rows // prompts, 0)


def _bits(
    inside: Tensor, members: Tensor, base: float, rows: int, own: slice, device: torch.device
) -> RegionMask:
    """With ``base`` 0 or 1. Two regions more: the rest, where it counts, and the whole picture,
    which has all tokens of rows without a mask."""
    every = torch.ones(len(inside), 1, dtype=torch.bool)
    outside = ~inside.any(1, keepdim=True)
    pixels = torch.cat([every if base else outside, every, inside], 1)
    tokens = torch.zeros(rows, members.shape[1], pixels.shape[1], dtype=torch.bool)
    tokens[:, :, 1] = True
    rest = ~members.any(2, keepdim=True)
    tokens[own] = torch.cat([rest, torch.zeros_like(rest), members], 2)
    return RegionMask.from_members(pixels[None].to(device), tokens.to(device))


def _bias(
    inside: Tensor, members: Tensor, base: float, rows: int, own: slice, device: torch.device
) -> Tensor:
    """[rows, 1, pixels, tokens]: the logarithm of the weights g."""
    shared = (inside.float() @ members.float().mT > 0).float()
    rest = (~members.any(2)).float()[:, None]
    weights = shared + rest * torch.where(inside.any(1), base, 1.0)[:, None]
    bias = torch.zeros(rows, 1, *weights.shape[1:])
    bias[own, 0] = weights.log()
    return bias.to(device)


def _couple(
    phrases: Tensor, inside: Tensor, alone: float, count: int, rows: int, own: slice
) -> Wanted:
    """The prompt of ``count`` tokens, and after it each region's phrase encoded alone, which has a
    softmax of its own, and weight in the prompt's rows and the region's pixels."""
    regions, each, _ = phrases.shape
    starts = range(count, count + regions * each, each)
    share = alone * inside / inside.sum(1, keepdim=True).clamp(min=1)  # [pixels, regions]
    weights = torch.zeros(rows, 1 + regions, len(inside))
    weights[:, 0] = 1
    weights[own] = torch.cat([1 - share.sum(1, keepdim=True), share], 1).mT
    return Wanted(
        None,
        phrases.flatten(0, 1).expand(rows, -1, -1),
        [(0, count), *((start, start + each) for start in starts)],
        weights.to(phrases.device),
    )


def _add(state: SimpleNamespace, own: slice, found: Tensor) -> None:
    """Adds a layer's probabilities of the phrases' tokens, [rows, pixels, tokens], to the sums."""
    members = _of_rows(state.members, own)[:, state.tokens].to(found.device, torch.float32)
    part = found[own].float() @ members
    total, count = state.sums.get(part.shape[1], (0, 0))
    state.sums[part.shape[1]] = total + part, count + 1


def _averaged(sums: dict[int, tuple[Tensor, int]], size: tuple[int, int]) -> Tensor:
    """[regions, pictures, h, w]: the mean over calls of the layers of the largest resolutions."""
    largest = sorted(sums, reverse=True)[:MAPPED]
    side = side_of(largest[0], *size)
    total: Tensor | float = 0.0
    for count in largest:
        planes = sums[count][0].mT.unflatten(2, side_of(count, *size))
        total = total + torch.nn.functional.interpolate(planes, side, mode="bilinear")
    mean = total / sum(sums[count][1] for count in largest)
    return mean.transpose(0, 1).cpu().clamp(0, 1)
