"""token_mass against its float64 twin, and what it refuses. Run: pytest tests/python/test_token_mass.py"""

import math
from dataclasses import replace

import pytest
import torch

from mage_ext import ops, reference
from mage_ext.testing.cases import ATTENTION_CASES, BF16, CUDA_ATTENTION_CASES, AttentionCase, on_cuda
from mage_ext.testing.compare import assert_log_mass_close, assert_mass_close, assert_same_bits, exact_attention

gpu = pytest.mark.gpu
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]


def inputs(case, seed=0):
    """Tensors and options of token_mass for a case, with the lse of block_attention."""
    tensors, options = case.tensors(seed), dict(case.options)
    _, lse = ops.block_attention(**tensors, **options)
    del tensors["v_cache"], options["split_tokens"]
    return {**tensors, "lse": lse}, options


def candidates(case, g):
    """[B, Hkv, C] units of g tokens: not ascending, some unused, some past the end, one twice."""
    count = 5
    last = (case.longest - 1) // g
    units = torch.randint(0, last + 1, (len(case.lens), case.kv_heads, count), dtype=torch.int32)
    units[..., 1] = -1
    units[..., 3] = last
    units[..., 4] = units[..., 0]
    return units


def extend(case, options):
    extra = dict(options)
    if extra.get("norm") == "prefix":
        extra["prefix_lens"] = torch.tensor([max(0, n - case.q_len) for n in case.lens], dtype=torch.int32)
    if extra.pop("masked", False):
        extra["row_mask"] = torch.arange(case.q_len).expand(len(case.lens), -1) % 2 == 1
    if extra.pop("listed", False):
        extra["units"] = candidates(case, extra["g"])
    return extra


RUNS = [
    ("all_ones", {}),
    ("one_row", {"score": "max"}),
    ("block_of_135m", {"norm": "prefix"}),
    ("block_of_135m", {"listed": True, "g": 32}),
    ("block_of_7b", {"score": "max", "norm": "prefix", "masked": True}),
    ("block_of_7b", {"listed": True, "g": 64, "score": "rows", "norm": "prefix"}),
    ("ragged", {"masked": True}),
    ("ragged", {"score": "rows", "norm": "prefix"}),
    ("ragged", {"listed": True, "g": 16, "norm": "prefix"}),
    ("ragged", {"listed": True, "g": 1, "score": "max"}),
    ("rows_exceed_tokens", {"score": "rows"}),
    ("page_of_1_hnd", {"listed": True, "g": 16, "masked": True}),
    ("page_of_256", {"norm": "prefix", "score": "max"}),
    ("head_dim_24", {"score": "rows", "masked": True}),
    ("many_rows", {}),
    ("prefill_chunk", {"norm": "prefix"}),
    ("causal", {"listed": True, "g": 64, "score": "rows"}),
    ("causal_longer_than_tokens", {"masked": True, "score": "max"}),
    ("rows_without_tokens", {"norm": "prefix"}),
    ("invalid_pages", {"listed": True, "g": 16}),
    ("only_invalid_pages", {"score": "rows"}),
    ("one_winner", {"norm": "prefix"}),
    ("one_winner_bf16", {"listed": True, "g": 16, "score": "max"}),
    ("zero_scale", {}),
    ("negative_scale", {"score": "rows"}),
    ("long", {"norm": "prefix"}),
    ("longer_than_max", {}),
    ("room_to_spare", {"score": "rows", "norm": "prefix"}),
    ("fused_projection", {"listed": True, "g": 32, "norm": "prefix", "masked": True}),
    ("no_requests", {}),
]


@pytest.mark.parametrize(
    ("name", "options"), RUNS, ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x.values()))
)
def test_matches_reference(name, options):
    case = ATTENTION_CASES[name]
    tensors, call = inputs(case)
    call |= extend(case, options)
    mass = ops.token_mass(**tensors, **call)
    exact = reference.token_mass(**tensors, **call, upcast=True)
    if options.get("score") == "rows":
        assert_log_mass_close(mass, exact, dim=2)
    else:
        assert_mass_close(mass, exact)


NAN_RUNS = [
    ("ragged", {}),
    ("ragged", {"score": "max", "norm": "prefix"}),
    ("ragged", {"score": "rows", "norm": "prefix"}),
    ("ragged", {"listed": True, "g": 16}),
    ("ragged", {"listed": True, "g": 1, "score": "rows"}),
    ("room_to_spare", {"score": "max"}),
    ("invalid_pages", {"score": "rows"}),
    ("invalid_pages", {"listed": True, "g": 16}),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "options"), NAN_RUNS)
def test_an_lse_of_nan_shows_in_tokens_that_count_alone(name, options, device):
    tensors, call = inputs((CUDA_ATTENTION_CASES if device == "cuda" else ATTENTION_CASES)[name])
    call |= extend(ATTENTION_CASES[name], options)
    tensors["lse"][:, 0, 0] = math.nan
    exact = reference.token_mass(**tensors, **call, upcast=True)
    if device == "cuda":
        tensors, call = on_cuda(tensors), on_cuda(call)
    mass = ops.token_mass(**tensors, **call).cpu()
    assert exact.isnan().any() and torch.equal(mass.isnan(), exact.isnan())
    assert torch.equal(mass == 0, exact == 0) or options.get("score") == "rows"
    assert torch.equal(mass == -math.inf, exact == -math.inf)


@pytest.mark.parametrize("g", [16, 32, 64])
@pytest.mark.parametrize("norm", ["context", "prefix"])
def test_sums_to_unit_mass(g, norm):
    """Token masses of a unit add up to what block_attention_mass emits for it."""
    case = ATTENTION_CASES["block_of_7b"]
    tensors, call = inputs(case)
    extra = extend(case, {"norm": norm})
    tokens = ops.token_mass(**tensors, **call, **extra)
    padded = torch.zeros(1, 4, -(-517 // g) * g, dtype=torch.float64)
    padded[..., :517] = tokens
    unit_mass = ops.block_attention_mass(**case.tensors(), **case.options, **extra, g=g)[2]
    assert_mass_close(unit_mass, padded.unflatten(-1, (-1, g)).sum(-1))
    assert abs(tokens.double().sum(-1) - 1).max() < 1e-3


@pytest.mark.parametrize("score", ["mean", "max", "rows"])
def test_candidates_equal_the_full_pass(score):
    """A list of units gives, bit for bit, the values that the pass over everything gives at those tokens."""
    case = replace(ATTENTION_CASES["page_of_16"], lens=(256, 256))
    tensors, call = inputs(case)
    full = ops.token_mass(**tensors, **call, score=score)
    units = torch.tensor([[[9, 2, -1, 15]], [[0, 1, 2, 3]]], dtype=torch.int32)
    listed = ops.token_mass(**tensors, **call, score=score, units=units, g=16)
    for b in range(2):
        for c, unit in enumerate(units[b, 0].tolist()):
            part = listed[b, 0, c * 16 : (c + 1) * 16]
            if unit < 0:
                assert (part == (-math.inf if score == "rows" else 0)).all()
            else:
                assert_same_bits(part, full[b, 0, unit * 16 : (unit + 1) * 16])


def test_hostile_units():
    """Numbers far outside weigh 0 and read nothing."""
    case = ATTENTION_CASES["one_row"]
    tensors, call = inputs(case)
    units = torch.tensor([2**31 - 1, -(2**31), 10**9, 3, -1], dtype=torch.int32).expand(1, 3, 5).contiguous()
    mass = ops.token_mass(**tensors, **call, units=units, g=64)
    assert (mass == 0).all()  # unit 3 starts at 192, past S = 130
    empty = ops.token_mass(**tensors, **call, units=units[..., :0].contiguous(), g=64)
    assert empty.shape == (1, 3, 0)


def test_repeats_bit_for_bit_on_any_number_of_threads():
    case = ATTENTION_CASES["long"]
    tensors, call = inputs(case)
    call |= extend(case, {"norm": "prefix"})
    try:
        results = []
        for threads in (1, 2, 5):
            torch.ops.mage.set_num_threads(threads)
            results.append(ops.token_mass(**tensors, **call))
    finally:
        torch.ops.mage.set_num_threads(0)
    for mass in results[1:]:
        assert_same_bits(mass, results[0])


@pytest.mark.parametrize(("name", "options"), [("ragged", {"norm": "prefix"}), ("room_to_spare", {"score": "rows"})])
def test_out_twin_writes_everything(name, options):
    case = ATTENTION_CASES[name]
    tensors, call = inputs(case)
    call |= extend(case, options)
    expected = ops.token_mass(**tensors, **call)
    mass = torch.full_like(expected, math.nan)
    size = ops.token_mass_workspace(len(case.lens), case.q_len, case.heads, case.kv_heads, case.head_dim, case.longest)
    ops.token_mass_out(**tensors, mass=mass, workspace=torch.full((size,), 255, dtype=torch.uint8), **call)
    assert_same_bits(mass, expected)


INT = torch.int32
BAD = {
    "g_without_units": ({"g": 16}, "g must be 1 without units, got 16"),
    "g": ({"g": 5, "units": torch.zeros(2, 2, 3, dtype=INT)}, "g must be .*1, 16, 32.*64, got 5"),
    "score": ({"score": "median"}, "score must be .*mean, max.*rows, got '?median"),
    "norm": ({"norm": "x"}, "norm must be .*context.*prefix, got '?x"),
    "prefix_missing": ({"norm": "prefix"}, "prefix_lens must be given with norm .?prefix.?.*, got None"),
    "units_dtype": ({"units": torch.zeros(2, 2, 3)}, "units must be int32, got float32"),
    "units_rank": ({"units": torch.zeros(2, 2, dtype=INT)}, "units must be a tensor of rank 3"),
    "units_heads": ({"units": torch.zeros(2, 4, 3, dtype=INT)}, r"units must be of shape \[B, Hkv, C\] = \[2, 2, 3\]"),
    "units_strided": ({"units": torch.zeros(2, 3, 2, dtype=INT).mT}, "units must be contiguous"),
    "lse_shape": ({"lse": torch.zeros(2, 8, 4)}, r"lse must be of shape \[B, H, Q\] = \[2, 4, 8\]"),
    "lse_dtype": ({"lse": torch.zeros(2, 4, 8).double()}, "lse must be float32, got float64"),
    "max_seq_len": ({"max_seq_len": -7}, "max_seq_len must be in .*, got -7"),
    "row_mask": (
        {"row_mask": torch.ones(8, dtype=torch.bool)},
        r"row_mask must be of shape \[B, Q\] = \[2, 8\], got \[8\]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_refuses(name):
    options, message = BAD[name]
    tensors, _ = inputs(replace(ATTENTION_CASES["ragged"], lens=(100, 128)))
    for op in (ops.token_mass, torch.ops.mage.token_mass):
        with pytest.raises((ValueError, RuntimeError), match="token_mass: " + message):
            op(**{**tensors, "max_seq_len": 128, **options})


@pytest.mark.parametrize("device", DEVICES)
def test_debug_switch_names_the_value(device):
    tensors = replace(ATTENTION_CASES["ragged"], lens=(100, 128), dtype=BF16).tensors(device=device)
    del tensors["v_cache"]
    good = {**tensors, "lse": torch.zeros(2, 4, 8, device=device), "max_seq_len": 128, "g": 16}
    good["units"] = torch.tensor([[[0, -1], [7, 3]]] * 2, dtype=INT, device=device)
    bad = {name: good[name].clone() for name in ("block_table", "seq_lens", "units")}
    bad["block_table"][1, 2], bad["seq_lens"][0], bad["units"][1, 0, 1] = 99, -1, 8
    bad |= {"norm": "prefix", "prefix_lens": torch.tensor([0, 129], dtype=INT, device=device)}
    was_on = ops.set_debug(True)
    try:
        ops.token_mass(**good)
        for message, names in (
            (r"block_table\[1, 2\] must be .*, got 99", ["block_table"]),
            (r"seq_lens\[0\] must be in \[0, 128\], got -1", ["seq_lens"]),
            (r"units\[5\] must be in \[-1, 7\], got 8", ["units"]),
            (r"prefix_lens\[1\] must be in \[0, 128\], got 129", ["norm", "prefix_lens"]),
        ):
            with pytest.raises(RuntimeError, match=f"token_mass: {message}"):
                ops.token_mass(**good | {name: bad[name] for name in names})
    finally:
        ops.set_debug(was_on)


# --- CUDA ------------------------------------------------------------------------------------------------------------

CUDA_RUNS = [(name, options) for name, options in RUNS if name in CUDA_ATTENTION_CASES]
CUDA_RUNS += [
    ("page_of_1", {"listed": True, "g": 1, "norm": "prefix", "score": "rows"}),
    ("page_of_128", {"listed": True, "g": 64, "norm": "prefix", "masked": True}),
    ("ragged_half", {"score": "max", "norm": "prefix", "masked": True}),
    ("prefill_start", {"score": "rows", "norm": "prefix"}),
    ("many_rows", {"score": "max", "norm": "prefix", "listed": True, "g": 32}),
]


def cuda_inputs(case, options, seed=0):
    """Tensors and options of token_mass for a case: on the GPU, and on the CPU for the twin."""
    tensors = case.tensors(seed, device="cuda")
    call = {**case.options, **extend(case, options)}
    del call["split_tokens"]
    attention = on_cuda({name: call[name] for name in ("max_seq_len", "softmax_scale", "kv_lens")})
    _, lse = ops.block_attention(**tensors, **attention)
    del tensors["v_cache"]
    tensors["lse"] = lse
    return (tensors, on_cuda(call)), ({name: tensor.cpu() for name, tensor in tensors.items()}, call)


def assert_close(mass, exact, score):
    if score == "rows":
        assert_log_mass_close(mass.cpu(), exact, dim=2)
    else:
        assert_mass_close(mass.cpu(), exact)


@gpu
@pytest.mark.parametrize(
    ("name", "options"), CUDA_RUNS, ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x.values()))
)
def test_cuda_matches_reference(name, options):
    (tensors, call), (on_cpu, cpu_call) = cuda_inputs(CUDA_ATTENTION_CASES[name], options)
    mass = ops.token_mass(**tensors, **call)
    assert_close(mass, reference.token_mass(**on_cpu, **cpu_call, upcast=True), options.get("score"))


@gpu
@pytest.mark.parametrize(
    ("heads", "kv_heads", "q_len", "lens"),
    [
        (28, 4, 32, (4128, 0, 1500, 65)),
        (32, 8, 32, (2100, 3000)),
        (12, 2, 32, (4128, 1)),
        (7, 1, 8, (9000, 64)),
        (5, 1, 64, (140000, 70)),  # R = 320 in two chunks, and runs of 16 tiles within a worker's part
    ],
)
def test_cuda_matches_float64_on_the_gpu(heads, kv_heads, q_len, lens):
    case = AttentionCase(lens, q_len, heads, kv_heads, 64 if q_len == 64 else 128, dtype=BF16)
    tensors = case.tensors(device="cuda")
    _, _, lse, shares = exact_attention(**tensors)
    del tensors["v_cache"]
    call = {"lse": lse.float(), "max_seq_len": max(lens)}
    assert_mass_close(ops.token_mass(**tensors, **call), shares.mean(2))
    assert_mass_close(ops.token_mass(**tensors, **call, score="max"), shares.amax(2))
    prefix_lens = torch.tensor(lens, dtype=torch.int32, device="cuda") * 3 // 4
    shares *= torch.arange(shares.shape[-1], device="cuda") < prefix_lens[:, None, None, None]
    shares /= shares.sum(-1, keepdim=True).clamp(min=1e-300)
    mass = ops.token_mass(**tensors, **call, norm="prefix", prefix_lens=prefix_lens)
    assert_mass_close(mass, shares.mean(2))


@gpu
@pytest.mark.parametrize("norm", ["context", "prefix"])
def test_cuda_tokens_add_up_to_unit_mass(norm):
    case = CUDA_ATTENTION_CASES["block_of_7b"]
    (tensors, call), _ = cuda_inputs(case, {"norm": norm})
    tokens = torch.nn.functional.pad(ops.token_mass(**tensors, **call).double(), (0, -517 % 32))
    options = {name: call[name] for name in ("max_seq_len", "norm", "prefix_lens") if name in call}
    unit_mass = ops.block_attention_mass(**case.tensors(device="cuda"), **options, g=32)[2]
    assert_mass_close(unit_mass, tokens.unflatten(-1, (-1, 32)).sum(-1))
    assert abs(tokens.sum(-1) - 1).max() < 1e-3


@gpu
@pytest.mark.parametrize("score", ["mean", "max", "rows"])
@pytest.mark.parametrize("norm", ["context", "prefix"])
def test_cuda_candidates_equal_the_full_pass(score, norm):
    case = replace(CUDA_ATTENTION_CASES["page_of_16"], lens=(256, 256))
    (tensors, call), _ = cuda_inputs(case, {"norm": norm})
    full = ops.token_mass(**tensors, **call, score=score)
    units = torch.tensor([[[9, 2, -1, 15]], [[0, 1, 2, 3]]], dtype=torch.int32, device="cuda")
    listed = ops.token_mass(**tensors, **call, score=score, units=units, g=16)
    for b in range(2):
        for c, unit in enumerate(units[b, 0].tolist()):
            part = listed[b, 0, c * 16 : (c + 1) * 16]
            if unit < 0:
                assert (part == (-math.inf if score == "rows" else 0)).all()
            else:
                assert_same_bits(part, full[b, 0, unit * 16 : (unit + 1) * 16])


@gpu
@pytest.mark.parametrize(
    ("name", "options"),
    [("ragged", {"norm": "prefix"}), ("room_to_spare", {"score": "rows"}), ("many_rows", {"norm": "prefix"})],
)
def test_cuda_out_twin_writes_everything(name, options):
    """Into NaN, with a workspace of NaN, again and again bit for bit."""
    case = CUDA_ATTENTION_CASES[name]
    (tensors, call), _ = cuda_inputs(case, options)
    expected = ops.token_mass(**tensors, **call)
    size = ops.token_mass_workspace(len(case.lens), case.q_len, case.heads, case.kv_heads, case.head_dim, case.longest)
    for _ in range(20):
        mass = torch.full_like(expected, math.nan)
        workspace = torch.full((size,), 255, dtype=torch.uint8, device="cuda")
        ops.token_mass_out(**tensors, mass=mass, workspace=workspace, **call)
        assert_same_bits(mass, expected)


@gpu
def test_cuda_hostile_units_and_lengths():
    """Numbers far outside weigh 0 and read nothing."""
    (tensors, call), _ = cuda_inputs(CUDA_ATTENTION_CASES["one_row"], {})
    units = torch.tensor([2**31 - 1, -(2**31), 10**9, 3, -1], dtype=torch.int32).expand(1, 3, 5).contiguous().cuda()
    assert (ops.token_mass(**tensors, **call, units=units, g=64) == 0).all()  # unit 3 starts at 192, past S = 130
    assert ops.token_mass(**tensors, **call, units=units[..., :0].contiguous(), g=64).shape == (1, 3, 0)
    for prefix in (-(2**31), -1, 0):
        lens = torch.tensor([prefix], dtype=torch.int32, device="cuda")
        assert (ops.token_mass(**tensors, **call, norm="prefix", prefix_lens=lens) == 0).all()
    expected = ops.token_mass(**tensors, **call)
    tensors["seq_lens"].fill_(2**31 - 1)
    assert_same_bits(ops.token_mass(**tensors, **call), expected)
    tensors["seq_lens"].fill_(-(2**31))
    assert (ops.token_mass(**tensors, **call) == 0).all()


@gpu
@pytest.mark.parametrize("listed", [False, True])
def test_cuda_graph_follows_new_lengths(listed):
    case = replace(CUDA_ATTENTION_CASES["block_of_7b"], lens=(517, 517), layout="nhd")
    (tensors, call), _ = cuda_inputs(case, {"norm": "prefix", **({"listed": True, "g": 32} if listed else {})})
    ops.token_mass(**tensors, **call)  # first use, outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.token_mass(**tensors, **call)
    for seed, lens in enumerate([(517, 1), (0, 300), (0, 0), (64, 517)]):
        fresh = case.tensors(seed + 1, device="cuda")
        fresh["seq_lens"].copy_(torch.tensor(lens, dtype=torch.int32))
        fresh["lse"] = ops.block_attention(**fresh, max_seq_len=517)[1]
        for name, tensor in tensors.items():
            tensor.copy_(fresh[name])
        call["prefix_lens"].copy_(torch.tensor(lens, dtype=torch.int32) * 2 // 3)
        if listed:
            call["units"].copy_(candidates(case, 32))
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(captured, ops.token_mass(**tensors, **call))
        on_cpu = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in (tensors | call).items()}
        assert_mass_close(captured.cpu(), reference.token_mass(**on_cpu, upcast=True))


@gpu
def test_cuda_opcheck():
    (tensors, call), _ = cuda_inputs(CUDA_ATTENTION_CASES["causal"], {"norm": "prefix", "masked": True, "score": "max"})
    op = torch.ops.mage.token_mass.default
    assert set(torch.library.opcheck(op, tuple(tensors.values()), call).values()) == {"SUCCESS"}


@gpu
def test_cuda_refuses():
    (tensors, call), _ = cuda_inputs(CUDA_ATTENTION_CASES["ragged"], {"norm": "prefix"})
    wide = {name: tensors[name].new_zeros(*tensors[name].shape[:-1], 96) for name in ("q", "k_cache")}
    with pytest.raises(RuntimeError, match="token_mass: the head dim of q must be 64 or 128 on CUDA, got 96"):
        ops.token_mass(**(tensors | wide), **call)
    single = {name: tensors[name].float() for name in ("q", "k_cache")}
    with pytest.raises(RuntimeError, match="token_mass: q must be bfloat16 or float16 on CUDA, got float32"):
        ops.token_mass(**(tensors | single), **call)
    with pytest.raises((ValueError, RuntimeError), match=r"token_mass: lse must be on cuda:0.*, got cpu"):
        ops.token_mass(**(tensors | {"lse": tensors["lse"].cpu()}), **call)
    mass = torch.full((6, 2, 250), 7.0, device="cuda")
    workspace = torch.zeros(64, dtype=torch.uint8, device="cuda")
    with pytest.raises(RuntimeError, match=r"token_mass: workspace must have at least .* bytes, got 64"):
        ops.token_mass_out(**tensors, mass=mass, workspace=workspace, **call)
    assert (mass == 7).all()
