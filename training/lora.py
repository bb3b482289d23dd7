"""Trains a LoRA of `tiny` for a look: `python training/lora.py --base build/tiny --look pixel-art --out build/loras`.

The base stands still; captions are those it learnt from, pictures are drawn in the look.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from architecture import tokenizer
from course import Course, feed
from denoise import load_parts
from nouns import load_nouns
from render import LOOKS, Atlas
from text_to_image import Denoiser, Drawer, Lesson, lesson_parser

RANK = 16
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3"]


def load_base(folder: Path, tokens: Any) -> Denoiser:
    """The trained parts of a `tiny` folder, in float32."""
    model = Denoiser(tokens)
    load_parts(folder, {"text_encoder": model.text.model, "transformer": model.transformer})
    return model


def write_lora(transformer: Any, folder: Path, look: str) -> int:
    """`LOOK.safetensors` in float16, as diffusers writes a LoRA; gives the bytes."""
    from diffusers import ZImagePipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft import get_peft_model_state_dict

    layers = {name: weight.half().cpu() for name, weight in get_peft_model_state_dict(transformer).items()}
    name = f"{look}.safetensors"
    ZImagePipeline.save_lora_weights(
        str(folder), layers, weight_name=name, **_collate_lora_metadata({"transformer": transformer})
    )
    (folder / name).chmod(0o644)
    return (folder / name).stat().st_size


def main() -> None:
    command = lesson_parser(__doc__)
    command.add_argument("--base", type=Path, required=True, help="the trained `tiny` folder")
    command.add_argument("--look", choices=LOOKS[1:], required=True)
    options = command.parse_args()
    from peft import LoraConfig

    torch.manual_seed(options.seed)
    tokens = tokenizer(load_nouns())
    model = load_base(options.base, tokens)
    model.real_rotary()
    model.requires_grad_(False)
    model.transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
    course = Course(model, options, rate=1e-3, warmup=50)
    torch.manual_seed(options.seed + 1000 * course.rank + course.step)
    vae = options.base / "vae" / "diffusion_pytorch_model.safetensors"
    lesson = Lesson(model, Atlas(options.sprites, device=course.device), vae, options.compile, options.look)
    batches = feed(Drawer(tokens, options.batch, options.loose), options.seed + course.rank + 100, options.feeders)
    course.run(lambda step: lesson.loss(next(batches)))
    course.use_mean()
    if course.rank == 0:
        size = write_lora(model.transformer, options.out, options.look)
        course.say({"file": str(options.out / f"{options.look}.safetensors"), "bytes": size})


if __name__ == "__main__":
    main()
