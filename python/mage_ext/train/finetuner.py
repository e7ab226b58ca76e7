"""Fine-tunes a block-diffusion model so that its sparse forward matches its exact one (MAGE-FT, arXiv 2602.14209 v1).

A step has an exact forward without gradient, which selects (sparse_rows.py) and is the teacher, and a sparse forward of
the same rows. The loss is cross entropy + lam * KL(teacher || student) on masked positions. Selection has no gradient.
The control takes the same rows and as many steps of cross entropy under exact attention. The paper's own lam, learning
rate and data are not known to us; it states fewer than 200 steps. Its notes write KL(student || teacher).

Adapters train in float32 beside frozen bfloat16 weights; where all weights are trained, the optimizer keeps float32
copies of them. Activations of layers are computed again in the backward pass. On a GPU attention is FlexAttention,
compiled; the rest is plain torch.

Test: pytest tests/python/test_finetune.py
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

from mage_ext.models.adapter import adapter_tensors, add_adapter
from mage_ext.models.transformer import Transformer, rotary
from mage_ext.selection import BlockSelection, SelectionConfig, select
from mage_ext.train.packing import ANSWER, CLEAN, PROSE, Batch, Layout
from mage_ext.train.sparse_rows import Masks, RowAttention, SampledBlocks, kept_units, sampled_blocks, unit_mass
from mage_ext.train.trainer import TrainConfig

_LOG_EVERY = 10
_KINDS = {"prose": PROSE, "answer": ANSWER, "clean": CLEAN}


@dataclass(frozen=True)
class FinetuneConfig:
    """How a run goes.

    Fields:
        steps: of this run; minutes: wall time that ends it before, None: no bound.
        k, g: budget and unit of the sparse forward, as SelectionConfig has them. dense_layers: the first so many layers
            stay exact, as in generation.
        lam: weight of the KL divergence. control: cross entropy under exact attention alone, lam plays no part.
        lr: peak rate, reached after warmup_steps, falling over the last decay_share. clip: of the gradient's norm.
        answer_weight, prose_weight, clean_weight: of the three cross entropies, as TrainConfig has them.
        check_every: steps between checks on held-out rows. check_batches: batches of a check.
        seed: 0..999, names every batch. workers: processes that make batches; 0: none.

    Raises:
        ValueError: naming the field.
    """

    steps: int = 200
    minutes: float | None = None
    k: int = 512
    g: int = 32
    dense_layers: int = 2
    lam: float = 1.0
    control: bool = False
    lr: float = 1e-4
    warmup_steps: int = 10
    decay_share: float = TrainConfig.decay_share
    clip: float = TrainConfig.clip
    answer_weight: float = TrainConfig.answer_weight
    prose_weight: float = TrainConfig.prose_weight
    clean_weight: float = TrainConfig.clean_weight
    check_every: int = 50
    check_batches: int = 2
    seed: int = 0
    workers: int = 0

    def __post_init__(self):
        for name in ("lr", "decay_share", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"FinetuneConfig: {name} must be a positive number, got {getattr(self, name)}")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise ValueError(f"FinetuneConfig: minutes must be None or a positive number, got {self.minutes}")
        for name in ("lam", "answer_weight", "prose_weight", "clean_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"FinetuneConfig: {name} must be a number >= 0, got {getattr(self, name)}")
        for name, least in (
            ("steps", 1),
            ("dense_layers", 0),
            ("warmup_steps", 1),
            ("check_every", 1),
            ("check_batches", 1),
            ("workers", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"FinetuneConfig: {name} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.seed < 1000:
            raise ValueError(f"FinetuneConfig: seed must be in [0, 1000), got {self.seed}")
        _ = self.selection  # which refuses a k or g that it can't have

    @property
    def selection(self) -> SelectionConfig:
        return SelectionConfig(k=self.k, g=self.g)


class Finetuner:
    """Model, trained parameters, optimizer and log of one run.

    Args:
        model: a plain Transformer with token shift; it is changed in place.
        config: of the run. layout: of the rows. device: where to train.
        dtype: of the forwards; None: bfloat16 on CUDA, else float32.
        rank: of the adapter that is trained beside frozen weights; None: all weights are trained.
        start: tensors of an adapter to start from (adapter.load_adapter), of this rank; None: one that changes nothing.
    Raises:
        ValueError: the model, the layout or `start` does not fit.
    """

    def __init__(
        self,
        model: Transformer,
        config: FinetuneConfig,
        layout: Layout,
        device: str | torch.device = "cpu",
        rank: int | None = None,
        start: dict[str, Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ):
        facts = model.config
        if not facts.token_shift:
            raise ValueError("Finetuner: model must have the token shift, as packed rows do, got one without")
        if layout.block != facts.block_size:
            raise ValueError(f"Finetuner: layout.block must be {facts.block_size}, got {layout.block}")
        if layout.trunk + layout.branch_tokens > facts.max_positions:
            raise ValueError(
                f"Finetuner: trunk + branch_tokens must fit max_positions ({facts.max_positions}), "
                f"got {layout.trunk + layout.branch_tokens}"
            )
        if config.dense_layers >= facts.num_layers:
            raise ValueError(
                f"Finetuner: dense_layers must leave a layer that selects, got {config.dense_layers} of "
                f"{facts.num_layers}"
            )
        self.config, self.layout, self.device = config, layout, torch.device(device)
        torch.manual_seed(config.seed)
        on_gpu = self.device.type == "cuda"
        self.model = model.to(self.device, dtype or (torch.bfloat16 if on_gpu else torch.float32))
        self.wrapped, self.mask_row = {}, None
        if rank is None:
            self.trained = list(model.requires_grad_(True).parameters())
        else:
            self.wrapped = add_adapter(model, rank)
            self.mask_row = nn.Parameter(model.embed_tokens.weight[facts.mask_id].detach().float().clone())
            if start is not None:
                self._start_from(start)
            self.trained = [p for w in self.wrapped.values() for p in (w.a, w.b)] + [self.mask_row]
        # What the optimizer changes: small steps would be lost in bfloat16.
        self._exact = [p if p.dtype == torch.float32 else p.detach().float() for p in self.trained]
        self.optimizer = torch.optim.AdamW(self._exact, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=on_gpu)
        self.flex = torch.compile(flex_attention, dynamic=False, fullgraph=True) if on_gpu else flex_attention
        self.step = 0

    def _start_from(self, tensors: dict[str, Tensor]) -> None:
        expected = {name: list(t.shape) for name, t in adapter_tensors(self.wrapped, self.mask_row).items()}
        got = {name: list(t.shape) for name, t in tensors.items()}
        wrong = sorted(name for name in {*expected, *got} if expected.get(name) != got.get(name))
        if wrong:
            raise ValueError(
                f"Finetuner: start must hold {wrong[0]} of shape {expected.get(wrong[0], 'none')}, "
                f"got {got.get(wrong[0], 'none')}; {len(wrong)} tensors differ"
            )
        with torch.no_grad():
            for name, module in self.wrapped.items():
                module.a.copy_(tensors[name + ".a"])
                module.b.copy_(tensors[name + ".b"] / module.scale)
            self.mask_row.copy_(tensors["mask_row"])

    # --- forwards -------------------------------------------------------------------------------------------------

    def prepare(self, batch: Batch) -> SampledBlocks:
        """A batch of `layout` with what the exact pass needs beside it, on the device."""
        return sampled_blocks(batch, self.layout, self.model.config.mask_id).to(self.device)

    def _hidden(self, batch: Batch, attend: RowAttention) -> Tensor:
        """[rows, tokens, hidden]; with gradient, layers are computed again in the backward pass."""
        model = self.model
        x = model.embed_tokens(batch.tokens)
        if self.mask_row is not None:
            x = torch.where((batch.tokens == model.config.mask_id)[..., None], self.mask_row.to(x.dtype), x)
        cos, sin = rotary(batch.positions, model.config.head_dim, model.config.rope_theta, x.dtype)
        for index, layer in enumerate(model.layers):
            if torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, index, attend, use_reentrant=False)
            else:
                x = layer(x, cos, sin, index, attend)
        return model.norm(x)

    def _logits(self, batch: Batch, attend: RowAttention) -> Tensor:
        """[N, V], float32, of the batch's targets."""
        hidden = self._hidden(batch, attend)
        return self.model.logits(hidden[batch.source[:, 0], batch.source[:, 1]]).float()

    def _masks(self, batch: Batch) -> Masks:
        facts = self.model.config
        on_gpu = self.device.type == "cuda"
        return Masks(batch, self.layout.block, facts.num_heads // facts.num_kv_heads, flex=on_gpu)

    def exact_logits(self, batch: Batch) -> Tensor:
        """[N, V], float32, of the batch's targets under exact attention, with gradient where that is enabled."""
        mask = self._masks(batch).exact()
        return self._logits(batch, RowAttention([mask] * self.model.config.num_layers, self.flex))

    @torch.no_grad()
    def teach(self, blocks: SampledBlocks) -> tuple[Tensor, BlockSelection]:
        """The exact pass: logits [N, V] of the targets, and what each block keeps, [L, rows * N, Hkv, Kmax]."""
        facts, config = self.model.config, self.config
        units = -(-(self.layout.trunk + self.layout.branch_tokens) // config.g)
        masses: list[Tensor] = []

        def seen(layer: int, q: Tensor, k: Tensor) -> None:
            if layer >= config.dense_layers:
                masses.append(unit_mass(q, k, blocks, config.g, units))

        mask = self._masks(blocks.batch).exact()
        logits = self._logits(blocks.batch, RowAttention([mask] * facts.num_layers, self.flex, seen))
        mass = torch.stack(masses).flatten(1, 2)
        return logits, select(mass, blocks.prefix.flatten(), config.selection)

    def sparse_logits(self, blocks: SampledBlocks, selection: BlockSelection) -> Tensor:
        """[N, V], float32, of the targets where every noisy block sees what `selection` keeps, with gradient where that
        is enabled."""
        batch, dense = blocks.rows, self.config.dense_layers
        masks = self._masks(batch)
        units = -(-(self.layout.trunk + self.layout.branch_tokens) // selection.g)
        kept = kept_units(selection, batch.tokens.shape[0], units)
        exact = [masks.exact()] * dense if dense else []
        sparse = masks.sparse(blocks.owner[:, : blocks.first], kept, selection.g)
        return self._logits(batch, RowAttention([*exact, *sparse], self.flex))

    # --- losses ---------------------------------------------------------------------------------------------------

    def losses(self, blocks: SampledBlocks) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a step and its parts, detached.

        Returns:
            The loss; and prose, answer, clean (mean cross entropies, nats), ce (their weighted sum) and, but for the
            control, kl (mean over masked positions, nats) and kept (mean kept mass of the lists).
        """
        batch, config = blocks.batch, self.config
        if config.control:
            ce, parts = self._cross_entropy(batch, self.exact_logits(blocks.rows))
            return ce, parts
        teacher, selection = self.teach(blocks)
        student = self.sparse_logits(blocks, selection)
        ce, parts = self._cross_entropy(batch, student)
        masked = self._masked(batch)
        kl = divergence(teacher[masked], student[masked])
        parts |= {"kl": kl.detach(), "kept": self._kept(selection, blocks)}
        return ce + config.lam * kl, parts

    def _cross_entropy(self, batch: Batch, logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        each = nn.functional.cross_entropy(logits, batch.target, reduction="none")
        parts = {}
        for name, kind in _KINDS.items():
            which = batch.kind == kind
            parts[name] = each[which].sum() / which.sum().clamp_min(1)
        ce = sum(getattr(self.config, f"{name}_weight") * part for name, part in parts.items())
        return ce, {name: part.detach() for name, part in {**parts, "ce": ce}.items()}

    @staticmethod
    def _masked(batch: Batch) -> Tensor:
        """[N], bool: targets that a copy masks, so that their logits come from it."""
        return batch.noisy[batch.source[:, 0], batch.source[:, 1]] > 0

    @staticmethod
    def _kept(selection: BlockSelection, blocks: SampledBlocks) -> Tensor:
        there = blocks.prefix.flatten() > 0
        return selection.kept_mass[:, there].mean()

    # --- steps ----------------------------------------------------------------------------------------------------

    def train_step(self, blocks: SampledBlocks, rate: float) -> dict[str, Tensor]:
        """One step at learning rate `rate`; returns the parts of its loss."""
        loss, parts = self.losses(blocks)
        loss.backward()
        for exact, used in zip(self._exact, self.trained, strict=True):
            if exact is not used:
                exact.grad, used.grad = used.grad.float(), None
        nn.utils.clip_grad_norm_(self._exact, self.config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for exact, used in zip(self._exact, self.trained, strict=True):
                if exact is not used:
                    used.copy_(exact)
        self.step += 1
        return parts

    def rate(self, share: float) -> float:
        """Learning rate of the next step at this share of the run."""
        warm = min(1.0, (self.step + 1) / self.config.warmup_steps)
        left = max(0.0, 1.0 - share) / self.config.decay_share
        return self.config.lr * min(warm, max(0.02, min(1.0, left)))

    @torch.no_grad()
    def check(self, batches: Sequence[SampledBlocks]) -> dict[str, float]:
        """Exact and sparse forward of the same rows, means over the batches.

        Returns:
            exact_, sparse_ prose and answer (cross entropy, nats); exact_right, sparse_right (share of masked answer
            tokens that are the most probable one); kl, same (share of masked positions at which both name the same
            token), kept.
        """
        sums: dict[str, float] = {}
        for blocks in batches:
            batch = blocks.batch
            teacher, selection = self.teach(blocks)
            student = self.sparse_logits(blocks, selection)
            masked = self._masked(batch)
            answers = masked & (batch.kind == ANSWER)
            facts = {"kl": divergence(teacher[masked], student[masked]), "kept": self._kept(selection, blocks)}
            facts["same"] = (teacher.argmax(-1) == student.argmax(-1))[masked].float().mean()
            for way, logits in (("exact", teacher), ("sparse", student)):
                _, parts = self._cross_entropy(batch, logits)
                facts |= {f"{way}_prose": parts["prose"], f"{way}_answer": parts["answer"]}
                facts[f"{way}_right"] = (logits.argmax(-1) == batch.target)[answers].float().mean()
            for name, value in facts.items():
                sums[name] = sums.get(name, 0.0) + float(value) / len(batches)
        return sums

    def memory_gib(self) -> float:
        """Peak memory of the GPU, 0 on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else 0.0

    def run(
        self, batches: Iterator[Batch], held_out: Iterator[Batch], out: str | Path, save: Callable[[], None]
    ) -> None:
        """Trains, checks and saves.

        Args:
            batches: of `layout`, to train on. held_out: for checks, all of which use the same ones.
            out: folder of log.jsonl, made if needed; the log is appended to.
            save: called at every check but the first, and at the end.
        Raises:
            FloatingPointError: a loss is not finite.
        """
        config, out = self.config, Path(out)
        out.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()

        def log(**fields) -> None:
            line = json.dumps({k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in fields.items()})
            with (out / "log.jsonl").open("a") as file:
                file.write(line + "\n")
            print(line, flush=True)

        log(event="start", config=asdict(config), layout=asdict(self.layout))
        print(f"a check of {config.check_batches} held-out batches comes first, which counts as time", flush=True)
        tests = [self.prepare(next(held_out)) for _ in range(config.check_batches)]
        log(event="check", step=self.step, **self.check(tests))
        window: list[dict[str, Tensor]] = []
        ended_by, tick = "steps", time.monotonic()

        def tell() -> None:
            nonlocal window, tick
            means = {name: float(torch.stack([w[name] for w in window]).mean()) for name in window[0]}
            if not all(map(math.isfinite, means.values())):
                raise FloatingPointError(f"finetune: losses must stay finite, got {means}; lower lr")
            log(
                step=self.step,
                minutes=(time.monotonic() - began) / 60,
                **means,
                lr=rate,
                seconds_per_step=(time.monotonic() - tick) / len(window),
                memory_gib=self.memory_gib(),
            )
            window, tick = [], time.monotonic()

        for number in range(1, config.steps + 1):
            share = (number - 1) / config.steps
            if config.minutes is not None:
                elapsed = (time.monotonic() - began) / (60 * config.minutes)
                if elapsed >= 1:
                    ended_by = "time"
                    break
                share = max(share, elapsed)
            rate = self.rate(share)
            window.append(self.train_step(self.prepare(next(batches)), rate))
            if number == 1 or number % _LOG_EVERY == 0:
                tell()
            if number % config.check_every == 0 and number < config.steps:
                paused = time.monotonic()
                log(event="check", step=self.step, **self.check(tests))
                save()
                tick += time.monotonic() - paused
        if window:
            tell()
        log(event="check", step=self.step, **self.check(tests))
        save()
        log(event="end", step=self.step, ended_by=ended_by, minutes=(time.monotonic() - began) / 60)


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean of KL(teacher || student) over rows of logits [N, V], nats; 0 where there is no row."""
    target, given = teacher.log_softmax(-1), student.log_softmax(-1)
    return nn.functional.kl_div(given, target, log_target=True, reduction="sum") / max(len(teacher), 1)
