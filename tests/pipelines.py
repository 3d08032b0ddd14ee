"""Tiny pipelines with random weights, of each shape that methods meet."""

from __future__ import annotations

import functools
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from sdcore.embedded import models, world

STEPS, SIDE = 3, 64
FAMILIES = ("SD", "SDXL")
KINDS = ("text-to-image", "ControlNet")


def words(folder: Any) -> CLIPTokenizer:
    """From a copy in ``folder``. A tokenizer knows its path, and that of the package's own has the
    library's name, for which pickles of pipelines are searched."""
    models.kept_vocabulary().save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def pipeline(family: str, kind: str, tokens: CLIPTokenizer) -> Any:
    """Always with the same weights."""
    name = {"SD": "v1", "SDXL": "xl"}[family]
    torch.manual_seed(0)
    made = models.pipeline(
        name,
        models.autoencoder(name),
        models.unet(name),
        models.text_encoders(name, tokens),
        tokens,
    )
    classes = {
        "text-to-image": "Pipeline",
        "image-to-image": "Img2ImgPipeline",
        "inpainting": "InpaintPipeline",
        "ControlNet": "ControlNetPipeline",
    }
    prefix = {"SD": "StableDiffusion", "SDXL": "StableDiffusionXL"}[family]
    parts = dict(made.components)
    if kind == "ControlNet":
        parts["controlnet"] = models.controlnet(made.unet)
        nn.init.normal_(parts["controlnet"].controlnet_mid_block.weight, std=0.2)
    options = {"SD": {"requires_safety_checker": False}, "SDXL": {"add_watermarker": False}}[family]
    if family == "SDXL":
        options["force_zeros_for_empty_prompt"] = False
    pipe = getattr(diffusers, prefix + classes[kind])(**parts, **options)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@functools.cache
def outline() -> Tensor:
    return world.outlines(world.scenes(1, 0), SIDE).expand(-1, 3, -1, -1)


def options(kind: str) -> dict[str, Any]:
    """What a pipeline of this kind is called with."""
    found: dict[str, Any] = {
        "prompt": "a red circle left of a blue square",
        "negative_prompt": "a star",
        "num_inference_steps": STEPS,
        "output_type": "pt",
    }
    if kind in ("image-to-image", "inpainting"):
        found |= {"image": outline(), "strength": 0.7, "num_inference_steps": 5}
    if kind == "inpainting":
        mask = torch.zeros(1, 1, SIDE, SIDE)
        mask[..., : SIDE // 2] = 1
        found["mask_image"] = mask
    if kind == "ControlNet":
        found["image"] = outline()
    if kind != "image-to-image":
        found |= {"height": SIDE, "width": SIDE}
    return found


def images(pipe: Any, kind: str, **more: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return pipe(**options(kind) | more, generator=generator).images


class Small(diffusers.StableDiffusionPipeline):
    """A pipeline of someone's own, which takes few steps and pixels."""

    steps = STEPS

    def __call__(self, prompt: str, **options: Any) -> Any:
        return super().__call__(
            prompt, height=SIDE, width=SIDE, num_inference_steps=self.steps, **options
        )


def small(tokens: CLIPTokenizer, steps: int = STEPS) -> Small:
    pipe = pipeline("SD", "text-to-image", tokens)
    pipe.__class__ = Small
    pipe.steps = steps
    return pipe


def trace(pipe: Any) -> dict[str, Any]:
    """All that a patch could have changed of a pipeline, or a bare model, but for weights."""
    found: dict[str, Any] = {
        "class": type(pipe),
        "attributes": {name: id(value) for name, value in vars(pipe).items() if name[0] != "_"},
        "config": dict(pipe.config),
        "call": pipe.__call__.__func__,
    }
    parts = {"itself": pipe} if isinstance(pipe, nn.Module) else pipe.components
    for name, part in parts.items():
        found[name] = id(part), type(part)
        if isinstance(part, nn.Module):
            found[name, "keys"] = list(part.state_dict())
            found[name, "modules"] = [
                (
                    where,
                    type(module),
                    module.training,
                    list(module._forward_hooks),
                    list(module._forward_pre_hooks),
                    list(module._backward_hooks),
                    module.__dict__.get("forward"),
                    getattr(module, "_hf_hook", None),
                    id(getattr(module, "processor", None)),
                    sorted(key for key in vars(module) if key[0] != "_"),
                )
                for where, module in part.named_modules()
            ]
            found[name, "gradients"] = [one.requires_grad for one in part.parameters()]
    return found
