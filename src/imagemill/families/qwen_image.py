"""Qwen-Image: true CFG, which runs only with a negative prompt; a single space is the one its authors use for none.

`guidance_scale` is for a distilled variant only and has no effect here, so a task that sets it is refused.
"""

from __future__ import annotations

from imagemill.families.generic import TextToImage
from imagemill.plan import Defaults

FAMILY = TextToImage(
    name="qwen_image",
    pipelines=("QwenImagePipeline",),
    fields=frozenset({"negative_prompt", "true_cfg_scale", "loras"}),
    multiple=16,
    max_batch=4,
    defaults=Defaults(width=1024, height=1024, steps=50, true_cfg_scale=4.0, negative_prompt=" "),
    forward=0.2,
    doubled_by="true_cfg_scale",
    needs_negative=True,
)
