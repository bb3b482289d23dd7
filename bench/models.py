"""Full-size models with random weights, for timing and for tests on a GPU: nothing is downloaded.

    python bench/models.py z-image|qwen-image-edit|qwen2.5-vl-7b FOLDER [--device cuda] [--small]

Timing needs no trained weights. The tokenizer is that of the embedded model, so prompts have a few more tokens than with
the real one. `--small` makes a folder of the same parts in a few MB, to try what uses them on a CPU.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

SEED = 20250101
DISK_GIB = {"z-image": 20.0, "qwen-image-edit": 55.0, "qwen2.5-vl-7b": 16.5}
"""What each takes on the disk."""

CHAT = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- if message.content is string -%}{{- message.content -}}{%- else -%}"
    "{%- for part in message.content -%}{%- if part.type == 'image' -%}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- else -%}{{- part.text -}}{%- endif -%}{%- endfor -%}{%- endif -%}{{- '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
"""The chat template of Qwen2.5-VL, without its videos and tools."""


# --- Z-Image ----------------------------------------------------------------------------------------------------------


def z_image(folder: Path, device: str = "cuda", *, small: bool = False) -> None:
    """A Z-Image pipeline folder in bfloat16: 6.15 B transformer, 4.02 B Qwen3 text encoder, 0.084 B autoencoder."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import AutoTokenizer, Qwen3Config, Qwen3Model

    transformer = filled(lambda: ZImageTransformer2DModel(**(SMALL_Z_IMAGE if small else {})), device)
    text_encoder = filled(lambda: Qwen3Model(Qwen3Config(**(SMALL_QWEN3 if small else QWEN3))), device)
    vae = filled(
        lambda: AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 16, 16) if small else (128, 256, 512, 512),
            layers_per_block=1 if small else 2,
            latent_channels=16,
            norm_num_groups=8 if small else 32,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        device,
    )
    transformer.rope_embedder.freqs_cis = None
    pipe = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=AutoTokenizer.from_pretrained(str(embedded_tokenizer())),
        transformer=transformer,
    )
    pipe.save_pretrained(str(folder), safe_serialization=True)


QWEN3 = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
}
SMALL_QWEN3 = QWEN3 | {
    "vocab_size": 2048,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
SMALL_Z_IMAGE = {
    "dim": 96,
    "n_layers": 3,
    "n_refiner_layers": 1,
    "n_heads": 3,
    "n_kv_heads": 3,
    "cap_feat_dim": 48,
    "axes_dims": [8, 12, 12],
}


# --- Qwen-Image-Edit, and the judge that is also its text encoder -----------------------------------------------------


def qwen_image_edit(folder: Path, device: str = "cuda", *, small: bool = False) -> None:
    """A Qwen-Image-Edit pipeline folder in bfloat16: 20.4 B transformer, 8.3 B Qwen2.5-VL, 0.13 B autoencoder."""
    import diffusers

    tokenizer = marked_tokenizer()
    shape: dict[str, Any] = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 3} if small else {}
    shape |= {"joint_attention_dim": 48, "axes_dims_rope": (8, 4, 4)} if small else {}
    autoencoder: dict[str, Any] = {"base_dim": 24, "num_res_blocks": 1} if small else {}
    pipe = diffusers.QwenImageEditPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=filled(lambda: diffusers.AutoencoderKLQwenImage(**autoencoder), device),
        text_encoder=filled(lambda: _qwen2_5_vl(tokenizer, small=small), device),
        tokenizer=tokenizer,
        processor=_processor(tokenizer),
        transformer=filled(lambda: diffusers.QwenImageTransformer2DModel(**shape), device),
    )
    pipe.save_pretrained(str(folder), safe_serialization=True)


def qwen2_5_vl_7b(folder: Path, device: str = "cuda", *, small: bool = False) -> None:
    """A Qwen2.5-VL folder of the 7 B size (8.3 B with the part that sees and both ends) in bfloat16."""
    tokenizer = marked_tokenizer()
    filled(lambda: _qwen2_5_vl(tokenizer, small=small), device).save_pretrained(str(folder), safe_serialization=True)
    _processor(tokenizer).save_pretrained(str(folder))


def _qwen2_5_vl(tokenizer: Any, *, small: bool) -> Any:
    """The sizes of Qwen/Qwen2.5-VL-7B-Instruct's config.json, with the token ids of this tokenizer."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{word}|>")
        for name, word in (("image", "image_pad"), ("vision_start", "vision_start"), ("vision_end", "vision_end"))
    }
    text = {
        "vocab_size": 2048 if small else 152064,
        "hidden_size": 48 if small else 3584,
        "intermediate_size": 64 if small else 18944,
        "num_hidden_layers": 2 if small else 28,
        "num_attention_heads": 2 if small else 28,
        "num_key_value_heads": 2 if small else 4,
        "max_position_embeddings": 128000,
        "rope_scaling": {"mrope_section": [2, 4, 6] if small else [16, 24, 24], "rope_type": "default"},
    }
    vision = {
        "depth": 2 if small else 32,
        "hidden_size": 16 if small else 1280,
        "intermediate_size": 32 if small else 3420,
        "num_heads": 2 if small else 16,
        "out_hidden_size": 48 if small else 3584,
        "fullatt_block_indexes": [1] if small else [7, 15, 23, 31],
    }
    config = Qwen2_5_VLConfig(text_config=text | ids, vision_config=vision, tie_word_embeddings=False, **ids)
    return Qwen2_5_VLForConditionalGeneration(config)


def marked_tokenizer() -> Any:
    """The embedded model's tokenizer with Qwen's marks for pictures."""
    from transformers import AutoTokenizer

    marks = {f"{name}_token": f"<|{name}|>" for name in ("vision_start", "vision_end")}
    marks["image_token"] = "<|image_pad|>"
    place = str(embedded_tokenizer())
    return AutoTokenizer.from_pretrained(place, model_max_length=32768, extra_special_tokens=marks)


def _processor(tokenizer: Any) -> Any:
    """It stands in for `Qwen2VLProcessor`, which needs torchvision and fills in a picture's tokens the same way."""
    from transformers import PaddleOCRVLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    # The pixel bounds of Qwen/Qwen2.5-VL-7B-Instruct's preprocessor_config.json.
    reader = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12845056)
    return PaddleOCRVLProcessor(reader, tokenizer, chat_template=CHAT)


# --- weights ----------------------------------------------------------------------------------------------------------


def embedded_tokenizer() -> Path:
    """Where the embedded model's tokenizer is."""
    import imagemill

    return Path(imagemill.__file__).parent / "assets" / "tiny" / "tokenizer"


def filled(build: Callable[[], Any], device: str) -> Any:
    """A module built on the device in bfloat16, with random weights from the fixed seed."""
    import torch

    torch.manual_seed(SEED)
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        try:
            module = build()
        finally:
            torch.set_default_dtype(torch.float32)
    for parameter in module.parameters():
        _fill(parameter)
    return module


def _fill(parameter: Any) -> None:
    """Weights small enough that nothing overflows through 36 layers; gains of norms are one, biases zero."""
    import torch

    with torch.no_grad():
        if parameter.ndim >= 2 and parameter[0].numel() > 1:
            fan_in = parameter[0].numel()
            parameter.normal_(0.0, min(0.05, fan_in**-0.5))
        elif not parameter.float().eq(1).all():
            parameter.zero_()


# --- LoRAs for any of the transformers --------------------------------------------------------------------------------

ADAPTED = re.compile(r"(\w+\.\d+\.\w.*)\.weight")
"""Weights inside numbered blocks: `layers.0.attention.to_q.weight`, `transformer_blocks.7.img_mlp.net.2.weight`."""


def lora(path: Path, model: Path, seed: int, rank: int = 32) -> None:
    """A LoRA with random weights, as PEFT writes it, for the transformer of a pipeline folder: on every linear layer of its
    blocks but those that modulate them. Layers and their sizes are read from the heads of the folder's files."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator("cpu").manual_seed(seed)
    tensors = {}
    for name, outputs, inputs in adapted(model / "transformer"):
        for part, shape in (("lora_A", (rank, inputs)), ("lora_B", (outputs, rank))):
            weight = torch.randn(*shape, generator=generator) * 0.02
            tensors[f"transformer.{name}.{part}.weight"] = weight.to(torch.bfloat16)
    save_file(tensors, str(path))


def adapted(transformer: Path) -> list[tuple[str, int, int]]:
    """Name, outputs and inputs of the layers that a LoRA is for, sorted by name."""
    from safetensors import safe_open

    found = []
    for path in sorted(transformer.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (no mapping)
                match, shape = ADAPTED.fullmatch(key), file.get_slice(key).get_shape()
                if match and len(shape) == 2 and "mod" not in match[1]:
                    found.append((match[1], *shape))
    return sorted(found)


def loras(folder: Path, model: Path, count: int, rank: int = 32) -> list[Path]:
    """So many LoRAs for the transformer of a pipeline folder; those that are there already are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"look-{number}.safetensors" for number in range(count)]
    for number, path in enumerate(paths):
        if not path.exists():
            lora(path, model, seed=number, rank=rank)
    return paths


BUILDERS = {"z-image": z_image, "qwen-image-edit": qwen_image_edit, "qwen2.5-vl-7b": qwen2_5_vl_7b}


def main() -> None:
    """Build the model that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=BUILDERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    BUILDERS[options.model](options.folder, options.device, small=options.small)


if __name__ == "__main__":
    main()
