"""What `mage generate` and `mage chat` show: text as blocks finish, and on a terminal the block unmasking itself.

Test: pytest tests/python/test_cli.py
"""

import sys
from collections.abc import Sequence
from typing import TextIO

from mage_ext.denoise import DenoiseConfig, generate
from mage_ext.models.huggingface import LoadedModel
from mage_ext.models.tokenizer import Tokenizer
from mage_ext.results import Result, StepInfo, check_answered

_DIM, _BOLD, _PLAIN, _CLEAR = "\x1b[2m", "\x1b[1m", "\x1b[0m", "\r\x1b[K"
_OPEN = "\u2591"  # one per undecided position


class Unmasking:
    """A step callback that redraws the block of request 0 in place: undecided positions shaded, new tokens bold."""

    def __init__(self, tokenizer: Tokenizer, prompt_tokens: int, out: TextIO):
        self.tokenizer, self.prompt_tokens, self.out = tokenizer, prompt_tokens, out

    def __call__(self, info: StepInfo) -> None:
        if info.kind == "commit" or 0 not in info.requests:
            return
        row = info.requests.index(0)
        first = max(0, self.prompt_tokens - info.starts[row])
        tokens, open_, new = (t[row, first:].tolist() for t in (info.tokens, info.open, info.decided))
        pieces = []
        for token, is_open, is_new in zip(tokens, open_, new, strict=True):
            if is_open:
                pieces.append(f"{_DIM}{_OPEN}{_PLAIN}")
            else:
                text = self.tokenizer.decode([token]).replace("\n", " ")
                pieces.append(f"{_BOLD}{text}{_PLAIN}" if is_new else text)
        self.out.write(f"{_CLEAR}{_DIM}{info.step + 1:>3} {info.kind:<6}{_PLAIN} {''.join(pieces)}")
        self.out.flush()


def write(
    loaded: LoadedModel, prompt: Sequence[int], config: DenoiseConfig, seed: int, out: TextIO | None = None
) -> Result:
    """Generates one answer and prints it block by block; on a terminal each block is seen to unmask first.

    Args:
        loaded: model and tokenizer. prompt: ids. config: of the loop. seed: of the draws. out: where to; None: stdout.
    Returns:
        The result, its text decoded.
    Raises:
        ValueError: the model gave no answer; what there was of one is printed.
    """
    out = out or sys.stdout
    live = out.isatty()
    callback = Unmasking(loaded.tokenizer, len(prompt), out) if live else None
    blocks = generate(
        loaded.model,
        [list(prompt)],
        config,
        seeds=[seed],
        callback=callback,
        stream=True,
        tokenizer=loaded.tokenizer,
        progress=True,
    )
    tokens: list[int] = []
    shown = ""
    for block in blocks:
        tokens += block.tokens
        text = loaded.tokenizer.decode(tokens)
        if live:
            out.write(_CLEAR)
        # Bytes that the next block may complete to a character come with it.
        whole = text.rstrip("\ufffd")
        out.write(whole[len(shown) :])
        out.flush()
        shown = whole
    out.write(f"{loaded.tokenizer.decode(tokens)[len(shown) :]}\n")
    check_answered("generate", blocks.results)
    return blocks.results[0]


def cost_line(result: Result) -> str:
    """One line of what a result took."""
    stats = result.stats
    proven = f", {100 * sum(stats.proven) / len(stats.proven):.0f} % of the lists proven" if stats.proven else ""
    return (
        f"{stats.new_tokens} tokens in {stats.num_forwards} forwards ({stats.tokens_per_forward:.2f} per forward), "
        f"{stats.seconds:.2f} s after prefill, {100 * stats.kv_share:.1f} % of the K/V that exact attention reads"
        f"{proven}"
    )
