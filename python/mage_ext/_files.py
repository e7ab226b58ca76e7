"""Files that appear whole or not at all. Test: pytest tests/python/test_files.py"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A name beside `path` to write to; when the block ends, that file takes the place of `path`. Who reads `path`
    meanwhile, or after the process was killed, finds the earlier file; a block that raises leaves it, too.

    What exists and is no file, such as /dev/stdout, is written in place. A link stays, the file that it names changes.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        yield path
        return
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text as UTF-8, as `replacing` does."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")
