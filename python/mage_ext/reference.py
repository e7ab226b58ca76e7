"""Slow twins of the operators in plain torch: the documentation of what each computes, and the oracle of the tests.

Names, argument order and returns are those of `mage_ext.ops`, which never imports this module.
"""

import math

import torch
from torch import Tensor


def append_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, start: Tensor) -> None:
    """Twin of ops.append_kv: one token at a time, in place."""
    pages, page = k_cache.shape[:2]
    capacity = block_table.shape[1] * page
    for b in range(k.shape[0]):
        for i in range(k.shape[1]):
            position = int(start[b]) + i
            if not 0 <= position < capacity:
                continue
            page_id = int(block_table[b, position // page])
            if not 0 <= page_id < pages:
                continue
            k_cache[page_id, position % page] = k[b, i]
            v_cache[page_id, position % page] = v[b, i]


# --- selection -------------------------------------------------------------------------------------------------------


def row_votes(
    row_mass: Tensor, prefix_lens: Tensor, *, k: int, g: int, row_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Twin of ops.row_votes: one row after the other, sums in float64."""
    requests, heads, units, rows = row_mass.shape
    votes = torch.zeros(requests, heads, units, dtype=torch.int32)
    union_size = torch.zeros(requests, heads, dtype=torch.int32)
    coverage = torch.zeros(requests, heads)
    for b in range(requests):
        eligible = min(max(int(prefix_lens[b]), 0), units * g) // g
        keep = torch.ones(rows, dtype=torch.bool)
        if row_mask is not None:
            keep = row_mask[b].repeat_interleave(rows // row_mask.shape[1])
        for h in range(heads):
            for r in keep.nonzero().flatten().tolist():
                log_share = row_mass[b, h, :eligible, r].nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
                best = torch.sort(log_share, descending=True, stable=True).indices[: k // g]
                votes[b, h, best[log_share[best] > -math.inf]] += 1
            union = votes[b, h] > 0
            union_size[b, h] = union.sum()
            share = row_mass[b, h][:, keep].nan_to_num(nan=-math.inf, posinf=0, neginf=-math.inf).double()
            share = share.clamp(max=0).exp()
            total = share.sum(0)
            inside = torch.where(total > 0, share[union].sum(0) / total, 0)
            coverage[b, h] = inside.mean() if len(inside) else 0
    return votes, union_size, coverage


def _mass_order(mass: Tensor, heads: int = 1) -> Tensor:
    """Positions of mass [heads * n] in the order of rank: NaN last, zeros and negatives equal, ties to the lowest unit,
    then head."""
    bits = mass.contiguous().view(torch.int32).long()
    rank = torch.where(mass.isnan(), 0, torch.where(bits > 0, bits + 1, 1)).view(heads, -1)
    by_unit = torch.arange(rank.numel()).view(heads, -1).T.flatten()
    return by_unit[torch.sort(rank.T.flatten(), descending=True, stable=True).indices]


def _fixed_point(mass: Tensor) -> Tensor:
    return (mass.nan_to_num(nan=0, posinf=1).clamp(0, 1).double() * 2.0**40).long()


def _layer_budgets(k: int, k_min: int, union_size: Tensor, coverage: Tensor, units: int) -> list[int]:
    """Units of K_l for every layer of one request; k and k_min in units, union_size and coverage [L, Hkv]."""
    weight = ((1 - coverage.double().nan_to_num(nan=0).clamp(2.0**-24, 1).log()) * 2.0**20).round().long()
    score = (union_size.long().clamp(0, units) * weight).amax(1)
    if not score.sum():
        return [max(k_min, k)] * len(score)
    share = (score.double() * (k * len(score)) / score.sum().double()).floor().long()
    return share.clamp(min=k_min).tolist()


def select_kv(
    mass: Tensor,
    prefix_lens: Tensor,
    *,
    g: int,
    capacity: int,
    rule: str = "fixed",
    k: int = 0,
    k_min: int = 0,
    p: float = 0.0,
    sinks: int = 0,
    recents: int = 0,
    votes: Tensor | None = None,
    union_size: Tensor | None = None,
    coverage: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Twin of ops.select_kv: writes down every list in the order of priority, then cuts it."""
    layers, requests, heads, units = mass.shape
    indices = torch.full((layers, requests, heads, capacity), -1, dtype=torch.int32)
    counts = torch.zeros(layers, requests, heads, dtype=torch.int32)
    kept_mass = torch.zeros(layers, requests, heads)
    tail_start = torch.zeros(requests, dtype=torch.int32)
    overflow = torch.zeros(layers, requests, heads, dtype=torch.bool)
    fixed = _fixed_point(mass)
    for b in range(requests):
        prefix = min(max(int(prefix_lens[b]), 0), units * g)
        eligible, partial = prefix // g, int(prefix % g > 0)
        tail_start[b] = eligible * g
        forced = [unit for unit in range(eligible) if unit * g < sinks]
        latest = [unit for unit in reversed(range(eligible)) if (unit + 1) * g > prefix - recents and recents > 0]
        forced += [unit for unit in latest if unit not in forced]
        budgets = [k // g] * layers
        if rule == "layer":
            budgets = _layer_budgets(k // g, k_min // g, union_size[:, b], coverage[:, b], units)
        for l in range(layers):
            budget = max(budgets[l] - partial, 0)
            if rule == "joint":
                lists = _joint_lists(mass[l, b, :, :eligible], forced[:budget], budget)
            else:
                lists = []
                for h in range(heads):
                    if rule == "layer":
                        voted = votes[l, b, h, :eligible]
                        order = torch.sort(voted.clamp(min=0), descending=True, stable=True).indices.tolist()
                        order = [unit for unit in order if voted[unit] > 0]
                        order += [unit for unit in reversed(range(eligible)) if voted[unit] <= 0]
                    else:
                        order = _mass_order(mass[l, b, h, :eligible]).tolist()
                    order = forced + [unit for unit in order if unit not in forced]
                    size = budget
                    if rule == "mass":
                        size = _size_for_mass(fixed[l, b, h], order, len(forced), eligible, p)
                        size = max(size, k_min // g - partial)
                    lists.append(order[:size])
            for h, order in enumerate(lists):
                overflow[l, b, h] = len(order) > capacity
                listed = sorted(order[:capacity])
                counts[l, b, h] = len(listed)
                indices[l, b, h, : len(listed)] = torch.tensor(listed, dtype=torch.int32)
                kept = fixed[l, b, h, listed].sum() + fixed[l, b, h, eligible:].sum()
                kept_mass[l, b, h] = kept.double() / 2.0**40
    return indices, counts, kept_mass, tail_start, overflow


def _size_for_mass(fixed: Tensor, order: list[int], num_forced: int, eligible: int, p: float) -> int:
    """The shortest start of `order` that holds the forced units and, with all from `eligible` on, p of the total."""
    total = int(fixed.sum())
    target = min(math.ceil(p * float(total)), total)
    kept = int(fixed[eligible:].sum()) + int(fixed[order[:num_forced]].sum())
    size = num_forced
    while kept < target:
        kept += int(fixed[order[size]])
        size += 1
    return size


def _joint_lists(mass: Tensor, forced: list[int], budget: int) -> list[list[int]]:
    """Lists of the heads of mass [Hkv, E] that share Hkv * budget units, each in the order of priority."""
    heads, eligible = mass.shape
    lists = [list(forced) for _ in range(heads)]
    left = heads * (budget - len(forced))
    for position in _mass_order(mass.flatten(), heads).tolist() if eligible else []:
        head, unit = divmod(position, eligible)
        if left > 0 and unit not in forced:
            lists[head].append(unit)
            left -= 1
    return lists


def token_confidence(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Twin of ops.token_confidence: softmax in float64."""
    scores = logits.double()
    scores = torch.where(scores.isnan(), -math.inf, scores)
    infinite = scores == math.inf
    scores = torch.where(infinite.any(-1, keepdim=True), torch.where(infinite, 0.0, -math.inf), scores)
    token = scores.argmax(-1)  # the first of equal ones
    probs = torch.softmax(scores, -1).nan_to_num(0.0)
    entropy = -torch.where(probs > 0, probs * probs.log(), 0).sum(-1)
    return token, probs.gather(-1, token[:, None]).squeeze(-1).float(), entropy.clamp(min=0).float()
