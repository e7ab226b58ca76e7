"""Random models of every family, small enough that a test runs them hundreds of times, and folders that hold them.

Test: pytest tests/python/test_denoise.py tests/python/test_huggingface.py
"""

import torch

from mage_ext.models.config import ModelConfig
from mage_ext.models.transformer import Transformer

_VARIANTS = {
    "fast_dllm_v2": dict(
        family="fast_dllm_v2", block_size=32, sub_block_size=8, token_shift=True, qkv_bias=True, tie_embeddings=True
    ),
    "sdar": dict(family="sdar", block_size=4, qk_norm=True),
    "sdar_b16": dict(family="sdar", block_size=16, qk_norm=True, num_kv_heads=1),
    "llama": dict(family="llama", block_size=8),
    "llama_shift": dict(family="llama", block_size=16, token_shift=True, tie_embeddings=True),
}
VARIANTS = tuple(_VARIANTS)


def tiny_config(variant: str, **overrides) -> ModelConfig:
    """ModelConfig of a variant ("fast_dllm_v2", "sdar", "sdar_b16", "llama", "llama_shift") with 3 layers and no
    EOS."""
    fields = dict(
        vocab_size=97,
        hidden_size=32,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=48,
        rope_theta=10000.0,
        rms_eps=1e-6,
        max_positions=512,
        mask_id=96,
    )
    return ModelConfig(**{**fields, **_VARIANTS[variant], **overrides})


# Scales of the weights, chosen for outputs that vary: attention with a spread of scores of about 9, a residual that the
# layers' outputs dominate.
_SCALES = {"embed_tokens": 0.3, "q_proj": 3.0, "k_proj": 3.0, "v_proj": 1.5, "o_proj": 1.5, "lm_head": 1.5}
_NORM_SCALES = {"q_norm": 3.0, "k_norm": 3.0}


def tiny_model(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Transformer:
    """A Transformer of random weights whose generated text is not the same few tokens over and over."""
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            owner, kind = name.split(".")[-2:]
            noise = torch.randn(weight.shape, generator=generator)
            if kind == "bias":
                weight.copy_(0.1 * noise)
            elif weight.dim() == 1:
                weight.copy_(_NORM_SCALES.get(owner, 1.0) * (1 + 0.1 * noise))
            else:
                fan_in = 1 if owner == "embed_tokens" else weight.shape[1]
                weight.copy_(noise * _SCALES.get(owner, 1.0) * fan_in**-0.5)
    return model.to(dtype).requires_grad_(False).eval()
