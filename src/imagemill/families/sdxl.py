"""Stable Diffusion XL, with the defaults of its pipeline."""

from __future__ import annotations

from imagemill.families.generic import TextToImage
from imagemill.plan import Defaults

FAMILY = TextToImage(
    name="sdxl",
    pipelines=("StableDiffusionXLPipeline",),
    fields=frozenset({"negative_prompt", "guidance_scale", "loras"}),
    multiple=8,
    max_batch=8,
    defaults=Defaults(width=1024, height=1024, steps=50, guidance_scale=5.0),
    forward=0.025,
)
