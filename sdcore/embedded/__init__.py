"""A tiny family of text-to-image models, and the world that it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

FOLDER = Path(__file__).with_name("models")
NAMES = ("v1", "v2", "v1-ink", "v1-edge", "xl")


def load(
    name: str, *, device: str = "cpu", dtype: torch.dtype | None = None, folder: Path | None = None
) -> DiffusionPipeline:
    """The pipeline of an embedded model, from the package's own files.

    Args:
        name: ``"v1"``; ``"v2"``, the upgrade; ``"v1-ink"``, v1 with a LoRA for ink drawings;
            ``"v1-edge"``, v1 with a ControlNet for outline drawings; ``"xl"``, shaped as SDXL.
        device, dtype: where and in what it computes; None: float32.
        folder: where the models lie; None: in the package.

    Raises:
        ValueError: there is no model of that name; or a file is missing, damaged or foreign.
    """
    if name not in NAMES:
        raise ValueError(f"name must be one of {', '.join(NAMES)}; got {name!r}")
    import torch
    from diffusers import (
        ControlNetModel,
        DiffusionPipeline,
        StableDiffusionControlNetPipeline,
    )

    from sdcore.embedded import checksums

    folder = FOLDER if folder is None else folder
    base = name.partition("-")[0]
    for part in dict.fromkeys((base, name)):
        checksums.check(folder / part)
    if name == "v1-edge":
        control = ControlNetModel.from_pretrained(folder / name, use_safetensors=True)
        pipe = StableDiffusionControlNetPipeline.from_pretrained(
            folder / base, controlnet=control, use_safetensors=True
        )
    else:
        pipe = DiffusionPipeline.from_pretrained(folder / base, use_safetensors=True)
    if name == "v1-ink":
        pipe.load_lora_weights(folder / name)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            # Diffusers' own `to` warns of layers that must stay in float32. There are none.
            torch.nn.Module.to(part, device, dtype or torch.float32)
    return pipe
