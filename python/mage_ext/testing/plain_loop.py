"""The slow twin of the denoising loop: one request, no paged cache, no mage op, every forward sends the whole window.

Masks are explicit booleans, selections are Python lists, samplers are written out position by position. It shares no
code with `mage_ext.denoise` beyond the configuration objects and the random draws, so that the two can be held against
each other. With `sub_block_cache`, K/V of rows that a forward does not send stay in plain tensors: the twin of that
cache.

Test: pytest tests/python/test_denoise.py
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mage_ext.denoise import DenoiseConfig
from mage_ext.models.transformer import Transformer
from mage_ext.sampling import draw_tokens

# (layer, kv head) -> units that are attended below the tail; units at or after `tail` always are.
Lists = dict[tuple[int, int], list[int]]


@dataclass
class PlainStep:
    """One forward of a block: what the sampler saw and did.

    Fields:
        confidences, entropies: of the candidates, in order of position. num_decided: how many it decided.
        rows: positions sent whose logits were wanted: the block or a sub-block. sparse: lists were used.
    """

    confidences: list[float]
    entropies: list[float]
    num_decided: int
    rows: int
    sparse: bool


@dataclass
class PlainResult:
    """Tokens and trace of one request. Fields: tokens, EOS included; finish: "eos" or "length"; steps: of all blocks;
    commits."""

    tokens: list[int]
    finish: str
    steps: list[PlainStep] = field(default_factory=list)
    commits: int = 0


def block_causal_mask(num_tokens: int, block_size: int) -> Tensor:
    """[T, T], bool: row i may attend column j if j's block is not later than i's."""
    block = torch.arange(num_tokens) // block_size
    return block[:, None] >= block[None, :]


class PlainWindow:
    """K and V of a window of tokens in plain tensors, and forwards of some or all of its rows.

    Args:
        model: a Transformer. num_tokens: T.
    """

    def __init__(self, model: Transformer, num_tokens: int):
        config = model.config
        weight = model.embed_tokens.weight
        shape = (config.num_layers, 2, num_tokens, config.num_kv_heads, config.head_dim)
        self.model = model
        self.kv = torch.full(shape, math.nan, dtype=weight.dtype)
        self.shares: list[Tensor] = []

    def forward(self, tokens: list[int], rows: list[int], allowed: Callable[[int], Tensor]) -> Tensor:
        """Logits [rows, V] of the given positions; their K/V replace what the window held.

        Args:
            tokens: of the whole window. rows: positions to send.
            allowed: layer -> [Hkv, rows, T] or [1, rows, T], bool, what each row attends.
        Notes:
            `shares` holds the softmax [Hkv, G, rows, T] of every layer afterwards.
        """
        self.shares = []
        row_index = torch.tensor(rows)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.kv[layer, 0, row_index], self.kv[layer, 1, row_index] = k[0], v[0]
            mask = allowed(layer)
            seen = mask.any(0).any(0)  # rows that nobody attends may be unwritten
            keys, values = torch.where(seen[:, None, None], self.kv[layer], 0)
            q = q[0].unflatten(1, (keys.shape[1], -1))  # [rows, Hkv, G, D]
            scores = torch.einsum("rhgd,thd->hgrt", q, keys) * q.shape[-1] ** -0.5
            share = torch.softmax(scores.masked_fill(~mask[:, None], -math.inf), -1)
            self.shares.append(share)
            return torch.einsum("hgrt,thd->rhgd", share, values).flatten(1, 2)[None]

        with torch.no_grad():
            return self.model(torch.tensor([tokens])[:, row_index], row_index[None], attend)[0]


def plain_generate(model: Transformer, prompt: list[int], config: DenoiseConfig, seed: int = 0) -> PlainResult:
    """Generates after one prompt by re-forwarding the window.

    Args:
        model: a Transformer on the CPU. prompt: token ids.
        config: as for `generate`; in mode "mage" only rule "fixed" with score "mean", norm "context", no sinks or
            recents.
        seed: of the draws at temperature > 0.
    """
    selection = config.selection
    simple = (selection.rule, selection.score, selection.norm, selection.sinks, selection.recents)
    if config.mode == "mage" and simple != ("fixed", "mean", "context", 0, 0):
        raise ValueError(f"plain_generate: selection must be the plain fixed rule, got {selection}")
    shift, size = model.config.token_shift, model.config.block_size
    sub = config.sub_block_size or model.config.sub_block_size or size
    eos = () if config.ignore_eos else model.config.eos_ids
    limit = len(prompt) + config.max_new_tokens
    result = PlainResult([], "length")
    tokens = list(prompt)
    lists: Lists | None = None
    tail = age = 0
    drifted = False

    def ended(known: list[int | None]) -> int | None:
        """Number of tokens up to the end of the request, if all of them are decided."""
        for position in range(len(known)):
            if known[position] is None:
                return None
            if position >= len(prompt) and known[position] in eos:
                return position + 1
            if position + 1 == limit:
                return limit
        return None

    # Under token shift, a prompt of whole blocks is followed by what its last logits say.
    if shift and len(tokens) % size == 0:
        tokens.append(_best(model, _whole_window(model, tokens)[-1]))
    while True:
        begin = len(tokens) // size * size
        known: list[int | None] = [*tokens, *[None] * (begin + size - len(tokens))]
        window = PlainWindow(model, begin + size)
        open_at_start = [i for i in range(begin, begin + size) if known[i] is None]
        counted_rows = [i - shift - begin for i in open_at_start] if selection.score_rows == "open" else range(size)
        exact = config.mode == "exact" or begin <= selection.k
        selects = not exact and (
            lists is None
            or config.refresh == "block"
            or (config.refresh == "blocks" and age >= config.refresh_blocks)
            or (config.refresh == "kept_mass" and drifted)
        )
        step = 0
        for sub_begin in range(begin, begin + size, sub):
            while any(known[i] is None for i in range(sub_begin, sub_begin + sub)) and ended(known) is None:
                send_all = not config.sub_block_cache or step < config.exact_steps or known[sub_begin] is None
                rows = list(range(begin + size)) if send_all else list(range(sub_begin, sub_begin + sub))
                sparse = not exact and not (selects and step < config.exact_steps)
                shown = [model.config.mask_id if token is None else token for token in known]
                logits = window.forward(
                    shown, rows, _allowed(model, config, rows, begin, lists if sparse else None, tail)
                )
                if selects and step == config.exact_steps - 1:
                    counted = [rows.index(begin + row) for row in counted_rows if begin + row in rows]
                    mass = _mass(window, counted, selection.g)
                    lists = _top_units(mass, begin, selection.k, selection.g, config.dense_layers)
                    tail, age = begin // selection.g * selection.g, 0
                candidates = [i for i in range(sub_begin, sub_begin + sub) if known[i] is None]
                consumed = logits[[rows.index(i - shift) for i in candidates]]
                drawn = _draw(model, config, consumed, candidates, seed, step)
                decided = _decide(config, drawn)
                for index in decided:
                    known[candidates[index]] = drawn[index][0]
                result.steps.append(
                    PlainStep([d[1] for d in drawn], [d[2] for d in drawn], len(decided), len(rows[-size:]), sparse)
                )
                step += 1
        end = ended(known)
        if end is not None:
            result.tokens = [token for token in known[len(prompt) : end] if token is not None]
            result.finish = "eos" if result.tokens[-1] in eos else "length"
            return result
        # The clean block stays; its last logits predict the next block's first token.
        tokens = [token for token in known if token is not None]
        logits = _whole_window(model, tokens, window)
        result.commits += 1
        age += 1
        if lists is not None and config.refresh == "kept_mass":
            mass = _mass(window, list(range(begin, begin + size)), selection.g)
            drifted = _kept(mass, lists, tail // selection.g) < config.refresh_bound
        if shift:
            tokens.append(_best(model, logits[-1]))


def _whole_window(model: Transformer, tokens: list[int], window: PlainWindow | None = None) -> Tensor:
    mask = block_causal_mask(len(tokens), model.config.block_size)[None]
    return (window or PlainWindow(model, len(tokens))).forward(tokens, list(range(len(tokens))), lambda layer: mask)


def _without_mask(model: Transformer, logits: Tensor) -> Tensor:
    logits = logits.float().clone()
    logits[..., model.config.mask_id] = -math.inf
    return logits


def _best(model: Transformer, logits: Tensor) -> int:
    return int(_without_mask(model, logits).argmax())


def _allowed(
    model: Transformer, config: DenoiseConfig, rows: list[int], begin: int, lists: Lists | None, tail: int
) -> Callable[[int], Tensor]:
    """layer -> [Hkv, rows, T]: block-causal, and in selecting layers the block's rows see lists and tail alone."""
    size = model.config.block_size
    causal = block_causal_mask(begin + size, size)[rows]  # [rows, T]
    num_heads = model.config.num_kv_heads
    in_block = torch.tensor([row >= begin for row in rows])

    def allowed(layer: int) -> Tensor:
        mask = causal.expand(num_heads, -1, -1).clone()
        if lists is not None and layer not in config.dense_layers:
            for head in range(num_heads):
                kept = torch.zeros(begin + size, dtype=torch.bool)
                kept[tail:] = True
                for unit in lists[layer, head]:
                    kept[unit * config.selection.g : (unit + 1) * config.selection.g] = True
                mask[head, in_block] &= kept
        return mask

    return allowed


def _mass(window: PlainWindow, rows: list[int], g: int) -> Tensor:
    """[layers, Hkv, units]: mean share of every unit over some of the rows sent and the heads of a group."""
    shares = torch.stack([share[:, :, rows].mean((1, 2)) for share in window.shares])
    padding = -shares.shape[-1] % g
    return torch.nn.functional.pad(shares, (0, padding)).unflatten(-1, (-1, g)).sum(-1)


def _top_units(mass: Tensor, begin: int, k: int, g: int, dense_layers: tuple[int, ...]) -> Lists:
    """The heaviest units below the prefix's partial one; a partial unit is charged to k."""
    budget = max(k // g - (1 if begin % g else 0), 0)
    lists: Lists = {}
    for layer, heads in enumerate(mass.tolist()):
        for head, units in enumerate(heads):
            order = sorted(range(begin // g), key=lambda unit: (-units[unit], unit))
            if layer not in dense_layers:
                lists[layer, head] = sorted(order[:budget])
    return lists


def _kept(mass: Tensor, lists: Lists, first_tail_unit: int) -> float:
    kept = [
        float(mass[layer, head, units].sum() + mass[layer, head, first_tail_unit:].sum())
        for (layer, head), units in lists.items()
    ]
    return sum(kept) / len(kept)


def _draw(
    model: Transformer, config: DenoiseConfig, logits: Tensor, positions: list[int], seed: int, step: int
) -> list[tuple[int, float, float]]:
    """(token, confidence, entropy) per candidate."""
    sampler = config.sampler
    if sampler.temperature > 0:
        draws = draw_tokens(
            logits,
            mask_id=model.config.mask_id,
            temperature=sampler.temperature,
            top_k=sampler.top_k,
            top_p=sampler.top_p,
            seeds=torch.tensor(seed),
            positions=torch.tensor(positions),
            step=step,
        )
        return list(zip(draws.token.tolist(), draws.confidence.tolist(), draws.entropy.tolist(), strict=True))
    drawn = []
    for row in _without_mask(model, logits):
        probs = torch.softmax(row, -1)
        token = int(probs.argmax())
        entropy = -float(sum(p * math.log(p) for p in probs.tolist() if p > 0))
        drawn.append((token, float(probs[token]), entropy))
    return drawn


def _decide(config: DenoiseConfig, drawn: list[tuple[int, float, float]]) -> list[int]:
    """Indices of the candidates that are decided."""
    sampler = config.sampler
    count = range(len(drawn))
    by_confidence = sorted(count, key=lambda i: (-drawn[i][1], i))
    if sampler.name == "sequential":
        return list(count)[: sampler.tokens_per_step]
    if sampler.name == "low_confidence_static":
        return by_confidence[: sampler.tokens_per_step]
    if sampler.name == "low_confidence_dynamic":
        return [i for i in count if drawn[i][1] > sampler.threshold or i == by_confidence[0]]
    decided, total = [], 0.0
    for i in sorted(count, key=lambda i: (drawn[i][2], i)):
        if total > sampler.entropy_bound:
            break
        decided.append(i)
        total += drawn[i][2]
    return decided
