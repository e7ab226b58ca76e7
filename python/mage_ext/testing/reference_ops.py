"""Runs anything that calls `mage_ext.ops` on the slow twins instead, on purpose and for a while.

Test: pytest tests/python/test_denoise.py
"""

import contextlib
from collections.abc import Iterator

from mage_ext import ops, reference


@contextlib.contextmanager
def use_reference(*names: str) -> Iterator[None]:
    """Within it, mage_ext.ops.<name> is mage_ext.reference.<name>.

    Args:
        names: ops to replace; none given: every op that has a twin.
    Notes:
        It replaces the functions of the module, so callers that imported a function itself keep theirs. Not for
        threads.
    """
    chosen = names or [
        name for name in vars(reference) if not name.startswith("_") and callable(getattr(ops, name, None))
    ]
    saved = {name: getattr(ops, name) for name in chosen}
    try:
        for name in chosen:
            setattr(ops, name, getattr(reference, name))
        yield
    finally:
        for name, function in saved.items():
            setattr(ops, name, function)
