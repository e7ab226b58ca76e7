"""Files that appear whole or not at all. Run: pytest tests/python/test_files.py"""

import os
import threading
from types import SimpleNamespace

import pytest
import torch

from mage_ext._files import replacing, write_text
from mage_ext.evaluation import benchmark_files, figures, needles, pages
from mage_ext.models.adapter import save_adapter
from mage_ext.selection import BlockSelection, SelectionConfig, select

ROW = {"task": "t", "method": "exact", "K": 0, "g": 0, "n": 1, "score": 1.0}
ITEM = SimpleNamespace(source={"index": 0})
LISTS = select(torch.rand(1, 1, 1, 8), torch.tensor([8], dtype=torch.int32), SelectionConfig(k=4, g=1))


def test_the_earlier_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    for earlier in (None, "before"):
        if earlier is not None:
            path.write_text(earlier)
        with pytest.raises(RuntimeError, match="in the middle"), replacing(path) as part:
            part.write_text("half")
            assert (path.read_text() if path.exists() else None) == earlier
            raise RuntimeError("in the middle")
        assert (path.read_text() if path.exists() else None) == earlier
    with replacing(path) as part:
        part.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after" and os.listdir(tmp_path) == ["a.txt"]


def test_links_stay_and_what_is_no_file_is_written_in_place(tmp_path):
    (tmp_path / "folder").mkdir()
    path, link = tmp_path / "folder" / "a.txt", tmp_path / "link"
    path.write_text("before")
    link.symlink_to(path)
    write_text(link, "\u00e4fter")
    assert link.is_symlink() and path.read_text(encoding="utf-8") == "\u00e4fter"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(pipe, "text")
    assert os.read(reader, 9) == b"text" and pipe.is_fifo()
    os.close(reader)
    with pytest.raises(IsADirectoryError):
        write_text(tmp_path / "folder", "text")
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "none" / "a.txt", "text")


def _answers(path):
    outcome = benchmark_files.Outcome(["x"], [1.0], [1.0], [1])
    benchmark_files.keeper(path.parent.parent)(path.stem, path.parent.name, [ITEM], outcome)


def _figure(path):
    pytest.importorskip("matplotlib")
    figures.save(figures.panels(1, 1)[0], path)


WRITERS = {
    "rows": lambda path: needles.write_rows(path, "eval/needles", "tiny", "cpu", "abc", [ROW]),
    "page": lambda path: pages.write_page(path, "text"),
    "answers": _answers,
    "figure": _figure,
    "adapter": lambda path: save_adapter(path, {"mask_row": torch.ones(4)}, base="tiny.gguf"),
    "lists": LISTS.save,
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_tensors_go_into_a_pipe_and_a_new_file_is_as_others_are(tmp_path):
    fifo, path = tmp_path / "pipe", tmp_path / "lists"
    os.mkfifo(fifo)
    read = []
    reader = threading.Thread(target=lambda: read.append(fifo.read_bytes()))
    reader.start()
    LISTS.save(fifo)
    reader.join()
    assert fifo.is_fifo()
    path.write_bytes(read[0])
    assert torch.equal(BlockSelection.load(path).indices, LISTS.indices)
    path.unlink()
    LISTS.save(path)
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("name", WRITERS)
def test_a_writer_that_is_stopped_leaves_the_earlier_file(name, tmp_path, monkeypatch):
    path = tmp_path / "folder" / "file.jsonl"
    path.parent.mkdir()
    WRITERS[name](path)
    before = path.read_bytes()
    path.write_bytes(before + b"earlier")

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            WRITERS[name](path)
    assert path.read_bytes() == before + b"earlier" and os.listdir(path.parent) == ["file.jsonl"]
    WRITERS[name](path)
    assert path.stat().st_size == len(before) and os.listdir(path.parent) == ["file.jsonl"]
