"""Loads the operator libraries into torch. Knows files and versions; knows nothing of what the operators do."""

from pathlib import Path

import torch

_FOLDER = Path(__file__).parent
_MIN_TORCH = (2, 11)
_loaded: dict[str, str] = {}


def load() -> dict[str, str]:
    """Loads `libmage_ops` and, where this torch can use it, `libmage_ops_cuda`. Later calls do nothing.

    Does not initialise CUDA.

    Returns:
        State of each library by name: "loaded", or why it is not.

    Raises:
        ImportError: torch is too old, or the operators were never built.
    """
    if _loaded:
        return _loaded
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < _MIN_TORCH:
        raise ImportError(f"mage_ext: torch must be 2.11 or newer, got {torch.__version__}")
    ops = _FOLDER / "libmage_ops.so"
    if not ops.exists():
        raise ImportError(
            f"mage_ext: {ops.name} must be in {_FOLDER}, found none; `pip install -e .` in the source tree builds it"
        )
    torch.ops.load_library(str(ops))
    _loaded["mage_ops"] = "loaded"
    _loaded["mage_ops_cuda"] = _load_cuda(_FOLDER / "libmage_ops_cuda.so")
    return _loaded


def _load_cuda(path: Path) -> str:
    if not path.exists():
        return "not built"
    if torch.version.cuda is None:
        return "not loaded: this torch has no CUDA"
    from mage_ext import _build_info

    if (_build_info.CUDA or "none").split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"not loaded: built with CUDA {_build_info.CUDA}, this torch has CUDA {torch.version.cuda}"
    torch.ops.load_library(str(path))
    return "loaded"
