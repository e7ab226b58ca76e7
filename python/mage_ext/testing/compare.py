"""Comparisons of attention results with their float64 twins. Tolerances are derived, never tuned.

out: at most twice the largest error that torch's own attention makes in the same precision on the same inputs, plus one
unit in the last place of the output. In float32 torch has two ways (fused, and plain products with a softmax between);
both count, so that the measure does not hang on one lucky rounding where there are few rows. lse: 1e-4 * max(1, |lse|).
Mass: 1e-3 relative for what is above 1e-6 of the row's total.

out on CUDA, where the arithmetic of 16 bits is the measure, not torch: weights w that are rounded move out by
at most u * sum w |v|, with u = 2^-8 (bfloat16) or 2^-11 (float16); rounding out adds u * |out|; float32 scores of up to
about 100, rounded three times, add 1e-4 * sum w |v|; and float16 weights below 2^-14 are off by 2^-25 each.
"""

import math

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mage_ext import reference

LSE_TOLERANCE = 1e-4
MASS_TOLERANCE = 1e-3
MASS_FLOOR = 1e-6
TORCH_BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance of neighbouring numbers of `dtype` at |values|, float64."""
    info = torch.finfo(dtype)
    exponent = values.double().abs().clamp(min=info.tiny).log2().floor()
    return torch.exp2(exponent) * info.eps


def torch_attention(
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
) -> Tensor:
    """torch's own attention on the same inputs in their dtype: out [B, Q, H, D], 0 for rows without tokens.

    float32: [2, B, Q, H, D], the fused and the plain one. The plain one rounds scores to 16 bits in the other dtypes
    and would be too lenient a measure there.
    """
    backends = TORCH_BACKENDS[: 2 if q.dtype == torch.float32 else 1]
    out = torch.zeros(len(backends), *q.shape, dtype=q.dtype)
    group = q.shape[2] // k_cache.shape[2]
    for b in range(len(q)):
        length = min(max(int(seq_lens[b]), 0), max_seq_len)
        if length == 0:
            continue
        positions = torch.arange(length)
        k, valid = reference._tokens(k_cache, block_table[b], positions)
        v, _ = reference._tokens(v_cache, block_table[b], positions)
        seen = valid[None].expand(q.shape[1], -1)
        if kv_lens is not None:
            seen = seen & (positions < kv_lens[b][:, None])
        k, v = (x.transpose(0, 1).repeat_interleave(group, 0) for x in (k, v))  # [H, T, D]
        for i, backend in enumerate(backends):
            out[i, b] = masked_attention(q[b], k, v, seen, softmax_scale, backend)
    return out if len(backends) > 1 else out[0]


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, softmax_scale: float | None, backend: SDPBackend = TORCH_BACKENDS[0]
) -> Tensor:
    """torch's attention of q [Q, H, D] over k, v [H, T, D] under the mask seen [Q, T]; rows that see nothing are 0."""
    with sdpa_kernel(backend):
        rows = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(0, 1)[None], k[None], v[None], attn_mask=seen, scale=softmax_scale
        )
    return torch.where(seen.any(-1)[:, None, None], rows[0].transpose(0, 1), 0)


def assert_out_close(actual: Tensor, exact: Tensor, peer: Tensor) -> None:
    """`actual` against float64 `exact`; the error of `peer`, torch's result in the same precision, is the measure."""
    assert actual.shape == exact.shape == peer.shape[-4:] and actual.dtype == peer.dtype
    assert not actual.isnan().any(), "out has NaN"
    if not actual.numel():
        return
    allowed = 2 * (peer.double() - exact).abs().max() + ulp(exact, actual.dtype)
    error = (actual.double() - exact).abs()
    worst = int((error - allowed).argmax())
    assert (error <= allowed).all(), (
        f"out is off by {error.flatten()[worst]:.3e} at {worst} ({exact.flatten()[worst]:.6e}), "
        f"allowed {allowed.flatten()[worst]:.3e}"
    )


def exact_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """float64 attention where the tensors are, for shapes that are too large for the twin; pages must be valid.

    Returns out [B, Q, H, D], sum w |v| likewise, lse [B, H, Q] and shares [B, Hkv, R, T], 0 past a request's tokens.
    """
    batch, q_len, heads, head_dim = q.shape
    kv_heads, group = k_cache.shape[2], heads // k_cache.shape[2]
    tokens = int(seq_lens.max()) if batch else 0
    out = q.new_zeros(q.shape, dtype=torch.float64)
    size, lse = torch.zeros_like(out), out.new_full((batch, heads, q_len), -math.inf)
    shares = out.new_zeros(batch, kv_heads, q_len * group, tokens)
    for b, length in enumerate(seq_lens.tolist()):
        if length == 0:
            continue
        position = torch.arange(length, device=q.device)
        page, slot = block_table[b].long()[position // k_cache.shape[1]], position % k_cache.shape[1]
        k, v = (cache[page, slot].double() for cache in (k_cache, v_cache))  # [T, Hkv, D]
        rows = q[b].double().unflatten(1, (kv_heads, group)).transpose(0, 1).flatten(1, 2)  # [Hkv, R, D]
        scores = torch.einsum("hrd,thd->hrt", rows, k) * head_dim**-0.5
        share = shares[b, :, :, :length] = scores.softmax(-1)
        for result, values in ((out, v), (size, v.abs())):
            by_row = torch.einsum("hrt,thd->hrd", share, values)
            result[b] = by_row.unflatten(1, (q_len, group)).transpose(0, 1).flatten(1, 2)
        lse[b] = scores.logsumexp(-1).unflatten(1, (q_len, group)).transpose(1, 2).flatten(0, 1)
    return out, size, lse, shares


def assert_cuda_out_close(actual: Tensor, exact: Tensor, size: Tensor, tokens: int) -> None:
    """`actual` in 16 bits against float64 `exact`; size: sum w |v|. tokens: the most of a request; |v| is below 8."""
    assert actual.shape == exact.shape == size.shape
    assert not actual.isnan().any(), "out has NaN"
    u, tiny = (2.0**-8, 0.0) if actual.dtype == torch.bfloat16 else (2.0**-11, 2.0**-25)
    allowed = u * (size + exact.abs()) + 1e-4 * size + tiny * (8 * tokens + 1) + 1e-9
    error = (actual.to(exact.device).double() - exact).abs()
    assert (error <= allowed).all(), f"out is off by {error.max():.3e}, {(error / allowed).max():.2f} times what may be"


def assert_lse_close(actual: Tensor, exact: Tensor) -> None:
    assert actual.shape == exact.shape and actual.dtype == torch.float32
    assert torch.equal(actual == -math.inf, exact == -math.inf), "lse is -inf in other places"
    finite = exact > -math.inf
    error = (actual.double() - exact)[finite].abs()
    assert (error <= LSE_TOLERANCE * exact[finite].abs().clamp(min=1)).all(), f"lse is off by {error.max():.3e}"


def assert_mass_close(actual: Tensor, exact: Tensor, dim: int = -1) -> None:
    """Shares that lie along `dim`: relative above a millionth of their total, absolute (of that bound) below."""
    assert actual.shape == exact.shape and actual.dtype == torch.float32
    assert not actual.isnan().any(), "mass has NaN"
    floor = MASS_FLOOR * exact.sum(dim, keepdim=True)
    error = (actual.double() - exact).abs()
    allowed = MASS_TOLERANCE * torch.maximum(exact, floor)
    assert (error <= allowed).all(), f"mass is off by {(error - allowed).max():.3e}, largest error {error.max():.3e}"


def assert_log_mass_close(actual: Tensor, exact: Tensor, dim: int) -> None:
    """Natural logs of shares. Where the exact share is 0, -inf is required."""
    assert (actual[exact == -math.inf] == -math.inf).all(), "a share that is 0 is not -inf"
    assert_mass_close(actual.exp(), exact.exp(), dim)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal bit for bit, NaN and the sign of 0 included."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    as_int = {4: torch.int32, 2: torch.int16}[actual.element_size()]
    assert torch.equal(actual.contiguous().view(as_int), expected.contiguous().view(as_int))
