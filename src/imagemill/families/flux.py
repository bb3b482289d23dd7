"""FLUX.1 [dev]: guidance is distilled into the model; true CFG takes `true_cfg_scale` > 1 and a negative prompt."""

from __future__ import annotations

from imagemill.families.generic import TextToImage
from imagemill.plan import Defaults

FAMILY = TextToImage(
    name="flux",
    pipelines=("FluxPipeline",),
    fields=frozenset({"negative_prompt", "guidance_scale", "true_cfg_scale", "loras"}),
    multiple=16,
    max_batch=4,
    defaults=Defaults(width=1024, height=1024, steps=28, guidance_scale=3.5, true_cfg_scale=1.0),
    forward=0.2,
    doubled_by="true_cfg_scale",
    needs_negative=True,
)
