"""The operators: one typed function per op, its fake kernel right below it.

A function checks what Python can see cheaply (values of plain arguments; ValueError or TypeError), then calls
`torch.ops.mage.<op>`, which checks every tensor (RuntimeError). Nothing here chooses hardware or falls back: the device
of the tensors decides, and an op without a kernel for it raises. The slow twin of each is in `mage_ext.reference`.

    B requests            Q query rows per request      S cached tokens of a request, its block included
    H, Hkv, G = H / Hkv   D head dim                    P prefix tokens before the current block
    R = G * Q rows        g tokens per unit             n = ceil(max_seq_len / g) units of a mass buffer
    L layers that select  K selected prefix tokens      row r = q * G + head within the group

Pools are [pages, page, Hkv, D] with page in 1, 16, 32, 64, 128, 256; NHD, HND and K|V-interleaved pools are strided
views of it. Test: pytest tests/python -k "append or attention or mass or select or votes or confidence or merge"
"""

import torch
from torch import Tensor


def append_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, start: Tensor) -> None:
    """Writes a block's K and V into the pool, token i of request b at position start[b] + i.

    Args:
        k: [B, Q, Hkv, D], bfloat16, float16 or float32; rows of a multiple of 16 bytes.
        v: like k.
        k_cache: [pages, page, Hkv, D], dtype of k; written in place.
        v_cache: like k_cache; may be the other half of an interleaved pool.
        block_table: [B, max_pages], int32, page ids.
        start: [B], int32, position of each request's first row.

    Raises:
        RuntimeError: a tensor's device, dtype, rank, shape, stride or alignment is not as above.

    Notes:
        A token is dropped if its position is negative or past max_pages * page, or its page is not in the pool: nothing
        outside a request's own pages is written. Deterministic; can be captured in a CUDA graph.
        Reference: mage_ext.reference.append_kv.
    """
    torch.ops.mage.append_kv(k, v, k_cache, v_cache, block_table, start)


@torch.library.register_fake("mage::append_kv")
def _(k, v, k_cache, v_cache, block_table, start):
    return None


# --- selection -------------------------------------------------------------------------------------------------------

SELECT_RULES = ("fixed", "layer", "mass", "joint")
GRANULARITIES = (1, 16, 32, 64)
MAX_TOKENS = 1 << 30


def set_debug(on: bool) -> bool:
    """Turns the debug switch on or off and returns its former state; the environment variable MAGE_DEBUG=1 starts with
    it on.

    When on, every op also checks the values that live on the device (lengths, page ids, lists, NaN among masses), which
    kernels otherwise clamp or skip, and raises RuntimeError naming the first bad one, before it writes anything. It
    waits for the device at every op, so it cannot be on during CUDA graph capture.
    """
    if not isinstance(on, bool):
        raise TypeError(f"set_debug: on must be a bool, got {on!r}")
    return torch.ops.mage.set_debug(on)


def _check_tokens(op: str, name: str, value: int, g: int = 1) -> None:
    if not 0 <= value <= MAX_TOKENS:
        raise ValueError(f"{op}: {name} must be in [0, {MAX_TOKENS}], got {value}")
    if value % g:
        raise ValueError(f"{op}: {name} must be a multiple of g = {g}, got {value}")


def _check_granularity(op: str, g: int) -> None:
    if g not in GRANULARITIES:
        raise ValueError(f"{op}: g must be one of {', '.join(map(str, GRANULARITIES))}, got {g}")


def row_votes(
    row_mass: Tensor, prefix_lens: Tensor, *, k: int, g: int, row_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Units that each row of one layer would select on its own, counted (MAGE v1).

    Every kept row takes its top k / g units among [0, floor(P / g)) by share, ties to the lowest unit; only units with
    a share > 0.

    Args:
        row_mass: [B, Hkv, n, R], float32, contiguous. Natural log of each unit's share in each row, of
            block_attention_rows.
        prefix_lens: [B], int32. P, clamped to [0, n * g].
        k: tokens per row, multiple of g.
        g: tokens per unit: 1, 16, 32 or 64.
        row_mask: [B, Q], bool. Query positions that vote, R = G * Q; None: all.

    Returns:
        votes: [B, Hkv, n], int32. Rows that took the unit.
        union_size: [B, Hkv], int32. Units with a vote.
        coverage: [B, Hkv], float32. Mean over the kept rows of the part of the row's mass that lies in units with a
            vote; 0 if no row is kept.

    Raises:
        ValueError: g or k is not as above. RuntimeError: a tensor is not.

    Notes:
        NaN shares count as 0. Bit-reproducible. Reference: mage_ext.reference.row_votes.
    """
    _check_granularity("row_votes", g)
    _check_tokens("row_votes", "k", k, g)
    return torch.ops.mage.row_votes(row_mass, prefix_lens, k=k, g=g, row_mask=row_mask)


@torch.library.register_fake("mage::row_votes")
def _(row_mass, prefix_lens, *, k, g, row_mask=None):
    requests, heads, units, _ = row_mass.shape
    votes = row_mass.new_empty((requests, heads, units), dtype=torch.int32)
    union_size = row_mass.new_empty((requests, heads), dtype=torch.int32)
    return votes, union_size, row_mass.new_empty((requests, heads))


def row_votes_out(
    row_mass: Tensor,
    prefix_lens: Tensor,
    votes: Tensor,
    union_size: Tensor,
    coverage: Tensor,
    workspace: Tensor,
    *,
    k: int,
    g: int,
    row_mask: Tensor | None = None,
) -> None:
    """row_votes into given contiguous tensors; workspace: uint8, row_votes_workspace bytes. Allocates nothing on a
    device."""
    _check_granularity("row_votes", g)
    _check_tokens("row_votes", "k", k, g)
    torch.ops.mage.row_votes_out(
        row_mass, prefix_lens, votes, union_size, coverage, workspace, k=k, g=g, row_mask=row_mask
    )


@torch.library.register_fake("mage::row_votes_out")
def _(row_mass, prefix_lens, votes, union_size, coverage, workspace, *, k, g, row_mask=None):
    return None


def row_votes_workspace(batch: int, num_kv_heads: int, num_units: int, num_rows: int) -> int:
    """Bytes of workspace of row_votes_out."""
    return torch.ops.mage.row_votes_workspace(batch, num_kv_heads, num_units, num_rows)


def _check_select(g: int, capacity: int, rule: str, k: int, k_min: int, p: float, sinks: int, recents: int) -> None:
    _check_granularity("select_kv", g)
    if capacity < 1:
        raise ValueError(f"select_kv: capacity must be >= 1, got {capacity}")
    if rule not in SELECT_RULES:
        raise ValueError(f"select_kv: rule must be one of {', '.join(SELECT_RULES)}, got {rule!r}")
    _check_tokens("select_kv", "k", k, g)
    _check_tokens("select_kv", "k_min", k_min, g)
    _check_tokens("select_kv", "sinks", sinks)
    _check_tokens("select_kv", "recents", recents)
    if rule == "mass" and not 0 < p <= 1:
        raise ValueError(f'select_kv: p must be in (0, 1] with rule "mass", got {p}')


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
    """Budgets and top units of all layers of a step.

    With P = prefix_lens, units [0, floor(P / g)) can be listed; what lies at or after tail_start = floor(P / g) * g is
    attended anyway. A budget of K tokens lists K / g units, one fewer if P is not a multiple of g. Listed first, as far
    as the budget reaches: units that intersect [0, sinks), lowest first, then those that intersect [P - recents, P),
    latest first. The rest is ranked by mass (float bits; NaN last; ties to the lowest unit). Rules:

      fixed  K = k per layer and KV head.
      layer  s_l = max over heads of union_size * (1 - ln coverage); K_l = max(k_min, floor(s_l / sum s * k / g * L) *
             g), and k where all s_l are 0; ranked by votes (ties: lowest unit), then units without votes, the most
             recent first. coverage is clamped to [2^-24, 1] and 1 - ln coverage rounded to a multiple of 2^-20.
      mass   the fewest units with which the kept mass reaches p of the total of all n units; at least k_min; sinks and
             recents are always in.
      joint  the KV heads of a layer and request share their budgets of k: after each head's sinks and recents one
             ranking over all heads (ties: lowest unit, then lowest head).

    Args:
        mass: [L, B, Hkv, n], float32, last stride 1.
        prefix_lens: [B], int32. P, clamped to [0, n * g].
        g: tokens per unit: 1, 16, 32 or 64.
        capacity: Kmax in units; a longer list keeps its best `capacity` units and sets overflow.
        rule: see above.
        k: tokens, multiple of g.
        k_min: tokens, multiple of g; rules "layer" and "mass".
        p: share of the mass in (0, 1]; rule "mass".
        sinks: tokens.
        recents: tokens.
        votes: [L, B, Hkv, n], int32, contiguous; of row_votes, rule "layer".
        union_size: [L, B, Hkv], int32, contiguous; likewise.
        coverage: [L, B, Hkv], float32, contiguous; likewise.

    Returns:
        indices: [L, B, Hkv, capacity], int32. Strictly ascending unit numbers, -1 after the count.
        counts: [L, B, Hkv], int32.
        kept_mass: [L, B, Hkv], float32. Mass of the listed units and of all units from tail_start on.
        tail_start: [B], int32.
        overflow: [L, B, Hkv], bool.

    Raises:
        ValueError: a plain argument is not as above. RuntimeError: a tensor is not, or one of the three of rule "layer"
            is missing.

    Notes:
        Masses are summed as integers (clamped to [0, 1], times 2^40, rounded down; NaN: 0), so results are the same
        bits for any number of threads and on every device. Reference: mage_ext.reference.select_kv.
    """
    _check_select(g, capacity, rule, k, k_min, p, sinks, recents)
    return torch.ops.mage.select_kv(
        mass,
        prefix_lens,
        g=g,
        capacity=capacity,
        rule=rule,
        k=k,
        k_min=k_min,
        p=p,
        sinks=sinks,
        recents=recents,
        votes=votes,
        union_size=union_size,
        coverage=coverage,
    )


@torch.library.register_fake("mage::select_kv")
def _(mass, prefix_lens, *, g, capacity, **budgets):
    heads = mass.shape[:3]
    return (
        mass.new_empty((*heads, capacity), dtype=torch.int32),
        mass.new_empty(heads, dtype=torch.int32),
        mass.new_empty(heads),
        mass.new_empty(mass.shape[1:2], dtype=torch.int32),
        mass.new_empty(heads, dtype=torch.bool),
    )


def select_kv_out(
    mass: Tensor,
    prefix_lens: Tensor,
    indices: Tensor,
    counts: Tensor,
    kept_mass: Tensor,
    tail_start: Tensor,
    overflow: Tensor,
    workspace: Tensor,
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
) -> None:
    """select_kv into given contiguous tensors; workspace: uint8, select_kv_workspace bytes. Allocates nothing on a
    device."""
    _check_select(g, capacity, rule, k, k_min, p, sinks, recents)
    torch.ops.mage.select_kv_out(
        mass,
        prefix_lens,
        indices,
        counts,
        kept_mass,
        tail_start,
        overflow,
        workspace,
        g=g,
        capacity=capacity,
        rule=rule,
        k=k,
        k_min=k_min,
        p=p,
        sinks=sinks,
        recents=recents,
        votes=votes,
        union_size=union_size,
        coverage=coverage,
    )


@torch.library.register_fake("mage::select_kv_out")
def _(mass, prefix_lens, indices, counts, kept_mass, tail_start, overflow, workspace, *, g, capacity, **budgets):
    return None


def select_kv_workspace(num_layers: int, batch: int, num_kv_heads: int, num_units: int, capacity: int) -> int:
    """Bytes of workspace of select_kv_out."""
    return torch.ops.mage.select_kv_workspace(num_layers, batch, num_kv_heads, num_units, capacity)


def token_confidence(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The most probable token of each row, its probability and the row's entropy, in one pass.

    Args:
        logits: [N, V], float32, bfloat16 or float16, last stride 1. NaN counts as -inf; logits of +inf share the
            probability equally.

    Returns:
        token: [N], int64. Ties: lowest id. 0 for a row without any logit above -inf.
        prob: [N], float32. softmax(logits)[token]; 0 for such a row.
        entropy: [N], float32, nats; 0 for such a row.

    Raises:
        RuntimeError: logits is not as above.

    Notes:
        Bit-reproducible for any number of threads and rows on one instruction set. Reference:
        mage_ext.reference.token_confidence.
    """
    return torch.ops.mage.token_confidence(logits)


@torch.library.register_fake("mage::token_confidence")
def _(logits):
    rows = logits.shape[:1]
    token = logits.new_empty(rows, dtype=torch.int64)
    return token, logits.new_empty(rows, dtype=torch.float32), logits.new_empty(rows, dtype=torch.float32)


def token_confidence_out(logits: Tensor, token: Tensor, prob: Tensor, entropy: Tensor, workspace: Tensor) -> None:
    """token_confidence into given contiguous tensors; workspace: uint8, token_confidence_workspace bytes."""
    torch.ops.mage.token_confidence_out(logits, token, prob, entropy, workspace)


@torch.library.register_fake("mage::token_confidence_out")
def _(logits, token, prob, entropy, workspace):
    return None


def token_confidence_workspace(num_rows: int, vocab_size: int) -> int:
    """Bytes of workspace of token_confidence_out."""
    return torch.ops.mage.token_confidence_workspace(num_rows, vocab_size)
