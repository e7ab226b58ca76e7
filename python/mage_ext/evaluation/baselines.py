"""Other sparse methods on the denoising loop, its kernels and its graphs: what MAGE is held against at equal K and g.

Quest and Tidal are `AttentionMethod`s, which choose anew in every forward; SparseD, recency and random are
configurations of mode "mage". All attend a block's own tokens and the partial unit at the end of the prefix, all charge
what they keep to K as `select_kv` does, and all commit a block exactly. What they read beside K and V is counted.

Test: pytest tests/python/test_baselines.py
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mage_ext import ops, profiling, selection
from mage_ext._arguments import check_list, check_type, got
from mage_ext.cache import PagedCache
from mage_ext.denoise import DenoiseConfig
from mage_ext.models.transformer import Transformer
from mage_ext.paged_forward import Emission, PagedForward
from mage_ext.selection import SelectionConfig

_MAX_FINITE_BITS = 0x7F7FFFFF  # of float32, as an integer

METHODS = ("exact", "mage", "quest", "tidal", "sparsed", "recency", "random")
# What can be set per method, beside the budget that all share: see `methods`.
SETTINGS = {
    "mage": ("score", "score_rows", "norm"),
    "quest": ("score", "norm"),
    "tidal": ("score", "anchors"),
    "sparsed": ("skip_share", "score", "score_rows", "norm"),
}


class Quest:
    """Quest (Tang et al. 2024, arXiv 2406.10774): in every forward the units whose keys may score highest.

    A unit keeps the elementwise minimum and maximum of its g keys per layer and KV head. For a query q no key of the
    unit scores more than

        bound(q) = sum over d of max(q_d * min_d, q_d * max_d) = min(q, 0) . min + max(q, 0) . max

    (before the scale, which is positive). Quest is for one query per head; here the rows of a block and of a group of
    query heads share one list. With score "max" a unit counts by the highest bound of all rows, so no row finds a key
    beyond the lists that scores more than every listed unit may: Quest's rule, applied to a block. "mean" is the mean
    of the bounds, which is the bound of the mean of min(q, 0) and max(q, 0) and so needs one product instead of one per
    row; on CUDA that mean is rounded to the cache's dtype. Bounds of different rows are of different sizes: with norm
    "prefix" a row's bounds become shares of the whole units of the prefix, softmax(bound * D ** -0.5), before the rows
    are joined. Of a single row all of these rank alike: they differ only in how rows share a list, which Quest itself
    does not say. All rows count, decided or not.

    A forward reads min and max of every whole unit of the prefix: 2 D numbers, as much as K and V of one token. The
    scores are torch's products on gathered bounds, which move these bytes three times and the products of all rows
    twice; a kernel of its own would move them once.
    Its bounds are in tensors by page [num_layers, pages, page / g, Hkv, 2, D] of the cache's dtype, 1 / g of the
    cache's bytes. The loop refreshes them as it commits; `prepare` makes those of a cache that was filled otherwise.

    Args:
        cache: of the generation. Its page size must be a multiple of g.
        k: tokens per layer and KV head, multiple of g; the partial unit is charged to it.
        g: tokens per unit: 1, 16, 32 or 64.
        score: "max" or "mean" over the rows.
        norm: "none", or "prefix": of shares.
        sinks, recents: tokens at the start and the end of the prefix that are always kept; charged to k.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    def __init__(
        self,
        cache: PagedCache,
        *,
        k: int,
        g: int,
        score: str = "max",
        norm: str = "none",
        sinks: int = 0,
        recents: int = 0,
    ):
        check_type("Quest", "cache", cache, PagedCache, "a PagedCache")
        if norm not in ("none", "prefix"):
            raise ValueError(f"Quest: norm must be one of none, prefix, got {got(norm)}")
        self.norm = norm
        self.selection = SelectionConfig(k=k, g=g, score=score, sinks=sinks, recents=recents)
        if cache.page_size % g:
            raise ValueError(f"Quest: g must divide the cache's pages of {cache.page_size} tokens, got {g}")
        self.cache = cache
        self._units_per_page = cache.page_size // g
        self._bounds = self._new_bounds()

    def _new_bounds(self) -> Tensor:
        """[num_layers, num_pages + 1, page / g, Hkv, 2, D]; the last page takes what has no page."""
        cache = self.cache
        shape = (cache.num_pages + 1, self._units_per_page, cache.num_kv_heads, 2, cache.head_dim)
        return torch.zeros(cache.num_layers, *shape, dtype=cache.dtype, device=cache.device)

    @property
    def bounds(self) -> Tensor:
        """[num_layers, num_pages, page / g, Hkv, 2, D], cache's dtype: min and max of K over the written tokens of each
        unit; what it holds of a unit without any is undefined."""
        num_pages = self.cache.num_pages
        if self._bounds.shape[1] != num_pages + 1:  # the cache has grown
            grown = self._new_bounds()
            grown[:, : self._bounds.shape[1] - 1] = self._bounds[:, :-1]
            self._bounds = grown
        return self._bounds[:, :num_pages]

    def _rows(self, layer: int) -> Tensor:
        """[(num_pages + 1) * page / g, Hkv, 2, D] of a layer; the last page is nobody's."""
        self.bounds  # noqa: B018  (as many pages as the cache)
        return self._bounds[layer].flatten(0, 1)

    def prepare(self) -> None:
        """Computes the bounds of all pages from the cache, K of which it reads once.

        For a cache that was not filled by this method's own runs: random K and V, a prefill shared with other methods,
        a fork. Call it before `generate`. Units that are not written yet may hold anything, NaN too.
        """
        bounds = self.bounds
        for layer in range(self.cache.num_layers):
            keys = self.cache.layer(layer)[0].unflatten(1, (self._units_per_page, -1))  # [pages, units, g, Hkv, D]
            low, high = torch.aminmax(keys, dim=2)
            bounds[layer, ..., 0, :], bounds[layer, ..., 1, :] = low, high

    def written(self, forward: PagedForward, layer: int, k: Tensor, k_cache: Tensor) -> None:
        """See AttentionMethod. Recomputes the bounds of the units that the forward's writes touch, over their tokens
        below forward.seq_lens."""
        self._check_cache(forward)
        heads = k_cache.shape[2:]
        for number, write in enumerate(forward.writes):
            num_rows = k.shape[1] if write.first_row is None else write.num_rows
            key = f"written {number}"
            if key not in forward.shared:
                forward.shared[key] = self._touched(forward, write.start, num_rows)
            source, target, is_written = forward.shared[key]
            keys = k_cache.view(-1, self.selection.g, *heads)[source]  # [A, U, g, Hkv, D]
            low = torch.where(is_written, keys, math.inf).amin(2)
            high = torch.where(is_written, keys, -math.inf).amax(2)
            self._rows(layer)[target] = torch.stack((low, high), -2)

    def _touched(self, forward: PagedForward, start: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """The units of positions [start, start + num_rows) of every request: their rows in the pools [A, U], the rows
        of their bounds [A, U], and which of their tokens are written [A, U, g, 1, 1], bool."""
        g, units = self.selection.g, self._units_per_page
        table, num_pages = forward.block_table, self.cache.num_pages
        unit = (start.long() // g)[:, None] + torch.arange((num_rows + g - 2) // g + 1, device=start.device)  # [A, U]
        page = table.gather(1, (unit // units).clamp(0, table.shape[1] - 1)).long()
        lens = forward.seq_lens.long()[:, None]
        own = (start >= 0)[:, None] & (unit * g < lens) & (unit // units < table.shape[1])
        own &= (page >= 0) & (page < num_pages)
        row = page * units + unit % units
        position = unit[..., None] * g + torch.arange(g, device=start.device)
        is_written = (position < lens[..., None])[..., None, None]
        return torch.where(own, row, 0), torch.where(own, row, num_pages * units), is_written

    def attend(self, forward: PagedForward, layer: int, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """See AttentionMethod."""
        self._check_cache(forward)
        with profiling.span("bound_scores"):
            scores = self.scores(forward, layer, q)
        lists = _select(self.selection, _as_mass(scores), forward.prefix_lens)
        return forward.attend_lists(q, k_cache, v_cache, forward.seq_lens, lists, self.selection.g)

    def scores(self, forward: PagedForward, layer: int, q: Tensor) -> Tensor:
        """Upper bound of q . k in every unit, or its share, over the rows as `score` says: [A, Hkv, n], float32;
        undefined in units that are not whole below the prefix.

        Args:
            forward: block_table and max_seq_len are used, for shares prefix_lens. q: [A, Q, H, D].
        """
        num_heads, head_dim = self.cache.num_kv_heads, self.cache.head_dim
        if "bound rows" not in forward.shared:
            forward.shared["bound rows"] = self._rows_of(forward)
        rows = forward.shared["bound rows"]  # [Hkv, A, n]
        bounds = self._rows(layer).view(-1, 2 * head_dim)[rows].flatten(0, 1)  # [Hkv * A, n, 2 D]
        heads = q.unflatten(2, (num_heads, -1)).permute(2, 0, 1, 3, 4)  # [Hkv, A, Q, G, D]
        signed = q.new_empty(*heads.shape[:-1], 2 * head_dim)
        torch.clamp(heads, max=0, out=signed[..., :head_dim])
        torch.clamp(heads, min=0, out=signed[..., head_dim:])
        signed = signed.flatten(2, 3).flatten(0, 1)  # [Hkv * A, R, 2 D]
        is_mean, has_shares = self.selection.score == "mean", self.norm == "prefix"
        if is_mean and not has_shares:
            signed = signed.mean(1, keepdim=True, dtype=torch.float32).to(q.dtype)
        bound = _product(signed, bounds.mT)  # [Hkv * A, R or 1, n]
        if has_shares:
            bound = self._shares(forward, bound)
        joined = bound.mean(1) if is_mean and has_shares else bound.amax(1)
        return joined.unflatten(0, (num_heads, -1)).transpose(0, 1)

    def _shares(self, forward: PagedForward, bound: Tensor) -> Tensor:
        """softmax(bound * D ** -0.5) over the whole units of every request's prefix: [Hkv * A, R, n], as bound."""
        unit = torch.arange(bound.shape[-1], device=bound.device)
        is_other = unit >= (forward.prefix_lens // self.selection.g)[:, None]  # [A, n]
        is_other = is_other.repeat(self.cache.num_kv_heads, 1)[:, None]
        scaled = bound * self.cache.head_dim**-0.5
        return scaled.masked_fill(is_other, torch.finfo(scaled.dtype).min).softmax(-1)

    def _rows_of(self, forward: PagedForward) -> Tensor:
        """Rows of the bounds [num_layers][rows * Hkv, 2 D] of every unit: [Hkv, A, n], int64."""
        cache, units = self.cache, self._units_per_page
        device = forward.block_table.device
        page = forward.block_table[:, : cache.pages_for(forward.max_seq_len)].long()
        page = torch.where((page >= 0) & (page < cache.num_pages), page, cache.num_pages)
        unit = (page[..., None] * units + torch.arange(units, device=device)).flatten(1)  # [A, n]
        return unit * cache.num_kv_heads + torch.arange(cache.num_kv_heads, device=device)[:, None, None]

    def tokens_read(self, prefix_len: int, num_tokens: int) -> float:
        """See AttentionMethod. The bounds of a whole unit count as one token."""
        return _tokens_attended(self.selection, prefix_len, num_tokens) + prefix_len // self.selection.g

    def _check_cache(self, forward: PagedForward) -> None:
        if forward.cache is not self.cache:
            raise ValueError("Quest: cache must be that of the generation, got another")


class Tidal:
    """After TidalDecode (Yang et al. 2024, arXiv 2410.05076): in every forward a few anchor layers attend everything
    and choose, the layers after each use its lists.

    TidalDecode's: position persistence across layers, a choice at the first layer after the dense ones and another at a
    middle layer, by the attention of that very forward. Ours: units of g tokens instead of single ones, the mean (or
    largest) share over the rows of a block as the score, one list per KV head; K and V that the block leaves behind are
    those of an exact commit, so no correction of the cache is needed.

    Args:
        selecting: the layers that select, as DenoiseConfig.selecting_layers gives them; the others are dense.
        k, g, score, sinks, recents: as SelectionConfig has them.
        anchors: layers of `selecting`, ascending, the first of them among these. None: that one and, where there are
            more than two, the one in the middle, selecting[len(selecting) // 2].

    Raises:
        ValueError, TypeError: naming the argument.
    """

    def __init__(
        self,
        selecting: Sequence[int],
        *,
        k: int,
        g: int,
        anchors: Sequence[int] | None = None,
        score: str = "mean",
        sinks: int = 0,
        recents: int = 0,
    ):
        self.selecting = _layers("selecting", selecting)
        self.selection = SelectionConfig(k=k, g=g, score=score, sinks=sinks, recents=recents)
        if anchors is None:
            anchors = self.selecting[:1]
            if len(self.selecting) > 2:
                anchors += (self.selecting[len(self.selecting) // 2],)
        self.anchors = _layers("anchors", anchors)
        if self.anchors[0] != self.selecting[0] or not set(self.anchors) <= set(self.selecting):
            raise ValueError(
                f"Tidal: anchors must be of the selecting layers {self.selecting} and begin with the first, "
                f"got {self.anchors}"
            )

    def prepare(self) -> None:
        """Nothing: a forward knows all it needs."""

    def written(self, forward: PagedForward, layer: int, k: Tensor, k_cache: Tensor) -> None:
        """See AttentionMethod. Nothing is kept of K."""

    def attend(self, forward: PagedForward, layer: int, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """See AttentionMethod."""
        if tuple(forward.selecting) != self.selecting:
            raise ValueError(
                f"Tidal: selecting must be the layers that the generation selects in, {tuple(forward.selecting)}, "
                f"got {self.selecting}"
            )
        if layer not in self.anchors:
            lists = forward.shared["lists"]
            return forward.attend_lists(q, k_cache, v_cache, forward.seq_lens, lists, self.selection.g)
        emission = Emission(self.selection, None, forward.prefix_lens)
        out = forward.emit(emission, q, k_cache, v_cache, forward.seq_lens)
        forward.shared["lists"] = _select(self.selection, emission.masses[0], forward.prefix_lens)
        return out

    def tokens_read(self, prefix_len: int, num_tokens: int) -> float:
        """See AttentionMethod. The mean over the selecting layers; an anchor reads everything."""
        share = len(self.anchors) / len(self.selecting)
        return share * num_tokens + (1 - share) * _tokens_attended(self.selection, prefix_len, num_tokens)


def _layers(name: str, layers: Sequence[int]) -> tuple[int, ...]:
    expected = "ascending layer numbers, at least one"
    layers = tuple(check_list("Tidal", name, layers, expected))
    integers = all(isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0 for layer in layers)
    if not layers or not integers or list(layers) != sorted(set(layers)):
        raise ValueError(f"Tidal: {name} must be {expected}, got {layers!r}")
    return layers


def sparsed_config(base: DenoiseConfig, *, skip_share: float = 0.2, forwards: int) -> DenoiseConfig:
    """After SparseD (Wang et al. 2025, arXiv 2509.24014): the first forwards exact, then lists that stay.

    SparseD's: full attention in the first `skip` share of all steps (its default 0.2), one choice by the attention of
    the step in which they end, per head, blocks of keys, the same to the last step. Ours: the steps are those of a
    block, since a block is denoised on its own; K tokens per KV head by the mean over the rows of the block (SparseD
    keeps a share per head and block of queries); a choice anew for every block unless `base.refresh` says otherwise.
    With one exact forward it is MAGE.

    Args:
        base: selection, dense layers, sampler and the rest; its mode, method and select_override are replaced.
        skip_share: in (0, 1], share of a block's forwards that are exact.
        forwards: of a block, without its commit, >= 1.
    Returns:
        base in mode "mage" with exact_steps = ceil(skip_share * forwards).
    Raises:
        ValueError, TypeError: naming the argument.
    """
    check_type("sparsed_config", "base", base, DenoiseConfig, "a DenoiseConfig")
    if not isinstance(skip_share, (int, float)) or isinstance(skip_share, bool) or not 0 < skip_share <= 1:
        raise ValueError(f"sparsed_config: skip_share must be a number in (0, 1], got {got(skip_share)}")
    if not isinstance(forwards, int) or isinstance(forwards, bool) or forwards < 1:
        raise ValueError(f"sparsed_config: forwards must be an integer >= 1, got {got(forwards)}")
    exact_steps = math.ceil(round(skip_share * forwards, 9))  # 0.28 * 25 is 7.000000000000001
    return _mage(base, exact_steps=max(exact_steps, 1))


def anchor_layers(selecting: Sequence[int], shares: Sequence[float]) -> tuple[int, ...]:
    """The layers at these shares of the selecting ones, such as 0 (the first) and 0.5 (that in the middle); without
    doubles, which few layers have."""
    return tuple(sorted({selecting[int(share * len(selecting))] for share in shares}))


def methods(
    model: Transformer,
    cache: PagedCache,
    config: DenoiseConfig,
    *,
    forwards: int | None = None,
    seed: int = 0,
    names: Sequence[str] = METHODS,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, DenoiseConfig]:
    """All methods at the K, g, sinks, recents, dense layers and sampler of one configuration.

    "exact", "mage", "quest", "tidal", "sparsed", "recency" (`recency_selection`) and "random" (`random_selection`).

    Args:
        model: a Transformer. cache: of the generations; `generate` must get the same one.
        config: its selection must be of rule "fixed"; its mode, method, select_override and exact_steps are replaced.
            selection.score and score_rows are those of mage and sparsed; tidal takes the score over all rows, quest the
            max of its bounds.
        forwards: of a block, for sparsed. None: the most that the sampler can need for a whole open block.
        seed: of random.
        names: of METHODS, those that are wanted: Quest's bounds take memory.
        settings: by method, what differs from its default; of SETTINGS. "score", "score_rows" and "norm" are those of
            the SelectionConfig, for quest those of Quest; "anchors" of tidal are shares of the selecting layers, as
            `anchor_layers` has them; "skip_share" is that of `sparsed_config`.
    Returns:
        Configurations by name. The Quest in "quest" has no bounds yet of what the cache holds: see Quest.prepare.
    Raises:
        ValueError, TypeError: naming the argument.
    """
    check_type("methods", "config", config, DenoiseConfig, "a DenoiseConfig")
    chosen, model_config = config.selection, model.config
    if chosen.rule != "fixed":
        raise ValueError(f'methods: config.selection.rule must be "fixed", got {chosen.rule!r}')
    if forwards is None:
        block_size = model_config.block_size
        sub_block_size = config.sub_block_size or model_config.sub_block_size or block_size
        forwards = config.sampler.max_forwards(sub_block_size) * (block_size // sub_block_size)
    check_type("methods", "seed", seed, int, "an integer")
    for name in names:
        if name not in METHODS:
            raise ValueError(f"methods: names must be of {', '.join(METHODS)}, got {got(name)}")
    settings = settings if settings is not None else {}
    for name, own in settings.items():
        if name not in SETTINGS:
            raise ValueError(f"methods: settings must be of {', '.join(SETTINGS)}, got {got(name)}")
        for key in own:
            if key not in SETTINGS[name]:
                raise ValueError(f"methods: settings of {name} must be of {', '.join(SETTINGS[name])}, got {got(key)}")
    mage = _mage(config)
    budget = dict(k=chosen.k, g=chosen.g, sinks=chosen.sinks, recents=chosen.recents)
    selecting = list(mage.selecting_layers(model_config.num_layers))

    def of(method: Quest | Tidal) -> DenoiseConfig:
        return dataclasses.replace(mage, mode="method", method=method)

    def with_settings(name: str) -> DenoiseConfig:
        changes = {key: value for key, value in settings.get(name, {}).items() if key != "skip_share"}
        return dataclasses.replace(mage, selection=dataclasses.replace(chosen, **changes))

    def tidal() -> Tidal:
        own = {"score": chosen.score, **settings.get("tidal", {})}
        if "anchors" in own:
            own["anchors"] = anchor_layers(selecting, own["anchors"])
        return Tidal(selecting, **own, **budget)

    def sparsed() -> DenoiseConfig:
        skip = {key: value for key, value in settings.get("sparsed", {}).items() if key == "skip_share"}
        return sparsed_config(with_settings("sparsed"), forwards=forwards, **skip)

    random = functools.partial(selection.random_selection, seed=seed)
    makers = {
        "exact": lambda: dataclasses.replace(mage, mode="exact"),
        "mage": lambda: with_settings("mage"),
        "quest": lambda: of(Quest(cache, **settings.get("quest", {}), **budget)),
        "tidal": lambda: of(tidal()),
        "sparsed": sparsed,
        "recency": lambda: dataclasses.replace(mage, select_override=selection.recency_selection),
        "random": lambda: dataclasses.replace(mage, select_override=random),
    }
    return {name: make() for name, make in makers.items() if name in names}


def _mage(config: DenoiseConfig, exact_steps: int = 1) -> DenoiseConfig:
    return dataclasses.replace(config, mode="mage", method=None, select_override=None, exact_steps=exact_steps)


# indices [A, Hkv, Kmax] and counts [A, Hkv] of one layer, tail_start [A]; int32, as sparse_block_attention takes them
_Lists = tuple[Tensor, Tensor, Tensor]


def _select(config: SelectionConfig, mass: Tensor, prefix_lens: Tensor) -> _Lists:
    """Lists of one layer by descending mass [A, Hkv, n], float32 >= 0."""
    with profiling.span("select_kv"):
        indices, counts, _, tail_start, _ = ops.select_kv(
            mass[None],
            prefix_lens,
            g=config.g,
            capacity=config.capacity_units(mass.shape[-1], 1, mass.shape[1]),
            k=config.k,
            sinks=config.sinks,
            recents=config.recents,
        )
    return indices[0], counts[0], tail_start


def _tokens_attended(config: SelectionConfig, prefix_len: int, num_tokens: int) -> int:
    """K/V tokens per KV head of a forward over lists: `select_kv` lists one unit fewer where a partial one is left."""
    whole, part = divmod(prefix_len, config.g)
    listed = min(whole, max(config.k // config.g - (part > 0), 0))
    return listed * config.g + num_tokens - whole * config.g


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Batched matrix product in float32 of matrices of any floating type."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def _as_mass(scores: Tensor) -> Tensor:
    """Float32 numbers >= 0 in the order of `scores`, for select_kv: it ranks by float bits, so scores may not be
    negative. They may be of any size, since biases of q and k can move all of them far from 0.

    The bits of a float32, those below the sign inverted where it is set, ascend as integers do. Halved and shifted, the
    range of finite numbers becomes that of the finite numbers >= 0: neighbours may become equal. Others are clamped.
    """
    bits = scores.view(torch.int32)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ((order >> 1) + ((_MAX_FINITE_BITS >> 1) + 1)).clamp(0, _MAX_FINITE_BITS).view(torch.float32)
