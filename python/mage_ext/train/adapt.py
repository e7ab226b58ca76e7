"""How the shipped models are made: the built-in base, given texts, and a curriculum of context lengths.

"short": the base learns to denoise and to look facts up in 512 tokens first; when 90 % of the held-out answers are
found there, the rest of the time goes to 2048 tokens. "long" goes on from such an adapter to all of the base's 8192
positions, with registers of lines beside prose. "cut" keeps 16 of the base's 30 layers, takes over what an adapter of
the whole base knows about them, and goes from 512 to 16384 positions, with variables and lists of words too. `mage
train adapter` runs this; the Trainer does the work. Made for one GPU: a CPU takes hours for what it does in minutes,
and serves for checking a change.

Test: pytest tests/python/test_train.py
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mage_ext.evaluation import tasks
from mage_ext.models import builtin
from mage_ext.models.config import Cut
from mage_ext.train.data import Corpus
from mage_ext.train.packing import Layout
from mage_ext.train.trainer import Stage, TrainConfig, Trainer

MAX_WORKERS = 12


def curriculum(rows: int = 8) -> list[Stage]:
    """The stages of the first run of smollm2-135m-block; 8 rows per step take 25 GiB of GPU memory."""
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


# The layers that the losses of the adapted base miss least went first: ten in two rounds of five, then four one by one.
# theta keeps the slowest rotary angle of position 16384 below that of 8192 in the base: theta^(62/64) / 16384 is above
# 100000^(62/64) / 8192 from theta = 205000 on.
CUT = Cut(layers=(0, 1, 2, 8, 9, 10, 11, 14, 15, 16, 19, 20, 23, 24, 28, 29), rope_theta=250000.0, max_positions=16384)


def cut_curriculum(rows: int = 8) -> list[Stage]:
    """512 (until 80 % of held-out answers are found; missed, the run ends), 2048, 8064 and 16256 tokens.

    Half of the blocks of a trunk of 512 are noised: their loss is what joins the layers again. A next-token loss on the
    clean text can't do it, since a clean block sees itself.
    """
    return [
        Stage(Layout(trunk=512, branches=16, trunk_blocks=8), rows, gate=0.8, min_steps=200, until=0.25),
        Stage(Layout(trunk=2048, branches=16), rows, until=0.42),
        Stage(Layout(trunk=8064, branches=24), max(1, rows // 2), until=0.68),
        Stage(Layout(trunk=16256, branches=24), max(1, rows // 4)),
    ]


@dataclass(frozen=True)
class Plan:
    """Stages by rows per step, settings that differ from TrainConfig's, and what is kept of the base (None: all)."""

    stages: Callable[[int], list[Stage]]
    settings: dict[str, Any] = field(default_factory=dict)
    cut: Cut | None = None


# Gates take seconds, so that long stages have them at their end only.
CURRICULA = {
    "short": Plan(curriculum),
    "long": Plan(long_curriculum, {"registers": 0.4, "eval_every": 10**6, "eval_batches": 1, "save_every_s": 75.0}),
    "cut": Plan(
        cut_curriculum,
        {
            "registers": 0.4,
            "variables": 0.1,
            "word_lists": 0.1,
            "eval_every": 200,
            "eval_batches": 1,
            "save_every_s": 75.0,
        },
        CUT,
    ),
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
    """Trains an adapter for `minutes` and leaves adapter-int8.safetensors, adapter.safetensors and log.jsonl in `out`,
    with an int8 file of the end of every earlier stage.

    Args:
        texts: files of prose, see tasks.read_texts; every tenth text by name is held out for the gates. With fewer than
            ten the gates use the project's own prose.
        out: folder, made if needed. minutes: of training, compilation included.
        device: "cuda" or "cpu". rank, lr, seed: see TrainConfig. rows: per step.
        resume: adapter file to start from, see Trainer. base: a GGUF file; None: the installed one.
        workers: processes that make rows; None: from the number of cores. curriculum: of CURRICULA.
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
    plan = CURRICULA[curriculum]
    run = TrainConfig(minutes=minutes, rank=rank, lr=lr, seed=seed, workers=workers, **plan.settings)
    if Path(out).exists() and not Path(out).is_dir():
        raise ValueError(f"train: out must be a folder, got the file {str(out)!r}")
    train, held_out = tasks.held_out_texts(tasks.read_texts(texts))
    if not train:
        raise ValueError("train: text must name at least one file with a text, got none")
    _, model, tokenizer = builtin.load_base(base, cut=plan.cut)
    corpora = Corpus.build(train, tokenizer), Corpus.build(held_out, tokenizer) if held_out else None
    print(f"{len(train)} texts to train on ({len(corpora[0].tokens)} tokens), {len(held_out)} held out", flush=True)
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
    wait = "compiles, about 20 s" if device == "cuda" else "takes minutes on a CPU"
    print(f"the first step {wait}; then every 50 steps have a line", flush=True)
    trainer = Trainer(model, run, out, Path(base).name if base else builtin.BASE_NAME, device, resume, plan.cut)
    return trainer.run(plan.stages(rows), tokenizer, *corpora)
