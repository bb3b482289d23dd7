"""Stable Diffusion 3 and 3.5, with the defaults of their pipeline."""

from __future__ import annotations

from imagemill.families.generic import TextToImage
from imagemill.plan import Defaults

FAMILY = TextToImage(
    name="sd3",
    pipelines=("StableDiffusion3Pipeline",),
    fields=frozenset({"negative_prompt", "guidance_scale", "loras"}),
    multiple=16,
    max_batch=8,
    defaults=Defaults(width=1024, height=1024, steps=28, guidance_scale=7.0),
    forward=0.06,
)
