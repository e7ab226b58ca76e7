"""Lists of single tokens in two levels: units that may hold them, the tokens, and whether the first level lost any.

Masses of all tokens are a second pass over every key. With `SelectionConfig.candidates` each layer looks at the tokens
of its heaviest units alone, while its q is there; one `select_kv` over what all layers saw makes the lists. This module
knows nothing of attention and of the loop.

Test: pytest tests/python/test_token_candidates.py
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mage_ext import ops
from mage_ext._arguments import check_tensor, check_type
from mage_ext.selection import CANDIDATE_UNIT, BlockSelection, SelectionConfig

# A token's mass is never above its unit's, but both are rounded: block_attention_mass gives shares of units to within
# 2^-10 of themselves on CUDA. A proof leaves room for four times that.
ROUNDING = 2.0**-8


@dataclass(frozen=True, eq=False)
class Candidates:
    """What the selecting layers of a forward saw of single tokens. u = CANDIDATE_UNIT.

    Fields:
        units: [L, B, Hkv, C], int32. Candidate units of u tokens: strictly ascending, -1 after the last, which is the
            one of token P - 1. All heads of a request have as many.
        token_mass: [L, B, Hkv, C * u], float32. Masses of their tokens, in this order.
        unit_mass: [L, B, Hkv, n], float32. Masses of all units of u tokens.
    """

    units: Tensor
    token_mass: Tensor
    unit_mass: Tensor


def whole_lens(prefix_lens: Tensor) -> Tensor:
    """prefix_lens [B], int32, rounded up to whole candidate units."""
    return (prefix_lens + (CANDIDATE_UNIT - 1)) // CANDIDATE_UNIT * CANDIDATE_UNIT


def candidate_units(unit_mass: Tensor, whole_lens: Tensor, config: SelectionConfig) -> Tensor:
    """The first level, of one layer: the heaviest units, and in any case those of the tokens that are always listed and
    the one in which the prefix ends.

    Args:
        unit_mass: [B, Hkv, n], float32, of units of CANDIDATE_UNIT tokens. whole_lens: [B], int32, of `whole_lens`.
        config: with candidates.

    Returns:
        [B, Hkv, C], int32, contiguous; C = config.candidates / CANDIDATE_UNIT, or n if that is less.

    Raises:
        ValueError: config has no candidates. TypeError: it is none. Both of `select_kv`, naming the argument.
    """
    _check_config("candidate_units", config)
    sinks, recents = _forced(config)
    size = max(1, min(config.candidates // CANDIDATE_UNIT, unit_mass.shape[-1]))
    units, *_ = ops.select_kv(
        unit_mass[None],
        whole_lens,
        g=CANDIDATE_UNIT,
        capacity=size,
        k=config.candidates,
        sinks=sinks,
        # P may be up to so many tokens below whole_lens.
        recents=recents + CANDIDATE_UNIT - 1,
    )
    return units[0]


def select_tokens(
    candidates: Candidates, prefix_lens: Tensor, config: SelectionConfig
) -> tuple[BlockSelection, Tensor]:
    """The second level, of all layers: lists of tokens out of their candidates, without waiting for the device.

    Args:
        candidates: of a forward. prefix_lens: [B], int32. P of each request, as the first level had it, or 0: nothing
            is listed, the tail starts at 0.
        config: with candidates.

    Returns:
        The selection, and proven [L, B, Hkv], bool: the list is, token for token, that of `select` over what token_mass
        gives for all tokens. It is if each of its tokens (but those always listed) has more mass than any unit that is
        no candidate; with rule "joint" if this holds for the lists of all heads together and the least of their tokens
        has no equal that is left out. Where it does not, a list may be the same nevertheless.

    Raises:
        TypeError: naming the argument. ValueError: config has no candidates, or tensors of other shapes than
            `Candidates` names.
    """
    check_type("select_tokens", "candidates", candidates, Candidates, "a Candidates")
    _check_config("select_tokens", config)
    unit, units, mass = CANDIDATE_UNIT, candidates.units, candidates.token_mass
    _check_candidates(candidates)
    check_tensor("select_tokens", "prefix_lens", prefix_lens, tuple(units.shape[1:2]), torch.int32)
    num_layers, _, num_kv_heads, num_candidates = units.shape
    num_units = candidates.unit_mass.shape[-1]
    prefix_lens = prefix_lens.clamp(0, num_units * unit)
    whole = whole_lens(prefix_lens)
    # Candidates are ascending, and the last one ends with the prefix: their tokens are a shorter prefix, with the same
    # sinks at its start and the same recents at its end.
    lens = (whole // unit).clamp(max=num_candidates) * unit - (whole - prefix_lens)  # [B], int32
    sinks, recents = _forced(config)
    places, counts, kept_mass, _, overflow = ops.select_kv(
        mass,
        lens,
        g=1,
        capacity=config.capacity_units(mass.shape[-1], num_layers, num_kv_heads),
        rule=config.rule,
        k=config.k,
        sinks=sinks,
        recents=recents,
    )
    listed, places = places >= 0, places.clamp(min=0).long()
    tokens = units.gather(-1, places // unit) * unit + (places % unit).int()

    numbers = torch.arange(num_units, device=mass.device)
    below = numbers < (whole // unit)[:, None, None]  # [B, 1, n]: the prefix has tokens of it
    behind = torch.where(below, 0.0, candidates.unit_mass).sum(-1)  # all of it where P = 0
    selection = BlockSelection(
        indices=torch.where(listed, tokens, -1),
        counts=counts,
        # select_kv added the tokens of the last unit that are at or past P.
        kept_mass=torch.where((prefix_lens > 0)[:, None], kept_mass + behind, behind),
        tail_start=prefix_lens,
        g=1,
        overflow=overflow,
    )

    listed_mass = mass.gather(-1, places)
    free = listed & (places >= sinks) & (places < (lens - recents)[:, None, None])
    least = torch.where(free, listed_mass, math.inf).amin(-1, keepdim=True)  # [L, B, Hkv, 1]
    # -1 stands for unused candidates, beside which all units are candidates, unit 0 among them.
    others = candidates.unit_mass.scatter(-1, units.clamp(min=0).long(), -1.0)
    most = torch.where(below, others, -1.0).amax(-1, keepdim=True)
    complete = most < 0
    proven = least > most * (1 + ROUNDING)
    if config.rule == "joint":
        # One ranking of all heads, whose ties go by the place among the candidates; what a capacity cut off of it is
        # not seen here.
        least = torch.where(overflow[..., None], -1.0, least).amin(-2, keepdim=True)
        place = torch.arange(mass.shape[-1], device=mass.device)
        as_heavy = (mass >= least) & (place < lens[:, None, None])
        taken = (listed & (listed_mass >= least)).sum((-2, -1), keepdim=True)
        proven = as_heavy.sum((-2, -1), keepdim=True) == taken
        proven = proven & (least > most.amax(-2, keepdim=True) * (1 + ROUNDING))
    return selection, (complete | proven).squeeze(-1)


def _check_candidates(candidates: Candidates) -> None:
    owner, heads = "select_tokens", ()
    for name, dtype in (("units", torch.int32), ("token_mass", torch.float32), ("unit_mass", torch.float32)):
        tensor, name = getattr(candidates, name), f"candidates.{name}"
        check_tensor(owner, name, tensor, dtype=dtype)
        if tensor.dim() != 4:
            raise ValueError(f"{owner}: {name} must have 4 dimensions, got shape {list(tensor.shape)}")
        heads = heads or tuple(tensor.shape[:3])
        tokens = candidates.units.shape[3] * CANDIDATE_UNIT
        last = tokens if name.endswith("token_mass") else tensor.shape[3]
        check_tensor(owner, name, tensor, (*heads, last))


def _check_config(owner: str, config: SelectionConfig) -> None:
    check_type(owner, "config", config, SelectionConfig, "a SelectionConfig")
    if config.candidates is None:
        raise ValueError(f"{owner}: config must have candidates, got None")


def _forced(config: SelectionConfig) -> tuple[int, int]:
    """Sinks and recents as far as the budget of a list reaches."""
    sinks = min(config.sinks, config.k)
    return sinks, min(config.recents, config.k - sinks)
