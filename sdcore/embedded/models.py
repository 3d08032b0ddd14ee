"""The embedded models' parts, before they are trained.

All are ordinary classes of Diffusers and Transformers, of a size that a laptop runs. Pictures have
128 pixels a side, latents 32 and four channels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from sdcore.embedded import FOLDER, tokenizer, world

LATENT_SIDE = world.SIZE // 4
TIMESTEPS = 1000
# UNets: channels of the three levels, width of the text, channels of an attention head.
UNETS: dict[str, dict[str, Any]] = {
    "v1": {"block_out_channels": (48, 64, 80), "cross_attention_dim": 128, "head": 16},
    "v2": {"block_out_channels": (64, 80, 96), "cross_attention_dim": 144, "head": 16},
    "xl": {"block_out_channels": (32, 48, 64), "cross_attention_dim": 160, "head": 16},
}
# Text encoders: width, layers and heads. An SDXL pipeline has two, whose widths add up.
TEXTS = {"v1": [(128, 3, 4)], "v2": [(144, 3, 6)], "xl": [(64, 2, 2), (96, 2, 3)]}
AUTOENCODERS = {"v1": (32, 40, 48), "v2": (32, 40, 48), "xl": (24, 32, 48)}
PREDICTIONS = {"v1": "epsilon", "v2": "v_prediction", "xl": "epsilon"}


def autoencoder(name: str, latent_scale: float = 1.0) -> AutoencoderKL:
    """``latent_scale``: what latents are multiplied by, to have unit variance."""
    return AutoencoderKL(
        block_out_channels=AUTOENCODERS[name],
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=world.SIZE,
        mid_block_add_attention=False,
        scaling_factor=latent_scale,
    )


def unet(name: str) -> UNet2DConditionModel:
    options = dict(UNETS[name])
    channels, head = options["block_out_channels"], options.pop("head")
    # As in Stable Diffusion 1, "attention_head_dim" is the number of heads.
    heads = tuple(width // head for width in channels)
    if name == "xl":
        options |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 32,
            "projection_class_embeddings_input_dim": TEXTS["xl"][1][0] + 6 * 32,
            "use_linear_projection": True,
        }
    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=heads,
        norm_num_groups=16,
        **options,
    )


def text_encoders(name: str, words: CLIPTokenizer) -> list[CLIPTextModel]:
    """One, or the two of an SDXL pipeline, of which the second also projects."""
    found = []
    for number, (width, layers, heads) in enumerate(TEXTS[name]):
        config = CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=tokenizer.LENGTH,
            projection_dim=width,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
        found.append((CLIPTextModelWithProjection if number else CLIPTextModel)(config))
    return found


def controlnet(base: UNet2DConditionModel) -> ControlNetModel:
    """One that begins as a copy of the first half of ``base``."""
    return ControlNetModel.from_unet(base, conditioning_embedding_out_channels=(8, 16, 32))


def scheduler(name: str) -> DDIMScheduler:
    """Stable Diffusion's noise, but more at the end (its ``beta_end`` is 0.012), where sampling
    begins.

    Things are large here: through less noise they can still be seen, and so a model would not learn
    from the caption where they are (Lin et al., 2024, arXiv:2305.08891).
    """
    return DDIMScheduler(
        num_train_timesteps=TIMESTEPS,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.014,
        prediction_type=PREDICTIONS[name],
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def pipeline(
    name: str,
    vae: AutoencoderKL,
    denoiser: UNet2DConditionModel,
    texts: list[CLIPTextModel],
    words: CLIPTokenizer,
) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    if name == "xl":
        return StableDiffusionXLPipeline(
            vae=vae,
            unet=denoiser,
            text_encoder=texts[0],
            text_encoder_2=texts[1],
            tokenizer=words,
            tokenizer_2=words,
            scheduler=scheduler(name),
            force_zeros_for_empty_prompt=False,  # it is trained on the empty prompt
            add_watermarker=False,
        )
    return StableDiffusionPipeline(
        vae=vae,
        unet=denoiser,
        text_encoder=texts[0],
        tokenizer=words,
        scheduler=scheduler(name),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def vocabulary(folder: Path) -> CLIPTokenizer:
    """The tokenizer, learned anew, which takes seconds; ``folder`` gets its files."""
    tokenizer.write(folder)
    return CLIPTokenizer.from_pretrained(folder)


def kept_vocabulary() -> CLIPTokenizer:
    """The same, as it lies beside the trained models."""
    return CLIPTokenizer.from_pretrained(FOLDER / "v1" / "tokenizer")


def parameters(*parts: torch.nn.Module) -> int:
    return sum(p.numel() for part in parts for p in part.parameters())
