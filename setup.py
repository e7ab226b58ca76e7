"""Builds the libraries with CMake. Everything else about the package is in pyproject.toml.

This file is also the build backend named there: it is setuptools', except that torch is a build requirement only where
the environment that is installed into has none. Headers are all that is needed of it, and the stable ABI makes the
result serve every torch >= 2.11, so the copy that is already there will do, also for an isolated build.

Environment: CUDA=off builds no kernels, also where nvcc is; MAX_JOBS limits parallel compilers; MAGE_CMAKE_ARGS is
handed to CMake.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools.build_meta
from setuptools import Extension, setup
from setuptools.build_meta import *  # noqa: F403  (the hooks that are not replaced below)
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARIES = ["libmage_ops.so", "libmage_ops_cuda.so", "_C" + sysconfig.get_config_var("EXT_SUFFIX"), "_build_info.py"]


def _torch_requirement() -> list[str]:
    installed = Path(sysconfig.get_paths()["purelib"]) / "torch" / "include"
    return [] if installed.exists() or importlib.util.find_spec("torch") else ["torch>=2.11"]


def get_requires_for_build_wheel(config_settings=None):
    return setuptools.build_meta.get_requires_for_build_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings=None):
    return setuptools.build_meta.get_requires_for_build_editable(config_settings) + _torch_requirement()


def max_jobs() -> int:
    """Parallel compilers: MAX_JOBS, else one per core and per 2 GiB of free memory."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    cores = len(os.sched_getaffinity(0))
    free_gib = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        free_gib = int(fields["MemAvailable"].split()[0]) / 2**20
    return max(1, min(cores, int(free_gib / 2)))


def tool(name: str) -> str | None:
    """A build tool: the one of the Python package of that name, else the one on PATH."""
    if importlib.util.find_spec(name):
        folder = getattr(__import__(name), {"cmake": "CMAKE_BIN_DIR", "ninja": "BIN_DIR"}[name], None)
        if folder and (Path(folder) / name).exists():
            return str(Path(folder) / name)
    return shutil.which(name)


def cuda_compiler() -> Path | None:
    """nvcc: $CUDACXX, the one on PATH, $CUDA_HOME's, the usual place's, or that of the nvidia-cuda-nvcc wheel."""
    wheel = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13"
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", wheel]
    places = [os.environ.get("CUDACXX"), shutil.which("nvcc"), *(Path(h) / "bin" / "nvcc" for h in homes if h)]
    return next((Path(place) for place in places if place and Path(place).exists()), None)


class CleanBuild(build):
    """Forgets the Python files of earlier builds, which setuptools would pack again after they are gone."""

    def run(self):
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Configures and builds in a folder that is kept, then puts the libraries beside the Python files."""

    def run(self):
        cmake, ninja = tool("cmake"), tool("ninja")
        if cmake is None:
            raise SystemExit("mage_ext: cmake must be installed (pip install cmake), found none")
        folder = ROOT / "build" / sys.implementation.cache_tag
        settings = {
            "CMAKE_GENERATOR": "Ninja" if ninja else "Unix Makefiles",
            "CMAKE_HOME_DIRECTORY": ROOT,
            "CMAKE_CUDA_COMPILER": None if os.environ.get("CUDA") == "off" else cuda_compiler(),
            "MAGE_PYTHON": sys.executable,
            "MAGE_OUTPUT_DIR": folder / "mage_ext",
            "MAGE_TESTS": "OFF",
        }
        environment = dict(os.environ)
        configure = [cmake, "-S", str(ROOT), "-B", str(folder), "-G", settings["CMAKE_GENERATOR"]]
        configure += [f"-D{name}={settings[name]}" for name in ("MAGE_PYTHON", "MAGE_OUTPUT_DIR", "MAGE_TESTS")]
        if nvcc := settings["CMAKE_CUDA_COMPILER"]:
            configure += [f"-DCMAKE_CUDA_COMPILER={nvcc}", "-DMAGE_CUDA=ON"]
            # The wheel's nvcc looks for its own libraries in lib64, but they lie in lib.
            environment["CUDAFLAGS"] = f"{environment.get('CUDAFLAGS', '')} -L{nvcc.parent.parent / 'lib'}".strip()
        else:
            configure.append("-DMAGE_CUDA=OFF")
        if ninja:
            configure.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        if self._is_foreign(folder / "CMakeCache.txt", settings):
            configure.append("--fresh")
        configure += shlex.split(os.environ.get("MAGE_CMAKE_ARGS", ""))
        subprocess.run(configure, check=True, env=environment)
        subprocess.run([cmake, "--build", str(folder), "-j", str(max_jobs())], check=True)
        target_folder = self._target_folder()
        target_folder.mkdir(parents=True, exist_ok=True)
        for name in LIBRARIES:
            # Also those that this build lacks; and a process that has the old file mapped keeps it.
            (target_folder / name).unlink(missing_ok=True)
        for source, target in self.get_output_mapping().items():
            shutil.copy2(source, target)

    def _is_foreign(self, cache: Path, settings: dict) -> bool:
        """Whether the kept folder was made by another generator or nvcc, or for another place of the tree."""
        if not cache.exists():
            return False
        lines = [line for line in cache.read_text().splitlines() if ":" in line and "=" in line]
        kept = {line.split(":", 1)[0]: line.split("=", 1)[1] for line in lines}
        fixed = ("CMAKE_GENERATOR", "CMAKE_HOME_DIRECTORY", "CMAKE_CUDA_COMPILER")
        return any(kept.get(name, "") != str(settings[name] or "") for name in fixed)

    def _target_folder(self) -> Path:
        return ROOT / "python" / "mage_ext" if self.inplace else Path(self.build_lib) / "mage_ext"

    def get_output_mapping(self):
        built = ROOT / "build" / sys.implementation.cache_tag / "mage_ext"
        return {str(built / n): str(self._target_folder() / n) for n in LIBRARIES if (built / n).exists()}

    def get_outputs(self):
        return list(self.get_output_mapping().values())


if __name__ == "__main__":
    setup(ext_modules=[Extension("mage_ext._C", [])], cmdclass={"build": CleanBuild, "build_ext": CMakeBuild})
