"""Adapts a causal base model to block diffusion with a low-rank adapter: curriculum of context lengths, accuracy gates, logs, resume.

On a GPU attention is FlexAttention over a block mask and every layer is compiled; on a CPU it is scaled_dot_product_attention with the
dense mask of the same rule, uncompiled (for tests). Learning rate: warm-up, constant, linear decay over the last share of the time.

Test: pytest tests/python/test_train.py
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from mage_ext.models.adapter import add_adapter, adapter_tensors, load_adapter, save_adapter
from mage_ext.models.tokenizer import Tokenizer
from mage_ext.models.transformer import Transformer, rotary
from mage_ext.train.data import Corpus, RowMaker, loader
from mage_ext.train.packing import ANSWER, CLEAN, PROSE, Batch, Layout, dense_mask, visible


@dataclass(frozen=True)
class Stage:
    """One context length of the curriculum.

    Fields:
        layout: of the rows. rows: per step. gate: share of held-out answers found that ends the stage (None: the time ends it).
        min_steps: before the gate counts. max_steps: after which a missed gate ends training.
    """

    layout: Layout
    rows: int
    gate: float | None = None
    min_steps: int = 100
    max_steps: int = 100000


@dataclass(frozen=True)
class TrainConfig:
    """minutes: wall time of this run. rank, scale: of the adapter. lr: peak. weights of the three losses. seeds name every batch."""

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
    eval_every: int = 200
    save_every_s: float = 90.0
    seed: int = 0
    workers: int = 0


class Attention:
    """The `attend` of training: holds the mask of the current batch; flex on a GPU, dense on a CPU."""

    def __init__(self, block: int, device: torch.device):
        self.block, self.device = block, device
        self.mask: BlockMask | Tensor | None = None

    def set(self, batch: Batch) -> None:
        if self.device.type == "cpu":
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
    """Model, adapter, optimizer and log of one run."""

    def __init__(
        self,
        model: Transformer,
        config: TrainConfig,
        out: str | Path,
        base: str,
        device: str | torch.device = "cpu",
        resume: str | Path | None = None,
    ):
        self.config, self.out, self.base = config, Path(out), base
        self.out.mkdir(parents=True, exist_ok=True)
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
            self.parameters, lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=self.device.type == "cuda"
        )
        self.attend = Attention(model.config.block_size, self.device)
        self.layers: list[Callable] = list(self.model.layers)
        if self.device.type == "cuda":
            self.layers = [torch.compile(layer, dynamic=False) for layer in self.model.layers]
        self.tokens_seen, self.step = 0, 0
        self._log = (self.out / "log.jsonl").open("a")

    def log(self, **fields) -> None:
        line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in fields.items()})
        self._log.write(line + "\n")
        self._log.flush()
        print(line, flush=True)

    def _resume(self, path: str | Path) -> None:
        tensors = load_adapter(path, base=self.base)
        with torch.no_grad():
            for name, module in self.wrapped.items():
                module.a.copy_(tensors[name + ".a"])
                module.b.copy_(tensors[name + ".b"] / module.scale)
            self.mask_row.copy_(tensors["mask_row"])

    def save(self, name: str = "adapter", int8: bool = False) -> Path:
        """Writes the adapter; bfloat16 to resume from, int8 to ship."""
        path = self.out / f"{name}.safetensors"
        part = path.with_suffix(".part")
        save_adapter(part, adapter_tensors(self.wrapped, self.mask_row), self.base, int8=int8)
        part.replace(path)
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
        means = [each[batch.kind == kind].sum() / (batch.kind == kind).sum().clamp_min(1) for kind in (PROSE, ANSWER, CLEAN)]
        c = self.config
        return c.prose_weight * means[0] + c.answer_weight * means[1] + c.clean_weight * means[2], means

    def _rate(self, elapsed_share: float, step_of_run: int) -> float:
        warm = min(1.0, (step_of_run + 1) / self.config.warmup_steps)
        left = max(0.0, 1.0 - elapsed_share) / self.config.decay_share
        return self.config.lr * min(warm, max(0.02, min(1.0, left)))

    @torch.no_grad()
    def answers_found(self, batches: Iterator[Batch], count: int) -> dict[int, tuple[int, int]]:
        """Denoises the answers of `count` all-masked batches and compares them with the truth.

        Several blocks of one answer are denoised beside the clean text of the blocks before them. Per step all tokens with probability
        above 0.9 are decided, and the most probable one of each copy.

        Returns:
            number of lines in the answer -> (answers wholly right, answers).
        """
        found: dict[int, list[int]] = {}
        for _ in range(count):
            batch = next(batches).to(self.device)
            keep = batch.kind == ANSWER
            source, target, at = batch.source[keep], batch.target[keep], batch.target_at[keep]
            truth = batch.tokens.clone()
            truth[at[:, 0], at[:, 1]] = target
            noisy = batch.noisy[at[:, 0], at[:, 1]]
            in_copy = noisy > 0
            copy = at[:, 0] * 4096 + noisy  # one number per (row, copy)
            open_ = in_copy.clone()
            right = torch.zeros_like(open_)
            for _ in range(self.model.config.block_size):
                logits = self.model.logits(self.hidden(batch)[source[:, 0], source[:, 1]]).float()
                logits[:, self.model.config.mask_id] = -torch.inf
                prob, token = logits.softmax(-1).max(-1)
                right = torch.where(in_copy, right, token == target)  # first tokens of blocks: predicted from clean text
                score = torch.where(open_, prob, -1.0)
                best = torch.full((int(copy.max()) + 1,), -1.0, device=self.device).scatter_reduce(0, copy, score, "amax")
                now = open_ & ((score > 0.9) | (score == best[copy]))
                batch.tokens[at[now, 0], at[now, 1]] = token[now]
                right = torch.where(now, token == target, right)
                open_ &= ~now
                if not open_.any():
                    break
            owner = torch.stack((at[:, 0], batch.branch[at[:, 0], at[:, 1]]), 1).tolist()
            whole: dict[tuple[int, int], bool] = {}
            for who, ok in zip(map(tuple, owner), right.tolist()):
                whole[who] = whole.get(who, True) and ok
            lines = self._answer_lines(batch, truth)
            for who, ok in whole.items():
                entry = found.setdefault(lines[who], [0, 0])
                entry[0] += ok
                entry[1] += 1
        return {k: (v[0], v[1]) for k, v in sorted(found.items())}

    def _answer_lines(self, batch: Batch, truth: Tensor) -> dict[tuple[int, int], int]:
        """(row, branch) -> lines of the answer, counted as newline tokens behind the last chat header of the clean branch."""
        lines = {}
        for row in range(batch.tokens.shape[0]):
            clean = batch.noisy[row] == 0
            for j in range(1, int(batch.branch[row].max()) + 1):
                tokens = batch.tokens[row][clean & (batch.branch[row] == j)].tolist()
                start = len(tokens) - 1 - tokens[::-1].index(self.header_id)
                lines[row, j] = sum(t == self.newline_id for t in tokens[start:])  # one more ends the header line itself
        return lines

    def run(self, stages: Sequence[Stage], tokenizer: Tokenizer, corpus: Corpus | None, held_out: Corpus | None) -> bool:
        """Trains through the stages; returns whether the last gate held. Saves adapter.safetensors (bf16) and adapter-int8.safetensors."""
        config, end_id = self.config, self.model.config.eos_ids[0]
        self.newline_id = tokenizer.encode("\n")[0]
        self.header_id = tokenizer.encode(tokenizer.render_chat([{"role": "user", "content": ""}]))[0]
        self.log(event="start", config=asdict(config), stages=[asdict(s) for s in stages], rows_seen=0)
        began = last_save = time.monotonic()
        ok = False
        for number, stage in enumerate(stages):
            shared = dict(layout=stage.layout, rows=stage.rows, mask_id=self.model.config.mask_id, end_id=end_id)
            batches = loader(RowMaker(tokenizer, corpus, **shared), config.seed * 10**6 + number * 10**5, config.workers)
            test = loader(
                RowMaker(tokenizer, held_out, held_out=True, all_masked=True, **shared), 10**9 + number * 10**5, min(config.workers, 2)
            )
            ok, window, tick = False, torch.zeros(3, device=self.device), time.monotonic()
            for stage_step in range(1, stage.max_steps + 1):
                elapsed = (time.monotonic() - began) / (60 * config.minutes)
                if elapsed >= 1:
                    break
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
                if stage_step % 50 == 0 or stage_step == 1:
                    span = 1 if stage_step == 1 else 50
                    prose, answer, clean = (window / span).tolist()
                    rate = span * batch.tokens.numel() / (time.monotonic() - tick)
                    self.log(
                        stage=number, step=self.step, minutes=(time.monotonic() - began) / 60, prose=prose, answer=answer, clean=clean,
                        lr=self.optimizer.param_groups[0]["lr"], tokens=self.tokens_seen, tokens_per_s=rate, memory_gib=self._memory(),
                    )  # fmt: skip
                    window.zero_()
                    tick = time.monotonic()
                if stage_step % config.eval_every == 0:
                    ok = self._gate(test, stage, number)
                    tick = time.monotonic()
                    if ok and stage_step >= stage.min_steps and number + 1 < len(stages):
                        break
                if time.monotonic() - last_save > config.save_every_s:
                    self.save(), self.save("adapter-int8", int8=True)
                    last_save = time.monotonic()
            else:
                if stage.gate is not None and not ok:
                    self.log(event="gate missed", stage=number, gate=stage.gate)
                    break
        ok = self._gate(test, stage, number)
        self.save(), self.save("adapter-int8", int8=True)
        self.log(event="end", step=self.step, tokens=self.tokens_seen, gate_held=ok)
        return ok

    def _gate(self, test: Iterator[Batch], stage: Stage, number: int) -> bool:
        found = self.answers_found(test, count=2)
        total = sum(n for _, n in found.values())
        share = sum(n for n, _ in found.values()) / max(total, 1)
        self.log(event="gate", stage=number, step=self.step, share=share, by_lines={str(k): list(v) for k, v in found.items()})
        return stage.gate is None or share >= stage.gate

    def _memory(self) -> float:
        return torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0


@contextlib.contextmanager
def timed(label: str) -> Iterator[None]:
    """Prints how long a block took."""
    began = time.monotonic()
    yield
    print(f"{label}: {time.monotonic() - began:.1f} s", flush=True)
