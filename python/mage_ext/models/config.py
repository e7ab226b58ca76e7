"""What the project knows about a model: the one description that every family is read into."""

import itertools
import math
from dataclasses import dataclass, field, replace


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class ModelConfig:
    """Shape and decoding facts of a block-diffusion decoder.

    Fields:
        family: "fast_dllm_v2", "sdar" or "llama".
        vocab_size, hidden_size, num_layers, num_heads, num_kv_heads, head_dim, intermediate_size: counts.
        rope_theta: base of the rotary embedding; rms_eps: epsilon of every RMSNorm.
        qkv_bias: q/k/v projections have a bias (Qwen2.5); qk_norm: RMSNorm over head_dim on q and k (Qwen3).
        tie_embeddings: lm_head shares embed_tokens.
        max_positions: positions the model was trained for; prompt + output may not exceed it.
        block_size: tokens per denoised block; sub_block_size: rows of a sub-block step (None: no sub-blocks).
        token_shift: logits at i-1 predict position i.
        mask_id: token that stands for an undecided position; eos_ids: tokens that end a request.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rope_theta: float
    rms_eps: float
    max_positions: int
    block_size: int
    mask_id: int
    eos_ids: tuple[int, ...] = field(default=())
    sub_block_size: int | None = None
    token_shift: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False

    def __post_init__(self):
        for name in (
            "vocab_size hidden_size num_layers num_heads num_kv_heads head_dim intermediate_size "
            "max_positions block_size"
        ).split():
            value = getattr(self, name)
            if not _is_int(value) or value < 1:
                raise ValueError(f"ModelConfig: {name} must be a positive integer, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"ModelConfig: num_heads must be a multiple of num_kv_heads ({self.num_kv_heads}), got {self.num_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"ModelConfig: head_dim must be even (rotary pairs), got {self.head_dim}")
        for name in ("rope_theta", "rms_eps"):
            value = getattr(self, name)
            if not (_is_int(value) or isinstance(value, float)) or not 0 < value < math.inf:
                raise ValueError(f"ModelConfig: {name} must be a positive finite number, got {value!r}")
        for name in ("token_shift", "qkv_bias", "qk_norm", "tie_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"ModelConfig: {name} must be a bool, got {getattr(self, name)!r}")
        if not isinstance(self.eos_ids, (tuple, list)):
            raise ValueError(f"ModelConfig: eos_ids must be a tuple of ids, got {self.eos_ids!r}")
        for token in self.eos_ids:
            if not _is_int(token) or not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"ModelConfig: eos_ids must be ids in [0, vocab_size = {self.vocab_size}), got {token!r}"
                )
        if not _is_int(self.mask_id) or not 0 <= self.mask_id < self.vocab_size:
            raise ValueError(f"ModelConfig: mask_id must be in [0, vocab_size = {self.vocab_size}), got {self.mask_id}")
        sub = self.sub_block_size
        if sub is not None and (not _is_int(sub) or sub < 1 or self.block_size % sub):
            raise ValueError(f"ModelConfig: sub_block_size must divide block_size ({self.block_size}), got {sub!r}")


@dataclass(frozen=True)
class Cut:
    """A base model without some of its layers, at other positions.

    Fields:
        layers: numbers of the layers that stay, ascending. rope_theta, max_positions: in place of the base's.
    Raises:
        ValueError: a layer that is no number, twice or out of order, or none; the others as in ModelConfig.
    """

    layers: tuple[int, ...]
    rope_theta: float
    max_positions: int

    def __post_init__(self):
        layers = self.layers
        if not (
            isinstance(layers, tuple)
            and layers
            and all(_is_int(layer) and layer >= 0 for layer in layers)
            and all(a < b for a, b in itertools.pairwise(layers))
        ):
            raise ValueError(f"Cut: layers must be ascending layer numbers, at least one, got {layers!r}")

    def of(self, config: ModelConfig) -> ModelConfig:
        """The configuration of what is left of a base. Raises ValueError if it has no such layer."""
        if self.layers[-1] >= config.num_layers:
            raise ValueError(f"Cut: layers must be below the base's {config.num_layers}, got {self.layers[-1]}")
        return replace(
            config, num_layers=len(self.layers), rope_theta=self.rope_theta, max_positions=self.max_positions
        )
