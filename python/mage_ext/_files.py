"""Files that appear whole or not at all. Test: pytest tests/python/test_files.py"""

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from safetensors import torch as safetensors
from torch import Tensor


def _part_of(path: Path) -> Path:
    """A name beside `path`, short where that is as long as names can be."""
    return path.with_name(f"{path.name[:40]}.{os.getpid()}.{threading.get_ident()}.part")


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
    part = _part_of(path)
    try:
        yield part
        part.replace(path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def save_tensors(path: str | os.PathLike, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file as `replacing` does, which others may read as they may other new files."""
    with replacing(path) as part:
        if part.exists():  # it is written in place: the library would put a file of its own there
            part.write_bytes(safetensors.save(tensors, metadata))
            return
        part.touch()
        mode = part.stat().st_mode
        safetensors.save_file(tensors, str(part), metadata)
        part.chmod(mode)


def check_writable(path: str | os.PathLike) -> None:
    """Raises OSError where `replacing` could not write, before what is to be written is there."""
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    os.stat(os.path.dirname(os.path.realpath(path)))
    with contextlib.suppress(FileNotFoundError):
        os.stat(path)  # a name that is too long
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    if not os.path.exists(path) or os.path.isfile(path):
        part = _part_of(Path(os.path.realpath(path)))
        part.touch()
        part.unlink()


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text as UTF-8, as `replacing` does."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")
