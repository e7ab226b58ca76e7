"""Two-stream block-diffusion rows with a shared context and many questions, and the one rule of what sees what.

A row is [trunk | branches | noisy blocks], each part a run of tokens with absolute positions:

    trunk     the clean context, block-causal
    branch j  a clean question with its answer, as if it followed the trunk; it does not see other branches
    noisy     copies of single blocks of trunk or branch with some tokens masked; a copy sees the clean blocks before
              its own, and itself

That is the two-stream loss of BD3-LM (arXiv 2503.09573) restricted to sampled blocks, so it is unbiased, with one
context serving many questions. Every block is noised as a complementary pair (Fast-dLLM v2, arXiv 2509.26328): each
maskable token is masked in exactly one copy. With the token shift a masked position i is read at i - 1 of the same
copy, and a block's first token at the last clean token of the block before.

Test: pytest tests/python/test_packing.py
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

PROSE, ANSWER, CLEAN = 0, 1, 2  # kinds of targets


@dataclass(frozen=True)
class Layout:
    """Sizes of the parts of a row in tokens; all rows of a batch share it.

    Fields:
        trunk: context. branches, branch_tokens: number and clean tokens of the branches.
        branch_blocks: noised blocks per branch (an answer may cross a block's end). trunk_blocks: those of the trunk.
        block: tokens of a block.
    """

    trunk: int
    branches: int
    branch_tokens: int = 128
    branch_blocks: int = 2
    trunk_blocks: int = 6
    block: int = 32

    def __post_init__(self):
        for name, least in (
            ("block", 2),
            ("trunk", 1),
            ("branches", 0),
            ("branch_tokens", 1),
            ("branch_blocks", 1),
            ("trunk_blocks", 0),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"Layout: {name} must be an integer of at least {least}, got {value!r}")
        for name in ("trunk", "branch_tokens"):
            if getattr(self, name) % self.block:
                raise ValueError(
                    f"Layout: {name} must be a multiple of block ({self.block}), got {getattr(self, name)}"
                )

    @property
    def clean(self) -> int:
        return self.trunk + self.branches * self.branch_tokens

    @property
    def tokens(self) -> int:
        """Tokens of a row, rounded up to 128 (the tile of the attention mask)."""
        noisy = 2 * self.block * (self.branches * self.branch_blocks + self.trunk_blocks)
        return -(-(self.clean + noisy) // 128) * 128


@dataclass(frozen=True)
class Branch:
    """A question after the trunk: `tokens` [n]; those from `answer_start` on are the answer (end token included)."""

    tokens: Sequence[int]
    answer_start: int


@dataclass
class Batch:
    """Packed rows, int64 [rows, tokens] each, and the targets of all rows.

    Fields:
        tokens, positions. branch: 0 trunk, j >= 1 branch j, -1 padding.
        noisy: 0 clean, else the number of the copy within the row.
        source: [N, 2] (row, index) whose logits predict. target: [N] token. kind: [N] PROSE, ANSWER or CLEAN.
        target_at: [N, 2] (row, index) of the token that is predicted.
    """

    tokens: Tensor
    positions: Tensor
    branch: Tensor
    noisy: Tensor
    source: Tensor
    target: Tensor
    kind: Tensor
    target_at: Tensor

    def to(self, device: str | torch.device) -> "Batch":
        return Batch(**{name: value.to(device, non_blocking=True) for name, value in vars(self).items()})


def visible(
    q_branch: Tensor, q_noisy: Tensor, q_block: Tensor, k_branch: Tensor, k_noisy: Tensor, k_block: Tensor
) -> Tensor:
    """Whether a query token sees a key token: bool, of the broadcast shape of their branch, copy and absolute block."""
    own_copy = (q_noisy > 0) & (q_noisy == k_noisy)
    same_text = (k_noisy == 0) & ((k_branch == 0) | (k_branch == q_branch))
    before = (k_block < q_block) | ((k_block == q_block) & (q_noisy == 0))
    return own_copy | (same_text & before)


def dense_mask(batch: Batch, block: int) -> Tensor:
    """[rows, 1, tokens, tokens] bool of `visible`, for scaled_dot_product_attention."""
    b, n, k = batch.branch, batch.noisy, batch.positions // block
    return visible(b[:, :, None], n[:, :, None], k[:, :, None], b[:, None], n[:, None], k[:, None])[:, None]


def pack(
    rng: np.random.Generator,
    layout: Layout,
    trunks: Sequence[Sequence[int]],
    branches: Sequence[Sequence[Branch]],
    mask_id: int,
    end_id: int,
    epsilon: float = 1e-3,
    all_masked: bool = False,
) -> Batch:
    """Packs one row per trunk.

    Args:
        rng: noise and choice of trunk blocks.
        trunks: tokens of each row, cut to layout.trunk and to whole blocks.
        branches: of each row, at most layout.branches.
        mask_id, end_id: tokens of an undecided position and of what fills a block behind an answer's end.
        epsilon: least share of masked tokens; per copy the share is t ~ U(0, 1), (1 - epsilon) t + epsilon.
        all_masked: every maskable token of the first copy is masked and none of the second, as a denoised block starts.
    Raises:
        ValueError: trunks and branches differ in number, a row has more than layout.branches, a branch has no answer,
            is longer than layout.branch_tokens, or its answer crosses more blocks than layout.branch_blocks.
    """
    if len(branches) != len(trunks):
        raise ValueError(f"pack: branches must have an entry for each of {len(trunks)} trunks, got {len(branches)}")
    rows, size, block = len(trunks), layout.tokens, layout.block
    tokens = np.full((rows, size), end_id, np.int64)
    positions = np.zeros((rows, size), np.int64)
    branch_of = np.full((rows, size), -1, np.int64)
    noisy_of = np.zeros((rows, size), np.int64)
    source: list[tuple[int, int]] = []
    target: list[int] = []
    kind: list[int] = []
    target_at: list[tuple[int, int]] = []

    def predict(row: int, at: int, token: int, what: int) -> None:
        """The token at `at` is predicted by the logits before it."""
        source.append((row, at - 1))
        target.append(token)
        kind.append(what)
        target_at.append((row, at))

    for row in range(rows):
        trunk = np.asarray(trunks[row][: layout.trunk // block * block], np.int64)
        trunk = trunk[: len(trunk) // block * block]
        tokens[row, : len(trunk)] = trunk
        positions[row, : layout.trunk] = np.arange(layout.trunk)
        branch_of[row, : len(trunk)] = 0
        for first in range(block, len(trunk), block):
            predict(row, first, trunk[first], CLEAN)
        copies = []  # (index of the clean block in the row, branch, maskable [block] bool, kind)
        if len(trunk) > block and layout.trunk_blocks:
            later = np.arange(1, len(trunk) // block)
            picked = rng.choice(later, min(layout.trunk_blocks, len(later)), replace=False)
            copies += [(a * block, 0, np.arange(block) > 0, PROSE) for a in picked]
        if len(branches[row]) > layout.branches:
            raise ValueError(f"pack: branches must be at most {layout.branches} per row, got {len(branches[row])}")
        for j, piece in enumerate(branches[row]):
            count = len(piece.tokens)
            if not 0 <= piece.answer_start < count:
                raise ValueError(f"pack: answer_start of a branch must be in [0, {count}), got {piece.answer_start}")
            start = layout.trunk + j * layout.branch_tokens
            length = -(-count // block) * block
            blocks = range(piece.answer_start // block, length // block)
            if length > layout.branch_tokens or len(blocks) > layout.branch_blocks:
                raise ValueError(
                    f"pack: a branch must fit {layout.branch_tokens} tokens, its answer {layout.branch_blocks} blocks, "
                    f"got {count} tokens with the answer from {piece.answer_start}"
                )
            tokens[row, start : start + count] = piece.tokens
            positions[row, start : start + length] = len(trunk) + np.arange(length)
            branch_of[row, start : start + length] = j + 1
            for a in blocks:
                place = a * block + np.arange(block)
                copies.append((start + a * block, j + 1, (place >= piece.answer_start) & (place % block > 0), ANSWER))
                if piece.answer_start <= a * block < count and a > 0:
                    predict(row, start + a * block, tokens[row, start + a * block], ANSWER)
        at = layout.clean
        for number, (clean, owner, maskable, what) in enumerate(copies):
            share = (1 - epsilon) * rng.random() + epsilon
            first = maskable if all_masked else maskable & (rng.random(block) < share)
            for half, masked in enumerate((first, np.zeros(block, bool) if all_masked else maskable & ~first)):
                here = slice(at, at + block)
                tokens[row, here] = np.where(masked, mask_id, tokens[row, clean : clean + block])
                positions[row, here] = positions[row, clean : clean + block]
                branch_of[row, here] = owner
                noisy_of[row, here] = 2 * number + half + 1
                for i in np.flatnonzero(masked):
                    predict(row, at + i, tokens[row, clean + i], what)
                at += block
    as_tensor = torch.from_numpy
    return Batch(
        as_tensor(tokens),
        as_tensor(positions),
        as_tensor(branch_of),
        as_tensor(noisy_of),
        torch.tensor(source, dtype=torch.int64).reshape(-1, 2),
        torch.tensor(np.array(target, np.int64)),
        torch.tensor(kind, dtype=torch.int64),
        torch.tensor(target_at, dtype=torch.int64).reshape(-1, 2),
    )
