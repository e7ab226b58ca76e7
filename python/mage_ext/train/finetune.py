"""Fine-tuning a model with its sparse forward (finetuner.py): from files to files, and what a step takes.

`mage train finetune` runs this.

Test: pytest tests/python/test_finetune.py
"""

import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from mage_ext import models
from mage_ext._arguments import check_device
from mage_ext._files import save_tensors
from mage_ext.evaluation import tasks
from mage_ext.models import builtin
from mage_ext.models.adapter import adapter_cut, adapter_tensors, load_adapter, save_adapter
from mage_ext.models.config import ModelConfig
from mage_ext.models.tokenizer import Tokenizer
from mage_ext.models.transformer import Transformer
from mage_ext.train.data import Corpus, RowMaker, loader
from mage_ext.train.finetuner import FinetuneConfig, Finetuner
from mage_ext.train.packing import Batch, Branch, Layout, pack

ADAPTER_FROM = 3e9  # parameters: from here on adapters are trained by default, below all weights
ADAPTER_RANK = 32


def layout_for(tokens: int, block: int) -> Layout:
    """Rows of a context of `tokens` tokens: 8 questions behind it, 8 of its own blocks sampled."""
    return Layout(trunk=tokens, branches=8, branch_blocks=-(-64 // block), trunk_blocks=8, block=block)


def finetune(
    model: str | Path,
    texts: Sequence[str | Path],
    out: str | Path,
    config: FinetuneConfig,
    tokens: int = 2048,
    rows: int = 4,
    device: str | torch.device = "cuda",
    rank: int | None = None,
    resume: str | Path | None = None,
) -> None:
    """Fine-tunes a model and leaves it in `out`, with log.jsonl.

    Adapters: adapter.safetensors (bfloat16) and adapter-int8.safetensors, as `mage train adapter` writes them;
    `adapter.apply_adapter(loaded.model, adapter.load_adapter(file))` folds one into the model of a folder.
    All weights: a folder that `models.load` takes, with the files of `model` beside the weights.

    Args:
        model: a folder, or of models.builtin.names(), whose shipped adapter is trained on.
        texts: files of prose, see tasks.read_texts; every tenth text by name is held out for the checks.
        out: folder, made if needed. config: of the run.
        tokens: context of a row, a multiple of the model's block. rows: per step. device: CPU or CUDA.
        rank: of the adapters of a folder's model. None: all its weights are trained, or from ADAPTER_FROM parameters on
            adapters of ADAPTER_RANK.
        resume: adapter file of an earlier run to start from; the optimizer starts fresh.
    Raises:
        ValueError, FileNotFoundError: naming the argument; nothing is written then.
    """
    device = check_device("finetune", device)
    if rows < 1:
        raise ValueError(f"finetune: rows must be at least 1, got {rows}")
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"finetune: out must be a folder, got the file {str(out)!r}")
    train, held_out = tasks.held_out_texts(tasks.read_texts(texts))
    if not train:
        raise ValueError("finetune: text must name at least one file with a text, got none")
    start = cut = None
    is_builtin = str(model) in builtin.names() and not Path(model).exists()
    if is_builtin:
        if rank is not None:
            raise ValueError(f"finetune: rank must be left to the adapter of {model}, got {rank}")
        base, source = builtin.BASE_NAME, None
        shipped = builtin.adapter_path(model)
        cut = adapter_cut(shipped)
        start = load_adapter(resume or shipped, base=base, cut=cut)
        rank = next(t.shape[0] for name, t in start.items() if name.endswith(".a"))
        _, plain, tokenizer = builtin.load_base(cut=cut)
    else:
        base, source = Path(model).resolve().name, Path(model)
        if out.resolve() == source.resolve():
            raise ValueError(f"finetune: out must be another folder than model, got {str(out)!r}")
        loaded = models.load(model, torch.bfloat16 if device.type == "cuda" else torch.float32)
        plain, tokenizer = loaded.model, loaded.tokenizer
        rank = _rank_for(plain, rank)
        if resume is not None:
            if rank is None:
                raise ValueError(
                    "finetune: resume must be left out where all weights are trained (model names the folder of the "
                    f"earlier run then), got {str(resume)!r}"
                )
            start = load_adapter(resume, base=base)
    if not plain.config.eos_ids:
        raise ValueError("finetune: model must have an end token, got none")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    tuner = Finetuner(plain, config, layout_for(tokens, plain.config.block_size), device, rank, start)
    corpora = Corpus.build(train, tokenizer), Corpus.build(held_out, tokenizer) if held_out else None
    batches, tests = (
        _batches(tuner, tokenizer, corpus, rows, first, is_test)
        for corpus, first, is_test in ((corpora[0], config.seed * 10**6, False), (corpora[1], 10**9, True))
    )
    trains = "all weights" if rank is None else f"adapters of rank {rank}"
    print(f"{len(train)} texts to train on, {len(held_out)} held out; {trains}", flush=True)

    def save() -> None:
        if rank is None:
            save_folder(tuner.model, source, out)
            return
        for name, int8 in (("adapter", False), ("adapter-int8", True)):
            tensors = adapter_tensors(tuner.wrapped, tuner.mask_row)
            save_adapter(out / f"{name}.safetensors", tensors, base, int8=int8, cut=cut)

    tuner.run(batches, tests, out, save)


def _rank_for(model: Transformer, rank: int | None) -> int | None:
    if rank is not None or sum(p.numel() for p in model.parameters()) < ADAPTER_FROM:
        return rank
    return ADAPTER_RANK


def _batches(
    tuner: Finetuner, tokenizer: Tokenizer, corpus: Corpus | None, rows: int, first: int, is_test: bool
) -> Iterator[Batch]:
    facts = tuner.model.config
    maker = RowMaker(tokenizer, corpus, tuner.layout, rows, facts.mask_id, facts.eos_ids[0], held_out=is_test)
    return loader(maker, first, 0 if is_test else tuner.config.workers)


def save_folder(model: Transformer, source: Path, out: Path) -> None:
    """Writes a folder that models.load takes: the model's weights, the other small files of `source`."""
    names = {name: name if name == "lm_head.weight" else f"model.{name}" for name in model.state_dict()}
    if model.config.tie_embeddings:
        del names["lm_head.weight"]
    weights = {stored: model.state_dict()[name].detach().cpu().contiguous() for name, stored in names.items()}
    save_tensors(out / "model.safetensors", weights, {"format": "pt"})
    for path in source.iterdir():
        if path.suffix in (".json", ".txt", ".jinja", ".model") and path.name != "model.safetensors.index.json":
            shutil.copyfile(path, out / path.name)


def random_batch(config: ModelConfig, layout: Layout, rows: int, seed: int) -> Batch:
    """Rows of random tokens with every place of the layout taken: right for time and memory, they mean nothing."""
    rng = np.random.default_rng(seed)
    start = layout.branch_tokens - layout.branch_blocks * layout.block

    def branch() -> Branch:
        return Branch(rng.integers(config.vocab_size, size=layout.branch_tokens).tolist(), start)

    trunks = rng.integers(config.vocab_size, size=(rows, layout.trunk))
    branches = [[branch() for _ in range(layout.branches)] for _ in range(rows)]
    return pack(rng, layout, list(trunks), branches, config.mask_id, end_id=0)


def measure(
    model: Transformer,
    config: FinetuneConfig,
    tokens: Sequence[int],
    rows: int = 1,
    device: str | torch.device = "cuda",
    rank: int | None = None,
    steps: int = 5,
) -> Iterator[dict[str, float]]:
    """Time and memory of training steps on random rows, one row of a table per context; the model is spoiled.

    Args:
        tokens: contexts. rows: per step. rank: as in `finetune`. steps: that are timed, after two that are not.
    Returns:
        tokens (of the context), row_tokens (all of a row), rows, seconds_per_step, memory_gib (peak, 0 on a CPU),
        minutes_of_200_steps (projected).
    Raises:
        ValueError: naming the argument.
    """
    block = model.config.block_size
    rank = _rank_for(model, rank)
    if torch.device(device).type == "cuda":
        torch.set_float32_matmul_precision("high")
    tuner = Finetuner(model, config, layout_for(max(tokens), block), device, rank)
    for length in tokens:
        tuner.layout = layout_for(length, block)
        if tuner.device.type == "cuda":
            torch.compiler.reset()  # or the kernels of all contexts would count towards one limit
            torch.cuda.reset_peak_memory_stats(tuner.device)
        for number in range(-2, steps):
            if number == 0:
                began = time.perf_counter()
            parts = tuner.train_step(
                tuner.prepare(random_batch(model.config, tuner.layout, rows, number + 2)), config.lr
            )
            float(parts["ce"])  # waits for the device
        if tuner.device.type == "cuda":
            torch.cuda.synchronize(tuner.device)
        seconds = (time.perf_counter() - began) / steps
        yield {
            "tokens": length,
            "row_tokens": tuner.layout.tokens,
            "rows": rows,
            "seconds_per_step": seconds,
            "memory_gib": tuner.memory_gib(),
            "minutes_of_200_steps": 200 * seconds / 60,
        }
