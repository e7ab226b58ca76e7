"""What one block reads of its prompt, forward by forward, per layer and KV head: measured, and shown as an HTML page.

`inspect_block` runs an answer up to one of its blocks as the loop does and measures beside it, in every forward and
every layer, the exact attention mass of every token, sparse forwards included. `page` shows the text shaded by that
mass and outlined where the block's lists have it, with controls for layer, KV head and forward (`inspection.js`).

Test: pytest tests/python/test_inspection.py
"""

import base64
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mage_ext import selection
from mage_ext._arguments import check_index
from mage_ext.denoise import DenoiseConfig, generate, prefill
from mage_ext.evaluation import pages
from mage_ext.models.huggingface import LoadedModel
from mage_ext.models.tokenizer import Tokenizer
from mage_ext.paged_forward import Emission, PagedForward
from mage_ext.results import StepInfo
from mage_ext.selection import BlockSelection, SelectionConfig
from mage_ext.token_candidates import select_tokens

DECADES = 6  # of masses that a page tells apart, below the largest of a layer, head and forward
MAX_MASS_BYTES = 48 << 20  # of a page
_LONGEST_CHARACTER = 4  # bytes of UTF-8, which may be as many tokens


@dataclass
class Inspection:
    """A block of an answer. S is the prefix and the block.

    Fields:
        config: of the run. layers: layer -> index in the lists, of those that select. block: its number, from 0.
        prefix: ids before the block. tokens: [block], its ids after the last forward, the mask id where a position
            stayed open.
        decided_at: per position of the block the forward that decided it, -1 known before, None never.
        kinds: of every forward, "exact", "select" or "sparse".
        masses: [T, L, Hkv, S], float32, on the CPU: share of the exact attention of a forward that a token has, mean
            over the rows that config.selection.score_rows names.
        lists: [layers that select, Hkv, units], bool: which units of g tokens the lists of the first forward hold.
        tail_start: first token that is attended without being listed.
        proven: with candidates, the share of the lists that are proven to be those of all tokens; else None.
    """

    config: DenoiseConfig
    layers: dict[int, int]
    block: int
    prefix: list[int]
    tokens: list[int]
    decided_at: list[int | None]
    kinds: list[str]
    masses: Tensor
    lists: Tensor
    tail_start: int
    proven: float | None = None

    def listed(self) -> Tensor:
        """[L, Hkv, S], bool: the tokens that a list holds; none in dense layers."""
        length = self.masses.shape[-1]
        found = torch.zeros(*self.masses.shape[1:], dtype=torch.bool)
        for layer, index in self.layers.items():
            tokens = self.lists[index].repeat_interleave(self.config.selection.g, -1)[:, :length]
            found[layer, :, : tokens.shape[-1]] = tokens
        return found

    def kept(self) -> tuple[Tensor, Tensor]:
        """[T, L, Hkv] twice: the mass of a forward that the lists keep, with everything from tail_start on, and the
        most that lists of as many units could keep of it. Both 1 in dense layers."""
        g = self.config.selection.g
        masses = self.masses.double()
        kept, best = (torch.ones(self.masses.shape[:3], dtype=torch.float64) for _ in range(2))
        head = masses[..., : self.tail_start]
        tail = masses[..., self.tail_start :].sum(-1)
        for layer, index in self.layers.items():
            units = head[:, layer].unflatten(-1, (-1, g)).sum(-1) if self.tail_start else head[:, layer]
            listed = self.lists[index, :, : units.shape[-1]]
            kept[:, layer] = torch.where(listed, units, 0.0).sum(-1) + tail[:, layer]
            ranked = units.sort(-1, descending=True).values
            inside = torch.arange(units.shape[-1]) < listed.sum(-1, keepdim=True)
            best[:, layer] = torch.where(inside, ranked, 0.0).sum(-1) + tail[:, layer]
        return kept, best


class _Observed:
    """An AttentionMethod that attends as MAGE does (or exactly) and measures the mass of every forward.

    Fields (of the block that is running):
        masses: one list per forward, of one tensor [Hkv, n], float32, per layer. lists: of the first forward.
        proven: share of them that are proven to be those of all tokens, with candidates. start: tokens before it.
        is_sparse: whether its later forwards read the lists.
    """

    def __init__(self, config: DenoiseConfig, layers: dict[int, int], known: int, token_shift: bool):
        self.masses: list[list[Tensor]] = []
        self.lists: BlockSelection | None = None
        self.proven: float | None = None
        self.start, self.is_sparse = -1, False
        self._config, self._layers, self._known, self._shift = config, layers, known, int(token_shift)
        self._row_mask: Tensor | None = None
        self._emission: Emission | None = None

    def prepare(self) -> None:
        """Nothing: nothing is kept of K."""

    def written(self, forward: PagedForward, layer: int, k: Tensor, k_cache: Tensor) -> None:
        """See AttentionMethod. Nothing is kept of K."""

    def _begin(self, start: int, q: Tensor, prefix_lens: Tensor) -> None:
        """A block: everything anew."""
        config = self._config
        known = self._known if self.start < 0 else 0
        self.start, self.masses, self.lists = start, [], None
        self.is_sparse = config.mode == "mage" and start > config.exact_prefix
        if config.selection.score_rows == "open":
            predicts = (
                torch.arange(q.shape[1], device=q.device) + self._shift
            )  # the position that a row's logits predict
            self._row_mask = ((predicts >= known) & (predicts < q.shape[1]))[None]
        self._emission = Emission(config.selection, self._row_mask, prefix_lens)

    def attend(self, forward: PagedForward, layer: int, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """See AttentionMethod. Every layer comes here; what selects is in `layers`."""
        if layer == 0:
            start = int(forward.prefix_lens[0])
            if start != self.start:
                self._begin(start, q, forward.prefix_lens)
            self.masses.append([])
        index = self._layers.get(layer)
        seen = Emission(SelectionConfig(k=1, g=1), self._row_mask, forward.prefix_lens)
        out = forward.emit(seen, q, k_cache, v_cache, forward.seq_lens)
        self.masses[-1].append(seen.masses[0][0])
        if index is None:
            return out
        if len(self.masses) == 1:
            out = forward.emit(self._emission, q, k_cache, v_cache, forward.seq_lens)
            if index == len(self._layers) - 1:
                mass, votes = self._emission.mass(), self._emission.stacked_votes()
                candidates = self._emission.candidates()
                if candidates is None:
                    self.lists = selection.select(mass, forward.prefix_lens, self._config.selection, votes=votes)
                else:
                    self.lists, proven = select_tokens(candidates, forward.prefix_lens, self._config.selection)
                    self.proven = proven.float().mean().item()
        elif self.is_sparse:
            lists = self.lists.layer(index)
            out = forward.attend_lists(q, k_cache, v_cache, forward.seq_lens, lists, self._config.selection.g)
        return out

    def tokens_read(self, prefix_len: int, num_tokens: int) -> float:
        """See AttentionMethod. What is measured counts, so everything."""
        return num_tokens


def inspect_block(
    loaded: LoadedModel, prompt: Sequence[int], config: DenoiseConfig, *, block: int = 0, seed: int = 0
) -> Inspection:
    """Runs an answer up to a block and measures what that block reads.

    Args:
        loaded: the model, on any device. prompt: ids.
        config: mode "mage" decides as MAGE does: sparse from the second forward on, in the layers that select. Mode
            "exact" is exact throughout; its lists are those that MAGE would have used. A prefix of at most
            config.exact_prefix tokens makes mode "mage" exact, as in the loop. Every block selects anew.
        block: number of the block, from 0. The prompt's tail is in block 0. seed: of the draws.
    Raises:
        ValueError: another mode, sub-block caches or several exact steps; a block that the answer does not have, or
            whose tokens the forward before it decided; masses that would fill more than MAX_MASS_BYTES. Both of
            `generate`, naming the argument.
    """
    owner = "inspect_block"
    if config.mode not in ("mage", "exact") or config.sub_block_cache or config.exact_steps != 1:
        raise ValueError(
            f"{owner}: config must have mode mage or exact, no sub_block_cache and exact_steps 1, got "
            f"{config.mode}, {config.sub_block_cache}, {config.exact_steps}"
        )
    model, facts = loaded.model, loaded.config
    layers = dataclasses.replace(config, mode="mage").selecting_layers(facts.num_layers)
    size, forwards = facts.block_size, config.sampler.max_forwards(facts.block_size)
    check_index(owner, "block", block, 1 + (len(prompt) % size + config.max_new_tokens - 1) // size)
    num_bytes = (len(prompt) + (block + 1) * size) * facts.num_layers * facts.num_kv_heads * forwards
    if num_bytes > MAX_MASS_BYTES:
        raise ValueError(
            f"{owner}: prompt must be shorter, or decided in fewer forwards: {len(prompt)} tokens in {forwards} "
            f"forwards need {num_bytes} bytes of a page, {MAX_MASS_BYTES} are the most"
        )
    state = prefill(model, [list(prompt)], config, seeds=[seed], progress=True)
    method = _Observed(config, layers, len(state.pending[0]), facts.token_shift)
    infos: list[StepInfo] = []

    def keep(info: StepInfo) -> None:
        if info.step >= 0 and info.index == block:
            copies = {name: getattr(info, name).cpu().clone() for name in ("tokens", "open", "decided")}
            infos.append(dataclasses.replace(info, **copies))

    plain = dict(dense_layers=(), cuda_graphs=False, refresh="block", fuse_commit=False)
    run = dataclasses.replace(config, mode="method", method=method, **plain)
    context = list(prompt)
    with generate(model, state, run, callback=keep, stream=True) as blocks:
        for finished in blocks:
            if finished.index == block:
                break
            context += finished.tokens
    if not infos:
        if finished.index == block:
            told = f"got {block}, whose tokens the forward before it decided"
            raise ValueError(f"{owner}: block must be one with a forward of its own, {told}")
        raise ValueError(f"{owner}: block must be below {finished.index + 1}, the answer's blocks, got {block}")
    length = method.start + size
    masses = torch.stack([torch.stack(each)[..., :length].cpu() for each in method.masses])
    while len(infos) > 1 and not infos[-1].decided.any():  # a forward that a lagging flag cost
        infos.pop()
    decided_at: list[int | None] = [None if is_open else -1 for is_open in infos[-1].open[0].tolist()]
    for step, info in enumerate(infos):
        for position in info.decided[0].nonzero().flatten().tolist():
            decided_at[position] = step
    lists = method.lists.to("cpu")
    units = torch.zeros(*lists.indices.shape[:1], lists.indices.shape[2], length // lists.g + 1, dtype=torch.bool)
    units.scatter_(-1, lists.indices[:, 0].long() % units.shape[-1], True)
    units[..., -1] = False  # where the places behind a list's end went
    first, later = ("select", "sparse") if method.is_sparse else ("exact", "exact")
    return Inspection(
        config=config,
        layers=layers,
        block=block,
        prefix=context[: method.start],
        tokens=infos[-1].tokens[0].tolist(),
        decided_at=decided_at,
        kinds=[first, *[later] * (len(infos) - 1)],
        masses=masses[: len(infos)],
        lists=units,
        tail_start=int(lists.tail_start[0]),
        proven=method.proven,
    )


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text of every token in its place: joined, they are the text. A character that several tokens spell is the
    piece of the last of them, the others are empty.

    Args:
        tokenizer: special tokens are written out. ids: any.
    """
    # What a token adds to the text before it, of which a few tokens are enough: some decoders drop a first space.
    found: list[str] = []
    context, begin = 0, 0
    for end in range(1, len(ids) + 1):
        before = tokenizer.decode(ids[context:begin], skip_special_tokens=False)
        after = tokenizer.decode(ids[context:end], skip_special_tokens=False)
        is_part = after.endswith("\ufffd") and end - begin < _LONGEST_CHARACTER
        found.append("" if is_part else after[len(before) :])
        if not is_part:
            context, begin = begin, end
    if found and not found[-1] and begin < len(ids):
        found[-1] = tokenizer.decode(ids[begin:], skip_special_tokens=False)
    return found


def page(inspection: Inspection, tokenizer: Tokenizer, facts: dict[str, str]) -> str:
    """The page: HTML that needs nothing else.

    Args:
        inspection: of `inspect_block`. tokenizer: of the model. facts: shown at the top, such as model and device.
    """
    config, chosen = inspection.config, inspection.config.selection
    prefix = len(inspection.prefix)
    texts = [pages.visible(text) for text in pieces(tokenizer, inspection.prefix + inspection.tokens)]
    kept, best = inspection.kept()
    scales, coded = quantise(inspection.masses)
    steps, num_layers, num_heads, length = inspection.masses.shape
    counts = inspection.lists.sum(-1).tolist()
    data = {
        "texts": texts,
        "prefix": prefix,
        "decided": inspection.decided_at,
        "kinds": inspection.kinds,
        "shape": [steps, num_layers, num_heads, length],
        "scales": [float(f"{scale:.4g}") for scale in scales.flatten().tolist()],
        "decades": DECADES,
        "masses": _base64(coded),
        "layers": [inspection.layers.get(layer, -1) for layer in range(num_layers)],
        "lists": _base64(np.packbits(inspection.lists.numpy(), axis=-1)),
        "units": inspection.lists.shape[-1],
        "counts": counts,
        "g": chosen.g,
        "tail": inspection.tail_start,
        "kept": [round(value, 5) for value in kept.flatten().tolist()],
        "best": [round(value, 5) for value in best.flatten().tolist()],
    }
    dense = sorted(set(range(num_layers)) - set(inspection.layers))
    budget = f"{100 * chosen.p:g} % of the mass" if chosen.rule == "mass" else f"K = {chosen.k}"
    if chosen.rule != "mass" and prefix:
        share = f"{100 * chosen.k / prefix:.2f} %" if chosen.k < prefix else "all"
        budget += f" ({share} of the prefix)"
    if inspection.kinds[0] == "select":
        what = "The first forward reads everything and chooses lists; the others read the lists."
    elif config.mode == "mage":
        what = "The prefix is no longer than the budget, so every forward reads everything."
    else:
        what = "Every forward reads everything; the lists are those that MAGE would have used."
    if inspection.proven is not None:
        budget += f" out of {chosen.candidates} candidates ({100 * inspection.proven:.0f} % of the lists proven)"
    facts = {
        **facts,
        "mode": config.mode,
        "lists": f"{budget}, g = {chosen.g}, rule {chosen.rule}, dense layers {', '.join(map(str, dense)) or 'none'}",
        "prefix": f"{prefix} tokens",
        "block of the answer": str(inspection.block),
        "forwards": f"{steps} ({config.sampler.name})",
    }
    shown = " · ".join(f"{pages.escape(name)} <b>{pages.escape(value)}</b>" for name, value in facts.items())
    body = _BODY.replace("@FACTS@", shown).replace("@WHAT@", what).replace("@DECADES@", str(DECADES))
    script = Path(__file__).with_name("inspection.js").read_text(encoding="utf-8")
    return pages.page("What a block reads", body, style=_STYLE, script=script, data=data)


def quantise(masses: Tensor) -> tuple[Tensor, np.ndarray]:
    """Masses in bytes: logarithms over DECADES below the largest of each (forward, layer, head).

    Args:
        masses: [T, L, Hkv, S], float32, >= 0.
    Returns:
        scales [T, L, Hkv], the largest masses, and codes [T, L, Hkv, S], uint8: 0 is a mass below scale / 10^DECADES,
        code c > 0 is scale * 10^(DECADES * (c - 255) / 254), which errs by at most a factor of 10^(DECADES / 508).
    """
    scales = masses.amax(-1)
    share = masses.double() / scales.double().clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    decades = share.clamp(min=1e-300).log10()
    codes = torch.where(decades < -DECADES, 0.0, 255 + (decades * (254 / DECADES)).round())
    return scales, codes.to(torch.uint8).numpy()


def _base64(values: Any) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")


_STYLE = """
body { max-width: 96em; }
#bar { position: sticky; top: 0; background: var(--paper); border-bottom: 1px solid var(--line); padding: 0.4em 0;
  z-index: 1; }
#bar label { display: inline-flex; align-items: center; gap: 0.4em; margin-right: 1em; }
#bar input { width: 12em; } #bar output { min-width: 6.5em; font-variant-numeric: tabular-nums; }
#numbers { font-variant-numeric: tabular-nums; }
#main { display: grid; grid-template-columns: 270px 1fr; gap: 1.6em; align-items: start; margin-top: 0.8em; }
aside { position: sticky; top: 6.5em; max-height: calc(100vh - 7em); overflow-y: auto; }
figure { margin: 0 0 0.9em; } figcaption { color: var(--dim); font-size: 0.85em; }
#text, #block { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext; line-height: 1.75;
  font-family: ui-monospace, monospace; font-size: 13px; border: 1px solid var(--line); padding: 0.6em; }
#main h2 { margin: 0 0 0.3em; } #block { margin-bottom: 0.8em; }
.t { border-radius: 2px; padding: 1px 0; scroll-margin: 12em; }
.t.listed { outline: 1.5px solid var(--orange); outline-offset: -1px; }
.t.tail { border-bottom: 2px dotted var(--orange); } .t.open { color: var(--dim); }
.t.new { font-weight: bold; text-decoration: underline; } .t.part { color: var(--dim); }
.key { padding: 0 0.4em; } .shade { background: linear-gradient(90deg, #ffffff, rgba(31, 119, 180, 0.85)); }
rect.cell { cursor: pointer; } rect.at { stroke: var(--ink); stroke-width: 2; }
svg text { font: 10px system-ui, sans-serif; fill: var(--dim); }
"""

_BODY = """<h1>What a block reads</h1>
<p class="dim">@FACTS@</p>
<p>@WHAT@ Shaded is the share of the forward's exact attention that each token has, mean over those rows of the block
that selection scores: the square root of it, darkest from the share on that one token in a hundred before the block
exceeds. Shares are stored in a byte each, over @DECADES@ decades. Point at a token for its share; cursor keys change
forward and layer.</p>
<div id="bar">
<label>layer <input type="range" id="layer" min="-1"><output id="layer-out"></output></label>
<label>KV head <input type="range" id="head" min="-1"><output id="head-out"></output></label>
<label>forward <input type="range" id="step" min="0"><output id="step-out"></output></label>
<div id="numbers"></div>
<div class="dim"><span class="key shade">attention</span> <span class="t listed key">listed</span>
<span class="t tail key">read without being listed</span> <span class="t new key">decided in this forward</span>
<span class="t open key">&#9617; open</span></div>
</div>
<div id="main">
<aside>
<figure><svg id="cells"></svg><figcaption>Mass that the lists keep in this forward; a row per layer, a column per KV
head. Click to choose.</figcaption></figure>
<figure><svg id="line"></svg><figcaption>Kept mass over the forwards: by the lists of the first one (orange), by the
best lists as long (grey).</figcaption></figure>
<figure><svg id="depth"></svg><figcaption>Attention by place in the text, as square roots (blue), and how much of the
place is listed (orange). Click to go there.</figcaption></figure>
</aside>
<main>
<h2>The block</h2><div id="block" dir="auto"></div>
<h2>The text before it</h2><div id="text" dir="auto"></div>
</main>
</div>
<noscript>This page needs JavaScript to draw the text; nothing is loaded from anywhere.</noscript>
"""
