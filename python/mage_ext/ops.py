"""The operators: one typed function per op, its fake kernel right below it.

A function checks what Python can see cheaply (types of all arguments: TypeError; values of plain ones: ValueError) and
calls `torch.ops.mage.<op>`, which checks every tensor (RuntimeError). Nothing here chooses hardware or falls back: the
device of the tensors decides, and an op without a kernel for it raises; meta tensors give meta tensors, of whose shapes
and dtypes little is checked, and one among others is a ValueError. The slow twin of each is in `mage_ext.reference`.

    B requests            Q query rows per request      S cached tokens of a request, its block included
    H, Hkv, G = H / Hkv   D head dim                    P prefix tokens before the current block
    R = G * Q rows        g tokens per unit             n = ceil(max_seq_len / g) units of a mass buffer
    L layers that select  K selected prefix tokens      row r = q * G + head within the group

Pools are [pages, page, Hkv, D] with page in 1, 16, 32, 64, 128, 256; NHD, HND and K|V-interleaved pools are strided
views of it. Test: pytest tests/python -k "append or attention or mass or select or votes or confidence or merge"
"""

import functools
import numbers
from collections.abc import Callable

import torch
from torch import Tensor

from mage_ext._arguments import got

_NONE = type(None)
_TYPES = {  # of the schemas: types that Python may pass, and how a message says it; bool is no number here
    "Tensor": ((Tensor,), "a tensor"),
    "Optional[Tensor]": ((Tensor, _NONE), "a tensor or None"),
    "List[Tensor]": ((list, tuple), "a list of tensors"),
    "int": ((int, torch.SymInt, numbers.Integral), "an integer"),
    "float": ((float, int, torch.SymFloat, torch.SymInt, numbers.Real), "a number"),
    "Optional[float]": ((float, int, torch.SymFloat, torch.SymInt, numbers.Real, _NONE), "a number or None"),
    "bool": ((bool,), "a bool"),
    "str": ((str,), "a string"),
}

_UNLIMITED = ("split_tokens", "capacity")  # integers whose range no function here checks


def _typed(function: Callable) -> Callable:
    """`function` behind a check of its arguments' types against the schema of the operator of its name.

    torch.ops would refuse the same values, but in words of its own and only after this module has computed with them.
    It takes 1 to 2 microseconds.
    """
    op = function.__name__.removesuffix("_out").removesuffix("_workspace")
    schema = getattr(torch.ops.mage, function.__name__).default._schema
    kinds = {argument.name: str(argument.type) for argument in schema.arguments}
    names = tuple(kinds)
    # What needs no second look is found by its exact type: isinstance for every argument would take twice as long.
    usual = {name: frozenset(_TYPES[kind][0]) for name, kind in kinds.items()}
    for name, kind in kinds.items():
        if kind == "int" and (name in _UNLIMITED or function.__name__.endswith("_workspace")):
            usual[name] = frozenset()

    def check(name: str, value: object) -> None:
        types, expected = _TYPES[kinds[name]]
        if isinstance(value, types) and not isinstance(value, bool):
            if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
                raise ValueError(f"{op}: {name} must fit 64 bits, got {value}")
            return
        # A torch.fx.Proxy may stand for anything.
        if isinstance(value, Tensor) or not hasattr(value, "__torch_function__"):
            raise TypeError(f"{op}: {name} must be {expected}, got {got(value)}")

    @functools.wraps(function)
    def checked(*args, **options):
        for name, value in zip(names, args, strict=False):
            if type(value) not in usual[name]:
                check(name, value)
        for name, value in options.items():
            if name in usual and type(value) not in usual[name]:
                check(name, value)
        return function(*args, **options)

    return checked


def _fake(name: str) -> Callable[[Callable], Callable]:
    """Registers the decorated function as fake kernel of torch.ops.mage.<name>, behind a check of the devices.

    A fake kernel is also what runs when a single argument of a real call is a meta tensor, and would then return memory
    that nobody writes. So all tensors must be on one device; none may stay on the CPU, since no op takes a scalar one.
    """
    schema = getattr(torch.ops.mage, name).default._schema
    arguments = [argument.name for argument in schema.arguments]
    op = name.removesuffix("_out")

    def register(kernel: Callable) -> Callable:
        @functools.wraps(kernel)
        def checked(*args, **options):
            given = dict(zip(arguments, args, strict=False)) | options
            _check_one_device(op, {argument: given[argument] for argument in arguments if argument in given})
            return kernel(*args, **options)

        torch.library.register_fake(f"mage::{name}", checked)
        return checked

    return register


def _check_one_device(op: str, arguments: dict[str, object]) -> None:
    tensors = []
    for name, value in arguments.items():
        parts = enumerate(value) if isinstance(value, (list, tuple)) else ()
        tensors += [(name, value), *((f"{name}[{i}]", part) for i, part in parts)]
    first = None
    for name, tensor in tensors:
        if isinstance(tensor, Tensor):
            first = tensor.device if first is None else first
            if tensor.device != first:
                raise ValueError(f"{op}: {name} must be on {first}, got {tensor.device}")


@_typed
def append_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, start: Tensor) -> None:
    """Writes a block's K and V into the pool, token i of request b at position start[b] + i.

    Args:
        k: [B, Q, Hkv, D], bfloat16, float16 or float32; rows of a multiple of 16 bytes.
        v: like k.
        k_cache: [pages, page, Hkv, D], dtype of k; written in place.
        v_cache: like k_cache, without an element in common (one that begins where k_cache does is refused); may be the
            other half of an interleaved pool.
        block_table: [B, max_pages], int32, page ids.
        start: [B], int32, position of each request's first row.

    Raises:
        TypeError: an argument is of another type. RuntimeError: a tensor's device, dtype, rank, shape, stride or
            alignment is not as above.

    Notes:
        A token is dropped if its position is negative or past max_pages * page, or its page is not in the pool: nothing
        outside a request's own pages is written. Deterministic; can be captured in a CUDA graph.
        Reference: mage_ext.reference.append_kv.
    """
    torch.ops.mage.append_kv(k, v, k_cache, v_cache, block_table, start)


@_fake("append_kv")
def _(k, v, k_cache, v_cache, block_table, start):
    return None


# --- attention -------------------------------------------------------------------------------------------------------

MASS_SCORES = ("mean", "max")
MASS_NORMS = ("context", "prefix")
SPLIT_STEP = 64


def _check_lengths(op: str, max_seq_len: int, split_tokens: int = 0) -> None:
    if not 1 <= max_seq_len <= MAX_TOKENS:
        raise ValueError(f"{op}: max_seq_len must be in [1, {MAX_TOKENS}], got {max_seq_len}")
    if split_tokens < 0 or split_tokens % SPLIT_STEP:
        raise ValueError(f"{op}: split_tokens must be 0 or a positive multiple of {SPLIT_STEP}, got {split_tokens}")
    if split_tokens > MAX_TOKENS:
        raise ValueError(f"{op}: split_tokens must be at most {MAX_TOKENS}, got {split_tokens}")


def _check_mass(op: str, score: str, scores: tuple[str, ...], norm: str, prefix_lens: Tensor | None) -> None:
    if score not in scores:
        raise ValueError(f"{op}: score must be one of {', '.join(scores)}, got {score!r}")
    if norm not in MASS_NORMS:
        raise ValueError(f"{op}: norm must be one of {', '.join(MASS_NORMS)}, got {norm!r}")
    if (norm == "prefix") != (prefix_lens is not None):
        got = "None" if prefix_lens is None else "a tensor"
        raise ValueError(f'{op}: prefix_lens must be given with norm "prefix" only, got {got} with norm {norm!r}')


def _new_out_and_lse(q: Tensor) -> tuple[Tensor, Tensor]:
    batch, q_len, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, q_len), dtype=torch.float32)


def _num_units(max_seq_len: int, g: int) -> int:
    return -(-max_seq_len // g)


@_typed
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
) -> tuple[Tensor, Tensor]:
    """Exact attention of every query row over the first S tokens of its request: softmax(scale * q k^T) v.

    Args:
        q: [B, Q, H, D], bfloat16, float16 or float32, last stride 1; H a multiple of Hkv, D a multiple of 8 up to 512.
            On CUDA bfloat16 or float16, D 64 or 128. Head h reads KV head h // G, G = H / Hkv.
        k_cache: [pages, page, Hkv, D], dtype of q; page 1, 16, 32, 64, 128 or 256. Holds the current block's K already.
        v_cache: like k_cache.
        block_table: [B, max_pages], int32, page ids. A token of a page outside the pool weighs 0.
        seq_lens: [B], int32. S, clamped to [0, max_seq_len].
        max_seq_len: tokens that a request can have at most; block_table must span them.
        softmax_scale: factor of the scores, in [-65536, 65536]; None: D^-0.5.
        kv_lens: [B, Q], int32, nondecreasing. Row q sees [0, min(S, kv_lens[b, q])); None: [0, S). It gives the
            staircase of a chunked prefill and causal masks.
        split_tokens: 0 cuts the KV stream as the shapes suggest, on CUDA the lengths too; a multiple of 64, at most
            2^30, cuts it at its multiples, whatever else is in the batch.

    Returns:
        out: [B, Q, H, D], dtype of q.
        lse: [B, H, Q], float32. Natural log of the sum of exponentials.

    Raises:
        TypeError: an argument is of another type. ValueError: max_seq_len or split_tokens is not as above.
        RuntimeError: a tensor or softmax_scale is not.

    Notes:
        A row without tokens gets out 0 and lse -inf. K and V of [0, S) must be finite. Bitwise repeatable, for any
        number of threads too. Reference: mage_ext.reference.block_attention.

    Example:
        >>> seq_lens = torch.tensor([70], dtype=torch.int32)
        >>> q, pool = torch.randn(1, 32, 9, 64), torch.randn(2, 2, 64, 3, 64)
        >>> out, lse = block_attention(q, *pool, torch.tensor([[1, 0]], dtype=torch.int32), seq_lens, max_seq_len=128)
    """
    _check_lengths("block_attention", max_seq_len, split_tokens)
    return torch.ops.mage.block_attention(
        q,
        k_cache,
        v_cache,
        block_table,
        seq_lens,
        max_seq_len=max_seq_len,
        softmax_scale=softmax_scale,
        kv_lens=kv_lens,
        split_tokens=split_tokens,
    )


@_fake("block_attention")
def _(q, k_cache, v_cache, block_table, seq_lens, **options):
    return _new_out_and_lse(q)


@_typed
def block_attention_out(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    out: Tensor,
    lse: Tensor,
    workspace: Tensor,
    *,
    max_seq_len: int,
    softmax_scale: float | None = None,
    kv_lens: Tensor | None = None,
    split_tokens: int = 0,
) -> None:
    """block_attention into given contiguous tensors, each with memory of its own.

    workspace: uint8, block_attention_workspace bytes, aligned to 16 bytes.
    """
    _check_lengths("block_attention", max_seq_len, split_tokens)
    torch.ops.mage.block_attention_out(
        q,
        k_cache,
        v_cache,
        block_table,
        seq_lens,
        out,
        lse,
        workspace,
        max_seq_len=max_seq_len,
        softmax_scale=softmax_scale,
        kv_lens=kv_lens,
        split_tokens=split_tokens,
    )


@_fake("block_attention_out")
def _(q, k_cache, v_cache, block_table, seq_lens, out, lse, workspace, **options):
    return None


@_typed
def block_attention_workspace(
    batch: int, q_len: int, num_heads: int, num_kv_heads: int, head_dim: int, max_seq_len: int, split_tokens: int = 0
) -> int:
    """Bytes of workspace of block_attention_out, enough on every device: partial results of the splits.

    With R = Q * H / Hkv rows in tiles of 64, 128, 192 or 256 (T rows, X tiles) the GPU needs
    slots * T * (3 * D + 12) + 8 * B * Hkv * X; slots: B * Hkv * X * ceil(max_seq_len / split_tokens) with fixed splits,
    else at most 264. The CPU's need is in include/mage/block_attention.h; the larger one is returned.

    Args:
        batch, q_len, num_heads, num_kv_heads, head_dim: B, Q, H, Hkv, D. max_seq_len, split_tokens: of the call.

    Raises:
        TypeError: an argument is no integer. RuntimeError: it is out of the range that the call has.
    """
    return torch.ops.mage.block_attention_workspace(
        batch, q_len, num_heads, num_kv_heads, head_dim, max_seq_len, split_tokens
    )


@_typed
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
) -> tuple[Tensor, Tensor, Tensor]:
    """block_attention, and the share of attention that each unit of g tokens received from the rows of a KV head.

    share[r, j] is the sum of row r's softmax probabilities over tokens [j * g, (j + 1) * g).

    Args:
        q: [B, Q, H, D]; this and the next four as block_attention. On CUDA Q * H / Hkv, the rows of a KV head, is at
            most 1024.
        k_cache: [pages, page, Hkv, D].
        v_cache: [pages, page, Hkv, D].
        block_table: [B, max_pages], int32.
        seq_lens: [B], int32.
        max_seq_len: as block_attention.
        g: tokens per unit: 16, 32 or 64; on the CPU also 1, at the price of a second pass over K.
        score: "mean": mean share over the kept rows. "max": the largest share that a kept row gives.
        row_mask: [B, Q], bool. Query positions whose rows count for mass; None: all. It changes neither out nor lse.
        norm: "context": shares of all S tokens. "prefix": only tokens below P count, and each row's shares are divided
            by their sum, so units past P get 0 and a unit across P its part below.
        prefix_lens: [B], int32. P, clamped to [0, S]; with norm "prefix" and only then.
        softmax_scale: as block_attention.
        kv_lens: [B, Q], int32; as block_attention.
        split_tokens: as block_attention.

    Returns:
        out: [B, Q, H, D], dtype of q.
        lse: [B, H, Q], float32, natural log.
        mass: [B, Hkv, n], float32. 0 past S, in an empty slot and where no row is kept; with score "mean" it sums to 1.
            Rounded as float32 is; on CUDA, where B * Hkv * n * R numbers would take 12 MB and more (R = G * Q <= 192,
            split_tokens 0), each row's share of a unit is within 2^-10 of itself.

    Raises:
        TypeError: an argument is of another type. ValueError: a plain one is not as above. RuntimeError: a tensor or
            softmax_scale is not.

    Notes:
        Exact: shares use the final lse, whatever the splits. A row that sees no token, or whose share of [0, P) is
        below 2^-126 with norm "prefix", gives nothing but is counted in the mean.
        Reference: mage_ext.reference.block_attention_mass.
    """
    _check_lengths("block_attention_mass", max_seq_len, split_tokens)
    _check_granularity("block_attention_mass", g)
    _check_mass("block_attention_mass", score, MASS_SCORES, norm, prefix_lens)
    return torch.ops.mage.block_attention_mass(
        q,
        k_cache,
        v_cache,
        block_table,
        seq_lens,
        max_seq_len=max_seq_len,
        g=g,
        score=score,
        row_mask=row_mask,
        norm=norm,
        prefix_lens=prefix_lens,
        softmax_scale=softmax_scale,
        kv_lens=kv_lens,
        split_tokens=split_tokens,
    )


@_fake("block_attention_mass")
def _(q, k_cache, v_cache, block_table, seq_lens, *, max_seq_len, g=64, **options):
    shape = (q.shape[0], k_cache.shape[2], _num_units(max_seq_len, g))
    return *_new_out_and_lse(q), q.new_empty(shape, dtype=torch.float32)


@_typed
def block_attention_mass_out(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    out: Tensor,
    lse: Tensor,
    mass: Tensor,
    workspace: Tensor,
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
) -> None:
    """block_attention_mass into given contiguous tensors, each with memory of its own.

    workspace: uint8, block_attention_mass_workspace bytes, aligned to 16 bytes.
    """
    _check_lengths("block_attention_mass", max_seq_len, split_tokens)
    _check_granularity("block_attention_mass", g)
    _check_mass("block_attention_mass", score, MASS_SCORES, norm, prefix_lens)
    torch.ops.mage.block_attention_mass_out(
        q,
        k_cache,
        v_cache,
        block_table,
        seq_lens,
        out,
        lse,
        mass,
        workspace,
        max_seq_len=max_seq_len,
        g=g,
        score=score,
        row_mask=row_mask,
        norm=norm,
        prefix_lens=prefix_lens,
        softmax_scale=softmax_scale,
        kv_lens=kv_lens,
        split_tokens=split_tokens,
    )


@_fake("block_attention_mass_out")
def _(q, k_cache, v_cache, block_table, seq_lens, out, lse, mass, workspace, **options):
    return None


@_typed
def block_attention_mass_workspace(
    batch: int,
    q_len: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_seq_len: int,
    g: int = 64,
    split_tokens: int = 0,
) -> int:
    """Bytes of workspace of block_attention_mass_out, enough on every device: partial results and unit sums per row.

    On the GPU block_attention's, 8 * B * Hkv * R, and 4 * B * Hkv * R * n, n = ceil(max_seq_len / g); less than the
    last where sums are kept in 16 bits. The CPU's need is in include/mage/block_attention_mass.h; the larger one is
    returned.

    Args, Raises: as block_attention_workspace; g: tokens per unit.
    """
    return torch.ops.mage.block_attention_mass_workspace(
        batch, q_len, num_heads, num_kv_heads, head_dim, max_seq_len, g, split_tokens
    )


@_typed
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
) -> tuple[Tensor, Tensor, Tensor]:
    """block_attention, and every row's own share of every unit of g tokens.

    Args:
        q: [B, Q, H, D]; this and the next four as block_attention. On CUDA Q * H / Hkv, the rows of a KV head, is at
            most 1024.
        k_cache: [pages, page, Hkv, D].
        v_cache: [pages, page, Hkv, D].
        block_table: [B, max_pages], int32.
        seq_lens: [B], int32.
        max_seq_len: as block_attention.
        g: tokens per unit: 16, 32 or 64; on the CPU also 1, at the price of a second pass over K.
        softmax_scale: as block_attention.
        kv_lens: [B, Q], int32; as block_attention.
        split_tokens: as block_attention.

    Returns:
        out: [B, Q, H, D], dtype of q.
        lse: [B, H, Q], float32, natural log.
        row_mass: [B, Hkv, n, R], float32. Natural log of the row's summed probabilities over the unit, row r = q * G +
            head within the group; -inf past the row's last token and where the share is below about 2^-126.

    Raises:
        TypeError: an argument is of another type. ValueError: a plain one is not as above. RuntimeError: a tensor or
            softmax_scale is not.

    Notes:
        Input of row_votes. Reference: mage_ext.reference.block_attention_rows.
    """
    _check_lengths("block_attention_rows", max_seq_len, split_tokens)
    _check_granularity("block_attention_rows", g)
    return torch.ops.mage.block_attention_rows(
        q,
        k_cache,
        v_cache,
        block_table,
        seq_lens,
        max_seq_len=max_seq_len,
        g=g,
        softmax_scale=softmax_scale,
        kv_lens=kv_lens,
        split_tokens=split_tokens,
    )


@_fake("block_attention_rows")
def _(q, k_cache, v_cache, block_table, seq_lens, *, max_seq_len, g=64, **options):
    rows = q.shape[1] * (q.shape[2] // k_cache.shape[2])
    shape = (q.shape[0], k_cache.shape[2], _num_units(max_seq_len, g), rows)
    return *_new_out_and_lse(q), q.new_empty(shape, dtype=torch.float32)


@_typed
def block_attention_rows_out(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    out: Tensor,
    lse: Tensor,
    row_mass: Tensor,
    workspace: Tensor,
    *,
    max_seq_len: int,
    g: int = 64,
    softmax_scale: float | None = None,
    kv_lens: Tensor | None = None,
    split_tokens: int = 0,
) -> None:
    """block_attention_rows into given contiguous tensors, each with memory of its own.

    workspace: uint8, block_attention_rows_workspace bytes, aligned to 16 bytes.
    """
    _check_lengths("block_attention_rows", max_seq_len, split_tokens)
    _check_granularity("block_attention_rows", g)
    torch.ops.mage.block_attention_rows_out(
        q,
        k_cache,
        v_cache,
        block_table,
        seq_lens,
        out,
        lse,
        row_mass,
        workspace,
        max_seq_len=max_seq_len,
        g=g,
        softmax_scale=softmax_scale,
        kv_lens=kv_lens,
        split_tokens=split_tokens,
    )


@_fake("block_attention_rows_out")
def _(q, k_cache, v_cache, block_table, seq_lens, out, lse, row_mass, workspace, **options):
    return None


@_typed
def block_attention_rows_workspace(
    batch: int,
    q_len: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_seq_len: int,
    g: int = 64,
    split_tokens: int = 0,
) -> int:
    """Bytes of workspace of block_attention_rows_out, enough on every device.

    On the GPU block_attention's and 8 * B * Hkv * R. The CPU's need is in include/mage/block_attention_rows.h; the
    larger one is returned.

    Args, Raises: as block_attention_workspace; g: tokens per unit.
    """
    return torch.ops.mage.block_attention_rows_workspace(
        batch, q_len, num_heads, num_kv_heads, head_dim, max_seq_len, g, split_tokens
    )


@_typed
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
) -> Tensor:
    """The share of attention that each single token received: one pass over K with the lse that block_attention gave.

    share[r, t] = exp(scale * q[r] . k[t] - lse[r])

    Args:
        q: [B, Q, H, D]; this and the next three as in the call that gave lse.
        k_cache: [pages, page, Hkv, D].
        block_table: [B, max_pages], int32.
        seq_lens: [B], int32.
        lse: [B, H, Q], float32, contiguous, natural log.
        max_seq_len: as in that call.
        score: "mean" or "max" over the kept rows, or "rows": the natural log of each row's share.
        row_mask: [B, Q], bool. Query positions that count; None: all. With score "rows" the others get -inf.
        norm: "context", or "prefix": tokens at or past P get 0 and each row's shares are divided by their sum.
        prefix_lens: [B], int32. P, clamped to [0, S]; with norm "prefix" and only then.
        units: [B, Hkv, C], int32, contiguous. Candidate units of g tokens, -1 unused; None: all tokens.
        g: tokens per candidate: 1, 16, 32 or 64; 1 without units.
        softmax_scale: as in that call.
        kv_lens: [B, Q], int32; as in that call.

    Returns:
        mass: [B, Hkv, N], float32, or [B, Hkv, N, R] with score "rows". N = max_seq_len, or C * g in the order of the
            candidates. 0 (score "rows": -inf) past S, for unused candidates and where no row is kept.

    Raises:
        TypeError: an argument is of another type. ValueError: a plain one is not as above. RuntimeError: a tensor or
            softmax_scale is not.

    Notes:
        With units and norm "prefix" the rows' sums still run over the whole prefix, which costs a pass over K below P.
        Reference: mage_ext.reference.token_mass.
    """
    _check_token_mass(max_seq_len, score, norm, prefix_lens, units, g)
    return torch.ops.mage.token_mass(
        q,
        k_cache,
        block_table,
        seq_lens,
        lse,
        max_seq_len=max_seq_len,
        score=score,
        row_mask=row_mask,
        norm=norm,
        prefix_lens=prefix_lens,
        units=units,
        g=g,
        softmax_scale=softmax_scale,
        kv_lens=kv_lens,
    )


def _check_token_mass(
    max_seq_len: int, score: str, norm: str, prefix_lens: Tensor | None, units: Tensor | None, g: int
) -> None:
    _check_lengths("token_mass", max_seq_len)
    _check_granularity("token_mass", g)
    _check_mass("token_mass", score, (*MASS_SCORES, "rows"), norm, prefix_lens)
    if units is None and g != 1:
        raise ValueError(f"token_mass: g must be 1 without units, got {g}")


@_fake("token_mass")
def _(q, k_cache, block_table, seq_lens, lse, *, max_seq_len, score="mean", units=None, g=1, **options):
    tokens = max_seq_len if units is None else units.shape[2] * g
    shape = (q.shape[0], k_cache.shape[2], tokens)
    if score == "rows":
        shape = (*shape, q.shape[1] * (q.shape[2] // k_cache.shape[2]))
    return q.new_empty(shape, dtype=torch.float32)


@_typed
def token_mass_out(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    lse: Tensor,
    mass: Tensor,
    workspace: Tensor,
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
) -> None:
    """token_mass into a given contiguous tensor with memory of its own.

    workspace: uint8, token_mass_workspace bytes, aligned to 16 bytes.
    """
    _check_token_mass(max_seq_len, score, norm, prefix_lens, units, g)
    torch.ops.mage.token_mass_out(
        q,
        k_cache,
        block_table,
        seq_lens,
        lse,
        mass,
        workspace,
        max_seq_len=max_seq_len,
        score=score,
        row_mask=row_mask,
        norm=norm,
        prefix_lens=prefix_lens,
        units=units,
        g=g,
        softmax_scale=softmax_scale,
        kv_lens=kv_lens,
    )


@_fake("token_mass_out")
def _(q, k_cache, block_table, seq_lens, lse, mass, workspace, **options):
    return None


@_typed
def token_mass_workspace(
    batch: int, q_len: int, num_heads: int, num_kv_heads: int, head_dim: int, max_seq_len: int
) -> int:
    """Bytes of workspace of token_mass_out, enough on every device: 0 on the GPU with norm context, else sums per row.

    With Rp = R up to a multiple of 16 the GPU needs at most 4 * Rp * (B * Hkv + 132) + 8 * B * Hkv, the CPU
    4 * B * Hkv * Rp * (ceil(max_seq_len / 512) + 2); the larger one is returned.

    Args, Raises: as block_attention_workspace.
    """
    return torch.ops.mage.token_mass_workspace(batch, q_len, num_heads, num_kv_heads, head_dim, max_seq_len)


@_typed
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
) -> tuple[Tensor, Tensor]:
    """Attention over the units listed for each KV head below tail_start, and over everything in [tail_start, S).

    Args:
        q: [B, Q, H, D]; this and the next four as block_attention.
        k_cache: [pages, page, Hkv, D].
        v_cache: [pages, page, Hkv, D].
        block_table: [B, max_pages], int32.
        seq_lens: [B], int32.
        indices: [B, Hkv, Kmax], int32, contiguous. Unit numbers, ascending; select_kv gives one such tensor per layer.
        counts: [B, Hkv], int32, contiguous. Entries that are valid, clamped to [0, Kmax].
        tail_start: [B], int32. First token that every head sees whatever the list says; clamped to [0, S].
        g: tokens per unit: 1, 16, 32 or 64.
        max_seq_len: as block_attention.
        softmax_scale: as block_attention.
        kv_lens: [B, Q], int32; as block_attention.
        split_tokens: as block_attention, along the listed tokens and then the tail.

    Returns:
        out: [B, Q, H, D], dtype of q.
        lse: [B, H, Q], float32, natural log, over the attended tokens.

    Raises:
        TypeError: an argument is of another type. ValueError: a plain one is not as above. RuntimeError: a tensor or
            softmax_scale is not.

    Notes:
        An entry that is negative, not larger than its predecessor in the list, or whose unit starts at or past
        tail_start or S is skipped; a unit across tail_start is cut there. So in an ascending list, repeats or not, no
        token counts twice, and a full list equals block_attention. A list that falls is an error which set_debug
        reports; a unit that comes again after a smaller one counts again. set_debug holds lists to what select_kv
        gives, so it reports a tail_start that is no multiple of g too.
        Reference: mage_ext.reference.sparse_block_attention.
    """
    _check_lengths("sparse_block_attention", max_seq_len, split_tokens)
    _check_granularity("sparse_block_attention", g)
    return torch.ops.mage.sparse_block_attention(
        q,
        k_cache,
        v_cache,
        block_table,
        seq_lens,
        indices,
        counts,
        tail_start,
        g=g,
        max_seq_len=max_seq_len,
        softmax_scale=softmax_scale,
        kv_lens=kv_lens,
        split_tokens=split_tokens,
    )


@_fake("sparse_block_attention")
def _(q, k_cache, v_cache, block_table, seq_lens, indices, counts, tail_start, **options):
    return _new_out_and_lse(q)


@_typed
def sparse_block_attention_out(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    indices: Tensor,
    counts: Tensor,
    tail_start: Tensor,
    out: Tensor,
    lse: Tensor,
    workspace: Tensor,
    *,
    g: int,
    max_seq_len: int,
    softmax_scale: float | None = None,
    kv_lens: Tensor | None = None,
    split_tokens: int = 0,
) -> None:
    """sparse_block_attention into given contiguous tensors, each with memory of its own.

    workspace: uint8, sparse_block_attention_workspace bytes, aligned to 16 bytes.
    """
    _check_lengths("sparse_block_attention", max_seq_len, split_tokens)
    _check_granularity("sparse_block_attention", g)
    torch.ops.mage.sparse_block_attention_out(
        q,
        k_cache,
        v_cache,
        block_table,
        seq_lens,
        indices,
        counts,
        tail_start,
        out,
        lse,
        workspace,
        g=g,
        max_seq_len=max_seq_len,
        softmax_scale=softmax_scale,
        kv_lens=kv_lens,
        split_tokens=split_tokens,
    )


@_fake("sparse_block_attention_out")
def _(q, k_cache, v_cache, block_table, seq_lens, indices, counts, tail_start, out, lse, workspace, **options):
    return None


@_typed
def sparse_block_attention_workspace(
    batch: int,
    q_len: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_seq_len: int,
    g: int,
    capacity: int,
    split_tokens: int = 0,
) -> int:
    """Bytes of workspace of sparse_block_attention_out, enough on every device.

    As block_attention's, of streams that have up to capacity * g + max_seq_len + 64 tokens, in tiles of at least 128
    rows on the GPU (include/mage/sparse_block_attention.h).

    Args, Raises: as block_attention_workspace; g: tokens per unit; capacity: Kmax, in units.
    """
    return torch.ops.mage.sparse_block_attention_workspace(
        batch, q_len, num_heads, num_kv_heads, head_dim, max_seq_len, g, capacity, split_tokens
    )


@_typed
def merge_attention(
    outs: list[Tensor], lses: list[Tensor], *, log2_in: bool = False, log2_out: bool = False
) -> tuple[Tensor, Tensor]:
    """One attention result out of several over disjoint tokens: outs weighted by exp(lse), lses added as exponentials.

    Args:
        outs: tensors [B, Q, H, D], one dtype (bfloat16, float16 or float32), last stride 1.
        lses: as many tensors [B, H, Q], float32, contiguous; natural logs, or log2 with log2_in.
        log2_in: the lses given are in log2.
        log2_out: the lse returned is in log2.

    Returns:
        out: [B, Q, H, D], dtype of outs.
        lse: [B, H, Q], float32.

    Raises:
        TypeError: an argument is of another type. ValueError: outs is empty, or lses is not of its length.
        RuntimeError: a tensor is not as above.

    Notes:
        A part with lse -inf has no say, whatever its out holds; if all are -inf, out is 0 and lse -inf. Summed in
        float32 in the order given. At most 512 parts on a GPU. Reference: mage_ext.reference.merge_attention.
    """
    _check_parts(outs, lses)
    return torch.ops.mage.merge_attention(outs, lses, log2_in=log2_in, log2_out=log2_out)


def _check_parts(outs: list[Tensor], lses: list[Tensor]) -> None:
    for name, parts in (("outs", outs), ("lses", lses)):
        for i, part in enumerate(parts):
            if not isinstance(part, Tensor) and not hasattr(part, "__torch_function__"):
                raise TypeError(f"merge_attention: {name}[{i}] must be a tensor, got {got(part)}")
    if len(outs) == 0:
        raise ValueError("merge_attention: outs must hold at least one tensor, got none")
    if len(lses) != len(outs):
        raise ValueError(f"merge_attention: lses must be as many as outs ({len(outs)}), got {len(lses)}")


@_fake("merge_attention")
def _(outs, lses, **options):
    return _new_out_and_lse(outs[0])


@_typed
def merge_attention_out(
    outs: list[Tensor],
    lses: list[Tensor],
    out: Tensor,
    lse: Tensor,
    workspace: Tensor,
    *,
    log2_in: bool = False,
    log2_out: bool = False,
) -> None:
    """merge_attention into given contiguous tensors, each with memory of its own.

    workspace: uint8, merge_attention_workspace bytes.
    """
    _check_parts(outs, lses)
    torch.ops.mage.merge_attention_out(outs, lses, out, lse, workspace, log2_in=log2_in, log2_out=log2_out)


@_fake("merge_attention_out")
def _(outs, lses, out, lse, workspace, **options):
    return None


@_typed
def merge_attention_workspace(num_parts: int, batch: int, q_len: int, num_heads: int, head_dim: int) -> int:
    """Bytes of workspace of merge_attention_out: 0, the sums need no memory of their own; callers ask nevertheless.

    Args, Raises: as block_attention_workspace; num_parts: N.
    """
    return torch.ops.mage.merge_attention_workspace(num_parts, batch, q_len, num_heads, head_dim)


# --- selection -------------------------------------------------------------------------------------------------------

SELECT_RULES = ("fixed", "layer", "mass", "joint")
GRANULARITIES = (1, 16, 32, 64)
MAX_TOKENS = 1 << 30
MAX_UNITS = 1 << 22  # of select_kv


def set_debug(on: bool) -> bool:
    """Turns the debug switch on or off and returns its former state; the environment variable MAGE_DEBUG=1 starts with
    it on.

    When on, every op also checks the values that live on the device (lengths, page ids, lists, NaN among masses), which
    kernels otherwise clamp or skip, and raises RuntimeError naming the first bad one, before it writes anything. It
    waits for the device at every op, so it cannot be on during CUDA graph capture.
    """
    if not isinstance(on, bool):
        raise TypeError(f"set_debug: on must be a bool, got {got(on)}")
    return torch.ops.mage.set_debug(on)


def _check_tokens(op: str, name: str, value: int, g: int = 1) -> None:
    if not 0 <= value <= MAX_TOKENS:
        raise ValueError(f"{op}: {name} must be in [0, {MAX_TOKENS}], got {value}")
    if value % g:
        raise ValueError(f"{op}: {name} must be a multiple of g = {g}, got {value}")


def _check_granularity(op: str, g: int) -> None:
    if g not in GRANULARITIES:
        raise ValueError(f"{op}: g must be one of {', '.join(map(str, GRANULARITIES))}, got {g}")


@_typed
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
        TypeError: an argument is of another type. ValueError: g or k is not as above. RuntimeError: a tensor is not.

    Notes:
        NaN shares count as 0. Bit-reproducible. Reference: mage_ext.reference.row_votes.
    """
    _check_granularity("row_votes", g)
    _check_tokens("row_votes", "k", k, g)
    return torch.ops.mage.row_votes(row_mass, prefix_lens, k=k, g=g, row_mask=row_mask)


@_fake("row_votes")
def _(row_mass, prefix_lens, *, k, g, row_mask=None):
    requests, heads, units, _ = row_mass.shape
    votes = row_mass.new_empty((requests, heads, units), dtype=torch.int32)
    union_size = row_mass.new_empty((requests, heads), dtype=torch.int32)
    return votes, union_size, row_mass.new_empty((requests, heads))


@_typed
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
    """row_votes into given contiguous tensors, each with memory of its own.

    workspace: uint8, row_votes_workspace bytes, on a GPU aligned to 16 bytes.
    """
    _check_granularity("row_votes", g)
    _check_tokens("row_votes", "k", k, g)
    torch.ops.mage.row_votes_out(
        row_mass, prefix_lens, votes, union_size, coverage, workspace, k=k, g=g, row_mask=row_mask
    )


@_fake("row_votes_out")
def _(row_mass, prefix_lens, votes, union_size, coverage, workspace, *, k, g, row_mask=None):
    return None


@_typed
def row_votes_workspace(batch: int, num_kv_heads: int, num_units: int, num_rows: int) -> int:
    """Bytes of workspace of row_votes_out: 8 * B * Hkv * (1 + R * (1 + min(64, ceil(n / 32)))).

    Args, Raises: as block_attention_workspace; num_units: n. num_rows: R.
    """
    return torch.ops.mage.row_votes_workspace(batch, num_kv_heads, num_units, num_rows)


def _check_select(g: int, capacity: int, rule: str, k: int, k_min: int, p: float, sinks: int, recents: int) -> None:
    _check_granularity("select_kv", g)
    if not 1 <= capacity <= MAX_UNITS:
        raise ValueError(f"select_kv: capacity must be in [1, {MAX_UNITS}], got {capacity}")
    if rule not in SELECT_RULES:
        raise ValueError(f"select_kv: rule must be one of {', '.join(SELECT_RULES)}, got {rule!r}")
    _check_tokens("select_kv", "k", k, g)
    _check_tokens("select_kv", "k_min", k_min, g)
    _check_tokens("select_kv", "sinks", sinks)
    _check_tokens("select_kv", "recents", recents)
    if rule == "mass" and not 0 < p <= 1:
        raise ValueError(f'select_kv: p must be in (0, 1] with rule "mass", got {p}')


@_typed
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
      layer  the layer-adaptive budget of MAGE's first version (arXiv 2602.14209v1): s_l = max over heads of
             union_size * (1 - ln coverage); K_l = max(k_min, floor(s_l / sum s * k / g * L) * g), and k where all s_l
             are 0; ranked by votes (ties: lowest unit), then units without votes, the most recent first. coverage is
             clamped to [2^-24, 1] and 1 - ln coverage rounded to a multiple of 2^-20.
      mass   the fewest units with which the kept mass reaches p of the total of all n units; at least k_min; sinks and
             recents are always in.
      joint  the KV heads of a layer and request share their budgets of k: after each head's sinks and recents one
             ranking over all heads (ties: lowest unit, then lowest head).

    Args:
        mass: [L, B, Hkv, n], float32, last stride 1; n at most 2^22.
        prefix_lens: [B], int32. P, clamped to [0, n * g].
        g: tokens per unit: 1, 16, 32 or 64.
        capacity: Kmax in units, at most 2^22; a longer list keeps its best `capacity` units and sets overflow.
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
        TypeError: an argument is of another type. ValueError: a plain one is not as above. RuntimeError: a tensor is
            not, or one of the three of rule "layer" is missing.

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


@_fake("select_kv")
def _(mass, prefix_lens, *, g, capacity, **budgets):
    heads = mass.shape[:3]
    return (
        mass.new_empty((*heads, capacity), dtype=torch.int32),
        mass.new_empty(heads, dtype=torch.int32),
        mass.new_empty(heads),
        mass.new_empty(mass.shape[1:2], dtype=torch.int32),
        mass.new_empty(heads, dtype=torch.bool),
    )


@_typed
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
    """select_kv into given contiguous tensors, each with memory of its own.

    workspace: uint8, select_kv_workspace bytes. Allocates nothing on a GPU.
    """
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


@_fake("select_kv_out")
def _(mass, prefix_lens, indices, counts, kept_mass, tail_start, overflow, workspace, *, g, capacity, **budgets):
    return None


@_typed
def select_kv_workspace(num_layers: int, batch: int, num_kv_heads: int, num_units: int, capacity: int) -> int:
    """Bytes of workspace of select_kv_out: 0, no backend needs any; callers ask nevertheless.

    Args, Raises: as block_attention_workspace; num_layers: L. num_units: n. capacity: Kmax.
    """
    return torch.ops.mage.select_kv_workspace(num_layers, batch, num_kv_heads, num_units, capacity)


@_typed
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
        TypeError: logits is no tensor. RuntimeError: it is not as above.

    Notes:
        Bit-reproducible for any number of threads and rows and any stride, on one instruction set or on CUDA.
        Reference: mage_ext.reference.token_confidence.
    """
    return torch.ops.mage.token_confidence(logits)


@_fake("token_confidence")
def _(logits):
    rows = logits.shape[:1]
    token = logits.new_empty(rows, dtype=torch.int64)
    return token, logits.new_empty(rows, dtype=torch.float32), logits.new_empty(rows, dtype=torch.float32)


@_typed
def token_confidence_out(logits: Tensor, token: Tensor, prob: Tensor, entropy: Tensor, workspace: Tensor) -> None:
    """token_confidence into given contiguous tensors, each with memory of its own.

    workspace: uint8, token_confidence_workspace bytes.
    """
    torch.ops.mage.token_confidence_out(logits, token, prob, entropy, workspace)


@_fake("token_confidence_out")
def _(logits, token, prob, entropy, workspace):
    return None


@_typed
def token_confidence_workspace(num_rows: int, vocab_size: int) -> int:
    """Bytes of workspace of token_confidence_out: 0, none is needed; callers ask nevertheless.

    Args, Raises: as block_attention_workspace; num_rows: N. vocab_size: V.
    """
    return torch.ops.mage.token_confidence_workspace(num_rows, vocab_size)
