"""Geometries of the models that speed is measured on, and models of that size with random weights.

Test: pytest tests/python/test_transformer.py
"""

import dataclasses
from typing import Any

import torch

from mage_ext._arguments import check_device, check_type
from mage_ext.models.config import ModelConfig
from mage_ext.models.transformer import Transformer

# The models themselves stop at 32768 positions and know end-of-text tokens. For speed 128K of context and its output
# must fit, and a random weight must not end a request.
_SPEED_ONLY = dict(max_positions=1 << 18, eos_ids=())
_QWEN25 = dict(
    family="fast_dllm_v2",
    num_layers=28,
    head_dim=128,
    rope_theta=1e6,
    rms_eps=1e-6,
    block_size=32,
    sub_block_size=8,
    mask_id=151665,
    token_shift=True,
    qkv_bias=True,
    **_SPEED_ONLY,
)

# "1.5B" and "7B": Fast-dLLM v2 (Qwen2.5). "8B": SDAR-8B (Qwen3), of its releases the one with blocks of 32.
GEOMETRIES = {
    "1.5B": ModelConfig(
        vocab_size=151936,
        hidden_size=1536,
        num_heads=12,
        num_kv_heads=2,
        intermediate_size=8960,
        tie_embeddings=True,
        **_QWEN25,
    ),
    "7B": ModelConfig(
        vocab_size=152064,
        hidden_size=3584,
        num_heads=28,
        num_kv_heads=4,
        intermediate_size=18944,
        **_QWEN25,
    ),
    "8B": ModelConfig(
        family="sdar",
        vocab_size=151936,
        hidden_size=4096,
        num_layers=36,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=12288,
        rope_theta=1e6,
        rms_eps=1e-6,
        block_size=32,
        mask_id=151669,
        qk_norm=True,
        **_SPEED_ONLY,
    ),
}


@torch.no_grad()
def random_model(
    name: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    num_layers: int | None = None,
    **changes: Any,
) -> Transformer:
    """A model of a real one's size with random weights: right for speed, its text means nothing.

    The weights are drawn where they stay, so a 7B model takes no host memory.

    Args:
        name: of GEOMETRIES. device: of the weights. dtype: float32, bfloat16 or float16. seed: of the weights.
        num_layers: fewer layers than the real one; None: all of them.
        changes: other fields of ModelConfig, e.g. token_shift=False or max_positions.
    Returns:
        The model in eval mode, without gradients, not optimized.
    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_type("random_model", "name", name, str, "a text")
    if name not in GEOMETRIES:
        raise ValueError(f"random_model: name must be one of {', '.join(GEOMETRIES)}, got {name!r}")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"random_model: dtype must be float32, bfloat16 or float16, got {dtype}")
    check_type("random_model", "seed", seed, int, "an integer")
    device = check_device("random_model", device)
    unknown = set(changes) - set(ModelConfig.__dataclass_fields__)
    if unknown:
        raise ValueError(f"random_model: changes must be fields of ModelConfig, got {', '.join(sorted(unknown))}")
    if num_layers is not None:
        changes["num_layers"] = num_layers
    config = dataclasses.replace(GEOMETRIES[name], **changes)

    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    model.to_empty(device=device)
    if config.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    generator = torch.Generator(device).manual_seed(seed)
    for parameter_name, weight in model.named_parameters():
        if parameter_name.endswith("norm.weight"):
            weight.fill_(1.0)
        else:
            # Rows of variance 1 / hidden keep what a product gives near 1; the norms do the rest.
            fan_in = config.hidden_size if weight.dim() == 1 else weight.shape[1]
            weight.normal_(std=fan_in**-0.5, generator=generator)
    return model.requires_grad_(False).eval()
