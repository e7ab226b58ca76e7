"""The rules of the house that a test can hold: who may include whom, what an import does, what the tree contains.

Run: pytest tests/python/test_house.py
"""

import ast
import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mage_ext
from mage_ext import cli, ops

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "python" / "mage_ext"
CXX_SUFFIXES = {".h", ".cpp", ".cu", ".cuh"}
HOST_OPS = {
    "set_num_threads",
    "set_debug",
    "debug_flag",
}  # torch.ops.mage without a tensor and without a Python function


def tracked_files() -> list[Path]:
    """Files of the tree, without what git ignores."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in result.stdout.split("\0") if name and (ROOT / name).is_file()]


def sources(folder: str, suffixes=CXX_SUFFIXES) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes)


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --- C++ layers -----------------------------------------------------------------------------------------------------

LAYERS = [  # folder, prefixes of project headers that its files may include
    ("include/mage", ["mage/"]),
    ("csrc/core", ["mage/", "core/"]),
    ("csrc/device", ["mage/", "device/", "cute/", "cutlass/"]),
    ("csrc/kernels", ["mage/", "core/", "device/", "kernels/", "cute/", "cutlass/"]),
    ("csrc/cpu", ["mage/", "core/", "cpu/"]),
    ("csrc/torch", ["mage/", "core/", "torch/", "pybind11/"]),
    ("tests/cpp", ["mage/", "core/", "device/", "kernels/", "cpu/", "gtest/", "gmock/"]),
    ("bench/cpp", ["mage/", "core/", "device/", "kernels/"]),
]
PROJECT_HEADER = re.compile(
    r"^(mage|core|cpu|device|kernels|torch|ATen|c10|pybind11|cute|cutlass|gtest|gmock)/|^Python\.h"
)


@pytest.mark.parametrize("folder, allowed", LAYERS, ids=[layer[0] for layer in LAYERS])
def test_includes_point_one_way(folder, allowed):
    wrong = [
        f"{name(path)} includes {header}"
        for path in sources(folder)
        for header in includes(path)
        if PROJECT_HEADER.match(header) and not any(header.startswith(prefix) for prefix in allowed)
    ]
    assert not wrong


def test_op_folders_do_not_include_each_other():
    wrong = [
        f"{name(path)} includes {header}"
        for path in sources("csrc/kernels")
        for header in includes(path)
        if header.startswith("kernels/") and header.count("/") > 1 and header.split("/")[1] != path.parent.name
    ]
    assert not wrong


def test_torch_only_in_csrc_torch_and_only_its_stable_abi():
    """nvcc never sees torch, torch code never sees device code, and the stable ABI is the only binding."""
    elsewhere = [
        name(path)
        for folder in ("include", "csrc", "tests/cpp", "bench/cpp")
        for path in sources(folder)
        if "csrc/torch" not in name(path) and re.search(r"\btorch::|\bat::|\bc10::", path.read_text())
    ]
    assert not elsewhere
    assert not [name(path) for path in sources("csrc/torch") if path.suffix in (".cu", ".cuh")]
    unstable = [
        f"{name(path)} includes {header}"
        for path in sources("csrc/torch")
        for header in includes(path)
        if header.startswith(("torch/", "ATen/", "c10/"))
        and not header.startswith(("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/"))
    ]
    assert not unstable


def test_public_headers_need_no_cuda():
    wrong = [name(path) for path in sources("include") if any("cuda" in header for header in includes(path))]
    assert not wrong


def test_one_schema_file():
    defining = [
        name(path) for path in sources("csrc") if re.search(r"\bSTABLE_TORCH_LIBRARY(_FRAGMENT)?\(", path.read_text())
    ]
    assert defining == ["csrc/torch/registration.cpp"]


def test_compiled_code_never_prints_nor_ends_the_process():
    pattern = re.compile(
        r"\b(printf|fprintf|puts|abort|exit|_exit|quick_exit|terminate)\s*\(|\bstd::(cout|cerr|clog)\b|\bassert\s*\("
    )
    wrong = [
        f"{name(path)}:{number}: {line.strip()}"
        for folder in ("csrc", "include")
        for path in sources(folder)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line.split("//")[0])
    ]
    assert not wrong


def test_copies_for_instruction_sets_share_no_code():
    """A function that the linker merges across the copies of a kernel could bring AVX-512 to a processor without it."""
    objects = list((ROOT / "build").glob("**/mage_cpu_*_avx*.dir/**/*.o"))
    if not objects or shutil.which("nm") is None:
        pytest.skip("no build folder with object files (make test makes one)")
    merged = []
    for path in objects:
        symbols = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout
        for line in symbols.splitlines():
            kind, _, symbol = line[17:].partition(" ")
            if kind in "WVu" and "isa_avx" not in symbol:
                merged.append(f"{path.name}: {symbol}")
    assert not merged


# --- Python layers --------------------------------------------------------------------------------------------------

# Later groups may import earlier ones and their own; `reference` and `testing` are for tests and benches alone.
PYTHON_LAYERS = [
    {"_version", "_build_info", "_library", "_arguments", "_files", "_upload", "_C"},
    {"ops", "info", "counter_random", "profiling"},
    {"reference", "cache", "selection", "sampling"},
    {
        "token_candidates",
        "results",
        "paged_forward",
        "denoise_config",
        "carried_lists",
        "step_graphs",
        "step_functions",
        "block_slots",
        "prefill",
        "denoise",
    },
    {"models"},
    {"evaluation"},
    {"train"},
    {"cli", "terminal", "__main__"},
]


def package_imports(path: Path) -> set[str]:
    """Top-level modules of the package that a file imports, at whatever depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "mage_ext":
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mage_ext."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found.update(alias.name.split(".")[1] for alias in node.names if alias.name.startswith("mage_ext."))
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{name(path)} has a relative import"
    return found


def test_python_imports_point_one_way():
    rank = {module: index for index, group in enumerate(PYTHON_LAYERS) for module in group}
    wrong = []
    for path in sources("python/mage_ext", {".py"}):
        module = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if module in ("__init__", "testing"):
            continue
        assert module in rank, f"{name(path)} has no layer: give it one in PYTHON_LAYERS"
        for imported in package_imports(path) - {"__version__"}:
            if imported == "reference" or imported == "testing" or rank.get(imported, -1) > rank[module]:
                wrong.append(f"{name(path)} imports {imported}")
    assert not wrong


def test_benches_and_tests_do_not_use_the_private_module():
    wrong = [
        name(path)
        for folder in ("bench", "tests/python")
        for path in sources(folder, {".py"})
        if "_C" in package_imports(path) and path != Path(__file__).resolve()
    ]
    assert not wrong


# --- ops: one stem, one signature -----------------------------------------------------------------------------------


def op_names() -> list[str]:
    text = (ROOT / "csrc/torch/registration.cpp").read_text()
    names = re.findall(r'm\.def\(\s*"(\w+)\(', text)
    return [op for op in names if op not in HOST_OPS]


STEMS = [op for op in op_names() if not op.endswith(("_out", "_workspace"))]


@pytest.mark.parametrize("stem", STEMS)
def test_each_op_has_one_stem_everywhere(stem):
    expected = [f"include/mage/{stem}.h", f"csrc/cpu/{stem}.cpp", f"csrc/torch/{stem}.cpp"]
    expected += [f"tests/cpp/test_{stem}.cpp", f"tests/python/test_{stem}.py"]
    assert [path for path in expected if not (ROOT / path).exists()] == []
    assert callable(getattr(ops, stem))
    tree = ast.parse((PACKAGE / "reference.py").read_text())
    assert stem in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("op", op_names())
def test_python_signature_is_that_of_the_schema(op):
    """Names, order, defaults and what is keyword-only: stated in the schema, mirrored in ops.py."""
    schema = getattr(torch.ops.mage, op).default._schema
    parameters = inspect.signature(getattr(ops, op)).parameters.values()
    no_default = inspect.Parameter.empty
    actual = [(p.name, p.kind is p.KEYWORD_ONLY, p.default) for p in parameters]
    expected = [
        (a.name, a.kwarg_only, a.default_value if a.has_default_value() else no_default) for a in schema.arguments
    ]
    assert actual == expected


@pytest.mark.parametrize("op", STEMS)
def test_docstring_names_every_argument(op):
    function = getattr(ops, op)
    text = inspect.getdoc(function)
    assert [name for name in inspect.signature(function).parameters if not re.search(rf"\b{name}\b", text)] == []


@pytest.mark.parametrize("op", [op for op in op_names() if not op.endswith("_workspace")])
def test_op_without_cuda_kernel_names_itself(op):
    """What a CUDA tensor meets in a build without CUDA kernels: an error with the op's name, from the dispatcher."""
    overload = getattr(torch.ops.mage, op).default
    if torch._C._dispatch_has_kernel_for_dispatch_key(overload.name(), "CUDA"):
        pytest.skip("this build has a CUDA kernel for it")
    arguments, keywords = [], {}
    for argument in overload._schema.arguments:
        kind = str(argument.type)
        value = {"Tensor": torch.zeros(1), "List[Tensor]": [torch.zeros(1)], "int": 1}.get(kind)
        if argument.has_default_value():
            continue
        (keywords.__setitem__(argument.name, value) if argument.kwarg_only else arguments.append(value))
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(NotImplementedError, match=f"mage::{op}'.*CUDA"):
        overload.redispatch(keys, *arguments, **keywords)


# --- what importing does --------------------------------------------------------------------------------------------


def run_python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_initialises_no_device_and_needs_no_module():
    code = """
import sys
sys.modules["mage_ext._C"] = None  # as where it could not be built
import torch, mage_ext
from mage_ext import ops
assert not torch.cuda.is_initialized()
assert not {"transformers", "tokenizers", "nvtx"} & set(sys.modules), sorted(sys.modules)
k = torch.ones(1, 1, 1, 8); cache = torch.zeros(1, 16, 1, 8); table = torch.zeros(1, 1, dtype=torch.int32)
torch.ops.mage.append_kv(k, k, cache, cache.clone(), table, torch.zeros(1, dtype=torch.int32))
print(int(cache.sum()))
"""
    assert run_python(code).split() == ["8"]


def test_threads_follow_torch():
    code = """
import torch, mage_ext
torch.set_num_threads(1)
torch.ops.mage.set_num_threads(3)
torch.ops.mage.set_num_threads(0)
try:
    torch.ops.mage.set_num_threads(-1)
except RuntimeError as error:
    print(error)
"""
    assert "set_num_threads: n must be in [0, 2^31), got -1" in run_python(code)


def test_forced_instruction_set_is_checked():
    code = "import mage_ext; from mage_ext import _C; print(_C.build_facts()['cpu_isa'])"
    pytest.importorskip("mage_ext._C")
    assert run_python(code, MAGE_CPU_ISA="baseline").split() == ["baseline"]
    with pytest.raises(
        AssertionError, match="MAGE_CPU_ISA: the instruction set must be baseline, avx2 or avx512, got sse9"
    ):
        run_python(code, MAGE_CPU_ISA="sse9")


def test_module_facts_agree_with_the_build():
    module = pytest.importorskip("mage_ext._C")
    from mage_ext import _build_info

    facts = module.build_facts()
    assert facts["version"] == _build_info.VERSION == mage_ext.__version__
    assert (facts["torch"], facts["cuda"], facts["compiler"]) == (
        _build_info.TORCH,
        _build_info.CUDA,
        _build_info.COMPILER,
    )
    variants = module.variants()
    assert facts["cpu_isa"] in variants["cpu"] and "baseline" in variants["cpu"]
    if facts["cuda"] is None:
        assert variants["cuda"] == [] and not hasattr(module, "kernel_infos")
    else:
        assert "mage_append_kv_kernel" in variants["cuda"]
        plan = module.append_kv_plan(batch=3, q_len=33, num_kv_heads=4, head_dim=128, element_bytes=2)
        assert plan == {"grid": (27, 1, 1), "block": (256, 1, 1), "shared_bytes": 0}


def test_info_prints_what_a_report_needs(capsys):
    assert cli.main(["info"]) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["mage_ext"] == mage_ext.__version__
    assert lines["library mage_ops"] == "loaded"
    assert lines["torch"].startswith(torch.__version__)
    assert {"build", "library mage_ops_cuda", "python", "processor", "nvcc", "packages", "environment"} <= set(lines)


# --- the tree -------------------------------------------------------------------------------------------------------


def test_top_level_folders():
    folders = {path.relative_to(ROOT).parts[0] for path in tracked_files() if len(path.relative_to(ROOT).parts) > 1}
    allowed = {"csrc", "include", "python", "tests", "bench", "third_party"}
    assert {folder for folder in folders if not folder.startswith(".")} <= allowed


def test_tree_and_history_are_small():
    assert sum(path.stat().st_size for path in tracked_files()) < 40 * 2**20
    history = ["git", "-C", str(ROOT), "rev-list", "--objects", "HEAD"]
    objects = subprocess.run(history, capture_output=True, check=False)
    if objects.returncode != 0:
        pytest.skip("a checkout without commits")
    names = b"\n".join(line.split(b" ")[0] for line in objects.stdout.splitlines())
    command = ["git", "-C", str(ROOT), "cat-file", "--batch-check=%(objectsize:disk)"]
    sizes = subprocess.run(command, input=names, capture_output=True, check=True).stdout
    assert sum(int(size) for size in sizes.split()) < 40 * 2**20


def test_no_machine_paths_nor_registry_hosts():
    pattern = re.compile(
        rb"/(work|root|opt/wheels|tmp/\w)[/\w]|pypi\.org|pythonhosted|download\.pytorch|deb\.debian|huggingface\.co/"
    )
    text = {".py", ".h", ".cpp", ".cu", ".cuh", ".md", ".toml", ".txt", ".json", "", ".cmake"}
    wrong = [
        name(path)
        for path in tracked_files()
        if path.suffix in text and path != Path(__file__).resolve() and pattern.search(path.read_bytes())
    ]
    assert not wrong


# --- setup and preparation: what a machine decides, with the machine faked --------------------------------------------


def load(path: str):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_jobs_respect_max_jobs_and_memory(monkeypatch):
    pytest.importorskip("setuptools")
    setup = load("setup.py")
    monkeypatch.setenv("MAX_JOBS", "3")
    assert setup.max_jobs() == 3
    monkeypatch.delenv("MAX_JOBS")
    assert 1 <= setup.max_jobs() <= len(os.sched_getaffinity(0))
    assert setup._torch_requirement() == []  # torch is here, so that an isolated build does not fetch another


@pytest.fixture
def prepare(monkeypatch):
    module = load(".ci/prepare.py")
    for variable in ("TORCH", "CUDA", "NO_CPP", "CUDACXX", "CUDA_HOME", "MAGE_CMAKE_ARGS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(module.os, "geteuid", lambda: 1000)
    return module


def test_prepare_prints_one_apt_line(prepare, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "compiles", lambda *_: False)
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: None if name == "ensurepip" else object())
    monkeypatch.setattr(prepare.sysconfig, "get_paths", lambda: {"include": "/nowhere"})
    with pytest.raises(SystemExit):
        prepare.check_machine("test", 0)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "apt-get" in line] == [
        "    sudo apt-get install -y python3-venv python3-dev g++ libgtest-dev"
    ]


def test_prepare_goes_on_without_googletest_alone(prepare, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "compiles", lambda source, *_: "gtest" not in source)
    monkeypatch.setattr(prepare.sysconfig, "get_paths", lambda: {"include": str(ROOT)})
    monkeypatch.setattr(prepare.Path, "exists", lambda path: True)
    monkeypatch.setattr(prepare.Path, "glob", lambda path, pattern: [])
    prepare.check_machine("test", 0)
    assert "sudo apt-get install -y libgtest-dev" in capsys.readouterr().out
    monkeypatch.setenv("NO_CPP", "1")
    prepare.check_machine("test", 0)
    assert "apt-get" not in capsys.readouterr().out
    monkeypatch.delenv("NO_CPP")
    with pytest.raises(SystemExit):
        prepare.check_machine("test-cpp", 0)


def test_prepare_refuses_a_full_disk(prepare, monkeypatch):
    monkeypatch.setattr(prepare, "compiles", lambda *_: True)
    with pytest.raises(SystemExit, match=r"at least 9999999 GiB must be free on the disk of"):
        prepare.check_machine("build", 9999999)


CUDA_CASES = {  # Hoppers, others, nvcc on PATH, CUDA=, what is said, what is installed
    "nothing": ([], [], None, "", "no nvcc: CPU-only build", None),
    "nvcc": ([], [], "/usr/bin/nvcc", "", "nvcc found (/usr/bin/nvcc): the CUDA library is built for sm_90a", None),
    "hopper": (["H100"], [], "/usr/bin/nvcc", "", "nvcc found (/usr/bin/nvcc)", None),
    "hopper_without_nvcc": (
        ["H100"],
        [],
        None,
        "",
        "python -m pip install 'nvidia-cuda-nvcc==13.0.*' 'nvidia-cuda-r",
        None,
    ),
    "hopper_with_pip": (["H100"], [], None, "pip", "nvcc comes from pip", "nvidia-cuda-nvcc==13.0.*"),
    "other_gpu": ([], ["RTX 4090"], None, "", "RTX 4090 is not a Hopper GPU", None),
    "off": ([], [], "/usr/bin/nvcc", "off", "CUDA=off: CPU-only build", None),
}


@pytest.mark.parametrize("case", CUDA_CASES)
def test_prepare_chooses_nvcc(prepare, monkeypatch, capsys, case):
    hoppers, others, nvcc, cuda, said, installed = CUDA_CASES[case]
    requirements = []
    monkeypatch.setenv("CUDA", cuda)
    monkeypatch.setattr(prepare.shutil, "which", lambda program: nvcc if program == "nvcc" else None)
    monkeypatch.setattr(prepare, "output", lambda *command: "13.0" if "torch" in command[-1] else "/nowhere")
    monkeypatch.setattr(prepare, "pip_install", lambda *names: requirements.extend(names))
    prepare.choose_nvcc(hoppers, others)
    assert said in capsys.readouterr().out
    assert requirements[:1] == ([installed] if installed else [])


# --- C++ tests in several processes, GoogleTest and compute-sanitizer faked -------------------------------------------

FAKE_TESTS = r"""#!/usr/bin/env python3
import json, os, sys, time
options = dict(argument.split("=", 1) for argument in sys.argv[1:])
names = ["Suite.quick", "Suite.other", "Suite.warns", "Suite.slow"]
if "--gtest_filter" in options:
    names = [name for name in names if name in options["--gtest_filter"].split(":")]
shards, own = int(os.environ.get("GTEST_TOTAL_SHARDS", 1)), int(os.environ.get("GTEST_SHARD_INDEX", 0))
names = names[own::shards]
broken = os.environ.get("FAKE_BROKEN", "")
tests = []
for name in names:
    if os.environ.get("FAKE_CRASH") == name:
        print("in the middle of", name, flush=True)
        os.abort()
    result = {"name": name.split(".")[1], "status": "RUN", "result": "COMPLETED", "time": "0.001s"}
    if name == "Suite.slow":
        result["time"] = "9s"
        time.sleep(float(os.environ.get("FAKE_SLEEP", 0)))
    tests.append(result | ({"failures": [{"failure": "1 is not 2"}]} if name == broken else {}))
if "--gtest_output" in options:
    with open(options["--gtest_output"].removeprefix("json:"), "w") as file:
        json.dump({"testsuites": [{"name": "Suite", "testsuite": tests}]}, file)
sys.exit(broken in names)
"""
FAKE_TOOL = r"""#!/usr/bin/env python3
import os, subprocess, sys
command = sys.argv[sys.argv.index("9") + 1 :]
status = subprocess.run(command, env=os.environ | {"FAKE_SLEEP": os.environ.get("FAKE_SLEEP_UNDER", "0")}).returncode
warnings = int("Suite.warns" in command[-1] and "FAKE_WARNS" in os.environ)
print("device", os.environ.get("CUDA_VISIBLE_DEVICES"))
if "FAKE_SKIPS" not in os.environ:
    print(f"[  PASSED  ] {command[-1].count(':') + 1} tests.")
print(f"========= RACECHECK SUMMARY: {warnings} hazards displayed (0 errors, {warnings} warnings)")
sys.exit(status)
"""


@pytest.fixture
def cpp_tests(tmp_path, monkeypatch):
    module = load(".ci/cpp_tests.py")
    for name, text in (("tests", FAKE_TESTS), ("compute-sanitizer", FAKE_TOOL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "BATCH_TESTS", 1)
    monkeypatch.setattr(module, "RACECHECK_TESTS", 1)
    return module, tmp_path / "tests"


def test_cpp_tests_add_up_over_processes(cpp_tests, monkeypatch, capsys):
    module, binary = cpp_tests
    assert module.run_plain(binary, 3, []) == 0
    assert "4 passed, 0 failed, 0 skipped" in capsys.readouterr().out
    monkeypatch.setenv("FAKE_BROKEN", "Suite.other")
    assert module.run_plain(binary, 3, []) == 1
    out = capsys.readouterr().out
    assert "Suite.other\n1 is not 2" in out and "3 passed, 1 failed" in out
    monkeypatch.setenv("FAKE_CRASH", "Suite.warns")
    assert module.run_plain(binary, 3, []) == 1
    out = capsys.readouterr().out
    assert "in the middle of Suite.warns" in out and "status -6" in out


def test_cpp_tests_under_a_tool_go_on_where_they_stood(cpp_tests, monkeypatch, capsys):
    module, binary = cpp_tests
    monkeypatch.setenv("FAKE_SLEEP_UNDER", "60")
    monkeypatch.setenv("FAKE_WARNS", "1")
    assert module.run_under("racecheck", binary, 2, 6.0, []) == 1
    out = capsys.readouterr().out
    assert "racecheck reports, in one of Suite.warns" in out and "(0 errors, 1 warnings)" in out
    assert "racecheck: 2 tests clean, 1 in batches with reports, 1 not run" in out
    monkeypatch.setenv("FAKE_SLEEP_UNDER", "0")
    monkeypatch.delenv("FAKE_WARNS")
    state = module.ROOT / "build" / "sanitize" / "racecheck.txt"
    assert len(state.read_text().split()) == 3
    assert module.run_under("racecheck", binary, 2, float("inf"), []) == 0
    assert "racecheck: 4 tests clean, 0 in batches with reports, 0 not run" in capsys.readouterr().out
    assert len(state.read_text().split()) == 5  # those that were clean did not run again
    binary.write_text(binary.read_text() + "\n")  # another binary: nothing is known of it
    monkeypatch.setenv("FAKE_WARNS", "1")
    assert module.run_under("racecheck", binary, 2, float("inf"), []) == 1
    assert "racecheck: 3 tests clean, 1 in batches with reports, 0 not run" in capsys.readouterr().out
    monkeypatch.setenv("FAKE_SKIPS", "1")  # a test that does not run under the tool is not clean
    assert module.run_under("synccheck", binary, 2, float("inf"), []) == 1
    assert "synccheck: 0 tests clean, 4 in batches with reports, 0 not run" in capsys.readouterr().out


def test_cpp_tests_share_the_gpus(cpp_tests, monkeypatch):
    module, binary = cpp_tests
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    monkeypatch.setenv("FAKE_SLEEP_UNDER", "1")
    assert module.run_under("memcheck", binary, 2, float("inf"), []) == 0
    logs = [log.read_text() for log in (module.ROOT / "build" / "sanitize" / "memcheck").iterdir()]
    assert {re.search("device (.*)", log)[1] for log in logs} == {"3", "GPU-5"}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    smi = binary.parent / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\necho 'GPU 1: NVIDIA H100 (UUID: GPU-2)'\n")
    smi.chmod(0o755)
    assert module.visible_gpus() == ["0", "1"]
