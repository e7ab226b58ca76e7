"""Options of bench/bench_generate.py, which are checked before anything is timed.

Run: pytest tests/python/test_bench_generate.py
"""

import argparse
import sys
from pathlib import Path

import pytest

from mage_ext.evaluation import speed

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    names = ("bench_generate", "cuda_timing", "gpu_bench", "peers", "result_file")
    before = {name: sys.modules.pop(name, None) for name in names}
    import bench_generate

    yield bench_generate
    for name, module in before.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


def _options(**changes) -> argparse.Namespace:
    good = dict(rows="7B:4:64K", steps="32,16,8", dense_layers="0,2", k=1024, g=64, methods="fa3", minutes=9.0)
    return argparse.Namespace(**{**good, **changes})


def test_good_options_become_lists(bench):
    args = _options(rows="7B::128K,1.5B:8")
    places = bench.checked_places(args)
    assert (args.steps, args.dense_layers, args.methods) == ([32, 16, 8], [0, 2], ["fa3"])
    assert {place.name for place in places} == {f"7B {b} x 128K" for b in (1, 4, 8, 16)} | {
        f"1.5B 8 x {context}" for context in bench.CONTEXTS
    }
    assert len(bench.checked_places(_options(rows="", methods=""))) == 3 * 4 * 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rows="7B:4:64K,zzz"), "--rows must fit rows of the table, MODEL:BATCH:CONTEXT, got 'zzz'"),
        (dict(rows="7B:4:64K:x"), "--rows must fit rows of the table"),
        (dict(steps="abc"), "--steps must be integers, several by commas, got 'abc'"),
        (dict(steps="32,8,8"), "--steps must be different numbers, got '32,8,8'"),
        (dict(steps="20"), "--steps must be forwards that a block of 32 can take, one of 32, 16, 11, .*, got 20"),
        (dict(steps="0"), "--steps must be forwards .* got 0"),
        (dict(steps="64"), "--steps must be forwards .* got 64"),
        (dict(dense_layers="0,0"), "--dense-layers must be different numbers, got '0,0'"),
        (dict(dense_layers="28"), r"--dense-layers must be in \[0, 27\], .* got 28"),
        (dict(dense_layers="-1"), r"--dense-layers must be in \[0, 27\], .* got -1"),
        (dict(k=-64), "--k and --g: SelectionConfig: k must be an integer >= 0, got -64"),
        (dict(k=100), "--k and --g: SelectionConfig: k must be a multiple of g = 64, got 100"),
        (dict(k=0), r"--k must be in \[1, 65535\], below the shortest context, got 0"),
        (dict(k=65536), r"--k must be in \[1, 65535\], below the shortest context, got 65536"),
        (dict(methods="fa33"), "--methods must be of fa3, flashinfer, baselines, got 'fa33'"),
        (dict(minutes=float("nan")), "--minutes must be above 0, got nan"),
    ],
)
def test_bad_options_are_refused_by_name(bench, changes, message):
    with pytest.raises(ValueError, match=message):
        bench.checked_places(_options(**changes))


def test_a_folder_is_no_result_file(bench, tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench.gpu_name(argparse.Namespace(out=str(tmp_path)), argparse.ArgumentParser())
    assert f"--out must be a file, got the folder {str(tmp_path)!r}" in capsys.readouterr().err


def test_steps_of_a_block():
    for size in (1, 8, 32):
        for tokens in range(1, size + 1):
            steps = -(-size // tokens)
            assert -(-size // speed.tokens_per_step(size, steps)) == steps
    assert [speed.tokens_per_step(32, steps) for steps in (32, 16, 11, 8, 1)] == [1, 2, 3, 4, 32]
    for steps in (0, 9, 20, 33, True, 1.5):
        with pytest.raises(ValueError, match="steps must be forwards that a block of 32 can take"):
            speed.tokens_per_step(32, steps)
