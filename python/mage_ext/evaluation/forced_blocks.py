"""Blocks whose tokens are given: what a method's attention costs in language quality, without any sampling noise.

The next 32 tokens of held-out prose are the block; a share t of them is masked, the same positions for all methods, and
one forward predicts them. Rows of `mage eval prose` (eval/prose.json), one per method, setting and t:

    task "prose", method, K, g, dense_layers    as in eval/methods.json
    T                    forwards of a whole open block: what "sparsed" takes a fifth of
    t                    share of the block's open positions that is masked; masked: how many these are
    n, tokens            contexts; tokens of each before the block, which is prefix_tokens, too
    score, ci_low, ci_high      cross entropy of the masked tokens in nats, mean over contexts
    exact                the same of exact attention
    delta, delta_low, delta_high      score - exact, paired by context
    over_mage, over_mage_low, over_mage_high      the same against MAGE at the same setting, where it ran
    over_g1, over_dense0, ...      against the same method with units of one token and without dense layers
    kl, kl_low, kl_high          KL(exact || method) in nats, mean over masked positions
    agreement, agreement_low, agreement_high      share of positions whose most probable token is that of exact
    kept_mass            mean mass that the lists keep of the forward that made them (of "mage_prefix" the prefix's, of
                         "mage_open" that of its rows); None where lists change, of "carry" and of "mage_max", whose
                         scores are no shares

Intervals are 95 % bootstrap intervals over contexts.

Test: pytest tests/python/test_forced_blocks.py
"""

import dataclasses
import functools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mage_ext import selection
from mage_ext._upload import upload
from mage_ext.denoise import DenoiseConfig, DenoiseState, prefill
from mage_ext.evaluation import needles, tasks
from mage_ext.evaluation.method_comparison import ALL_METHODS, METHODS, STATIC, Setting, check_choices, configs
from mage_ext.models.huggingface import LoadedModel
from mage_ext.models.transformer import Transformer
from mage_ext.paged_forward import NOT_WRITTEN, AttentionMethod, Emission, PagedForward, Write
from mage_ext.sampling import SamplerConfig
from mage_ext.selection import BlockSelection
from mage_ext.token_candidates import select_tokens

SHARES = (1.0, 0.75, 0.5, 0.25)
_UNIT = 64  # the bound of all lengths is a multiple of the largest unit
_EXCLUDED = -1e30  # logit of the mask id: finite, so that its part of a divergence is 0 and not 0 * (inf - inf)


class ForcedBlocks:
    """Forwards of the block behind each request's prefix, over tokens that are given.

    Args:
        model: a Transformer. state: of `prefill`, before a block; it is forked, `close` gives the fork's pages back.
        num_blocks: blocks that will be committed or sent, one after the other.
    Fields:
        start: [A], int32, first position of each request's block. cache. max_seq_len: bound of all lengths, a multiple
            of 64.
    """

    def __init__(self, model: Transformer, state: DenoiseState, num_blocks: int = 1):
        self.model, self._state = model, state.fork()
        self.cache = state.batch.cache
        self._size = model.config.block_size
        ends = [length + num_blocks * self._size for length in state.prefix_lens]
        for request, end in enumerate(ends):
            self._state.batch.reserve(request, end)
        self.start = upload(state.prefix_lens, self.cache.device, torch.int32)
        self.max_seq_len = -(-max(ends) // _UNIT) * _UNIT

    def close(self) -> None:
        """Gives the pages back."""
        self._state.release()

    def hidden(
        self,
        tokens: Tensor,
        *,
        live: Tensor | None = None,
        layers: dict[int, int] | None = None,
        lists: BlockSelection | None = None,
        method: AttentionMethod | None = None,
        emission: Emission | None = None,
        final: bool = False,
    ) -> Tensor:
        """One forward of all rows of the blocks; exact in every layer that is not in `layers`.

        Args:
            tokens: [A, Q], int64, the mask id where masked. live: [A], bool, who takes part; None: everybody.
            layers: layers that attend as lists, method or emission (one of them) say -> index in the lists.
            final: the tokens are the block's own, so K and V of the forward will stay.
        Returns:
            [A, Q, hidden]; undefined for requests that take no part.
        """
        ends = self.start + self._size
        start = self.start if live is None else torch.where(live, self.start, NOT_WRITTEN)
        seq_lens = ends if live is None else torch.where(live, ends, 0)
        table = self._state.batch.block_table
        forward = PagedForward(self.cache, table, self.max_seq_len, [Write(start)], seq_lens)
        forward.prefix_lens, forward.method, forward.final = self.start, method, final
        if layers is not None:
            forward.selecting, forward.selection, forward.emission = layers, lists, emission
            forward.exact_lens = None if emission is None else seq_lens
            forward.sparse_lens = None if lists is None else seq_lens
        positions = self.start[:, None].long() + torch.arange(self._size, device=tokens.device)
        return self.model.hidden(tokens, positions, forward)

    def select(self, tokens: Tensor, config: DenoiseConfig, row_mask: Tensor) -> BlockSelection:
        """Lists as mode "mage" makes them of an exact forward.

        Args:
            tokens: [A, Q], int64. config: of mode "mage"; its selection, dense layers and override count.
            row_mask: [A, Q], bool, of `rows_of`; unused with score_rows "all".
        """
        layers = config.selecting_layers(self.model.config.num_layers)
        chosen = config.selection
        emission = Emission(chosen, None if chosen.score_rows == "all" else row_mask, self.start)
        self.hidden(tokens, layers=layers, emission=emission)
        candidates = emission.candidates()
        if candidates is not None:
            return select_tokens(candidates, self.start, chosen)[0]
        choose = config.select_override or selection.select
        return choose(emission.mass(), self.start, chosen, votes=emission.stacked_votes())

    def advance(self, live: Tensor | None = None) -> None:
        """The next block begins where this one ends, for the requests of live [A], bool; None: all."""
        self.start = self.start + (self._size if live is None else live.int() * self._size)


def rows_of(is_open: Tensor, token_shift: bool) -> Tensor:
    """Rows [A, Q], bool, whose logits the open positions [A, Q], bool, consume: those of score_rows "open"."""
    if not token_shift:
        return is_open
    return torch.cat((is_open[:, 1:], torch.zeros_like(is_open[:, :1])), 1)


def prose(maker: needles.CaseMaker, seed: int, num_tokens: int) -> list[int]:
    """Ids of num_tokens tokens of running text: sentences of the maker's texts (the project's own prose if it has none)
    from a place that the seed draws; they may run from one text into the next."""
    rng = random.Random(f"prose/{seed}/{num_tokens}")
    sentences = maker.sentences
    at = rng.randrange(len(sentences)) if sentences else 0
    ids: list[int] = []
    while len(ids) < num_tokens:
        # About 4 characters a token; what is missing comes with the next round.
        missing, run = 6 * (num_tokens - len(ids)), []
        while missing > 0:
            sentence = sentences[at % len(sentences)] if sentences else tasks.filler_sentence(rng)
            run.append(sentence)
            at, missing = at + 1, missing - len(sentence) - 1
        ids += maker.tokenizer.encode((" " if ids else "") + " ".join(run), add_special_tokens=False)
    return ids[:num_tokens]


def bootstrap(values: Tensor, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of a mean (Efron 1979). values: [n], one per independent case; (nan, nan) for none."""
    if not len(values):
        return float("nan"), float("nan")
    means = _resample(len(values), resamples, seed) @ values.double().cpu()
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


@functools.lru_cache(maxsize=8)
def _resample(count: int, resamples: int, seed: int) -> Tensor:
    """[resamples, count], float64: the weight of each case in each resample."""
    drawn = torch.randint(count, (resamples, count), generator=torch.Generator().manual_seed(seed))
    weights = torch.zeros(resamples, count, dtype=torch.float64)
    return weights.scatter_add_(1, drawn, torch.full(drawn.shape, 1 / count, dtype=torch.float64))


# ----------------------------------------------------------------------------------------------------------------------
# Language quality


@dataclass
class Losses:
    """One method on forced blocks, per context: tensors [n], float64, on the CPU.

    Fields:
        ce: cross entropy in nats. kl: KL(exact || method). agreement: share of equal most probable tokens. All are
            means over the masked positions. kept: mass that the lists keep where they were made, NaN without.
    """

    ce: Tensor
    kl: Tensor
    agreement: Tensor
    kept: Tensor

    def __add__(self, other: "Losses") -> "Losses":
        names = [each.name for each in dataclasses.fields(self)]
        return Losses(*(torch.cat((getattr(self, name), getattr(other, name))) for name in names))


Key = tuple[Setting | None, str, float]  # setting (None: exact), method, share masked


@dataclass
class ProseLosses:
    """Losses over the same contexts. Fields: losses by (setting, method, t); masked: positions by t; T."""

    losses: dict[Key, Losses] = field(default_factory=dict)
    masked: dict[float, int] = field(default_factory=dict)
    T: int = 0

    def extend(self, other: "ProseLosses") -> None:
        """Adds further contexts."""
        for key, losses in other.losses.items():
            self.losses[key] = self.losses[key] + losses if key in self.losses else losses
        self.masked, self.T = other.masked, other.T

    def rows(self, tokens: int) -> list[dict[str, Any]]:
        """The rows of an evaluation file, as the module's docstring has them."""
        rows = []
        for (setting, name, share), found in self.losses.items():
            exact = self.losses[None, "exact", share]
            row: dict[str, Any] = {"task": "prose", "method": name}
            row |= {"K": 0, "g": 0, "dense_layers": -1} if setting is None else dataclasses.asdict(setting)
            row |= {"T": self.T, "t": share, "masked": self.masked[share], "n": len(found.ce)}
            row |= {"tokens": tokens, "prefix_tokens": tokens, "exact": exact.ce.mean().item()}
            for column, values in (
                ("score", found.ce),
                ("delta", found.ce - exact.ce),
                ("kl", found.kl),
                ("agreement", found.agreement),
            ):
                low, high = bootstrap(values)
                prefix = "ci" if column == "score" else column
                row |= {column: values.mean().item(), f"{prefix}_low": low, f"{prefix}_high": high}
            for column, other in self._others(setting, name, share).items():
                values = found.ce - other.ce
                low, high = bootstrap(values)
                row |= {column: values.mean().item(), f"{column}_low": low, f"{column}_high": high}
            row["kept_mass"] = None if found.kept.isnan().any() else found.kept.mean().item()
            rows.append(row)
        return rows

    def _others(self, setting: Setting | None, name: str, share: float) -> dict[str, Losses]:
        """What else a method's losses are held against, by column."""
        if setting is None:
            return {}
        keys: dict[str, Key] = {}
        if name != "mage":
            keys["over_mage"] = setting, "mage", share
        if setting.g > 1:
            keys["over_g1"] = dataclasses.replace(setting, g=1), name, share
        if setting.dense_layers > 0:
            keys["over_dense0"] = dataclasses.replace(setting, dense_layers=0), name, share
        return {column: self.losses[key] for column, key in keys.items() if key in self.losses}


def measure(
    loaded: LoadedModel,
    contexts: Sequence[Sequence[int]],
    wanted: Sequence[Setting],
    names: Sequence[str] = METHODS,
    shares: Sequence[float] = SHARES,
    sampler: SamplerConfig = STATIC,
    seeds: Sequence[int] | None = None,
) -> ProseLosses:
    """Every method on the last block of every context; prefill is done once.

    Under token shift a block's first position is never masked: the forward before has predicted it. The positions
    masked at a smaller share are among those of a larger one. Mode "mage" makes its lists of an exact forward in which
    all is masked ("sparsed" as much less as its exact forwards have decided by then) and uses them at every share up to
    that: at t = 1 they meet the very forward they were made of, where the loop itself would still be exact. "carry" has
    the lists of the block before.

    Args:
        loaded: the model. contexts: A lists of ids of one length, a multiple of the block: prefix, then the block.
        wanted: of `method_comparison.settings`; every K below the prefix without the block before.
        names: of ALL_METHODS, beside "exact". shares: t, each in (0, 1]. sampler: its forwards are T.
        seeds: of the masks, one per context; None: 0, 1, ...
    Raises:
        ValueError: naming the argument.
    """
    model, model_config = loaded.model, loaded.model.config
    size = model_config.block_size
    length = len(contexts[0]) if contexts else 0
    if not length or length % size or length < 3 * size or any(len(ids) != length for ids in contexts):
        raise ValueError(
            f"measure: contexts must be of one length, a multiple of {size} and at least {3 * size}, "
            f"got {sorted({len(ids) for ids in contexts})}"
        )
    for share in shares:
        if not 0 < share <= 1:
            raise ValueError(f"measure: shares must be in (0, 1], got {share}")
    longest = max((setting.K for setting in wanted), default=0)
    if longest >= length - 2 * size:
        raise ValueError(
            f"measure: wanted must have K below the prefix of the block before, {length - 2 * size}, got {longest}"
        )
    base = dataclasses.replace(DenoiseConfig(sampler=sampler), cuda_graphs=False)
    state = prefill(model, [list(ids[: -2 * size]) for ids in contexts], base)
    device = state.batch.cache.device
    ids = torch.tensor([list(each[-2 * size :]) for each in contexts], device=device)
    before, block = ids[:, :size], ids[:, size:]
    masks = _Masks(len(contexts), size, int(model_config.token_shift), model_config.mask_id, seeds, device)
    forced = ForcedBlocks(model, state, num_blocks=2)
    found = ProseLosses(masked={share: masks.count(share) for share in shares})
    found.T = sampler.max_forwards(size - int(model_config.token_shift))
    try:
        with torch.no_grad():
            # 1. The block before: what is carried from it, then its commit.
            carried = {}
            if "carry" in names:
                for setting in wanted:
                    (config,) = configs(model, forced.cache, setting, base, ["carry"]).values()
                    carried[setting] = forced.select(masks.apply(before, 1.0), config, masks.rows(1.0))
            forced.hidden(before, final=True)
            forced.advance()

            # 2. Exact attention at every share.
            scores = _Scores(model, block)
            for share in shares:
                hidden = forced.hidden(masks.apply(block, share))
                found.losses[None, "exact", share] = scores.exact(hidden, masks.positions(share), share)

            # 3. Every method on the same masks.
            for setting in wanted:
                found_configs = configs(model, forced.cache, setting, base, [name for name in names if name != "exact"])
                for name in list(found_configs):
                    config = found_configs.pop(name)
                    layers = config.selecting_layers(model_config.num_layers)
                    lists, last = None, 1.0
                    if config.method is not None:
                        config.method.prepare()
                    elif name == "carry":
                        lists = carried[setting]
                    else:
                        decided = (config.exact_steps - 1) * sampler.tokens_per_step
                        last = max(1 - decided / masks.count(1.0), 1 / masks.count(1.0))
                        lists = forced.select(masks.apply(block, last), config, masks.rows(1.0))
                    kept = None if lists is None or name in ("carry", "mage_max") else lists.kept_mass.mean((0, 2))
                    for share in shares:
                        if share > last:
                            continue
                        hidden = forced.hidden(
                            masks.apply(block, share), layers=layers, lists=lists, method=config.method
                        )
                        found.losses[setting, name, share] = scores.against_exact(
                            hidden, masks.positions(share), share, kept
                        )
    finally:
        forced.close()
        state.release()
    return found


class _Masks:
    """Which positions of each context's block are masked at a share: the first ones of a random order."""

    def __init__(
        self, count: int, size: int, shift: int, mask_id: int, seeds: Sequence[int] | None, device: torch.device
    ):
        self._mask_id, self._size, self._shift = mask_id, size, shift
        orders = []
        for seed in range(count) if seeds is None else seeds:
            order = list(range(shift, size))
            random.Random(f"mask/{seed}").shuffle(order)
            orders.append(order)
        self._order = torch.tensor(orders, device=device)

    def count(self, share: float) -> int:
        """Positions that are masked, of each context."""
        return max(1, round(share * (self._size - self._shift)))

    def positions(self, share: float) -> Tensor:
        """[A, m], int64, ascending."""
        return self._order[:, : self.count(share)].sort(1).values

    def apply(self, tokens: Tensor, share: float) -> Tensor:
        """tokens [A, Q] with the mask id at the masked positions."""
        return tokens.scatter(1, self.positions(share), self._mask_id)

    def rows(self, share: float) -> Tensor:
        """[A, Q], bool, of `rows_of`."""
        is_open = torch.zeros(len(self._order), self._size, dtype=torch.bool, device=self._order.device)
        return rows_of(is_open.scatter(1, self.positions(share), True), bool(self._shift))


class _Scores:
    """Losses of hidden states against the true tokens block [A, Q] and against exact attention."""

    def __init__(self, model: Transformer, block: Tensor):
        self._model, self._block = model, block
        self._exact: dict[float, Tensor] = {}

    def _log_probs(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """[A, m, V], float32, of the tokens at positions [A, m]; the mask id can't be emitted."""
        rows = (positions - int(self._model.config.token_shift))[..., None]
        logits = self._model.logits(hidden.gather(1, rows.expand(-1, -1, hidden.shape[-1]))).float()
        logits[..., self._model.config.mask_id] = _EXCLUDED
        return torch.log_softmax(logits, -1)

    def _ce(self, log_probs: Tensor, positions: Tensor) -> Tensor:
        target = self._block.gather(1, positions)[..., None]
        return -log_probs.gather(-1, target).squeeze(-1).double().mean(1).cpu()

    def exact(self, hidden: Tensor, positions: Tensor, share: float) -> Losses:
        """Losses of exact attention, which it keeps for the others."""
        self._exact[share] = log_probs = self._log_probs(hidden, positions)
        ce = self._ce(log_probs, positions)
        return Losses(ce, torch.zeros_like(ce), torch.ones_like(ce), torch.ones_like(ce))

    def against_exact(self, hidden: Tensor, positions: Tensor, share: float, kept: Tensor | None) -> Losses:
        """Losses of another method on the same masks. kept: [A]."""
        exact, log_probs = self._exact[share], self._log_probs(hidden, positions)
        kl = (exact.exp() * (exact - log_probs)).sum(-1).double().mean(1).cpu()
        agreement = (exact.argmax(-1) == log_probs.argmax(-1)).double().mean(1).cpu()
        ce = self._ce(log_probs, positions)
        unknown = torch.full_like(ce, float("nan"))
        return Losses(ce, kl, agreement, unknown if kept is None else kept.double().cpu())


def suite(
    runner: needles.Runner,
    n: int,
    wanted: Sequence[Setting],
    methods_wanted: Sequence[str] = METHODS,
    tokens: Sequence[int] = (2048,),
    shares: Sequence[float] = SHARES,
    tokens_per_step: int = 4,
) -> Iterator[list[dict[str, Any]]]:
    """All rows so far, after every batch of contexts.

    Args:
        runner: of the model. n: contexts per length, seeds 0 .. n - 1. wanted: of `method_comparison.settings`.
        methods_wanted: of ALL_METHODS, beside "exact". tokens: lengths of the prefix, multiples of the block.
        shares: t. tokens_per_step: gives T.
    Raises:
        ValueError: naming the argument.
    """
    check_choices("suite", "methods_wanted", methods_wanted, ALL_METHODS)
    sampler = dataclasses.replace(STATIC, tokens_per_step=tokens_per_step)
    done: list[dict[str, Any]] = []
    for length in tokens:
        work = functools.partial(
            _work, wanted=wanted, names=methods_wanted, tokens=length, shares=shares, sampler=sampler
        )
        whole = ProseLosses()
        for part in runner.parts(work, n):
            whole.extend(part)
            if runner.progress is not None:
                exact = whole.losses[None, "exact", shares[0]].ce
                runner.progress(f"prose, {length} tokens: {len(exact)}/{n} contexts, exact {exact.mean():.3f} nats")
            yield done + whole.rows(length)
        done += whole.rows(length)


def _work(
    seeds: range,
    *,
    wanted: Sequence[Setting],
    names: Sequence[str],
    tokens: int,
    shares: Sequence[float],
    sampler: SamplerConfig,
) -> ProseLosses:
    loaded, maker = needles.worker()
    contexts = [prose(maker, seed, tokens + loaded.config.block_size) for seed in seeds]
    return measure(loaded, contexts, wanted, names, shares, sampler, list(seeds))


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Differences to exact attention in nats by length, dense layers, g and K, as lines of text."""
    lines = []
    groups = dict.fromkeys((row["tokens"], row["dense_layers"], row["g"], row["K"]) for row in rows if row["K"])
    for length, dense, g, k in groups:
        lines.append(f"{length} tokens, K = {k}, g = {g}, {dense} dense layers: cross entropy minus exact, nats")
        inside = [
            row for row in rows if (row["tokens"], row["dense_layers"], row["g"], row["K"]) == (length, dense, g, k)
        ]
        shares = sorted({row["t"] for row in inside}, reverse=True)
        lines.append(f"{'t':>12}" + "".join(f"{share:>28}" for share in shares))
        for name in dict.fromkeys(row["method"] for row in inside):
            at = {row["t"]: row for row in inside if row["method"] == name}
            line = f"{name:>12}"
            for share in shares:
                row = at.get(share)
                text = "" if row is None else f"{row['delta']:.4f} [{row['delta_low']:.4f}, {row['delta_high']:.4f}]"
                line += f"{text:>28}"
            lines.append(line)
    return lines
