"""Tiny pipelines that edit pictures, with random weights: each is built once into a folder, as a hub's snapshot is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_model import TINY

SEED = 7
TEXT = 48
"""Width of the text encoder."""


def klein(folder: Path, *, tokens: int = 64, distilled: bool = False) -> Path:
    """FLUX.2 [klein]: a text encoder of three layers, a VAE that makes a picture four times smaller each way."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(TINY / "tokenizer", model_max_length=tokens)
    encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=-(-len(tokenizer) // 64) * 64,
            hidden_size=TEXT,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=24,
            max_position_embeddings=1024,
            initializer_range=0.2,
            tie_word_embeddings=True,
        )
    )
    return save(
        Flux2KleinPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=flux2_vae(),
            text_encoder=encoder,
            tokenizer=tokenizer,
            transformer=flux2_transformer(3 * TEXT, guidance=False),
            is_distilled=distilled,
        ),
        folder,
    )


def dev(folder: Path) -> Path:
    """FLUX.2 [dev]: a Mistral of three layers. The processor stands in for `PixtralProcessor`, which needs torchvision."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline
    from transformers import AutoTokenizer, Mistral3Config, Mistral3ForConditionalGeneration, PaddleOCRVLProcessor
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

    torch.manual_seed(SEED)
    template = (
        "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\\n' -}}"
        "{%- for part in message.content -%}{{- part.text -}}{%- endfor -%}{{- '<|im_end|>\\n' -}}{%- endfor -%}"
    )
    marks = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
    tokenizer = AutoTokenizer.from_pretrained(TINY / "tokenizer", model_max_length=1024, extra_special_tokens=marks)
    encoder = Mistral3ForConditionalGeneration(
        Mistral3Config(
            text_config={
                "model_type": "mistral",
                "vocab_size": -(-len(tokenizer) // 64) * 64,
                "hidden_size": TEXT,
                "intermediate_size": 64,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 24,
                "initializer_range": 0.2,
            },
            vision_config={
                "model_type": "pixtral",
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 32,
                "image_size": 64,
                "patch_size": 14,
            },
            image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
            vision_feature_layer=-1,
        )
    )
    return save(
        Flux2Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=flux2_vae(),
            text_encoder=encoder,
            tokenizer=PaddleOCRVLProcessor(PixtralImageProcessorPil(), tokenizer, chat_template=template),
            transformer=flux2_transformer(3 * TEXT, guidance=True),
        ),
        folder,
    )


def flux2_transformer(text: int, *, guidance: bool) -> Any:
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=text,
        timestep_guidance_channels=32,
        axes_dims_rope=(8, 8, 8, 8),
        guidance_embeds=guidance,
    )


def flux2_vae() -> Any:
    from diffusers import AutoencoderKLFlux2

    return AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def save(pipe: Any, folder: Path) -> Path:
    """Raise the small gains of a fresh transformer and decoder, so that pictures differ, and write the folder."""
    with torch.no_grad():
        for matrix in pipe.transformer.parameters():
            if matrix.ndim == 2:
                matrix.mul_(2.0)
        pipe.vae.decoder.conv_out.weight.mul_(4.0)
    pipe.save_pretrained(str(folder), safe_serialization=True)
    return folder


def kontext(folder: Path, kind: str = "FluxKontextPipeline") -> Path:
    """FLUX.1 Kontext [dev], or another pipeline of the same parts: CLIP and T5 of two layers."""
    import diffusers
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(TINY / "tokenizer", model_max_length=77)
    words = -(-len(tokenizer) // 64) * 64
    clip = CLIPTextConfig(
        vocab_size=words,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=32,
        eos_token_id=tokenizer.eos_token_id,
    )
    t5 = T5Config(vocab_size=words, d_model=32, d_ff=37, d_kv=8, num_layers=2, num_heads=4)
    return save(
        getattr(diffusers, kind)(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3,
                block_out_channels=(8, 16, 16),
                layers_per_block=1,
                latent_channels=4,
                norm_num_groups=4,
                scaling_factor=1.5,
                shift_factor=0.06,
                use_quant_conv=False,
                use_post_quant_conv=False,
            ),
            text_encoder=CLIPTextModel(clip),
            tokenizer=tokenizer,
            text_encoder_2=T5EncoderModel(t5),
            tokenizer_2=tokenizer,
            transformer=FluxTransformer2DModel(
                patch_size=1,
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=32,
                pooled_projection_dim=32,
                axes_dims_rope=(4, 4, 8),
                guidance_embeds=True,
            ),
        ),
        folder,
    )


def qwen(folder: Path, *, plus: bool = False) -> Path:
    """Qwen-Image-Edit, or its Plus pipeline. The processor stands in for `Qwen2VLProcessor`, which needs torchvision."""
    import diffusers
    from transformers import AutoTokenizer, PaddleOCRVLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(
        TINY / "tokenizer",
        model_max_length=1024,
        extra_special_tokens={
            "image_token": "<|image_pad|>",
            "vision_start_token": "<|vision_start|>",
            "vision_end_token": "<|vision_end|>",
        },
    )
    kind = diffusers.QwenImageEditPlusPipeline if plus else diffusers.QwenImageEditPipeline
    return save(
        kind(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=diffusers.AutoencoderKLQwenImage(
                base_dim=24,
                z_dim=4,
                dim_mult=[1, 2, 4],
                num_res_blocks=1,
                temperal_downsample=[False, True],
                latents_mean=[0.1, 0.0, -0.1, 0.2],
                latents_std=[1.0, 0.9, 1.1, 1.2],
            ),
            text_encoder=qwen_vl(tokenizer),
            tokenizer=tokenizer,
            processor=PaddleOCRVLProcessor(Qwen2VLImageProcessorPil(max_pixels=2**18), tokenizer),
            transformer=diffusers.QwenImageTransformer2DModel(
                patch_size=2,
                in_channels=16,
                out_channels=4,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=3,
                joint_attention_dim=TEXT,
                guidance_embeds=False,
                axes_dims_rope=(8, 4, 4),
            ),
        ),
        folder,
    )


def qwen_vl(tokenizer: Any) -> Any:
    """A Qwen2.5-VL of two layers of each kind, for the token ids of the tokenizer."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{word}|>")
        for name, word in (("image", "image_pad"), ("vision_start", "vision_start"), ("vision_end", "vision_end"))
    }
    words = -(-len(tokenizer) // 64) * 64
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": words,
                "hidden_size": TEXT,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "rope_scaling": {"mrope_section": [2, 4, 6], "rope_type": "default", "type": "default"},
                "initializer_range": 0.2,
                **ids,
            },
            vision_config={
                "depth": 2,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_heads": 2,
                "out_hidden_size": TEXT,
                "initializer_range": 0.2,
            },
            **ids,
        )
    )
