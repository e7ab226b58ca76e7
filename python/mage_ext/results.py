"""What the denoising loop reports: finished blocks, steps, results and their statistics, and a progress line for
terminals.

Test: pytest tests/python/test_denoise.py
"""

import sys
import time
from dataclasses import dataclass, field

from torch import Tensor

from mage_ext.selection import BlockSelection
from mage_ext.token_candidates import Candidates

FORWARD_KINDS = ("exact", "select", "sparse", "commit")


@dataclass(frozen=True)
class FinishedBlock:
    """A block whose tokens are final.

    Fields:
        request: index in the batch. index: number of the block of this request, from 0.
        tokens: its new tokens (the prompt's tail is not repeated), cut after EOS or the last wanted one.
        done: the request ended in it. error: why, where it failed; as in Result.
    """

    request: int
    index: int
    tokens: list[int]
    done: bool
    error: str | None = None


@dataclass(frozen=True)
class StepInfo:
    """One forward of a block, as a callback sees it. Tensors are the loop's own: read them, copy what is to be kept.

    Fields:
        index: number of the block, from 0. step: forward within the block, from 0; -1 for the commit.
        kind: "exact", "select" (exact, emits mass), "sparse", "commit", or "mixed" where requests differ.
        rows: query rows sent per request (a sub-block or the block).
        requests: batch index of every row of the tensors, None for an empty place. starts: absolute position of the
            block's first token, of each.
        tokens: [A, block], int64; the mask id where open. open: [A, block], bool, still undecided after this forward.
        decided: [A, block], bool, decided in this forward.
        selection: what the sparse layers attend, None in exact blocks. mass: [L, A, Hkv, n] where this forward emitted
            it. candidates: in its place, of a configuration that has them.
    """

    index: int
    step: int
    kind: str
    rows: int
    requests: list[int | None]
    starts: list[int]
    tokens: Tensor
    open: Tensor
    decided: Tensor
    selection: BlockSelection | None
    mass: Tensor | None
    candidates: Candidates | None


@dataclass
class RequestStats:
    """Costs of one request. Forwards count where the request took part, so a batch's forwards are not their sum.

    Fields:
        prompt_tokens, new_tokens: lengths.
        prefill_forwards: chunks of the prefill.
        forwards: of the blocks, by kind; every block but the last has one "commit".
        kept_mass: of every selection that was made, the mean over layers and KV heads.
        proven: of every selection out of candidates, the share of its lists that are proven to be those of all tokens.
        kv_bytes: K/V that the blocks' attention reads: whole context in dense layers and exact forwards, lists and tail
            in sparse ones.
        kv_bytes_exact: the same if every forward were exact.
        seconds: from the start of generation to the end of this request's last block, batch mates included; without
            prefill.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_forwards: int = 0
    forwards: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FORWARD_KINDS, 0))
    kept_mass: list[float] = field(default_factory=list)
    proven: list[float] = field(default_factory=list)
    kv_bytes: int = 0
    kv_bytes_exact: int = 0
    seconds: float = 0.0

    @property
    def num_forwards(self) -> int:
        """Forwards of all kinds, commits included, prefill not."""
        return sum(self.forwards.values())

    @property
    def tokens_per_forward(self) -> float:
        """New tokens per forward, commits included; 0 without a forward."""
        return self.new_tokens / self.num_forwards if self.num_forwards else 0.0

    @property
    def kv_share(self) -> float:
        """kv_bytes as a share of kv_bytes_exact; 1 where nothing was read."""
        return self.kv_bytes / self.kv_bytes_exact if self.kv_bytes_exact else 1.0


@dataclass
class Result:
    """What became of one request.

    Fields:
        request: index in the batch.
        tokens: new tokens, EOS included. text: of a tokenizer, if one was given.
        finish: "eos", "length", "refused" (the cache has no pages for it; error says how many it lacks) or "failed"
            (the model gave a position that was decided no logit above -inf; tokens are those of the blocks before).
        stats: costs.
    """

    request: int
    tokens: list[int]
    finish: str
    stats: RequestStats
    text: str | None = None
    error: str | None = None


def check_answered(owner: str, results: list[Result]) -> None:
    """Raises ValueError if a request was refused or failed."""
    for result in results:
        if result.error is not None:
            raise ValueError(f"{owner}: request {result.request} {result.finish}: {result.error}")


class Progress:
    """One line on stderr, rewritten in place; nothing at all where stderr is no terminal."""

    def __init__(self, enabled: bool = True):
        self._enabled = enabled and sys.stderr.isatty()
        self._due = 0.0
        self._shown = False

    def show(self, text: str) -> None:
        """Replaces the line, at most ten times a second."""
        now = time.monotonic()
        if self._enabled and now >= self._due:
            sys.stderr.write(f"\r\x1b[K{text}")
            sys.stderr.flush()
            self._due, self._shown = now + 0.1, True

    def clear(self) -> None:
        """Removes the line."""
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._shown = False
