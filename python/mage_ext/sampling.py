"""Samplers: which token each open position would take, and which open positions are decided in this step.

Pure functions on tensors, without state, host synchronisation or knowledge of the model, the cache and blocks. `open`
says which positions are still undecided; it is a boolean of the loop's, never `token == mask_id`. Rows (requests) never
influence each other.

Test: pytest tests/python/test_sampling.py
"""

import math
import numbers
import sys
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mage_ext import ops
from mage_ext._arguments import check_tensor, check_type, got
from mage_ext.counter_random import random_uniform

SAMPLERS = ("sequential", "low_confidence_static", "low_confidence_dynamic", "entropy_bounded")

# Probabilities are summed as integers of this scale: such sums have one result on every device and in every order.
# 2^40 resolves a uniform distribution over 262144 tokens with 22 bits each; a token below 2^-40 is never drawn.
_FIXED_POINT = 2.0**40

# Nats beyond which an entropy counts as infinite: no vocabulary reaches it, and 128 Ki such sum up in 63 bits.
_MAX_ENTROPY = 64.0

# Far beyond these a temperature rounds to 0 or infinity in float32, where the draw would silently be one fixed token.
_MIN_TEMPERATURE, _MAX_TEMPERATURE = 1e-4, 1e4


def _check_int(owner: str, name: str, value: object, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{owner}: {name} must be an integer >= {minimum}, got {got(value)}")
    if value >= 1 << 31:
        raise ValueError(f"{owner}: {name} must be below 2^31, got {value}")


def _check_real(owner: str, name: str, value: object, low: float, high: float, open_low: bool = False) -> None:
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_real or not low <= value <= high or (open_low and value == low):  # NaN is in no interval
        interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if math.isinf(high) else ']'}"
        raise ValueError(f"{owner}: {name} must be a number in {interval}, got {got(value)}")
    if abs(value) > sys.float_info.max:
        raise ValueError(f"{owner}: {name} must be finite, got {value!r}")


def _check_draw(owner: str, temperature: float, top_k: int, top_p: float) -> None:
    is_real = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    if not is_real or not (temperature == 0 or _MIN_TEMPERATURE <= temperature <= _MAX_TEMPERATURE):
        raise ValueError(
            f"{owner}: temperature must be a number, 0 or in [{_MIN_TEMPERATURE:g}, {_MAX_TEMPERATURE:g}], "
            f"got {got(temperature)}"
        )
    _check_int(owner, "top_k", top_k, 0)
    _check_real(owner, "top_p", top_p, 0.0, 1.0, open_low=True)


@dataclass(frozen=True)
class SamplerConfig:
    """How positions are decided and tokens drawn.

    Fields:
        name: "sequential" (the leftmost open positions), "low_confidence_static" (the most confident ones),
            "low_confidence_dynamic" (all above a threshold) or "entropy_bounded" (as many as the bound allows).
        tokens_per_step: positions that sequential and low_confidence_static decide per step, >= 1.
        threshold: of low_confidence_dynamic, in [0, 1]; strict: confidence > threshold, so 1 decides one position per
            step.
        entropy_bound: gamma of entropy_bounded, nats, >= 0; 0 decides one position (more only where entropy is exactly
            0).
        temperature: 0, which takes the most probable token, or in [1e-4, 1e4].
        top_k: 0 is off.
        top_p: in (0, 1]; 1 is off.

    Raises:
        ValueError: naming the field, what it must be and what came.
    """

    name: str = "low_confidence_dynamic"
    tokens_per_step: int = 1
    threshold: float = 0.9
    entropy_bound: float = 0.4
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not isinstance(self.name, str) or self.name not in SAMPLERS:
            raise ValueError(f"SamplerConfig: name must be one of {', '.join(SAMPLERS)}, got {got(self.name)}")
        _check_int("SamplerConfig", "tokens_per_step", self.tokens_per_step, 1)
        _check_real("SamplerConfig", "threshold", self.threshold, 0.0, 1.0)
        _check_real("SamplerConfig", "entropy_bound", self.entropy_bound, 0.0, math.inf)
        _check_draw("SamplerConfig", self.temperature, self.top_k, self.top_p)

    def max_forwards(self, num_open: int) -> int:
        """Steps after which `num_open` positions are decided for certain; exact for the two static samplers.

        Raises:
            ValueError: num_open is no integer >= 0.
        """
        _check_int("SamplerConfig", "num_open", num_open, 0)
        static = self.name in ("sequential", "low_confidence_static")
        return -(-num_open // self.tokens_per_step) if static else num_open


class Draws(NamedTuple):
    """What draw_tokens found per position.

    Fields:
        token: [...], int64, never the mask id.
        confidence: [...], float32. Probability of `token` under the model's distribution at temperature 1, without the
            mask id, before top-k and top-p.
        entropy: [...], float32, nats, of that distribution.
    """

    token: Tensor
    confidence: Tensor
    entropy: Tensor


def draw_tokens(
    logits: Tensor,
    *,
    mask_id: int | None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    step: Tensor | int = 0,
    overwrite: bool = False,
) -> Draws:
    """One token per row of logits, with its confidence and the row's entropy.

    The mask id is excluded first. At temperature 0 the largest logit wins (ties: lowest id). Otherwise logits are
    divided by the temperature; top_k keeps the k largest (of equal ones at the border the lower ids); top_p keeps, of
    what is left and in descending order (equal ones by lower id), a token while the probability before it is < top_p,
    so at least one; then one is drawn by inverse CDF in id order. NaN logits count as -inf, logits of +inf share the
    probability equally. A row without any logit above -inf gives the lowest allowed id with confidence 0.

    Args:
        logits: [..., V], float32, bfloat16 or float16; not changed unless `overwrite`.
        mask_id: id that may not be emitted, in [0, V); None: all ids may.
        temperature: as in SamplerConfig.
        top_k: as in SamplerConfig.
        top_p: as in SamplerConfig.
        seeds: [...] or broadcasting with it, int64. One per request; required at temperature > 0.
        positions: [...] or broadcasting with it, int64, absolute positions; required at temperature > 0.
        step: number of the step, an integer or int64 broadcasting with positions. (seed, position, step) is the whole
            key of a draw.
        overwrite: the caller needs the logits no more: those of the mask id become -inf in place, which saves a copy.

    Returns:
        Draws with tensors of shape [...].

    Raises:
        ValueError, TypeError: naming the argument.
    """
    _check_draw("draw_tokens", temperature, top_k, top_p)
    check_tensor("draw_tokens", "logits", logits)
    if logits.dim() < 1 or not logits.is_floating_point():
        raise TypeError(f"draw_tokens: logits must be floating point [..., V], got {logits.dtype} {list(logits.shape)}")
    vocab_size = logits.shape[-1]
    if vocab_size < (1 if mask_id is None else 2):
        raise ValueError(f"draw_tokens: logits must have an id that may be emitted, got V = {vocab_size}")
    if mask_id is not None:
        check_type("draw_tokens", "mask_id", mask_id, numbers.Integral, "an integer or None")
        if not 0 <= mask_id < vocab_size:
            raise ValueError(f"draw_tokens: mask_id must be in [0, V = {vocab_size}), got {mask_id}")
    check_type("draw_tokens", "overwrite", overwrite, bool, "a bool")
    if temperature > 0:
        _check_key(seeds, positions, step, logits.shape[:-1])

    if mask_id is not None:
        if not overwrite:
            logits = logits.clone()
        logits.select(-1, mask_id).fill_(-math.inf)
    token, confidence, entropy = _most_probable(logits)
    if temperature > 0:
        has_token = confidence > 0
        scores = _finite_scores(logits)
        shifted = scores - torch.where(has_token, scores.gather(-1, token[..., None]).squeeze(-1), 0)[..., None]
        scaled = shifted / temperature
        if 0 < top_k < vocab_size:
            scaled = _keep_top_k(scaled, top_k)
        probs = torch.softmax(scaled, -1)
        if top_p < 1:
            probs = _keep_top_p(probs, top_p)
        uniform = random_uniform(*torch.broadcast_tensors(seeds, positions), step).expand(token.shape)
        token = torch.where(has_token, _inverse_cdf(probs, uniform), token)
        # p(token) = e^(x_token - x_top) * p(top), without another pass; 0 is for rows without a token.
        drawn = confidence * shifted.gather(-1, token[..., None]).squeeze(-1).exp()
        confidence = torch.where(has_token, drawn.clamp(min=torch.finfo(drawn.dtype).tiny), confidence)
    if mask_id == 0:
        # 0 is the token of rows without a logit above -inf only.
        token = token.clamp(min=1)
    return Draws(token, confidence, entropy)


def _check_key(seeds: object, positions: object, step: object, rows: torch.Size) -> None:
    """seeds, positions and step of a draw for rows [...]."""
    for name, value in (("seeds", seeds), ("positions", positions)):
        if not isinstance(value, Tensor) or value.dtype != torch.int64:
            actual = value.dtype if isinstance(value, Tensor) else got(value)
            raise ValueError(f"draw_tokens: {name} must be an int64 tensor at temperature > 0, got {actual}")
    check_type("draw_tokens", "step", step, (int, Tensor), "an integer or an int64 tensor")
    if isinstance(step, Tensor) and step.dtype != torch.int64:
        raise TypeError(f"draw_tokens: step must be an integer or an int64 tensor, got {step.dtype}")
    if isinstance(step, int) and not -(1 << 63) <= step < 1 << 63:
        raise ValueError(f"draw_tokens: step must fit 64 bits, got {step}")
    for name, value in (("seeds", seeds), ("positions", positions), ("step", step)):
        sizes = list(value.shape) if isinstance(value, Tensor) else []
        padded = [1] * (len(rows) - len(sizes)) + sizes
        if len(padded) != len(rows) or any(size not in (1, row) for size, row in zip(padded, rows, strict=True)):
            raise ValueError(f"draw_tokens: {name} must broadcast with {list(rows)}, got {sizes}")


def _check_rows(owner: str, name: str, value: object, open: object) -> None:
    """A float tensor [B, Q] with what is open."""
    check_tensor(owner, "open", open, dtype=torch.bool)
    if open.dim() != 2:
        raise ValueError(f"{owner}: open must be [B, Q], got {list(open.shape)}")
    check_tensor(owner, name, value, open.shape)
    if not value.is_floating_point():
        raise TypeError(f"{owner}: {name} must be floating point, got {value.dtype}")


def _most_probable(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ops.token_confidence over [..., V]."""
    rows = ops.token_confidence(logits.reshape(-1, logits.shape[-1]))
    return tuple(row.view(logits.shape[:-1]) for row in rows)


def _finite_scores(logits: Tensor) -> Tensor:
    """float32 logits with NaN at -inf; in a row with +inf, those are 0 and the others -inf."""
    scores = logits.float()
    scores = torch.where(scores.isnan(), -math.inf, scores)
    infinite = scores == math.inf
    return torch.where(infinite.any(-1, keepdim=True), torch.where(infinite, 0.0, -math.inf), scores)


def _keep_top_k(scores: Tensor, top_k: int) -> Tensor:
    border = scores.topk(top_k, -1).values[..., -1:]
    above = scores > border
    ties = scores == border
    room = top_k - above.sum(-1, keepdim=True)
    return torch.where(above | (ties & (ties.cumsum(-1) <= room)), scores, -math.inf)


def _fixed_point(probs: Tensor) -> Tensor:
    return (probs.double() * _FIXED_POINT).long()


def _keep_top_p(probs: Tensor, top_p: float) -> Tensor:
    ordered, ids = torch.sort(probs, dim=-1, descending=True, stable=True)
    ordered = _fixed_point(ordered)
    cumulative = ordered.cumsum(-1)
    keep = (cumulative - ordered).double() < top_p * cumulative[..., -1:].double()
    return torch.where(torch.zeros_like(keep).scatter(-1, ids, keep), probs, 0)


def _inverse_cdf(probs: Tensor, uniform: Tensor) -> Tensor:
    """First id whose cumulative probability exceeds uniform * total; probs need not sum to 1."""
    cumulative = _fixed_point(probs.nan_to_num(0.0)).cumsum(-1)
    total = cumulative[..., -1]
    target = torch.minimum((uniform * total.double()).long(), total - 1)  # the product may round up to the total
    token = torch.searchsorted(cumulative, target[..., None].contiguous(), right=True).squeeze(-1)
    return token.clamp(max=probs.shape[-1] - 1)


def decide(config: SamplerConfig, draws: Draws, open: Tensor) -> Tensor:
    """Positions that `config.name` decides in this step.

    A row with an open position decides at least one, a row without decides none; nothing outside `open` is ever
    decided.

    Args:
        config: the sampler and its parameter.
        draws: of draw_tokens, tensors [B, Q].
        open: [B, Q], bool. Undecided positions; restrict it to the current sub-block where there is one.

    Returns:
        [B, Q], bool.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    check_type("decide", "config", config, SamplerConfig, "a SamplerConfig")
    check_type("decide", "draws", draws, Draws, "Draws")
    check_tensor("decide", "draws.token", draws.token)
    check_tensor("decide", "open", open)
    if open.dtype != torch.bool or open.shape != draws.token.shape:
        raise ValueError(f"decide: open must be bool {list(draws.token.shape)}, got {open.dtype} {list(open.shape)}")
    if config.name == "sequential":
        return sequential(open, config.tokens_per_step)
    if config.name == "low_confidence_static":
        return low_confidence_static(draws.confidence, open, config.tokens_per_step)
    if config.name == "low_confidence_dynamic":
        return low_confidence_dynamic(draws.confidence, open, config.threshold)
    return entropy_bounded(draws.entropy, open, config.entropy_bound)


def sequential(open: Tensor, tokens_per_step: int) -> Tensor:
    """The leftmost min(tokens_per_step, open) open positions. open: [B, Q], bool. Returns [B, Q], bool.

    Raises:
        ValueError, TypeError: naming the argument; so do the three below.
    """
    check_tensor("sequential", "open", open, dtype=torch.bool)
    if open.dim() != 2:
        raise ValueError(f"sequential: open must be [B, Q], got {list(open.shape)}")
    _check_int("sequential", "tokens_per_step", tokens_per_step, 1)
    return open & (open.cumsum(-1) <= tokens_per_step)


def low_confidence_static(confidence: Tensor, open: Tensor, tokens_per_step: int) -> Tensor:
    """The min(tokens_per_step, open) most confident open positions; ties: leftmost; NaN ranks below every number.

    Args:
        confidence: [B, Q], float32.
        open: [B, Q], bool.
        tokens_per_step: >= 1.

    Returns:
        [B, Q], bool.
    """
    _check_rows("low_confidence_static", "confidence", confidence, open)
    _check_int("low_confidence_static", "tokens_per_step", tokens_per_step, 1)
    return open & (_precedes(-_confidence_key(confidence), open).sum(-1) < tokens_per_step)


def low_confidence_dynamic(confidence: Tensor, open: Tensor, threshold: float) -> Tensor:
    """Every open position with confidence > threshold, and the most confident one in any case (ties: leftmost).

    Args:
        confidence: [B, Q], float32; NaN is never above the threshold.
        open: [B, Q], bool.
        threshold: compared in float32.

    Returns:
        [B, Q], bool.
    """
    _check_rows("low_confidence_dynamic", "confidence", confidence, open)
    _check_real("low_confidence_dynamic", "threshold", threshold, -math.inf, math.inf)
    key = torch.where(open, _confidence_key(confidence), -math.inf)
    index = torch.arange(open.shape[-1], device=open.device)
    most_confident = open & (key == key.amax(-1, keepdim=True))
    first = torch.where(most_confident, index, len(index)).amin(-1, keepdim=True)
    return open & ((confidence > float(threshold)) | (index == first))


def entropy_bounded(entropy: Tensor, open: Tensor, entropy_bound: float) -> Tensor:
    """The longest run of open positions in ascending entropy whose sum without its largest term is <= entropy_bound.

    This is the rule of the EB-sampler (Ben-Hamu et al., "Accelerated Sampling from Masked Diffusion Models via Entropy
    Bounded Unmasking", arXiv 2505.24857): the sum without its largest term bounds the mutual information of the
    positions decided together. The run of one has sum 0, so one position is always decided. Sums are exact ones of
    entropies rounded up to 2^-40 nats; beyond 64 nats, which no vocabulary reaches, one counts as infinite. Ties rank
    from left to right, NaN last.

    Args:
        entropy: [B, Q], float32, nats, >= 0.
        open: [B, Q], bool.
        entropy_bound: gamma >= 0.

    Returns:
        [B, Q], bool.
    """
    _check_rows("entropy_bounded", "entropy", entropy, open)
    _check_real("entropy_bounded", "entropy_bound", entropy_bound, 0.0, math.inf)
    key = entropy.double().nan_to_num(nan=math.inf)
    precedes = _precedes(key, open)
    # Rounded up: only an entropy of exactly 0 adds nothing.
    units = (key.clamp(max=_MAX_ENTROPY) * _FIXED_POINT).ceil().long()[:, None]  # [B, 1, Q]
    before = torch.where(precedes, units, 0).sum(-1).double() / _FIXED_POINT
    unbounded = (precedes & (key > _MAX_ENTROPY)[:, None]).any(-1)
    return open & ~unbounded & (before <= float(entropy_bound))


def _confidence_key(confidence: Tensor) -> Tensor:
    return confidence.nan_to_num(nan=-1.0)


def _precedes(key: Tensor, open: Tensor) -> Tensor:
    """[B, Q, Q], bool: open position j (last dim) ranks before position i in ascending key, equal keys from left to
    right. A comparison of all pairs has one result on every device and fuses with what follows, unlike a sort."""
    index = torch.arange(key.shape[-1], device=key.device)
    one, other = key[:, :, None], key[:, None]
    return open[:, None] & ((other < one) | ((other == one) & (index < index[:, None])))
