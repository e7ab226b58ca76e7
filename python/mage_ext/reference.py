"""Slow twins of the operators in plain torch: the documentation of what each computes, and the oracle of the tests.

Names, argument order and returns are those of `mage_ext.ops`, which never imports this module.
"""

import itertools
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


# --- attention -------------------------------------------------------------------------------------------------------
#
# They gather a request's K and V through its pages and take the softmax of the whole score matrix. Without `upcast` the
# arithmetic is float32 and results have the dtypes of the operators; with it everything is float64, unrounded.


def _tokens(cache: Tensor, pages: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [T, Hkv, D] of `cache` at positions [T] of one request, and which of them have a page (others are 0)."""
    page = cache.shape[1]
    page_ids = pages[positions // page].long()
    valid = (page_ids >= 0) & (page_ids < cache.shape[0])
    rows = cache[torch.where(valid, page_ids, 0), positions % page]
    return torch.where(valid[:, None, None], rows, 0), valid


def _seq_len(seq_lens: Tensor, b: int, max_seq_len: int, block_table: Tensor, cache: Tensor) -> int:
    return min(max(int(seq_lens[b]), 0), max_seq_len, block_table.shape[1] * cache.shape[1])


def _scores(
    q: Tensor,
    k: Tensor,
    visible: Tensor,
    positions: Tensor,
    row_lens: Tensor | None,
    softmax_scale: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """Scores [Hkv, R, T] of q [Q, H, D] and k [T, Hkv, D]; -inf where not visible [T] or past a row's length [Q]."""
    kv_heads = k.shape[1]
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    rows = q.unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(1, 2)  # [Hkv, R, D], row q * G + head in group
    scores = torch.einsum("hrd,thd->hrt", rows.to(dtype), k.to(dtype)) * scale
    scores = scores.masked_fill(~visible, -math.inf)
    if row_lens is not None:
        seen = positions < row_lens.repeat_interleave(q.shape[1] // kv_heads)[:, None]  # [R, T]
        scores = scores.masked_fill(~seen, -math.inf)
    return scores


def _log_shares(scores: Tensor, lse: Tensor) -> Tensor:
    """ln of softmax shares; -inf for rows that see nothing."""
    return torch.where(lse[..., None] == -math.inf, -math.inf, scores - lse[..., None])


def _by_head(rows: Tensor, q_len: int) -> Tensor:
    """[Hkv, R, ...] -> [Q, H, ...]."""
    return rows.unflatten(1, (q_len, -1)).transpose(0, 1).flatten(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, scores: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """out [Q, H, D], lse [H, Q] and log shares [Hkv, R, T] of one request."""
    lse = torch.logsumexp(scores, -1) if scores.shape[-1] else scores.new_full(scores.shape[:2], -math.inf)
    log_shares = _log_shares(scores, lse)
    out = torch.einsum("hrt,thd->hrd", log_shares.exp(), v.to(dtype))
    return _by_head(out, q.shape[0]), _by_head(lse, q.shape[0]).T, log_shares


def _run(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    max_seq_len: int,
    softmax_scale: float | None,
    kv_lens: Tensor | None,
    upcast: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """out, lse and, per request, log shares [Hkv, R, S] of exact attention."""
    dtype = torch.float64 if upcast else torch.float32
    batch, q_len, heads, _ = q.shape
    out = torch.zeros(q.shape, dtype=dtype if upcast else q.dtype)
    lse = torch.zeros(batch, heads, q_len, dtype=dtype)
    log_shares = []
    for b in range(batch):
        positions = torch.arange(_seq_len(seq_lens, b, max_seq_len, block_table, k_cache))
        k, valid = _tokens(k_cache, block_table[b], positions)
        v, _ = _tokens(v_cache, block_table[b], positions)
        row_lens = None if kv_lens is None else kv_lens[b]
        scores = _scores(q[b], k, valid, positions, row_lens, softmax_scale, dtype)
        out[b], lse[b], shares = _attend(q[b], k, v, scores, dtype)
        log_shares.append(shares)
    return out, lse, log_shares


def block_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    max_seq_len: int,
    softmax_scale: float | None = None,
    kv_lens: Tensor | None = None,
    split_tokens: int = 0,
    upcast: bool = False,
) -> tuple[Tensor, Tensor]:
    """Twin of ops.block_attention: gathers each request and takes its softmax; split_tokens changes nothing."""
    return _run(q, k_cache, v_cache, block_table, seq_lens, max_seq_len, softmax_scale, kv_lens, upcast)[:2]


def _kept_rows(row_mask: Tensor | None, b: int, q_len: int, rows: int) -> Tensor:
    """Which of the R rows count for mass, bool."""
    keep = torch.ones(q_len, dtype=torch.bool) if row_mask is None else row_mask[b]
    return keep.repeat_interleave(rows // q_len)


def _unit_mass(log_shares: Tensor, keep: Tensor, g: int, units: int, score: str, prefix: int | None) -> Tensor:
    """Mass [Hkv, n] of one request's log shares [Hkv, R, S]."""
    shares = log_shares[:, keep].exp()
    if prefix is not None:
        shares[..., prefix:] = 0
        total = shares.sum(-1, keepdim=True)
        shares = torch.where(total > 0, shares / total, 0)
    heads, rows, tokens = shares.shape
    padded = shares.new_zeros(heads, rows, units * g)
    padded[..., :tokens] = shares
    by_unit = padded.unflatten(-1, (units, g)).sum(-1)
    if rows == 0:
        return shares.new_zeros(heads, units)
    return by_unit.mean(1) if score == "mean" else by_unit.amax(1)


def _clamped_prefix(prefix_lens: Tensor | None, b: int, seq_len: int) -> int | None:
    return None if prefix_lens is None else min(max(int(prefix_lens[b]), 0), seq_len)


def block_attention_mass(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    max_seq_len: int,
    g: int = 64,
    score: str = "mean",
    row_mask: Tensor | None = None,
    norm: str = "context",
    prefix_lens: Tensor | None = None,
    softmax_scale: float | None = None,
    kv_lens: Tensor | None = None,
    split_tokens: int = 0,
    upcast: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Twin of ops.block_attention_mass: sums the whole probability matrix."""
    out, lse, log_shares = _run(q, k_cache, v_cache, block_table, seq_lens, max_seq_len, softmax_scale, kv_lens, upcast)
    units = -(-max_seq_len // g)
    mass = torch.zeros(len(q), k_cache.shape[2], units, dtype=lse.dtype)
    for b, shares in enumerate(log_shares):
        keep = _kept_rows(row_mask, b, q.shape[1], shares.shape[1])
        prefix = _clamped_prefix(prefix_lens, b, shares.shape[2]) if norm == "prefix" else None
        mass[b] = _unit_mass(shares, keep, g, units, score, prefix)
    return out, lse, mass


def block_attention_rows(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    max_seq_len: int,
    g: int = 64,
    softmax_scale: float | None = None,
    kv_lens: Tensor | None = None,
    split_tokens: int = 0,
    upcast: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Twin of ops.block_attention_rows: logsumexp of each unit's log shares."""
    out, lse, log_shares = _run(q, k_cache, v_cache, block_table, seq_lens, max_seq_len, softmax_scale, kv_lens, upcast)
    units = -(-max_seq_len // g)
    rows = q.shape[1] * (q.shape[2] // k_cache.shape[2])
    row_mass = torch.full((len(q), k_cache.shape[2], units, rows), -math.inf, dtype=lse.dtype)
    for b, shares in enumerate(log_shares):
        padded = shares.new_full((*shares.shape[:2], units * g), -math.inf)
        padded[..., : shares.shape[2]] = shares
        row_mass[b] = padded.unflatten(-1, (units, g)).logsumexp(-1).transpose(1, 2)
    return out, lse, row_mass


def token_mass(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    lse: Tensor,
    *,
    max_seq_len: int,
    score: str = "mean",
    row_mask: Tensor | None = None,
    norm: str = "context",
    prefix_lens: Tensor | None = None,
    units: Tensor | None = None,
    g: int = 1,
    softmax_scale: float | None = None,
    kv_lens: Tensor | None = None,
    upcast: bool = False,
) -> Tensor:
    """Twin of ops.token_mass: scores of every token, minus the lse given; candidates are looked up afterwards."""
    dtype = torch.float64 if upcast else torch.float32
    batch, q_len, heads, _ = q.shape
    kv_heads = k_cache.shape[2]
    rows = q_len * (heads // kv_heads)
    log_mass = torch.full((batch, kv_heads, max_seq_len, rows), -math.inf, dtype=dtype)
    keep = torch.stack([_kept_rows(row_mask, b, q_len, rows) for b in range(batch)]) if batch else None
    for b in range(batch):
        positions = torch.arange(_seq_len(seq_lens, b, max_seq_len, block_table, k_cache))
        k, visible = _tokens(k_cache, block_table[b], positions)
        if norm == "prefix":
            visible = visible & (positions < _clamped_prefix(prefix_lens, b, len(positions)))
        row_lens = None if kv_lens is None else kv_lens[b]
        scores = _scores(q[b], k, visible, positions, row_lens, softmax_scale, dtype)
        row_lse = lse[b].T.unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(1).to(dtype)  # [Hkv, R]
        shares = _log_shares(scores, row_lse)
        if norm == "prefix" and len(positions):
            shares = _log_shares(shares, shares.logsumexp(-1))
        log_mass[b, :, : len(positions)] = shares.masked_fill(~keep[b][:, None] | ~visible, -math.inf).transpose(1, 2)
    if units is not None:
        tokens = units.long()[..., None] * g + torch.arange(g)  # [B, Hkv, C, g]
        inside = ((tokens >= 0) & (tokens < max_seq_len)).flatten(2)
        tokens = tokens.flatten(2).clamp(0, max_seq_len - 1)
        log_mass = torch.where(
            inside[..., None], log_mass.gather(2, tokens[..., None].expand(-1, -1, -1, rows)), -math.inf
        )
    if score == "rows":
        return log_mass
    if score == "max":
        return log_mass.exp().amax(-1)
    kept = keep.sum(-1).clamp(min=1)[:, None, None] if batch else 1
    return log_mass.exp().sum(-1) / kept


def sparse_block_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    indices: Tensor,
    counts: Tensor,
    tail_start: Tensor,
    *,
    g: int,
    max_seq_len: int,
    softmax_scale: float | None = None,
    kv_lens: Tensor | None = None,
    split_tokens: int = 0,
    upcast: bool = False,
) -> tuple[Tensor, Tensor]:
    """Twin of ops.sparse_block_attention: exact attention over the listed tokens and the tail, head by head."""
    dtype = torch.float64 if upcast else torch.float32
    batch, q_len, heads, _ = q.shape
    kv_heads = k_cache.shape[2]
    group = heads // kv_heads
    out = torch.zeros(q.shape, dtype=dtype if upcast else q.dtype)
    lse = torch.zeros(batch, heads, q_len, dtype=dtype)
    for b in range(batch):
        seq_len = _seq_len(seq_lens, b, max_seq_len, block_table, k_cache)
        tail = min(max(int(tail_start[b]), 0), seq_len)
        for h in range(kv_heads):
            listed = indices[b, h, : min(max(int(counts[b, h]), 0), indices.shape[2])].tolist()
            pairs = zip(listed, [-1, *listed], strict=False)
            units = [unit for unit, before in pairs if unit > max(before, -1) and unit * g < tail]
            runs = [range(unit * g, min((unit + 1) * g, tail)) for unit in units]
            positions = torch.tensor([*itertools.chain(*runs), *range(tail, seq_len)], dtype=torch.long)
            k, valid = _tokens(k_cache[:, :, h : h + 1], block_table[b], positions)
            v, _ = _tokens(v_cache[:, :, h : h + 1], block_table[b], positions)
            mine = slice(h * group, (h + 1) * group)
            row_lens = None if kv_lens is None else kv_lens[b]
            scores = _scores(q[b, :, mine], k, valid, positions, row_lens, softmax_scale, dtype)
            out[b, :, mine], lse[b, mine], _ = _attend(q[b, :, mine], k, v, scores, dtype)
    return out, lse


def merge_attention(
    outs: list[Tensor], lses: list[Tensor], *, log2_in: bool = False, log2_out: bool = False, upcast: bool = False
) -> tuple[Tensor, Tensor]:
    """Twin of ops.merge_attention: a softmax over the parts."""
    dtype = torch.float64 if upcast else torch.float32
    parts = torch.stack(lses).to(dtype) * (math.log(2) if log2_in else 1)  # [N, B, H, Q]
    lse = parts.logsumexp(0)
    weights = torch.where(parts == -math.inf, 0, (parts - lse).exp()).transpose(2, 3)[..., None]  # [N, B, Q, H, 1]
    out = torch.where(weights == 0, 0, weights * torch.stack(outs).to(dtype)).sum(0)
    return out if upcast else out.to(outs[0].dtype), lse / (math.log(2) if log2_out else 1)


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
