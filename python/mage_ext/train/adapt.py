"""How the shipped model is made: the built-in base, given texts, and a curriculum of context lengths.

"short": the base learns to denoise and to look facts up in 512 tokens first; when 90 % of the held-out answers are
found there, the rest of the time goes to 2048 tokens. "long" goes on from such an adapter to all of the base's 8192
positions, with registers of lines beside prose. `mage train adapter` runs this; the Trainer does the work. Made for one
GPU: a CPU takes hours for what it does in minutes, and serves for checking a change.

Test: pytest tests/python/test_train.py
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from mage_ext.evaluation import tasks
from mage_ext.models import builtin
from mage_ext.train.data import Corpus
from mage_ext.train.packing import Layout
from mage_ext.train.trainer import Stage, TrainConfig, Trainer

MAX_WORKERS = 12


def curriculum(rows: int = 8) -> list[Stage]:
    """The stages of the shipped model; 8 rows per step take 25 GiB of GPU memory."""
    return [
        Stage(Layout(trunk=512, branches=16, trunk_blocks=4), rows, gate=0.9, min_steps=200, max_steps=2000),
        Stage(Layout(trunk=2048, branches=12, trunk_blocks=6), rows, gate=None),
    ]


def long_curriculum(rows: int = 8) -> list[Stage]:
    """2048, 4096 and 8064 tokens for 20, 28 and 52 % of the time; about as many packed tokens per step in each."""
    return [
        Stage(Layout(trunk=2048, branches=16), rows, until=0.2),
        Stage(Layout(trunk=4096, branches=16), max(1, rows * 3 // 4), until=0.48),
        Stage(Layout(trunk=8064, branches=24), max(1, rows // 2)),
    ]


# Stages, and settings that differ from TrainConfig's. Gates take seconds: "long" has them at the end of a stage only.
CURRICULA = {
    "short": (curriculum, {}),
    "long": (long_curriculum, {"registers": 0.4, "eval_every": 10**6, "eval_batches": 1, "save_every_s": 75.0}),
}


def train_adapter(
    texts: Sequence[str | Path],
    out: str | Path,
    minutes: float,
    device: str = "cuda",
    rank: int = 32,
    lr: float = 1e-3,
    resume: str | Path | None = None,
    rows: int = 8,
    workers: int | None = None,
    base: str | Path | None = None,
    seed: int = 0,
    curriculum: str = "short",
) -> bool:
    """Trains an adapter for `minutes` and leaves adapter-int8.safetensors, adapter.safetensors and log.jsonl in `out`.

    Args:
        texts: files of prose, see tasks.read_texts; every tenth text by name is held out for the gates. With fewer than
            ten the gates use the project's own prose.
        out: folder, made if needed. minutes: of training, compilation included.
        device: "cuda" or "cpu". rank, lr, seed: see TrainConfig. rows: per step.
        resume: adapter file to start from. workers: processes that make rows; None: from the number of cores.
        base: a GGUF file; None: the installed one. curriculum: of CURRICULA.
    Returns:
        Whether the last measured gate held.
    Raises:
        ValueError, FileNotFoundError: naming the argument; nothing is written then.
    """
    if device not in ("cuda", "cpu"):
        raise ValueError(f"train: device must be cuda or cpu, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("train: device must be cpu on a machine without a CUDA GPU, got 'cuda'")
    if rows < 1:
        raise ValueError(f"train: rows must be at least 1, got {rows}")
    if workers is None:
        workers = 0 if device == "cpu" else max(1, min(MAX_WORKERS, (os.cpu_count() or 2) - 2))
    if curriculum not in CURRICULA:
        raise ValueError(f"train: curriculum must be one of {', '.join(CURRICULA)}, got {curriculum!r}")
    stages, settings = CURRICULA[curriculum]
    run = TrainConfig(minutes=minutes, rank=rank, lr=lr, seed=seed, workers=workers, **settings)
    if Path(out).exists() and not Path(out).is_dir():
        raise ValueError(f"train: out must be a folder, got the file {str(out)!r}")
    train, held_out = tasks.held_out_texts(tasks.read_texts(texts))
    if not train:
        raise ValueError("train: text must name at least one file with a text, got none")
    _, model, tokenizer = builtin.load_base(base)
    corpora = Corpus.build(train, tokenizer), Corpus.build(held_out, tokenizer) if held_out else None
    print(f"{len(train)} texts to train on ({len(corpora[0].tokens)} tokens), {len(held_out)} held out", flush=True)
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
    trainer = Trainer(model, run, out, Path(base).name if base else builtin.BASE_NAME, device, resume)
    return trainer.run(stages(rows), tokenizer, *corpora)
