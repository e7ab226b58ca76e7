"""NVTX ranges of a generation in domain "mage": generate > prefill | block > step:kind > layer > op.

They are off until `enable` is called and cost one test of a boolean then. A replayed graph has the ranges of its step,
not of the layers and ops in it: those are seen with `DenoiseConfig(cuda_graphs=False)`.

Test: pytest tests/python/test_profiling.py
"""

import contextlib
from collections.abc import Iterator
from types import ModuleType

_nvtx: ModuleType | None = None
_NOTHING = contextlib.nullcontext()


def enable(on: bool = True) -> None:
    """Switches the ranges on or off, for the whole process.

    Raises:
        ModuleNotFoundError: the package nvtx is not installed.
    """
    global _nvtx
    if on:
        import nvtx

        _nvtx = nvtx
    else:
        _nvtx = None


def span(name: str) -> contextlib.AbstractContextManager[object]:
    """A range called `name` around a with block."""
    return _NOTHING if _nvtx is None else _nvtx.annotate(name, domain="mage")


@contextlib.contextmanager
def enabled() -> Iterator[None]:
    """Ranges are on within a with block."""
    before = _nvtx is not None
    enable()
    try:
        yield
    finally:
        enable(before)
