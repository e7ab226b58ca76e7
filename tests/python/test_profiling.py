"""Ranges that nest, ranges that cost nothing, and the table of a trace. Run: pytest tests/python/test_profiling.py"""

import contextlib
import gzip
import json
import subprocess
import sys
import timeit
import types

import pytest
import torch

from mage_ext import cli, profiling
from mage_ext.cache import PagedCache
from mage_ext.denoise import DenoiseConfig, StepGraphs, generate, prefill
from mage_ext.profiling import PARTS, StepRow, StepTable, profile_generation, read_trace
from mage_ext.sampling import SamplerConfig
from mage_ext.selection import SelectionConfig
from mage_ext.testing.tiny import tiny_config, tiny_model

# --------------------------------------------------------------------------- ranges


@pytest.fixture
def ranges(monkeypatch):
    """Paths of the ranges that were opened, in order; ranges are on."""
    seen, stack = [], []

    @contextlib.contextmanager
    def annotate(name, domain):
        assert domain == "mage"
        stack.append(name)
        seen.append(" > ".join(stack))
        yield
        assert stack.pop() == name

    monkeypatch.setitem(sys.modules, "nvtx", types.SimpleNamespace(annotate=annotate))
    with profiling.enabled():
        yield seen
    assert not stack


def _model(device="cpu", dtype=torch.float32):
    config = tiny_config("fast_dllm_v2", hidden_size=128, head_dim=64)
    return tiny_model(config, seed=1, dtype=dtype).to(device)


def _config(**fields):
    fields = {"selection": SelectionConfig(k=32, g=32), **fields}
    sampler = SamplerConfig("low_confidence_static", tokens_per_step=4)
    fields = {"mode": "mage", "max_new_tokens": 64, "dense_layers": (0,), "ignore_eos": True, **fields}
    return DenoiseConfig(sampler=sampler, **fields)


PROMPTS = [[1, 2, 3, 4] * 40, [5, 6, 7] * 32]


def test_ranges_nest(ranges):
    generate(_model(), PROMPTS, _config())
    assert set(ranges) == {
        "generate",
        "generate > prefill",
        *(f"generate > prefill > layer:{i}" for i in range(3)),
        *(f"generate > prefill > layer:{i} > {op}" for i in range(3) for op in ("append_kv", "block_attention")),
        "generate > prefill > logits",
        "generate > block",
        *(f"generate > block > {name}" for name in ("lists", "select_kv", "outcome")),
        *(f"generate > block > step:{kind}" for kind in ("select", "sparse", "commit")),
        *(
            f"generate > block > step:{kind} > layer:{i}{op}"
            for kind, attention in (
                ("select", "block_attention_mass"),
                ("sparse", "sparse_block_attention"),
                ("commit", "block_attention"),
            )
            for i in range(3)
            for op in ("", " > append_kv", " > " + (attention if i else "block_attention"))
        ),
        *(f"generate > block > step:{kind} > draw{op}" for kind in ("select", "sparse") for op in ("", " > logits")),
        "generate > block > step:commit > logits",
        "generate > block > step:commit > draw",
    }
    assert ranges.count("generate") == 1 and ranges.count("generate > block") == 2
    assert ranges.count("generate > block > select_kv") == 2


def test_ranges_of_the_rule_layer(ranges):
    selection = SelectionConfig(rule="layer", k=32, k_min=16, g=16)
    generate(_model(), PROMPTS, _config(selection=selection))
    layer = "generate > block > step:select > layer:1"
    assert {f"{layer} > block_attention_rows", f"{layer} > row_votes"} < set(ranges)


def test_a_streamed_generation_has_its_blocks_outside(ranges):
    for _ in generate(_model(), PROMPTS, _config(), stream=True):
        assert ranges[0] == "generate" and "block" in ranges
    assert "generate > prefill" in ranges and "generate > block" not in ranges


def test_enabled_restores_what_was(ranges):
    with profiling.enabled():
        pass
    with profiling.span("still"):
        assert ranges == ["still"]
    profiling.enable(False)
    with profiling.span("off"):
        assert ranges == ["still"]
    with pytest.raises(ZeroDivisionError), profiling.enabled():
        raise ZeroDivisionError
    with profiling.span("off"):
        assert ranges == ["still"]


def test_off_makes_nothing():
    """No range, no text, and no time to speak of: 2 us are ten times what it takes."""

    class Loud:
        def __format__(self, spec):
            raise AssertionError("formatted")

    assert profiling.span("step", Loud()) is profiling.span("layer", 3)
    with pytest.raises(ZeroDivisionError), profiling.span("x"):
        raise ZeroDivisionError
    statement = 'with profiling.span("x"): pass'
    seconds = min(timeit.repeat(statement, globals={"profiling": profiling}, number=1000, repeat=20)) / 1000
    assert seconds < 2e-6


def test_without_nvtx_enabling_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with pytest.raises(ModuleNotFoundError, match=r"the package nvtx must be installed: pip install nvtx"):
        profiling.enable()
    with profiling.span("off"):
        pass
    assert cli.main(["profile", "--model", "random:1.5B", "--context", "64", "--nvtx"]) == 2
    assert "the package nvtx must be installed" in capsys.readouterr().err
    with pytest.raises(TypeError, match="on must be a bool, got 1"):
        profiling.enable(1)


# --------------------------------------------------------------------------- the table of a trace

HOST = {"cat": "cuda_runtime", "dur": 2}


def _range(name, begin, end):
    return {"ph": "X", "cat": "user_annotation", "name": "mage." + name, "ts": begin, "dur": end - begin}


def _launch(correlation, ts, name="cudaGraphLaunch"):
    return {"ph": "X", "cat": "cuda_runtime", "name": name, "ts": ts, "dur": 2, "args": {"correlation": correlation}}


def _kernel(correlation, begin, end, name, cat="kernel"):
    args = {"correlation": correlation}
    return {"ph": "X", "cat": cat, "name": name, "ts": begin, "dur": end - begin, "args": args}


ATTENTION = "void mage::mage_block_attention_kernel<mage::Config<cutlass::bfloat16_t>, 1>(mage::AttentionArgs)"
CONFIDENCE = "void mage_token_confidence_kernel<__nv_bfloat16>(TokenConfidenceArgs)"
ELEMENTWISE = "void at::native::vectorized_elementwise_kernel<4>(int)"

# A block on the host (microseconds 0 to 100, far ahead of the device) and on the device (from 1000 on).
EVENTS = [
    _range("generate", 0, 100),
    _range("block", 5, 95),
    _range("lists", 19, 20),
    _range("step:select", 20, 30),
    _range("select_kv", 31, 40),
    _range("lists", 41, 44),
    _range("step:sparse", 45, 55),
    _range("outcome", 60, 70),
    _range("step:commit", 75, 85),
    _launch(1, 2, "cudaMemcpyAsync"),  # before the block
    _kernel(1, 1000, 1010, "Memcpy HtoD (Pinned -> Device)", "gpu_memcpy"),
    _launch(2, 6),
    _kernel(2, 1012, 1022, ELEMENTWISE),
    # Step "select": from 1030, where its first kernel starts, to 1200.
    _launch(3, 25),
    _kernel(3, 1030, 1040, "triton_red_fused_rms_norm"),
    _kernel(3, 1041, 1061, "nvjet_sm90_tst_128x64_64x8_1x2_h_bz_TNT"),
    _kernel(3, 1061, 1064, "mage_append_kv_kernel(AppendKvArgs)"),
    _kernel(3, 1064, 1104, ATTENTION),
    _kernel(3, 1100, 1110, "mage_block_attention_merge_kernel"),  # waits for the one before until 1104
    _kernel(3, 1110, 1115, "nvjet_sm90_tst_64x8"),
    _kernel(3, 1115, 1118, "void cublasLt::splitKreduce_kernel<32>()"),
    _kernel(3, 1118, 1120, ELEMENTWISE),
    _kernel(3, 1120, 1125, CONFIDENCE),
    _kernel(3, 1126, 1130, ELEMENTWISE),
    _launch(4, 33, "cuLaunchKernelEx"),
    _kernel(4, 1140, 1150, "void mage::mage_select_kv_kernel<1024, true>(mage::SelectArgs)"),
    _launch(5, 35, "cudaLaunchKernel"),
    _kernel(5, 1152, 1154, ELEMENTWISE),
    _launch(6, 42, "cudaMemcpyAsync"),
    _kernel(6, 1160, 1162, "Memcpy DtoD", "gpu_memcpy"),
    # Step "sparse": 1200 to 1300, with the flag that is copied behind it.
    _launch(7, 50),
    _kernel(7, 1200, 1220, "void mage_block_attention_short_list_kernel<true>()"),
    _kernel(7, 1222, 1242, "sm90_xmma_gemm_bf16bf16"),
    _kernel(7, 1240, 1250, CONFIDENCE),  # starts before the product ends: 8 of its own
    _launch(8, 57, "cudaMemcpyAsync"),
    _kernel(8, 1260, 1262, "Memcpy DtoH (Device -> Pinned)", "gpu_memcpy"),
    # Read back: 1300 to 1320.
    _launch(9, 65, "cudaLaunchKernel"),
    _kernel(9, 1300, 1305, ELEMENTWISE),
    # Commit without logits: 1320 to 1400.
    _launch(10, 80),
    _kernel(10, 1320, 1360, ATTENTION),
    _kernel(10, 1360, 1380, "void gemmSN_NN_kernel<float>"),
    _kernel(10, 1390, 1400, "triton_red_fused_rms_norm"),
    _launch(11, 98, "cudaMemcpyAsync"),  # behind it, as is the gap before
    _kernel(11, 1490, 1500, "Memset (Device)", "gpu_memset"),
    {"ph": "M", "name": "process_name"},
    {"ph": "X", "cat": "cpu_op", "name": "aten::add", "ts": 1, "dur": 1, "args": {}},
]


def _written(folder, events, name="trace.json"):
    text = json.dumps({"traceEvents": events})
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def _parts(**microseconds):
    return {part: pytest.approx(microseconds.get(part, 0) / 1e3) for part in PARTS}


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_table_of_a_small_trace(tmp_path, name):
    table = read_trace(_written(tmp_path, EVENTS, name))
    assert [row.kind for row in table.rows] == ["select", "sparse", "commit", "between blocks", "outside blocks"]
    assert table.blocks == 1 and table.plain_ms is None and table.profiled_ms is None

    select = table.row("select")
    assert (select.count, select.launches, select.ms) == (1, 13, pytest.approx(0.170))
    assert select.parts == _parts(
        attention=40 + 6, selection=10 + 2 + 2, append=3, gemm=20 + 5 + 3, other=10, sampling=2 + 5 + 4, gap=1 + 1,
        host_gap=10 + 2 + 6 + 38,
    )  # fmt: skip
    sparse = table.row("sparse")
    assert (sparse.count, sparse.launches, sparse.ms) == (1, 4, pytest.approx(0.100))
    assert sparse.parts == _parts(attention=20, gemm=20, sampling=8 + 2, gap=2, host_gap=10 + 38)
    assert sparse.share("host_gap") == pytest.approx(0.48)
    commit = table.row("commit")
    assert (commit.count, commit.launches, commit.ms) == (1, 3, pytest.approx(0.080))
    assert commit.parts == _parts(attention=40, gemm=20, other=10, gap=10)
    between = table.row("between blocks")
    assert (between.count, between.launches, between.ms) == (1, 2, pytest.approx(0.018 + 0.020))
    assert between.parts == _parts(other=10 + 5, host_gap=8 + 15)
    outside = table.row("outside blocks")
    assert (outside.count, outside.launches) == (1, 2) and outside.parts == _parts(other=10 + 10, host_gap=2 + 90)

    assert table.block.ms == pytest.approx(0.388) and table.block.launches == 22
    assert sum(table.block.parts.values()) == pytest.approx(0.388)
    text = str(table)
    assert len(text.splitlines()) == 7 and "host gap" in text and "  0.046  27%" in text


def test_steps_of_a_kind_are_averaged(tmp_path):
    """Two blocks, 1.6 ms apart: what is counted is counted per step, or per block."""
    shift = 2000
    second = []
    for event in EVENTS[1:-4]:
        event = json.loads(json.dumps(event))
        event["ts"] += shift if event["cat"] in ("kernel", "gpu_memcpy") else 100
        if "args" in event:
            event["args"]["correlation"] += 100
        if event["name"] == ATTENTION and event["ts"] == 1064 + shift:
            event["ts"] -= 2
            event["dur"] += 2  # starts within append_kv, which keeps its time
        second.append(event)
    table = read_trace(_written(tmp_path, EVENTS[:-4] + second))
    assert table.blocks == 2 and [row.count for row in table.rows] == [2, 2, 2, 2, 1]
    assert table.row("select").parts == read_trace(_written(tmp_path, EVENTS)).row("select").parts
    # The commit of the first block lasts until the second begins.
    assert table.row("commit").parts["host_gap"] == pytest.approx((3000 - 1400) / 2 / 1e3)
    assert table.block.ms == pytest.approx((2400 - 12) / 2 / 1e3)


def test_a_prefill_has_a_row_and_no_part_in_the_block(tmp_path):
    events = [
        _range("prefill", 0, 10),
        _launch(1, 5),
        _kernel(1, 100, 150, ATTENTION),
        _launch(2, 11),
        _kernel(2, 160, 161, ELEMENTWISE),
        _range("block", 12, 20),
        _range("step:exact", 13, 20),
        _launch(3, 14),
        _kernel(3, 170, 180, ATTENTION),
    ]
    table = read_trace(_written(tmp_path, events))
    assert [row.kind for row in table.rows] == ["exact", "prefill", "outside blocks"]
    assert table.row("prefill").ms == pytest.approx(0.050) and table.block.ms == pytest.approx(0.010)


BAD_TRACES = {
    "no kernels": ([_range("block", 0, 5)], "must hold kernels, got none"),
    "a step without": (
        [*EVENTS, _range("step:sparse", 90, 91)],
        "must hold kernels of every step, got none of a step 'sparse'",
    ),
    "no launch": ([*EVENTS, _kernel(77, 1500, 1501, ATTENTION)], "launch of every kernel, got 1 without"),
}


@pytest.mark.parametrize("case", BAD_TRACES)
def test_traces_that_are_not_whole(tmp_path, case):
    events, message = BAD_TRACES[case]
    with pytest.raises(ValueError, match=message):
        read_trace(_written(tmp_path, events))


def test_bad_arguments(tmp_path, monkeypatch):
    with pytest.raises(TypeError, match="path must be a path, got 3"):
        read_trace(3)
    with pytest.raises(FileNotFoundError, match="path must be a file that exists"):
        read_trace(tmp_path / "none.json")
    for name, text in (("a.json", "no json"), ("b.json", "[]"), ("d.json", "[" * 100_000), ("c.json.gz", "no gzip")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match="path must hold a chrome trace"):
            read_trace(tmp_path / name)
    with pytest.raises(TypeError, match="run must be callable, got None"):
        profile_generation(None)
    with pytest.raises(FileNotFoundError, match="path must be in a folder that exists"):
        profile_generation(print, tmp_path / "none" / "x.json")
    with pytest.raises(ValueError, match="warmup must be an integer >= 0, got -1"):
        profile_generation(print, warmup=-1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="a CUDA device must be there, torch finds none"):
        profile_generation(print)
    row = StepRow("sparse", 1, 1.0, dict.fromkeys(PARTS, 0.125), 1)
    with pytest.raises(ValueError, match=r"part must be one of attention, .*, got 'norms'"):
        row.share("norms")
    with pytest.raises(ValueError, match="kind must be one of sparse, got 'dense'"):
        StepTable((row,), 1).row("dense")
    with pytest.raises(ValueError, match="must hold a block, got none"):
        _ = StepTable((row,), 0).block


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs --out FILE, or --nvtx"),
        (["--out", "no/such/folder/x.json"], "out must be in a folder that exists"),
        (["--out", "x.json", "--batch", "0"], "batch must be in [1, 16777216], got 0"),
        (["--out", "x.json", "--dense-layers", "-1"], "dense_layers must be in [0, 1000], got -1"),
        (["--out", "x.json", "--k", "100"], "k must be a multiple of g = 32, got 100"),
        (["--out", "x.json", "--device", "cpu"], "profile: device must be cuda, got cpu"),
        (["--out", "x.json"], "device must be one that this machine has (torch finds no CUDA), got cuda"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["profile", "--model", "random:1.5B", "--context", "64", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


# --------------------------------------------------------------------------- on a GPU


def _check_row(row, graphs):
    assert row.ms == pytest.approx(sum(row.parts.values())) and min(row.parts.values()) >= 0
    if row.kind in ("between blocks", "outside blocks"):
        return
    for part in ("attention", "append", "gemm", "other"):
        assert 0 < row.share(part) < 1, (row.kind, part)
    assert (row.parts["sampling"] > 0) and (row.parts["selection"] > 0) == (row.kind == "select")
    assert (row.parts["gap"] > 0) == graphs and row.launches > 3 * 4


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize("mode", ["mage", "exact"])
def test_phases_of_a_generation(mode, graphs, tmp_path):
    """Three blocks of a tiny model: every phase is there as often as the loop has it, and its parts add up."""
    model = _model("cuda", torch.bfloat16)
    config = _config(mode=mode, max_new_tokens=96, cuda_graphs=graphs)
    cache = PagedCache.for_model(model, num_pages=64)
    state = prefill(model, PROMPTS, config, cache=cache)
    kept = StepGraphs()
    results = []
    path = tmp_path / "trace.json"
    table = profile_generation(
        lambda: results.append(generate(model, state.fork(), config, graphs=kept)), path, warmup=2
    )
    assert len(results) == 5 and len({str([r.tokens for r in each]) for each in results}) == 1
    assert table.blocks == 3
    forwards = results[-1][0].stats.forwards
    expected = {kind: count for kind, count in forwards.items() if count}
    assert {row.kind: row.count for row in table.rows} == expected | {"between blocks": 3, "outside blocks": 1}
    for row in table.rows:
        _check_row(row, graphs)
    total = sum(row.ms * row.count for row in table.rows)
    assert table.block.ms * 3 + table.row("outside blocks").ms == pytest.approx(total)
    assert total < table.profiled_ms and 0 < table.plain_ms
    names = {event["name"] for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"}
    assert {"mage.block", "mage.step:commit"} < names and ("mage.layer:2" in names) == (not graphs)
    with profiling.span("off"):  # as it was before
        pass
    assert profiling.span("a") is profiling.span("b")


@pytest.mark.gpu
def test_command_line_on_a_model_of_random_weights(tmp_path):
    """The 1.5B geometry at a short context, without the compiler: a table, and a trace that gives the same one."""
    out = tmp_path / "trace.json.gz"
    command = [
        sys.executable,
        "-m",
        "mage_ext",
        "profile",
        "--model",
        "random:1.5B",
        "--context",
        "2048",
        "--no-compile",
    ]
    command += ["--tokens-per-step", "8", "--out", str(out)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    table = read_trace(out)
    assert [row.kind for row in table.rows] == ["select", "sparse", "commit", "between blocks", "outside blocks"]
    assert str(table) in text and "random:1.5B, context 2048, batch 1, mage, k 1024, g 32" in text
