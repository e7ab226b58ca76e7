"""Adapts a causal base model to block diffusion with a low-rank adapter: stages of context length, gates, logs.

On a GPU attention is FlexAttention over a block mask and every layer is compiled; on a CPU it is
scaled_dot_product_attention with the dense mask of the same rule, uncompiled (for tests). Learning rate: warm-up,
constant, linear decay over the last share of the time. A run that resumes starts from the values of an adapter, with a
fresh optimizer.

Test: pytest tests/python/test_train.py
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from mage_ext.models.adapter import adapter_cut, adapter_tensors, add_adapter, cut_tensors, load_adapter, save_adapter
from mage_ext.models.config import Cut
from mage_ext.models.tokenizer import Tokenizer
from mage_ext.models.transformer import Transformer, rotary
from mage_ext.train.data import Corpus, RowMaker, loader
from mage_ext.train.packing import ANSWER, CLEAN, PROSE, Batch, Layout, dense_mask, visible

_COUNTED = ("facts", "registers")  # kinds of rows that a gate judges by


@dataclass(frozen=True)
class Stage:
    """One context length of the curriculum.

    Fields:
        layout: of the rows. rows: per step.
        gate: share of held-out answers found that ends the stage; None: only max_steps or the time of the run end it.
        min_steps: before the gate counts. max_steps: after which a missed gate ends training.
        until: share of the run's minutes after which the stage ends, as after max_steps.
    """

    layout: Layout
    rows: int
    gate: float | None = None
    min_steps: int = 100
    max_steps: int = 100000
    until: float = 1.0

    def __post_init__(self):
        for name in ("rows", "min_steps", "max_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"Stage: {name} must be at least 1, got {getattr(self, name)}")
        if self.gate is not None and not 0 <= self.gate <= 1:
            raise ValueError(f"Stage: gate must be None or in [0, 1], got {self.gate}")
        if not 0 < self.until <= 1:
            raise ValueError(f"Stage: until must be in (0, 1], got {self.until}")


@dataclass(frozen=True)
class TrainConfig:
    """How a run goes.

    Fields:
        minutes: wall time of this run. rank, scale: of the adapter.
        lr: peak rate, reached after warmup_steps, falling over the last decay_share of the time. weight_decay, clip.
        answer_weight, prose_weight, clean_weight: of the three losses.
        registers, variables, word_lists: shares of rows of these kinds, see RowMaker; gates then log these kinds too,
            but judge by facts and registers alone.
        eval_every: steps between gates. eval_batches: batches of a gate and kind. save_every_s: seconds between saves.
        seed: 0..999, names every batch; another one gives other rows. workers: processes that make batches; 0: none.
    """

    minutes: float
    rank: int = 32
    scale: float = 2.0
    lr: float = 1e-3
    warmup_steps: int = 50
    decay_share: float = 0.35
    weight_decay: float = 0.0
    clip: float = 1.0
    answer_weight: float = 1.0
    prose_weight: float = 0.5
    clean_weight: float = 0.2
    registers: float = 0.0
    variables: float = 0.0
    word_lists: float = 0.0
    eval_every: int = 200
    eval_batches: int = 2
    save_every_s: float = 90.0
    seed: int = 0
    workers: int = 0

    def __post_init__(self):
        for name in ("minutes", "scale", "lr", "decay_share", "clip"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
                raise ValueError(f"TrainConfig: {name} must be a positive number, got {value!r}")
        for name, least in (("rank", 1), ("warmup_steps", 1), ("eval_every", 1), ("eval_batches", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"TrainConfig: {name} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.seed < 1000:
            raise ValueError(f"TrainConfig: seed must be in [0, 1000), got {self.seed}")


class Attention:
    """The `attend` of training: holds the mask of the current batch.

    Args:
        block: tokens of a block. device: of the batches. flex: FlexAttention in place of a dense mask.
    """

    def __init__(self, block: int, device: torch.device, flex: bool):
        self.block, self.device, self.flex = block, device, flex
        self.mask: BlockMask | Tensor | None = None

    def set(self, batch: Batch) -> None:
        if not self.flex:
            self.mask = dense_mask(batch, self.block)
            return
        branch, noisy, block = (t.to(torch.int32) for t in (batch.branch, batch.noisy, batch.positions // self.block))

        def rule(b, h, q, k):
            return visible(branch[b, q], noisy[b, q], block[b, q], branch[b, k], noisy[b, k], block[b, k])

        rows, tokens = branch.shape
        self.mask = create_block_mask(rule, rows, None, tokens, tokens, device=self.device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if isinstance(self.mask, BlockMask):
            out = flex_attention(q, k, v, block_mask=self.mask, enable_gqa=True)
        else:
            out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, enable_gqa=True)
        return out.transpose(1, 2)


class Trainer:
    """Model, adapter, optimizer and log of one run.

    Args:
        model: a plain Transformer with the token shift and an end token; it is frozen and wrapped in place.
        config: of the run. out: folder of log.jsonl and the adapters, made if needed; the log is appended to.
        base: name of the base's file, which adapters carry. device: where to train.
        resume: an adapter file to start from, of the same base, of at most this rank: what it lacks starts as zero.
        cut: what the model is of its base, if not the whole; `resume` may then be of the whole base.
    Raises:
        ValueError: the model can't be trained so, or `resume` does not fit.
    """

    def __init__(
        self,
        model: Transformer,
        config: TrainConfig,
        out: str | Path,
        base: str,
        device: str | torch.device = "cpu",
        resume: str | Path | None = None,
        cut: Cut | None = None,
    ):
        if not model.config.token_shift or not model.config.eos_ids:
            raise ValueError(
                "Trainer: model must have the token shift and an end token, "
                f"got token_shift {model.config.token_shift}, eos_ids {model.config.eos_ids}"
            )
        self.config, self.out, self.base, self.cut = config, Path(out), base, cut
        self.device = torch.device(device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        torch.manual_seed(config.seed)
        self.model = model.to(self.device, self.dtype)
        self.wrapped = add_adapter(self.model, config.rank, config.scale)
        self.mask_row = nn.Parameter(model.embed_tokens.weight[model.config.mask_id].detach().float().clone())
        if resume is not None:
            self._resume(resume)
        self.parameters = [p for w in self.wrapped.values() for p in (w.a, w.b)] + [self.mask_row]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.lr,
            betas=(0.9, 0.95),
            weight_decay=config.weight_decay,
            fused=self.device.type == "cuda",
        )
        self.attend = Attention(model.config.block_size, self.device, flex=self.device.type == "cuda")
        self.layers: list[Callable] = list(self.model.layers)
        if self.device.type == "cuda":
            # A graph per stage, shared by all layers; past the limit torch would run attention uncompiled.
            torch._dynamo.config.recompile_limit = 64
            self.layers = [torch.compile(layer, dynamic=False) for layer in self.model.layers]
        self.tokens_seen, self.step = 0, 0
        self.out.mkdir(parents=True, exist_ok=True)

    def log(self, **fields) -> None:
        """Appends a line of JSON to log.jsonl and prints it."""
        line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in fields.items()})
        with (self.out / "log.jsonl").open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def _resume(self, path: str | Path) -> None:
        source = adapter_cut(path)
        tensors = load_adapter(path, base=self.base, cut=source)
        if self.cut is not None and source is None:
            tensors = cut_tensors(tensors, self.cut)
        elif source != self.cut:
            raise ValueError(f"Trainer: resume must be of cut {self.cut or 'none'}, got {source or 'none'}")
        expected = {name: list(t.shape) for name, t in adapter_tensors(self.wrapped, self.mask_row).items()}
        got = {name: list(t.shape) for name, t in tensors.items()}
        rank = min((t.shape[0] for name, t in tensors.items() if name.endswith(".a")), default=0)
        for name, shape in expected.items():  # what the file's rank makes of our shapes
            if 0 < rank < self.config.rank and name != "mask_row":
                shape[0 if name.endswith(".a") else 1] = rank
        wrong = sorted(name for name in {*expected, *got} if expected.get(name) != got.get(name))
        if wrong:
            raise ValueError(
                f"Trainer: resume must hold {wrong[0]} of shape {expected.get(wrong[0], 'none')} (rank "
                f"{self.config.rank}), got {got.get(wrong[0], 'none')}; {len(wrong)} tensors differ"
            )
        with torch.no_grad():
            for name, module in self.wrapped.items():
                module.a[:rank].copy_(tensors[name + ".a"])
                module.b[:, :rank].copy_(tensors[name + ".b"] / module.scale)
            self.mask_row.copy_(tensors["mask_row"])

    def save(self, name: str = "adapter", int8: bool = False) -> Path:
        """Writes the adapter; bfloat16 to resume from, int8 to ship."""
        path = self.out / f"{name}.safetensors"
        save_adapter(path, adapter_tensors(self.wrapped, self.mask_row), self.base, int8=int8, cut=self.cut)
        return path

    def hidden(self, batch: Batch) -> Tensor:
        """[rows, tokens, hidden] of a packed batch (on the device)."""
        model = self.model
        self.attend.set(batch)
        x = model.embed_tokens(batch.tokens)
        x = torch.where((batch.tokens == model.config.mask_id)[..., None], self.mask_row.to(x.dtype), x)
        cos, sin = rotary(batch.positions, model.config.head_dim, model.config.rope_theta, x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, 0, self.attend)  # one layer number for all: attention here does not ask for it
        return model.norm(x)

    def losses(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Weighted loss and the mean cross entropy of prose, answer and clean targets (nats)."""
        rows = self.hidden(batch)[batch.source[:, 0], batch.source[:, 1]]
        each = nn.functional.cross_entropy(self.model.logits(rows).float(), batch.target, reduction="none")
        kinds = [batch.kind == kind for kind in (PROSE, ANSWER, CLEAN)]
        means = [each[which].sum() / which.sum().clamp_min(1) for which in kinds]
        c = self.config
        return c.prose_weight * means[0] + c.answer_weight * means[1] + c.clean_weight * means[2], means

    def _rate(self, elapsed_share: float, step_of_run: int) -> float:
        warm = min(1.0, (step_of_run + 1) / self.config.warmup_steps)
        left = max(0.0, 1.0 - elapsed_share) / self.config.decay_share
        return self.config.lr * min(warm, max(0.02, min(1.0, left)))

    @torch.no_grad()
    def answers_found(self, batches: Iterator[Batch], count: int) -> dict[int, tuple[int, int]]:
        """Denoises the answers of `count` all-masked batches and compares them with the truth.

        Several blocks of one answer are denoised beside the clean text of the blocks before them. Per step all tokens
        with probability above 0.9 are decided, and the most probable one of each copy.

        Returns:
            number of lines in the answer -> (answers wholly right, answers).
        """
        found: dict[int, list[int]] = {}
        for _ in range(count):
            batch = next(batches).to(self.device)
            keep = batch.kind == ANSWER
            if not keep.any():
                continue
            source, target, at = batch.source[keep], batch.target[keep], batch.target_at[keep]
            truth = batch.tokens.clone()
            truth[at[:, 0], at[:, 1]] = target
            noisy = batch.noisy[at[:, 0], at[:, 1]]
            in_copy = noisy > 0
            copy = at[:, 0] * 4096 + noisy  # one number per (row, copy)
            open_ = in_copy.clone()
            right = torch.zeros_like(open_)
            for _ in range(self.model.config.block_size):
                with torch.set_grad_enabled(self.device.type == "cuda"):  # training's graph: no other is compiled
                    hidden = self.hidden(batch).detach()
                logits = self.model.logits(hidden[source[:, 0], source[:, 1]]).float()
                logits[:, self.model.config.mask_id] = -torch.inf
                prob, token = logits.softmax(-1).max(-1)
                # First tokens of blocks are predicted from clean text, so no step changes them.
                right = torch.where(in_copy, right, token == target)
                score = torch.where(open_, prob, -1.0)
                best = torch.full((int(copy.max()) + 1,), -1.0, device=self.device)
                best = best.scatter_reduce(0, copy, score, "amax")
                now = open_ & ((score > 0.9) | (score == best[copy]))
                batch.tokens[at[now, 0], at[now, 1]] = token[now]
                right = torch.where(now, token == target, right)
                open_ &= ~now
                if not open_.any():
                    break
            owner = torch.stack((at[:, 0], batch.branch[at[:, 0], at[:, 1]]), 1).tolist()
            whole: dict[tuple[int, int], bool] = {}
            for who, ok in zip(map(tuple, owner), right.tolist(), strict=True):
                whole[who] = whole.get(who, True) and ok
            lines = self._answer_lines(batch, truth)
            for who, ok in whole.items():
                entry = found.setdefault(lines[who], [0, 0])
                entry[0] += ok
                entry[1] += 1
        return {k: (v[0], v[1]) for k, v in sorted(found.items())}

    def _answer_lines(self, batch: Batch, truth: Tensor) -> dict[tuple[int, int], int]:
        """(row, branch) -> lines of the answer: the newline tokens behind the last chat header of the clean branch."""
        lines = {}
        for row in range(batch.tokens.shape[0]):
            clean = batch.noisy[row] == 0
            for j in range(1, int(batch.branch[row].max()) + 1):
                tokens = batch.tokens[row][clean & (batch.branch[row] == j)].tolist()
                start = len(tokens) - 1 - tokens[::-1].index(self.header_id)
                # One newline ends the header's own line and stands for the last line of the answer, which has none.
                lines[row, j] = sum(token == self.newline_id for token in tokens[start:])
        return lines

    def run(
        self, stages: Sequence[Stage], tokenizer: Tokenizer, corpus: Corpus | None, held_out: Corpus | None
    ) -> bool:
        """Trains through the stages, saving adapter.safetensors (bfloat16) and adapter-int8.safetensors as it goes, and
        adapter-int8-stage-N.safetensors at the end of each but the last.

        Args:
            stages: at least one. tokenizer: the model's. corpus, held_out: prose of rows and of gates; None: own prose.
        Returns:
            Whether the last gate that was measured held. A gate missed after max_steps, or the time, ends the run.
        Raises:
            ValueError: a stage does not fit the model. FloatingPointError: a loss is not finite.
        """
        config, facts = self.config, self.model.config
        if not stages:
            raise ValueError("Trainer: stages must hold a stage, got none")
        for stage in stages:
            if stage.layout.block != facts.block_size:
                raise ValueError(f"Trainer: layout.block must be {facts.block_size}, got {stage.layout.block}")
            longest = stage.layout.trunk + stage.layout.branch_tokens
            if longest > facts.max_positions:
                raise ValueError(
                    f"Trainer: trunk + branch_tokens must fit max_positions ({facts.max_positions}), got {longest}"
                )
        self.newline_id = tokenizer.encode("\n")[0]
        self.header_id = tokenizer.encode(tokenizer.render_chat([{"role": "user", "content": ""}]))[0]
        self.log(event="start", config=asdict(config), stages=[asdict(s) for s in stages], rows_seen=0)
        began = self._saved = time.monotonic()
        for number, stage in enumerate(stages):
            shared = dict(layout=stage.layout, rows=stage.rows, mask_id=facts.mask_id, end_id=facts.eos_ids[0])
            first = config.seed * 10**6 + number * 10**5
            shares = {kind: getattr(config, kind) for kind in ("registers", "variables", "word_lists")}
            batches = loader(RowMaker(tokenizer, corpus, **shares, **shared), first, config.workers)
            only = {"facts": {}, **{kind: {kind: 1.0} for kind, share in shares.items() if share}}
            tests = {
                kind: loader(
                    RowMaker(tokenizer, held_out, held_out=True, all_masked=True, **share, **shared),
                    10**9 + number * 10**5,
                    min(config.workers, 2),
                )
                for kind, share in only.items()
            }
            ended_by, held = self._run_stage(number, stage, batches, tests, number + 1 == len(stages), began)
            if not held:
                self.log(event="gate missed", stage=number, gate=stage.gate)
            if not held or ended_by == "time":
                break
            if number + 1 < len(stages):
                self.save(f"adapter-int8-stage-{number}", int8=True)
        self._save_both()
        self.log(event="end", step=self.step, tokens=self.tokens_seen, stage=number, ended_by=ended_by, gate_held=held)
        return held

    def _run_stage(
        self,
        number: int,
        stage: Stage,
        batches: Iterator[Batch],
        tests: dict[str, Iterator[Batch]],
        last: bool,
        began: float,
    ) -> tuple[str, bool]:
        """Trains one stage; returns what ended it ("gate", "steps", "share", "time") and whether its gate held then."""
        config, since, tick = self.config, 0, time.monotonic()
        window = torch.zeros(3, device=self.device)
        for stage_step in range(1, stage.max_steps + 1):
            elapsed = (time.monotonic() - began) / (60 * config.minutes)
            if elapsed >= stage.until:
                self._save_both()  # before a gate that a limit outside may cut off
                return "time" if elapsed >= 1 else "share", self._gate(tests, stage, number)
            batch = next(batches).to(self.device)
            loss, means = self.losses(batch)
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, config.clip)
            for group in self.optimizer.param_groups:
                group["lr"] = self._rate(elapsed, self.step)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            self.tokens_seen += batch.tokens.numel()
            window += torch.stack(means).detach()
            since += 1
            if stage_step % 50 == 0 or stage_step == 1:
                prose, answer, clean = (window / since).tolist()
                if not math.isfinite(prose + answer + clean):
                    raise FloatingPointError(
                        f"Trainer: losses must stay finite, got {prose}, {answer}, {clean}; lower lr"
                    )
                rate = since * batch.tokens.numel() / (time.monotonic() - tick)
                self.log(
                    stage=number,
                    step=self.step,
                    minutes=(time.monotonic() - began) / 60,
                    prose=prose,
                    answer=answer,
                    clean=clean,
                    lr=self.optimizer.param_groups[0]["lr"],
                    tokens=self.tokens_seen,
                    tokens_per_s=rate,
                    memory_gib=self._memory(),
                )
                window.zero_()
                since, tick = 0, time.monotonic()
            if stage_step % config.eval_every == 0 or stage_step == stage.max_steps:
                paused = time.monotonic()
                held = self._gate(tests, stage, number)
                tick += time.monotonic() - paused
                if held and stage.gate is not None and stage_step >= stage.min_steps and not last:
                    return "gate", True
            if time.monotonic() - self._saved > config.save_every_s:
                self._save_both()
        return "steps", held

    def _save_both(self) -> None:
        self.save()
        self.save("adapter-int8", int8=True)
        self._saved = time.monotonic()

    def _gate(self, tests: dict[str, Iterator[Batch]], stage: Stage, number: int) -> bool:
        """Logs what is found of every kind; share and by_lines, by which it judges, are of _COUNTED alone."""
        found: dict[int, list[int]] = {}
        kinds = {}
        for kind, test in tests.items():
            counts = self.answers_found(test, self.config.eval_batches)
            kinds[kind] = [sum(column) for column in zip(*counts.values(), strict=True)]
            if kind not in _COUNTED:
                continue
            for lines, pair in counts.items():
                found[lines] = [a + b for a, b in zip(found.get(lines, [0, 0]), pair, strict=True)]
        share = sum(n for n, _ in found.values()) / max(sum(n for _, n in found.values()), 1)
        by_lines = {str(k): v for k, v in sorted(found.items())}
        self.log(event="gate", stage=number, step=self.step, share=share, by_lines=by_lines, kinds=kinds)
        return stage.gate is None or share >= stage.gate

    def _memory(self) -> float:
        return torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0
