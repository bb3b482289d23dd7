"""Tiny vision-language models with random weights, in folders as the hub's snapshots are: with Qwen's processor classes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tiny_editors import qwen_vl
from tiny_model import TINY

SEED = 3
TEMPLATE = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- for part in message.content -%}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' if part.type == 'image' else part.text -}}"
    "{%- endfor -%}{{- '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
PICTURES = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
    "min_pixels": 56 * 56,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def qwen2_5_vl(folder: Path) -> Path:
    """Qwen2.5-VL; its processor wants torchvision for videos."""
    return write(folder, qwen_vl, PICTURES)


def qwen3_vl(folder: Path) -> Path:
    """Qwen3-VL; its processor wants torchvision for pictures too."""
    own = {"processor_class": "Qwen3VLProcessor", "image_processor_type": "Qwen2VLImageProcessorFast"}
    return write(folder, _qwen3_vl, PICTURES | own | {"patch_size": 16, "min_pixels": 64 * 64})


def _qwen3_vl(tokenizer: Any) -> Any:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    text = {
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "initializer_range": 0.2,
        "rope_scaling": {"mrope_section": [4, 4, 4], "rope_type": "default", "mrope_interleaved": True},
    }
    vision = {
        "depth": 3,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 48,
        "initializer_range": 0.2,
        "deepstack_visual_indexes": [0, 1],
        "patch_size": 16,
        "num_position_embeddings": 256,
    }
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{word}|>")
        for name, word in (("image", "image_pad"), ("vision_start", "vision_start"), ("vision_end", "vision_end"))
    }
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **ids))


def random_pictures(folder: Path, sizes: Iterable[tuple[int, int]]) -> list[str]:
    """The paths of PNG files of noise, one for each size (width, height)."""
    paths = []
    for number, (width, height) in enumerate(sizes):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        paths.append(str(folder / f"{number}.png"))
    return paths


def write(folder: Path, model_for: Callable[[Any], Any], pictures: dict[str, Any]) -> Path:
    """Writes the model, its tokenizer and its processor's settings."""
    from transformers import AutoTokenizer, GenerationConfig

    words = ("image_pad", "vision_start", "vision_end")
    tokenizer = AutoTokenizer.from_pretrained(
        TINY / "tokenizer",
        model_max_length=4096,
        extra_special_tokens={f"{word.replace('_pad', '')}_token": f"<|{word}|>" for word in words},
    )
    tokenizer.chat_template = None
    torch.manual_seed(SEED)
    model = model_for(tokenizer)
    # What Qwen's folders say, and what a judge must not do: draw at random, and punish what the prompt repeats.
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.1, repetition_penalty=1.5, eos_token_id=tokenizer.eos_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder
