"""torch.library.opcheck for every operator of torch.ops.mage, and their schemas against a golden file.

Run: pytest tests/python/test_opcheck.py
A schema that changes on purpose: MAGE_WRITE_GOLDEN=1 pytest tests/python/test_opcheck.py -k golden
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from mage_ext import ops

gpu = pytest.mark.gpu
GOLDEN = Path(__file__).parent / "golden" / "schemas.txt"


def registered() -> list[str]:
    """Names of all operators under torch.ops.mage."""
    names = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("mage::"))
    return sorted(name.removeprefix("mage::") for name in names)


def overload(name):
    return getattr(torch.ops.mage, name).default


DEBUG = ops.set_debug(False)
ops.set_debug(DEBUG)  # opcheck sets the switch to what it is

# Two requests of 40 and 17 tokens, pages of 16, G = 2, D = 8, Q = 4.
B, Q, H, HKV, D, PAGE, SEQ = 2, 4, 4, 2, 8, 16, 48


def tensors(dtype=torch.float32, head_dim=D):
    pool = torch.randn(2, 8, PAGE, HKV, head_dim).to(dtype)
    return {
        "q": torch.randn(B, Q, H, head_dim).to(dtype),
        "k_cache": pool[0],
        "v_cache": pool[1],
        "block_table": torch.tensor([[3, 0, 5], [1, 2, 7]], dtype=torch.int32),
        "seq_lens": torch.tensor([40, 17], dtype=torch.int32),
        "kv_lens": torch.tensor([[38, 38, 40, 40], [14, 15, 16, 17]], dtype=torch.int32),
        "prefix_lens": torch.tensor([36, 13], dtype=torch.int32),
        "row_mask": torch.tensor([[True, False, True, True], [False, False, True, True]]),
    }


def attention_args(t):
    return [t["q"], t["k_cache"], t["v_cache"], t["block_table"], t["seq_lens"]]


def scratch(size):
    return torch.empty(max(size, 16), dtype=torch.uint8)


def samples(name, device="cpu", dtype=torch.float32, head_dim=D):
    """Calls (args, kwargs) of an operator that opcheck tries. dtype: of all but one call of block_attention, logits."""
    t = tensors(dtype, head_dim)
    out, lse = torch.empty(B, Q, H, head_dim, dtype=dtype), torch.empty(B, H, Q)
    dims = (B, Q, H, HKV, head_dim, SEQ)
    indices = torch.tensor([[[0, 1], [1, -1]], [[0, -1], [-1, -1]]], dtype=torch.int32)
    counts = torch.tensor([[2, 1], [1, 0]], dtype=torch.int32)
    lists = [indices, counts, torch.tensor([32, 0], dtype=torch.int32)]
    mass, lengths = torch.rand(3, B, HKV, 6), torch.tensor([90, 33], dtype=torch.int32)
    votes = {
        "votes": torch.randint(0, 3, (3, B, HKV, 6), dtype=torch.int32),
        "union_size": torch.full((3, B, HKV), 4, dtype=torch.int32),
        "coverage": torch.rand(3, B, HKV),
    }
    row_mass = torch.log_softmax(torch.randn(B, HKV, 6, 8), 2)
    logits = torch.randn(3, 50)
    mass_options = {
        "g": 16,
        "score": "max",
        "norm": "prefix",
        "prefix_lens": t["prefix_lens"],
        "row_mask": t["row_mask"],
    }
    units = torch.tensor([[[0, 2], [1, -1]], [[0, 1], [-1, -1]]], dtype=torch.int32)
    select_outs = [
        torch.empty(3, B, HKV, 4, dtype=torch.int32),
        torch.empty(3, B, HKV, dtype=torch.int32),
        torch.empty(3, B, HKV),
        torch.empty(B, dtype=torch.int32),
        torch.empty(3, B, HKV, dtype=torch.bool),
    ]
    calls = {
        "set_num_threads": [((0,), {})],
        "set_debug": [((DEBUG,), {})],
        "debug_flag": [((), {})],
        "append_kv": [
            (
                (
                    torch.randn(B, Q, HKV, head_dim).to(dtype),
                    torch.randn(B, Q, HKV, head_dim).to(dtype),
                    t["k_cache"],
                    t["v_cache"].clone(),
                    t["block_table"],
                    t["prefix_lens"],
                ),
                {},
            )
        ],
        "block_attention": [
            (attention_args(t), {"max_seq_len": SEQ}),
            (
                attention_args(t),
                {"max_seq_len": SEQ, "kv_lens": t["kv_lens"], "split_tokens": 64, "softmax_scale": 0.2},
            ),
            (attention_args(tensors(torch.bfloat16, head_dim)), {"max_seq_len": SEQ}),
        ],
        "block_attention_out": [
            ((*attention_args(t), out, lse, scratch(ops.block_attention_workspace(*dims))), {"max_seq_len": SEQ})
        ],
        "block_attention_workspace": [(dims, {})],
        "block_attention_mass": [
            (attention_args(t), {"max_seq_len": SEQ, "g": 16}),
            (attention_args(t), {"max_seq_len": SEQ, **mass_options}),
        ],
        "block_attention_mass_out": [
            (
                (
                    *attention_args(t),
                    out,
                    lse,
                    torch.empty(B, HKV, 3),
                    scratch(ops.block_attention_mass_workspace(*dims, 16)),
                ),
                {"max_seq_len": SEQ, **mass_options},
            )
        ],
        "block_attention_mass_workspace": [((*dims, 16), {})],
        "block_attention_rows": [(attention_args(t), {"max_seq_len": SEQ, "g": 16})],
        "block_attention_rows_out": [
            (
                (
                    *attention_args(t),
                    out,
                    lse,
                    torch.empty(B, HKV, 3, 8),
                    scratch(ops.block_attention_rows_workspace(*dims, 16)),
                ),
                {"max_seq_len": SEQ, "g": 16},
            )
        ],
        "block_attention_rows_workspace": [((*dims, 16), {})],
        "token_mass": [
            ((t["q"], t["k_cache"], t["block_table"], t["seq_lens"], torch.zeros(B, H, Q)), {"max_seq_len": SEQ}),
            (
                (t["q"], t["k_cache"], t["block_table"], t["seq_lens"], torch.zeros(B, H, Q)),
                {"max_seq_len": SEQ, "units": units, "g": 16, "score": "rows"},
            ),
        ],
        "token_mass_out": [
            (
                (
                    t["q"],
                    t["k_cache"],
                    t["block_table"],
                    t["seq_lens"],
                    torch.zeros(B, H, Q),
                    torch.empty(B, HKV, SEQ),
                    scratch(ops.token_mass_workspace(*dims)),
                ),
                {"max_seq_len": SEQ, **norm},
            )
            for norm in ({}, {"norm": "prefix", "prefix_lens": t["prefix_lens"]})
        ],
        "token_mass_workspace": [(dims, {})],
        "row_votes": [
            ((row_mass, lengths), {"k": 32, "g": 16}),
            ((row_mass, lengths), {"k": 32, "g": 16, "row_mask": t["row_mask"]}),
        ],
        "row_votes_out": [
            (
                (
                    row_mass,
                    lengths,
                    torch.empty(B, HKV, 6, dtype=torch.int32),
                    torch.empty(B, HKV, dtype=torch.int32),
                    torch.empty(B, HKV),
                    scratch(ops.row_votes_workspace(B, HKV, 6, 8)),
                ),
                {"k": 32, "g": 16},
            )
        ],
        "row_votes_workspace": [((B, HKV, 6, 8), {})],
        "select_kv": [
            ((mass, lengths), {"g": 16, "capacity": 4, "k": 48, "sinks": 4, "recents": 20}),
            ((mass, lengths), {"g": 16, "capacity": 6, "rule": "layer", "k": 48, "k_min": 16, **votes}),
            ((mass, lengths), {"g": 16, "capacity": 6, "rule": "mass", "p": 0.5}),
            ((mass, lengths), {"g": 16, "capacity": 6, "rule": "joint", "k": 48}),
        ],
        "select_kv_out": [
            (
                (mass, lengths, *select_outs, scratch(ops.select_kv_workspace(3, B, HKV, 6, 4))),
                {"g": 16, "capacity": 4, "k": 48},
            )
        ],
        "select_kv_workspace": [((3, B, HKV, 6, 4), {})],
        "sparse_block_attention": [
            ((*attention_args(t), *lists), {"g": 16, "max_seq_len": SEQ, "kv_lens": t["kv_lens"]})
        ],
        "sparse_block_attention_out": [
            (
                (*attention_args(t), *lists, out, lse, scratch(ops.sparse_block_attention_workspace(*dims, 16, 2))),
                {"g": 16, "max_seq_len": SEQ},
            )
        ],
        "sparse_block_attention_workspace": [((*dims, 16, 2), {})],
        "merge_attention": [
            (
                ([torch.randn_like(t["q"]) for _ in range(3)], [torch.randn(B, H, Q) for _ in range(3)]),
                {"log2_out": True},
            )
        ],
        "merge_attention_out": [
            (
                (
                    [torch.randn_like(t["q"]) for _ in range(2)],
                    [torch.randn(B, H, Q) for _ in range(2)],
                    out,
                    lse,
                    scratch(ops.merge_attention_workspace(2, B, Q, H, head_dim)),
                ),
                {},
            )
        ],
        "merge_attention_workspace": [((2, B, Q, H, head_dim), {})],
        "token_confidence": [((logits,), {}), ((logits.bfloat16(),), {})],
        "token_confidence_out": [
            (
                (
                    logits,
                    torch.empty(3, dtype=torch.int64),
                    torch.empty(3),
                    torch.empty(3),
                    scratch(ops.token_confidence_workspace(3, 50)),
                ),
                {},
            )
        ],
        "token_confidence_workspace": [((3, 50), {})],
    }
    move = lambda x: x.to(device) if isinstance(x, torch.Tensor) else x  # noqa: E731
    return torch.utils._pytree.tree_map(move, calls[name])


@pytest.mark.parametrize("name", registered())
def test_opcheck(name):
    check(name)


def check(name, **where):
    for args, kwargs in samples(name, **where):
        results = torch.library.opcheck(overload(name), args, kwargs)
        assert set(results.values()) == {"SUCCESS"}


def test_fake_shapes_follow_the_operators():
    """Fake kernels give the shapes, dtypes and strides of the real ones, for every sample."""
    compared = 0
    for name in registered():
        if name.endswith(("_workspace", "_out")) or name in ("set_debug", "set_num_threads", "debug_flag", "append_kv"):
            continue
        for args, kwargs in samples(name):
            real = overload(name)(*args, **kwargs)
            with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
                convert = lambda x, mode=mode: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x  # noqa: E731
                fake_args, fake_kwargs = torch.utils._pytree.tree_map(convert, (list(args), kwargs))
                fake = overload(name)(*fake_args, **fake_kwargs)
            real, fake = (x if isinstance(x, (tuple, list)) else (x,) for x in (real, fake))
            for a, b in zip(real, fake, strict=True):
                assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device), name
                compared += 1
    assert compared >= 30


def test_every_python_function_has_its_operator():
    for name in registered():
        assert callable(getattr(ops, name, None)) or name in ("debug_flag", "set_num_threads"), name


def test_schemas_are_the_golden_ones():
    schemas = "".join(f"{overload(name)._schema}\n" for name in registered())
    if os.environ.get("MAGE_WRITE_GOLDEN") == "1":
        GOLDEN.write_text(schemas)
    assert schemas == GOLDEN.read_text()


# --- one tensor on another device -----------------------------------------------------------------------------------


def _on_meta(value, is_one):
    """A copy of (args, kwargs) with the tensors on meta for which is_one(number) holds, numbered in their order."""
    leaves, spec = torch.utils._pytree.tree_flatten(value)
    numbers = iter(range(len(leaves)))
    moved = [x.to("meta") if isinstance(x, torch.Tensor) and is_one(next(numbers)) else x for x in leaves]
    return torch.utils._pytree.tree_unflatten(moved, spec)


def tensor_names(name, args, kwargs):
    """Names of the tensors of a call, list[i] in lists, in the order of the schema."""
    order = [argument.name for argument in overload(name)._schema.arguments]
    given = dict(zip(order, args, strict=False)) | kwargs
    names = []
    for key in (key for key in order if key in given):
        parts = given[key] if isinstance(given[key], list) else None
        if parts is not None:
            names += [f"{key}[{i}]" for i in range(len(parts))]
        elif isinstance(given[key], torch.Tensor):
            names.append(key)
    return names


WITH_TENSORS = [name for name in registered() if tensor_names(name, *samples(name)[-1])]


def test_every_operator_with_tensors_is_tried_on_meta():
    assert len(WITH_TENSORS) == 19
    assert sum(name.endswith("_out") for name in WITH_TENSORS) == 9


def mixed_calls(name):
    """Calls of an operator with one tensor on meta: args, kwargs and how the message ends."""
    order = [argument.name for argument in overload(name)._schema.arguments]
    for args, kwargs in samples(name):
        kwargs = {key: kwargs[key] for key in order if key in kwargs}
        names = tensor_names(name, args, kwargs)
        for number in range(len(names) if len(names) > 1 else 0):
            ending = f"{names[number]} must be on cpu, got meta" if number else f"{names[1]} must be on meta, got cpu"
            yield *_on_meta((list(args), kwargs), lambda i, number=number: i == number), ending


@pytest.mark.parametrize("name", [name for name in WITH_TENSORS if name != "token_confidence"])
def test_one_meta_tensor_is_refused(name):
    """The dispatcher takes such a call to the fake kernel; its result would be memory that nobody wrote."""
    calls = list(mixed_calls(name))
    assert len(calls) > 1
    for args, kwargs, ending in calls:
        with pytest.raises(ValueError) as error:
            overload(name)(*args, **kwargs)
        assert str(error.value) == f"{name.removesuffix('_out')}: {ending}"


@pytest.mark.parametrize("name", WITH_TENSORS)
def test_all_on_meta_gives_meta(name):
    for args, kwargs in samples(name):
        args, kwargs = _on_meta((list(args), kwargs), lambda i: True)
        results = overload(name)(*args, **kwargs)
        results = results if isinstance(results, (tuple, list)) else (results,)
        assert all(result is None or result.is_meta for result in results)


def test_fake_tensors_of_two_devices_are_refused():
    mode = torch._subclasses.FakeTensorMode()
    cuda = torch.device("cuda", 0)
    args = [torch._subclasses.FakeTensor(mode, t.to("meta"), cuda) for t in attention_args(tensors())]
    with mode:
        out, lse = overload("block_attention")(*args, max_seq_len=SEQ)
        assert out.device == lse.device == cuda
        with pytest.raises(ValueError, match="block_attention: seq_lens must be on cuda:0, got cpu"):
            overload("block_attention")(*args[:4], torch.zeros(B, dtype=torch.int32), max_seq_len=SEQ)


# --- arguments of another type --------------------------------------------------------------------------------------

VALUES = {  # what is tried, and how a message says it
    "None": None,
    "'q'": "q",
    "3": 3,
    "0.5": 0.5,
    "nan": float("nan"),
    "1j": 1j,
    "True": True,
    "list": [0.5],
    "ndarray": np.zeros((2, 3), np.float32),
    "Tensor": torch.zeros(()),
}
WANTED = {  # by the type that a schema states: how a message says it, and which of VALUES are of it
    "Tensor": ("a tensor", ["Tensor"]),
    "Optional[Tensor]": ("a tensor or None", ["None", "Tensor"]),
    "List[Tensor]": ("a list of tensors", ["list"]),
    "int": ("an integer", ["3"]),
    "float": ("a number", ["3", "0.5", "nan"]),
    "Optional[float]": ("a number or None", ["None", "3", "0.5", "nan"]),
    "bool": ("a bool", ["True"]),
    "str": ("a string", ["'q'"]),
}
FUNCTIONS = [name for name in registered() if hasattr(ops, name)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_of_another_type_is_named(name):
    """TypeError with the argument's name, what it must be and what came, whether given by position or by name."""
    op = name.removesuffix("_out").removesuffix("_workspace")
    arguments = overload(name)._schema.arguments
    args, kwargs = samples(name)[-1]
    by_name = dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs
    for number, argument in enumerate(arguments):
        wanted, fitting = WANTED[str(argument.type)]
        for got in VALUES.keys() - fitting:
            calls = [([], {**by_name, argument.name: VALUES[got]})]
            if number < len(args):
                calls.append(([*args[:number], VALUES[got], *args[number + 1 :]], kwargs))
            for call_args, call_kwargs in calls:
                with pytest.raises(TypeError) as error:
                    getattr(ops, name)(*call_args, **call_kwargs)
                assert str(error.value) == f"{op}: {argument.name} must be {wanted}, got {got}"


@pytest.mark.parametrize("name", [name for name in WITH_TENSORS if name != "token_confidence"])
def test_operators_refuse_none_for_a_tensor(name):
    """torch.ops takes None for a tensor that has to be given; an error of the op's must come of it, never a crash."""
    op = name.removesuffix("_out")
    args, kwargs = samples(name)[-1]
    for number, argument in enumerate(overload(name)._schema.arguments[: len(args)]):
        if str(argument.type) == "Tensor":
            with pytest.raises(RuntimeError, match=f"^{op}: {argument.name} must be .*, got"):
                overload(name)(*args[:number], None, *args[number + 1 :], **kwargs)


def test_parts_of_a_list_are_named():
    outs, lses = samples("merge_attention")[0][0]
    for bad, got in ((None, "None"), ([1], "list"), (np.zeros(2), "ndarray")):
        with pytest.raises(TypeError, match=rf"^merge_attention: outs\[1\] must be a tensor, got {got}$"):
            ops.merge_attention([outs[0], bad, outs[2]], lses)
        with pytest.raises(TypeError, match=rf"^merge_attention: lses\[2\] must be a tensor, got {got}$"):
            ops.merge_attention(outs, [*lses[:2], bad])


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name.endswith("_workspace")])
def test_integers_of_more_than_64_bits_are_refused(name):
    op = name.removesuffix("_workspace")
    sizes = samples(name)[0][0]
    for number, argument in enumerate(overload(name)._schema.arguments[: len(sizes)]):
        for value in (1 << 63, -(1 << 63) - 1):
            with pytest.raises(ValueError, match=f"^{op}: {argument.name} must fit 64 bits, got {value}$"):
                getattr(ops, name)(*sizes[:number], value, *sizes[number + 1 :])
    args, kwargs = samples("select_kv")[0]
    with pytest.raises(ValueError, match=f"^select_kv: capacity must fit 64 bits, got {1 << 70}$"):
        ops.select_kv(*args, **{**kwargs, "capacity": 1 << 70})
    with pytest.raises(ValueError, match=f"^block_attention: split_tokens must fit 64 bits, got {1 << 70}$"):
        ops.block_attention(*attention_args(tensors()), max_seq_len=SEQ, split_tokens=1 << 70)


def test_numbers_of_numpy_are_taken():
    args = attention_args(tensors())
    expected = ops.block_attention(*args, max_seq_len=SEQ, softmax_scale=0.5, split_tokens=64)
    actual = ops.block_attention(
        *args, max_seq_len=np.int64(SEQ), softmax_scale=np.float32(0.5), split_tokens=np.int32(64)
    )
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("name", [name for name in WITH_TENSORS if not name.endswith("_out")])
def test_functions_compile_without_a_break(name):
    """Checks of types and values are traced away: one graph, the same results."""
    for args, kwargs in samples(name):
        torch._dynamo.reset()
        compiled = torch.compile(getattr(ops, name), fullgraph=True, backend="aot_eager")
        expected = getattr(ops, name)(*args, **kwargs)
        actual = compiled(*args, **kwargs)
        assert type(actual) is type(expected)
        leaves = (torch.utils._pytree.tree_leaves(results) for results in (actual, expected))
        for a, b in zip(*leaves, strict=True):
            assert a is b is None or torch.equal(a, b)


def test_out_functions_compile_without_a_break():
    args, kwargs = samples("block_attention_out")[0]
    expected = ops.block_attention(*args[:5], **kwargs)
    torch._dynamo.reset()
    torch.compile(ops.block_attention_out, fullgraph=True, backend="aot_eager")(*args, **kwargs)
    assert torch.equal(args[5], expected[0]) and torch.equal(args[6], expected[1])


class Attention(torch.nn.Module):
    def forward(self, q, k_cache, v_cache, block_table, seq_lens):
        return ops.block_attention(q, k_cache, v_cache, block_table, seq_lens, max_seq_len=SEQ)


@pytest.mark.parametrize("trace", ["export", "symbolic_trace"])
def test_functions_can_be_traced(trace):
    args = tuple(attention_args(tensors()))
    if trace == "export":
        batch = torch.export.Dim("batch", min=1, max=9)
        dims = ({0: batch}, None, None, {0: batch}, {0: batch})
        traced = torch.export.export(Attention(), args, dynamic_shapes=dims).module()
    else:
        traced = torch.fx.symbolic_trace(Attention())
    expected = Attention()(*args)
    assert all(torch.equal(a, b) for a, b in zip(traced(*args), expected, strict=True))


# --- the factor of the scores ---------------------------------------------------------------------------------------

SCALED = [name for name in WITH_TENSORS if "softmax_scale" in {a.name for a in overload(name)._schema.arguments}]


@pytest.mark.parametrize("name", SCALED)
def test_softmax_scale_that_overflows_is_refused(name):
    """By the function and by the operator below it, before a kernel makes NaN of it."""
    op = name.removesuffix("_out")
    args, kwargs = samples(name)[-1]
    interval = r"in \[-65536, 65536\]"
    refused = {1e300: interval, -1e300: interval, 1e39: interval, 65537.0: interval, -65536.5: interval}
    refused |= {float("nan"): "finite", float("inf"): "finite", -float("inf"): "finite"}
    for call in (getattr(ops, name), overload(name)):
        for scale, wanted in refused.items():
            with pytest.raises(RuntimeError, match=f"^{op}: softmax_scale must be {wanted}, got -?[0-9ni]"):
                call(*args, **{**kwargs, "softmax_scale": scale})


@pytest.mark.parametrize("scale", [65536.0, -65536.0, 0.0, 1e-300])
def test_extreme_softmax_scales_give_no_nan(scale):
    t = tensors()
    t["q"] *= 30
    args = attention_args(t)
    out, lse = ops.block_attention(*args, max_seq_len=SEQ, softmax_scale=scale)
    mass = ops.token_mass(
        t["q"], t["k_cache"], t["block_table"], t["seq_lens"], lse, max_seq_len=SEQ, softmax_scale=scale
    )
    assert out.isfinite().all() and lse.isfinite().all() and mass.isfinite().all()
    if abs(scale) < 1:
        assert torch.allclose(lse, t["seq_lens"].float().log()[:, None, None].expand_as(lse))


# --- sizes and memory -----------------------------------------------------------------------------------------------


def arguments_of(name):
    return [argument.name for argument in overload(name)._schema.arguments]


@pytest.mark.parametrize("name", [name for name in registered() if "split_tokens" in arguments_of(name)])
def test_split_tokens_beyond_every_length_is_refused(name):
    """They are kept in 32 bits; 2^30, the largest max_seq_len, is taken."""
    op = name.removesuffix("_out").removesuffix("_workspace")
    args, kwargs = samples(name)[-1]
    given = dict(zip(arguments_of(name), args, strict=False)) | kwargs
    overload(name)(**{**given, "split_tokens": 1 << 30})
    for value in ((1 << 30) + 64, 1 << 31, 1 << 32, 1 << 62, (1 << 63) - 64):
        with pytest.raises(RuntimeError, match=rf"^{op}: split_tokens must be at most 2\^30, got {value}$"):
            overload(name)(**{**given, "split_tokens": value})


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name.endswith("_workspace")])
def test_sizes_of_workspaces(name):
    """What no tensor can have is refused by the name of the argument, never answered by an overflow."""
    op = name.removesuffix("_workspace")
    names, sizes = arguments_of(name), samples(name)[0][0]
    for number, argument in enumerate(names[: len(sizes)]):
        calls = {value: [*sizes[:number], value, *sizes[number + 1 :]] for value in (-1, 1 << 62, (1 << 63) - 1)}
        with pytest.raises(RuntimeError, match=f"^{op}: {argument} must .*, got -1$"):
            overload(name)(*calls.pop(-1))
        for value, call in calls.items():
            try:
                found = overload(name)(*call)
            except RuntimeError as error:
                refused = str(error)
                assert any(refused.startswith(f"{op}: {each} must ") for each in names), refused
            else:
                assert found == 0, f"{argument} = {value}"


def in_one_memory(first, second):
    """Two tensors as contiguous views of the same bytes, from the same address on."""
    memory = torch.zeros(max(t.numel() * t.element_size() for t in (first, second)), dtype=torch.uint8)
    views = [memory[: t.numel() * t.element_size()].view(t.dtype).view(t.shape) for t in (first, second)]
    views[0].copy_(first)
    return views


@pytest.mark.parametrize("name", [name for name in WITH_TENSORS if name.endswith("_out")])
def test_outputs_with_memory_in_common_are_refused(name):
    """Outputs and workspace with one another, and with every input; nothing is written."""
    op = name.removesuffix("_out")
    args, kwargs = samples(name)[0]
    arguments = overload(name)._schema.arguments[: len(args)]
    outputs = [i for i, each in enumerate(arguments) if each.alias_info is not None and each.alias_info.is_write]
    assert len(outputs) >= 2
    given = {each.name: value for each, value in zip(arguments, args, strict=True)} | kwargs
    names = [arguments[j].name for j in outputs]
    inputs = [each for each, value in given.items() if each not in names and isinstance(value, (torch.Tensor, list))]
    tried = set()
    for j, output in enumerate(names):
        for with_name in [*inputs, *names[:j]]:
            value = given[with_name]
            first = value[0] if isinstance(value, list) else value
            if first.numel() == 0 or given[output].numel() == 0:
                continue
            one, other = in_one_memory(first, given[output])
            before = one.clone()
            call = given | {with_name: [one, *value[1:]] if isinstance(value, list) else one, output: other}
            with pytest.raises(RuntimeError, match=f"^{op}: {output} must have memory of its own, got some of "):
                overload(name)(**call)
            assert torch.equal(one.view(torch.uint8), before.view(torch.uint8))
            tried.add(with_name)
    assert set(inputs) <= tried


def test_row_mask_without_positions_is_no_mask():
    args, kwargs = samples("row_votes")[0]
    batch, rows = args[0].shape[0], args[0].shape[3]
    message = rf"^row_votes: row_mask must have Q positions that divide the rows \({rows}\), got 0$"
    with pytest.raises(RuntimeError, match=message):
        ops.row_votes(*args, **{**kwargs, "row_mask": torch.zeros(batch, 0, dtype=torch.bool)})


# --- CUDA -----------------------------------------------------------------------------------------------------------

ON_CUDA = {"device": "cuda", "dtype": torch.bfloat16, "head_dim": 64}


@gpu
@pytest.mark.parametrize("name", WITH_TENSORS)
def test_cuda_opcheck(name):
    check(name, **ON_CUDA)


@gpu
@pytest.mark.parametrize("name", [name for name in WITH_TENSORS if name.endswith("_out")] + ["append_kv"])
def test_cuda_nothing_is_allocated(name):
    """What writes into given tensors asks torch's allocator for nothing, not even for a moment."""
    for args, kwargs in samples(name, **ON_CUDA):
        getattr(ops, name)(*args, **kwargs)  # first use
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        getattr(ops, name)(*args, **kwargs)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
