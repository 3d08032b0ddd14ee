"""Gates, learned by a diffusion model's own loss, of which pixel attends to which token."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdcore import figures
from sdcore.masks import STE, GateMask
from sdcore.methods import cross_attention
from sdcore.methods.cross_attention import Layer, Wanted
from sdcore.patching import Call, Method, Run

FILE = "gated_attention.safetensors"
FORMAT = "sdcore.GatedAttention 1"
SHARED = ("stage", "all", "none")
# Where SDXL has its 50 cross-attentions of 32 × 32 pixels, at 1024² pixels.
SDXL_STAGES = ("down_blocks.2", "up_blocks.0")
PUBLISHED_FORMAT = "maskattn-sdxl-gates-v1"
PUBLISHED_MARK = ".processor.gate_head."
PUBLISHED_PARTS = {"feature_net": "phi", "token_net": "psi", "logit_bias": "bias"}
# Of a penalty, above which a closed token could still be seen next to open ones.
LEAST_PENALTY = -1e3
DRAWN_LAYERS = 8


class Head(nn.Module):
    """What one gate is made by; several layers may share it.

    Args:
        channels: width C of the pixels' hidden states.
        text: width E of the text embeddings.
        features: R, over which the product of the two goes; up to 256.
        hidden: width between the two linear layers.
        bias: where ``bias`` begins.
    """

    def __init__(self, channels: int, text: int, features: int, hidden: int, bias: float) -> None:
        super().__init__()
        self.phi, self.psi = (
            nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, hidden),
                nn.SiLU(),
                nn.Linear(hidden, features),
            )
            for width in (channels, text)
        )
        self.bias = nn.Parameter(torch.tensor(float(bias)))
        # So that z is the bias, whatever the input. With one of two factors zero, its own gradient
        # is not; the other's comes with the second step.
        nn.init.zeros_(self.psi[-1].weight)
        nn.init.zeros_(self.psi[-1].bias)

    @property
    def widths(self) -> tuple[int, int]:
        return self.phi[0].normalized_shape[0], self.psi[0].normalized_shape[0]


class GatedAttention(nn.Module, Method):
    r"""Learned gates on the cross-attention: MaskAttn-SDXL.

    A pixel attends to a token where the gate's z > 0, with

    .. math:: z_{nt} = \varphi(X)_n \cdot \psi(E)_t / \sqrt R + b

    and at least to the token of largest z. X [B, N, C] is what the layer's queries are made from,
    E [B, T, E] the text embeddings; :math:`\varphi` and :math:`\psi` are a LayerNorm, a linear
    layer, SiLU and a linear layer each. A gate holds for all heads of a layer, and for the negative
    prompt as for the prompt. Only the gates are trained, by the model's own loss::

        gates = sdcore.GatedAttention.for_unet(pipe.unet)
        pipe.unet.requires_grad_(False)
        optimizer = torch.optim.AdamW(gates.parameters(), lr=1e-4)
        with gates.attached(pipe.unet):
            for noisy, timestep, text, noise in batches:
                loss = (pipe.unet(noisy, timestep, text).sample - noise).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        gates.save_pretrained("gates")

    and then used::

        gates = sdcore.GatedAttention.from_pretrained("gates").to(pipe.device)
        with sdcore.patch(pipe, gates):
            pipe("a red cube left of a blue ball")

    A new one has all gates open, and leaves the pipeline's pictures as they are. The first step of
    an optimizer trains the last layer of psi, the second all parameters.

    The heads are computed in the dtype of their own parameters, float32 at first, also under
    autocast and whatever the UNet's dtype is; then phi and psi are cast to that of the attention.
    ``gates.half()`` makes heads as fast as a pipeline in float16 lets them be.

    Args:
        layers: the cross-attentions' names, and for each the number of its head.
        widths: of each head, (C, E).
        features: R, up to 256.
        hidden: width between a head's linear layers.
        ste: how the gradient comes through the threshold, see :class:`sdcore.masks.GateMask`.
            ``"multiplicative"`` lets closed gates open again; ``"additive"`` is as published.
        bias: where b begins, for each head. At 4, all gates are open.

    Attributes:
        layers: as above.
        heads: a :class:`Head` for each number.
        ste: as above.
        watch: whether runs are counted for :attr:`open_fraction` and :meth:`maps`; True at first.
            It costs z a second time, and [B, N, T] bytes a layer.

    Raises:
        TypeError, ValueError: arguments of a wrong type or value. Put on a pipeline: its UNet lacks
            a layer, or has it with other widths; a layer computes something else than plain
            attention, as with an IP-Adapter, or has fused projections. In a run: the gates are on
            another device.

    Gradient, through :meth:`attached`: to all parameters, to the hidden states and to the text. No
    second derivatives.

    Cost: for each layer O(N C hidden), for each head and call of the UNet O(T E hidden); see
    :func:`sdcore.ops.masked_cross_attention` for the rest.

    Source: Chang, Chen, Cheng, Bogdan, *MaskAttn-SDXL*, 2025, arXiv:2509.15357. There b begins at
    0, where half of the gates are closed.
    """

    claims = cross_attention.CLAIM

    def __init__(
        self,
        layers: Mapping[str, int],
        widths: Sequence[tuple[int, int]],
        *,
        features: int = 128,
        hidden: int = 128,
        ste: str = "multiplicative",
        bias: float = 4.0,
    ) -> None:
        super().__init__()
        _check_settings(layers, widths, features, hidden, ste, bias)
        self.layers = dict(layers)
        self.features, self.hidden, self.ste = features, hidden, ste
        self.watch = True
        self.heads = nn.ModuleList(Head(c, e, features, hidden, bias) for c, e in widths)
        self._seen: _Seen | None = None

    @classmethod
    def for_unet(
        cls,
        unet: Any,
        layers: str | Iterable[str] | None = None,
        shared: str = "stage",
        *,
        features: int = 128,
        hidden: int = 128,
        ste: str = "multiplicative",
        bias: float = 4.0,
    ) -> GatedAttention:
        """New gates for a UNet, on its device, in float32.

        Args:
            unet: of Diffusers; it is not changed, and not kept.
            layers: names of its cross-attentions, or what their names begin with, such as
                ``"mid_block"`` and ``"up_blocks.1.attentions.0"``. Default: those of
                ``down_blocks.2`` and ``up_blocks.0``, as published for SDXL; where one of the two
                has none, all.
            shared: which layers share a head. ``"stage"``, as published: those of one resolution
                and width, the middle block apart; ``"all"``: those of one width; ``"none"``.
            features, hidden, ste, bias: see the class.

        Raises:
            TypeError: not a UNet.
            ValueError: no such layers, or another argument is out of range.
        """
        if shared not in SHARED:
            raise ValueError(f"shared must be one of {', '.join(SHARED)}; got {shared!r}")
        parts = _parts(unet)
        numbers: dict[tuple[Any, ...], int] = {}
        chosen: dict[str, int] = {}
        for name in _chosen(list(parts), layers):
            whose = {"stage": _stage(unet, name), "all": "", "none": name}[shared]
            chosen[name] = numbers.setdefault((whose, *_widths(parts[name])), len(numbers))
        gates = cls(
            chosen,
            [(key[1], key[2]) for key in numbers],
            features=features,
            hidden=hidden,
            ste=ste,
            bias=bias,
        )
        device = next(unet.parameters()).device
        return gates if device.type == "meta" else gates.to(device)

    def extra_repr(self) -> str:
        return f"{len(self.layers)} layers, features={self.features}, ste={self.ste!r}"

    # -- on a UNet ------------------------------------------------------------------------------

    def check(self, pipe: Any) -> None:
        self._check(pipe.unet)

    def begin(self, run: Run) -> None:
        run.of(self).seen = _Seen()

    def denoise(self, call: Call, proceed: Callable[[Call], Tensor]) -> Tensor:
        unet = call.run.pipe.unet
        self._check_device(call.sample)
        at_work = _AtWork(self, call.run.of(self).seen, call.sample)
        with cross_attention.masked(unet, self.layers, at_work):
            return proceed(call)

    def end(self, run: Run, error: BaseException | None) -> None:
        self._seen = getattr(run.of(self), "seen", None)

    @contextlib.contextmanager
    def attached(self, unet: Any) -> Iterator[GatedAttention]:
        """Within it, calls of the UNet are gated, and differentiable.

        Afterwards the UNet is as it was before. It has a hook meanwhile, which tells one call from
        the next: psi(E) is computed once for each call and head, and with gradient checkpointing
        once for each layer. ``backward`` may be called within it or, without gradient
        checkpointing, also later. Calls from all threads are gated.

        Raises:
            TypeError, ValueError: as putting it on a pipeline would.
        """
        self._check(unet)
        module = getattr(unet, "_orig_mod", unet)
        works: list[_AtWork] = []

        def start(_: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            sample = args[0] if args else options["sample"]
            self._check_device(sample)
            again = torch.is_grad_enabled() and getattr(module, "is_gradient_checkpointing", False)
            self._seen = _Seen()
            # A layer that is computed again must keep as many tensors as it did before.
            works[:] = [_AtWork(self, self._seen, sample, cached=not again)]

        def stop(*_: Any) -> None:
            for one in works:
                one.stop()

        with contextlib.ExitStack() as stack:
            stack.enter_context(
                cross_attention.masked(
                    unet,
                    self.layers,
                    lambda layer: works[0](layer) if works else None,
                    all_threads=True,  # gradient checkpointing computes layers again in another
                )
            )
            stack.callback(module.register_forward_pre_hook(start, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(stop, always_call=True).remove)
            yield self

    def _check(self, unet: Any) -> None:
        parts = _parts(unet)
        for name, number in self.layers.items():
            if name not in parts:
                raise ValueError(
                    f"these gates are for another UNet: this one has no cross-attention {name}; "
                    f"it has {', '.join(list(parts)[:3])}, …"
                )
            got, expected = _widths(parts[name]), self.heads[number].widths
            if got != expected:
                raise ValueError(
                    f"these gates are for another UNet: {name} has pixels and text of widths {got};"
                    f" expected {expected}"
                )
            cross_attention.check_processor(name, parts[name])

    def _check_device(self, sample: Tensor) -> None:
        device = self.heads[0].bias.device
        if device != sample.device:
            raise ValueError(
                f"the gates are on {device}, and the UNet's input on {sample.device}; "
                "move them with gates.to(device)"
            )

    # -- files ----------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes ``gated_attention.safetensors`` into ``folder``, which is made if need be."""
        from safetensors.torch import save_file

        config = {
            "layers": self.layers,
            "widths": [head.widths for head in self.heads],
            "features": self.features,
            "hidden": self.hidden,
            "ste": self.ste,
        }
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(
            {name: value.contiguous() for name, value in self.state_dict().items()},
            Path(folder, FILE),
            {"format": FORMAT, "config": json.dumps(config)},
        )

    @classmethod
    def from_pretrained(cls, path: str | Path) -> GatedAttention:
        """What :meth:`save_pretrained` wrote, bit for bit, on the CPU.

        Args:
            path: the folder, or the file itself.

        Raises:
            OSError: there is no such file.
            ValueError: it is damaged, or not of this kind; the message says what is wrong.
        """
        path = Path(path)
        if path.is_dir():
            path = path / FILE
        state, metadata = _read(path)
        if metadata.get("format") != FORMAT:
            published = any(PUBLISHED_MARK in key for key in state)
            hint = "; from_published reads it" if published else ""
            raise ValueError(
                f"{path} holds no gates: its metadata has the format "
                f"{metadata.get('format')!r}, not {FORMAT!r}{hint}"
            )
        try:
            config = json.loads(metadata["config"])
            with torch.device("meta"):  # random numbers would be drawn for nothing
                gates = cls(config.pop("layers"), config.pop("widths"), **config)
            gates._load(state)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        return gates

    @classmethod
    def from_published(
        cls, path: str | Path, unet: Any, *, ste: str = "multiplicative"
    ) -> GatedAttention:
        """Gates that the authors' code trained, for this UNet, on the CPU.

        Args:
            path: a checkpoint as that code writes it (``gate_final.pt``), which is read without
                running any code in it; or its ``gate_state_dict`` as a .safetensors.
            unet: SDXL's; it is not changed.
            ste: for further training; ``"additive"`` as it was trained.

        Layers whose weights are equal bit for bit share a head. A threshold other than 0.5 becomes
        a part of the bias.

        Raises:
            OSError: there is no such file.
            ValueError: it is damaged, not of this kind, or for another UNet.
        """
        _check_ste(ste)
        path = Path(path)
        weights, settings = _read_published(path)
        layers, heads = _published_heads(path, weights)
        shift = _published_shift(path, settings)
        state = {
            f"heads.{number}.{name}": value - shift if name == "bias" else value
            for number, one in enumerate(heads)
            for name, value in one.items()
        }
        try:
            widths = [(len(one["phi.0.weight"]), len(one["psi.0.weight"])) for one in heads]
            hidden, features = len(heads[0]["phi.1.bias"]), len(heads[0]["phi.3.bias"])
            with torch.device("meta"):
                gates = cls(layers, widths, features=features, hidden=hidden, ste=ste)
            gates._load(state)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        gates._check(unet)
        return gates

    def _load(self, state: dict[str, Tensor]) -> None:
        odd = [name for name, value in state.items() if not value.is_floating_point()]
        if odd:
            raise ValueError(f"{odd[0]} holds {state[odd[0]].dtype}, not floats")
        self.load_state_dict(state, assign=True)

    # -- reports --------------------------------------------------------------------------------

    @property
    def open_fraction(self) -> dict[str, float]:
        """For each layer, the share of its gates that were open, 0 to 1: the mean of the last run
        that ended, or the last call of the UNet under :meth:`attached`.

        Raises:
            ValueError: nothing was run yet, or then :attr:`watch` was off.
        """
        seen = self._watched()
        found = torch.stack(list(seen.shares.values())).tolist()  # waits for the device once
        return {
            name: share / seen.calls[name] for name, share in zip(seen.shares, found, strict=True)
        }

    def maps(
        self,
        path: str | Path,
        words: Sequence[str] | Mapping[int, str],
        *,
        layers: Sequence[str] | None = None,
        row: int = -1,
    ) -> None:
        """Draws which pixels attend to which words: blue where the gate is open. Of the last call
        of the UNet that was seen: in a run, the one of its last step. Needs matplotlib.

        Args:
            path: where to, as a PNG, SVG or PDF.
            words: the prompt's tokens as ``pipe.tokenizer.tokenize(prompt)`` gives them, for the
                positions from 1 on (0 is the beginning of the text); or positions and their labels.
            layers: which, from top to bottom. Default: up to 8, spread over the UNet.
            row: which of the UNet's rows. Under guidance the prompt's follow those of the negative
                prompt; the last is of the last picture.

        Raises:
            ValueError: nothing was run yet, or an argument names what was not seen.
        """
        seen = self._watched()
        names = _spread(list(seen.open)) if layers is None else list(layers)
        labels = _labels(words)
        for name in names:
            if name not in seen.open:
                raise ValueError(f"layers must be of those seen; got {name!r}")
        if not names:
            raise ValueError("layers must be one at least; got none")
        rows, _, tokens = seen.open[names[0]].shape
        if not -rows <= row < rows:
            raise ValueError(f"row must be within the {rows} rows of the UNet; got {row}")
        if not labels or not all(0 <= at < tokens for at in labels):
            raise ValueError(f"words must be at positions 0 to {tokens - 1}; got {list(labels)}")
        grids = {}
        for name in names:
            gates = seen.open[name][row][:, list(labels)].cpu()
            side = cross_attention.side_of(len(gates), *seen.size)
            grids[name] = gates.mT.unflatten(-1, side)
        figures.draw_gates(grids, list(labels.values())).savefig(path)

    def _watched(self) -> _Seen:
        if self._seen is None or not self._seen.shares:
            raise ValueError(
                "no gates were seen yet: call the pipeline that they are patched on, or the UNet "
                "that they are attached to, with gates.watch on"
            )
        return self._seen


class _Seen:
    """What became of the gates: all on the device, which nothing waits for."""

    def __init__(self) -> None:
        self.shares: dict[str, Tensor] = {}  # sums over calls, float32
        self.calls: dict[str, int] = {}
        self.open: dict[str, Tensor] = {}  # [B, N, T] bool, of the last call
        self.size = (0, 0)  # of the last call's latents

    def add(self, name: str, mask: GateMask) -> None:
        # As the kernel has it: from the rounded features, in float32.
        exact = GateMask(mask.phi.detach().float(), mask.psi.detach().float(), mask.bias)
        with torch.no_grad(), torch.autocast(mask.phi.device.type, enabled=False):
            gates = exact.dense(mask.psi.shape[1])
            share = gates.mean(dtype=torch.float32)
            self.shares[name] = self.shares[name] + share if name in self.shares else share
        self.calls[name] = self.calls.get(name, 0) + 1
        self.open[name] = gates


class _AtWork:
    """Gates within one call of a UNet: what its layers ask."""

    def __init__(
        self, gates: GatedAttention, seen: _Seen, sample: Tensor, *, cached: bool = True
    ) -> None:
        self.gates, self.seen, self.cached = gates, seen, cached
        self.watch = gates.watch
        self.psi: dict[int, tuple[Tensor, Tensor]] = {}  # of each head, with its text
        seen.size = (sample.shape[-2], sample.shape[-1])

    def __call__(self, layer: Layer) -> Wanted:
        number = self.gates.layers[layer.name]
        head = self.gates.heads[number]
        states = layer.hidden_states
        # Autocast would round what decides on which side of the threshold a gate lies.
        with torch.autocast(states.device.type, enabled=False):
            phi = head.phi(states.to(head.bias.dtype)).to(states.dtype)
            psi = self._psi(number, layer.text).to(states.dtype)
        mask = GateMask(phi, psi, head.bias, self.gates.ste)
        if self.watch:
            self.seen.add(layer.name, mask)
        return Wanted(mask)

    def stop(self) -> None:
        """After the call: what ``backward`` computes again counts once."""
        self.watch = False
        self.psi.clear()

    def _psi(self, number: int, text: Tensor) -> Tensor:
        known = self.psi.get(number)
        if known is not None and known[0] is text:
            return known[1]
        head = self.gates.heads[number]
        found = head.psi(text.to(head.bias.dtype))
        if self.cached:
            self.psi[number] = text, found
        return found


# ---------------------------------------------------------------------------------------------
# The UNet's layers


def _parts(unet: Any) -> dict[str, nn.Module]:
    if not isinstance(unet, nn.Module):
        raise TypeError(f"unet must be a UNet of Diffusers; got {type(unet).__name__}")
    found = cross_attention.layers(unet)
    if not found:
        raise TypeError(f"{type(unet).__name__} has no cross-attention")
    return found


def _widths(attention: Any) -> tuple[int, int]:
    return attention.query_dim, attention.cross_attention_dim


def _chosen(names: list[str], layers: str | Iterable[str] | None) -> list[str]:
    if layers is None:
        stages = [[name for name in names if name.startswith(f"{one}.")] for one in SDXL_STAGES]
        return [name for one in stages for name in one] if all(stages) else names
    wanted = [layers] if isinstance(layers, str) else list(layers)
    for one in wanted:
        if not any(f"{name}.".startswith(f"{one}.") for name in names):
            raise ValueError(
                f"layers: no cross-attention's name begins with {one!r}; "
                f"this UNet has {', '.join(names)}"
            )
    return [name for name in names if any(f"{name}.".startswith(f"{one}.") for one in wanted)]


def _stage(unet: Any, name: str) -> str:
    """Blocks of one resolution on both ways have one: the last block down, the first one up."""
    block, number, *_ = name.split(".")
    if block == "down_blocks":
        return number
    if block == "up_blocks":
        levels = len(getattr(unet, "_orig_mod", unet).up_blocks)
        return str(levels - 1 - int(number))
    return block


def _check_settings(
    layers: Any, widths: Any, features: Any, hidden: Any, ste: Any, bias: Any
) -> None:
    for name, value, most in (("features", features, 256), ("hidden", hidden, math.inf)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an integer; got {value!r}")
        if not 1 <= value <= most:
            raise ValueError(f"{name} must be at least 1 and at most {most}; got {value}")
    _check_ste(ste)
    if not isinstance(bias, int | float) or not math.isfinite(bias):
        raise ValueError(f"bias must be a finite number; got {bias!r}")
    if not layers or set(layers.values()) != set(range(len(widths))):
        raise ValueError(
            f"layers must name one layer at least, and use all of {len(widths)} heads; got {layers}"
        )


def _check_ste(ste: Any) -> None:
    if ste not in STE:
        raise ValueError(f"ste must be one of {', '.join(STE)}; got {ste!r}")


# ---------------------------------------------------------------------------------------------
# Files


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            # Copies: tensors may lie in the mapped file, and that be written anew while in use.
            state = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return state, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or damaged: {error}") from error


def _read_published(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and settings."""
    if path.suffix == ".safetensors":
        return _read(path)[0], {}
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of many kinds, by which part is damaged
        raise ValueError(f"{path} can't be read as weights: {error}") from error
    if not isinstance(found, dict) or found.get("format") != PUBLISHED_FORMAT:
        raise ValueError(f"{path} is not of the format {PUBLISHED_FORMAT!r}")
    state, settings = found.get("gate_state_dict"), found.get("maskattn_config")
    if not isinstance(state, dict) or not isinstance(settings, dict):
        raise ValueError(f"{path} lacks gate_state_dict or maskattn_config")
    return state, settings


def _published_heads(
    path: Path, state: dict[str, Tensor]
) -> tuple[dict[str, int], list[dict[str, Tensor]]]:
    """Layers with the numbers of their heads, and the heads' weights by our names."""
    by_layer: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        layer, mark, rest = key.partition(PUBLISHED_MARK)
        part, dot, number = rest.partition(".")
        if not mark or part not in PUBLISHED_PARTS or not isinstance(value, Tensor):
            raise ValueError(f"{path} holds {key!r}, which is no weight of MaskAttn-SDXL's gates")
        by_layer.setdefault(layer, {})[PUBLISHED_PARTS[part] + dot + number] = value
    expected = set(Head(1, 1, 1, 1, 0).state_dict())
    for layer, one in by_layer.items():
        if set(one) != expected:
            odd = sorted(set(one) ^ expected)
            raise ValueError(f"{path} has for {layer} too much or too little: {', '.join(odd)}")
    if not by_layer:
        raise ValueError(f"{path} holds no weights")
    heads: list[dict[str, Tensor]] = []
    layers = {}
    for layer, one in by_layer.items():
        same = (n for n, other in enumerate(heads) if all(one[k].equal(other[k]) for k in expected))
        layers[layer] = next(same, len(heads))
        if layers[layer] == len(heads):
            heads.append(dict(one))
    return layers, heads


def _published_shift(path: Path, settings: dict[str, Any]) -> float:
    """What b is less where gates open at sigmoid(z) > threshold."""
    threshold, penalty = settings.get("threshold", 0.5), settings.get("negative_value", -1e4)
    if not 0 < threshold < 1:
        raise ValueError(f"{path} has the threshold {threshold}, at which gates never change")
    if penalty > LEAST_PENALTY:
        raise ValueError(f"{path} has the penalty {penalty}, which does not close a gate")
    return math.log(threshold / (1 - threshold))


# ---------------------------------------------------------------------------------------------
# Pictures


def _spread(names: list[str]) -> list[str]:
    count = min(DRAWN_LAYERS, len(names))
    return [names[number * (len(names) - 1) // max(1, count - 1)] for number in range(count)]


def _labels(words: Sequence[str] | Mapping[int, str]) -> dict[int, str]:
    if isinstance(words, str):
        raise TypeError("words must be a list of tokens, or positions with labels; got a string")
    found = words if isinstance(words, Mapping) else dict(enumerate(words, 1))
    return {at: label.removesuffix("</w>") for at, label in found.items()}
