"""A pipeline with LoRAs in it, beside the pipeline that they are for."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class LoRA:
    """A LoRA for :class:`DeltaSampling`, on top of its source.

    Args:
        weights: a file, a folder, a repository id, or a state dict, as ``load_lora_weights`` takes.
        scale: its strength within the adapted model; ``DeltaSampling(strength=…)`` is that of the
            delta.
        weight_name: the file in a folder or repository that has several.
    """

    weights: str | Path | Mapping[str, Tensor]
    scale: float = 1.0
    weight_name: str | None = None


def plain(unet: Any) -> Any:
    """Also of what ``torch.compile`` returned."""
    return getattr(unet, "_orig_mod", unet)


def text_encoders(pipe: Any) -> dict[str, nn.Module]:
    named = {name: getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2")}
    return {name: one for name, one in named.items() if one is not None}


def with_loras(source: Any, loras: Sequence[LoRA]) -> Any:
    """A pipeline of the source's parts, of which those that LoRAs change are copies, with the
    LoRAs fused."""
    if getattr(plain(source.unet), "peft_config", None):
        raise ValueError(
            "the source has LoRAs loaded: call its fuse_lora() and unload_lora_weights() first"
        )
    encoders = text_encoders(source)
    states = [_state_dict(source, one) for one in loras]
    for keys, *_ in states:
        _check_keys(keys, {"unet": plain(source.unet)} | encoders)
    changed = ["unet"] + [
        name
        for name in encoders
        if any(key.startswith(f"{name}.") for keys, *_ in states for key in keys)
    ]
    pipe = copy.copy(source)
    for name, part in source.components.items():
        if isinstance(part, nn.Module):  # what is not changed must not be touched, hooks included
            setattr(pipe, name, _copied(part) if name in changed else None)
    names = [f"delta_{number}" for number in range(len(loras))]
    for adapter, (state, alphas, metadata) in zip(names, states, strict=True):
        options = {"adapter_name": adapter, "metadata": metadata}
        pipe.load_lora_into_unet(state, alphas, pipe.unet, **options)
        for name in changed[1:]:
            encoder = getattr(pipe, name)
            pipe.load_lora_into_text_encoder(state, alphas, encoder, prefix=name, **options)
    pipe.set_adapters(names, [one.scale for one in loras])
    pipe.fuse_lora(components=changed, adapter_names=names)
    pipe.unload_lora_weights()
    for name, part in encoders.items():
        if name not in changed:
            setattr(pipe, name, part)
    return pipe


def _copied(module: nn.Module) -> nn.Module:
    from accelerate.hooks import remove_hook_from_module

    return remove_hook_from_module(copy.deepcopy(plain(module)), recurse=True)


def _state_dict(source: Any, lora: LoRA) -> tuple[Mapping[str, Tensor], Any, Any]:
    """In the names of PEFT or of Diffusers; alphas; and PEFT's configuration."""
    given = lora.weights
    options: dict[str, Any] = {"use_safetensors": True}  # no pickles
    if lora.weight_name is not None:
        options["weight_name"] = lora.weight_name
    return type(source).lora_state_dict(
        dict(given) if isinstance(given, Mapping) else given,
        unet_config=plain(source.unet).config,
        return_lora_metadata=True,
        **options,
    )


# The two factors of a layer's change, as PEFT and as Diffusers name them.
FACTOR = re.compile(r"^(\w+)\.(.+?)\.(lora_A|lora_B|lora\.down|lora\.up)\.(?:\w+\.)?weight$")


def _check_keys(state: Mapping[str, Tensor], parts: Mapping[str, nn.Module]) -> None:
    """Raises a ValueError that names the first key without a layer of its size."""
    factors = {key: found for key in state if (found := FACTOR.match(key))}
    if not factors:
        raise ValueError(f"the weights are no LoRA's; they are {', '.join(list(state)[:3])}, …")
    for key, found in factors.items():
        part, name, factor = found.groups()
        layer = _layer(parts[part], name) if part in parts else None
        if layer is None:
            raise ValueError(
                f"the LoRA does not fit the source: {key} is for a layer that it does not have"
            )
        shape, axis = list(state[key].shape), int(factor in ("lora_A", "lora.down"))
        wanted = layer.weight.shape[axis]
        if shape[axis] != wanted:
            raise ValueError(
                f"the LoRA does not fit the source: {key} is {shape}, for a layer with {wanted} "
                + ("inputs" if axis else "outputs")
            )


def _layer(part: nn.Module, name: str) -> Any:
    """None if there is no such layer, also by the names of older versions."""
    older = name.replace(".processor.", ".").replace("to_out_lora", "to_out.0")
    older = older.replace("_lora", "")
    for one in (name, older, f"text_model.{name}", name.removeprefix("text_model.")):
        try:
            layer = part.get_submodule(one)
        except AttributeError:
            continue
        if isinstance(getattr(layer, "weight", None), Tensor):
            return layer
    return None
