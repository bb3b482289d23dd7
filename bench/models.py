"""Full-size models with random weights, for timing and for tests on a GPU: nothing is downloaded.

    python bench/models.py z-image FOLDER

Timing needs no trained weights. The tokenizer is that of the embedded model, so prompts have a few more tokens than with
the real one.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

SEED = 20250101


def z_image(folder: Path, device: str = "cuda") -> None:
    """A Z-Image pipeline folder in bfloat16: 6.15 B transformer, 4.02 B Qwen3 text encoder, 0.084 B autoencoder."""
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import AutoTokenizer, Qwen3Config, Qwen3Model

    import imagemill

    tiny = Path(imagemill.__file__).parent / "assets" / "tiny"
    torch.manual_seed(SEED)
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        try:
            transformer = ZImageTransformer2DModel()
            text_encoder = Qwen3Model(
                Qwen3Config(
                    vocab_size=151936,
                    hidden_size=2560,
                    intermediate_size=9728,
                    num_hidden_layers=36,
                    num_attention_heads=32,
                    num_key_value_heads=8,
                    head_dim=128,
                    max_position_embeddings=40960,
                )
            )
            vae = AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
                latent_channels=16,
                norm_num_groups=32,
                scaling_factor=0.3611,
                shift_factor=0.1159,
                use_quant_conv=False,
                use_post_quant_conv=False,
            )
        finally:
            torch.set_default_dtype(torch.float32)
    transformer.rope_embedder.freqs_cis = None
    for parameter in [*transformer.parameters(), *text_encoder.parameters(), *vae.parameters()]:
        _fill(parameter)
    pipe = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=AutoTokenizer.from_pretrained(str(tiny / "tokenizer")),
        transformer=transformer,
    )
    pipe.save_pretrained(str(folder), safe_serialization=True)


def _fill(parameter: Any) -> None:
    """Weights small enough that nothing overflows through 36 layers; gains of norms are one, biases zero."""
    import torch

    with torch.no_grad():
        if parameter.ndim >= 2:
            fan_in = parameter[0].numel()
            parameter.normal_(0.0, min(0.05, fan_in**-0.5))
        elif not parameter.float().eq(1).all():
            parameter.zero_()


def z_image_lora(path: Path, seed: int, rank: int = 32) -> None:
    """A LoRA for that transformer on every attention projection and feed-forward layer, as PEFT writes it."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator("cpu").manual_seed(seed)
    tensors = {}
    for block in [f"layers.{number}" for number in range(30)] + ["noise_refiner.0", "context_refiner.0"]:
        for name, inputs, outputs in _linears():
            key = f"transformer.{block}.{name}"
            tensors[f"{key}.lora_A.weight"] = (torch.randn(rank, inputs, generator=generator) * 0.02).to(torch.bfloat16)
            tensors[f"{key}.lora_B.weight"] = (torch.randn(outputs, rank, generator=generator) * 0.02).to(
                torch.bfloat16
            )
    save_file(tensors, str(path))


def _linears() -> list[tuple[str, int, int]]:
    """Name, inputs and outputs of the linear layers of one block of the default transformer."""
    dim, hidden = 3840, int(3840 / 3 * 8)
    attention = [(f"attention.{name}", dim, dim) for name in ("to_q", "to_k", "to_v", "to_out.0")]
    return [
        *attention,
        ("feed_forward.w1", dim, hidden),
        ("feed_forward.w2", hidden, dim),
        ("feed_forward.w3", dim, hidden),
    ]


def main() -> None:
    """Build the model that is named."""
    if len(sys.argv) != 3 or sys.argv[1] != "z-image":
        sys.exit("usage: python bench/models.py z-image FOLDER")
    z_image(Path(sys.argv[2]))


if __name__ == "__main__":
    main()
