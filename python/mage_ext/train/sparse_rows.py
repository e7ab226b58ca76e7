"""Exact and sparse attention of packed rows, and the selection that lies between them, as generation makes it.

A denoised block starts all masked; its first forward is exact and selects units of the clean text before it, per layer
and KV head. A packed row (packing.py) holds noisy copies of sampled blocks, so the exact pass gets one more copy of
each, all masked, whose attention gives the masses. `selection.select` makes the lists, with budgets charged as there.
The sparse pass restricts what the noisy copies see of the clean text to them; a copy sees itself, and the clean stream
its own past, as before.

On a GPU a mask is FlexAttention's: a block mask by tiles of 128 tokens, with the lists read by KV head inside of it. On
a CPU it is a dense mask of the same rule.

Test: pytest tests/python/test_finetune.py
"""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from mage_ext.selection import BlockSelection
from mage_ext.train.packing import Batch, Layout, visible

_TILE = 128  # of a block mask; rows are a multiple of it
_TILES_AT_ONCE = 4  # rows of tiles whose mask is written out while the block mask is made

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (row, query head, query, key) -> visible


@dataclass
class SampledBlocks:
    """The blocks that the copies of a batch belong to, N places per row, and an all-masked copy of each.

    Fields:
        batch: the rows with the all-masked copies behind them.
        first: index in a row at which these start. size: tokens of a block.
        prefix: [rows, N], int32, tokens before the block; 0: no block at this place.
        sees: [rows, N, clean], bool, clean tokens before the block.
        owner: [rows, tokens], int32, the place of a noisy token's block; 0 for other tokens.
    """

    batch: Batch
    first: int
    size: int
    prefix: Tensor
    sees: Tensor
    owner: Tensor

    @property
    def rows(self) -> Batch:
        """The batch as it was, without the all-masked copies."""
        cut = {name: getattr(self.batch, name)[:, : self.first] for name in ("tokens", "positions", "branch", "noisy")}
        return dataclasses.replace(self.batch, **cut)

    def to(self, device: str | torch.device) -> "SampledBlocks":
        names = ("batch", "prefix", "sees", "owner")
        return dataclasses.replace(self, **{name: getattr(self, name).to(device) for name in names})


def sampled_blocks(batch: Batch, layout: Layout, mask_id: int) -> SampledBlocks:
    """The blocks of a batch that `packing.pack` made with `layout`.

    Args:
        batch: on the CPU. mask_id: token of a masked position.
    Raises:
        ValueError: the batch was not packed with this layout.
    """
    rows, tokens = batch.tokens.shape
    block, clean = layout.block, layout.clean
    places = layout.branches * layout.branch_blocks + layout.trunk_blocks
    region = slice(clean, clean + 2 * places * block)
    number = torch.arange(1, 2 * places + 1).view(1, places, 2, 1)
    if tokens != layout.tokens:
        raise ValueError(f"sampled_blocks: batch must have rows of {layout.tokens} tokens, got {tokens}")

    def copies(values: Tensor) -> Tensor:
        return values[:, region].reshape(rows, places, 2, block)

    noisy = copies(batch.noisy)
    if batch.noisy[:, :clean].any() or ((noisy != number) & (noisy != 0)).any():
        raise ValueError("sampled_blocks: batch must hold its copies in order behind layout.clean tokens, got another")
    there = (noisy > 0).all((2, 3))  # [rows, N]
    masked = torch.zeros(rows, tokens, dtype=torch.bool)
    at = batch.target_at[batch.noisy[batch.target_at[:, 0], batch.target_at[:, 1]] > 0]  # in copies
    masked[at[:, 0], at[:, 1]] = True
    maskable = copies(masked).any(2)

    extra = -(-places * block // _TILE) * _TILE

    def appended(values: Tensor, new: Tensor, fill: int) -> Tensor:
        tail = torch.full((rows, extra), fill, dtype=values.dtype)
        tail[:, : places * block] = torch.where(there[..., None], new.expand(rows, places, block), fill).flatten(1)
        return torch.cat((values, tail), 1)

    positions, branch = copies(batch.positions)[:, :, 0], copies(batch.branch)[:, :, 0]
    all_masked = torch.where(maskable, mask_id, copies(batch.tokens)[:, :, 0])
    whole = Batch(
        appended(batch.tokens, all_masked, int(batch.tokens[0, -1])),
        appended(batch.positions, positions, 0),
        appended(batch.branch, branch, -1),
        appended(batch.noisy, (2 * places + 1 + torch.arange(places))[:, None], 0),
        batch.source,
        batch.target,
        batch.kind,
        batch.target_at,
    )
    before = batch.positions[:, None, :clean] // block < positions[:, :, :1] // block
    own_text = (batch.branch[:, None, :clean] == 0) | (batch.branch[:, None, :clean] == branch[:, :, :1])
    owner = torch.zeros(rows, whole.tokens.shape[1], dtype=torch.int32)
    owner[:, region] = torch.arange(places, dtype=torch.int32).repeat_interleave(2 * block)
    return SampledBlocks(
        whole,
        first=tokens,
        size=block,
        prefix=torch.where(there, positions[:, :, 0], 0).to(torch.int32),
        sees=before & own_text & there[..., None],
        owner=owner,
    )


def unit_mass(q: Tensor, k: Tensor, blocks: SampledBlocks, g: int, units: int) -> Tensor:
    """Attention mass that the all-masked copies give to units of their text, the copy itself being its last part.

    mass[j] = mean over the rows of the block and the query heads of a KV head of the sum over unit j of softmax(q . k /
    sqrt(D)), the softmax over the clean text before the block and the copy itself: what `block_attention_mass` emits
    at the first forward of the block (score "mean", score_rows "all", norm "context"). The largest tensor of it has
    [rows, N * block * H / Hkv, clean] float32 numbers.

    Args:
        q: [rows, T, H, D], k: [rows, T, Hkv, D], rotated, of the rows of blocks.batch.
        g: tokens per unit. units: n, as many as the longest text has.
    Returns:
        [rows, N, Hkv, n], float32; 0 at places without a block.
    """
    (rows, places, clean), size = blocks.sees.shape, blocks.size
    group = q.shape[2] // k.shape[2]
    here = slice(blocks.first, blocks.first + places * size)
    share = (blocks.prefix > 0).float() / (group * size)
    share = share[..., None, None].expand(-1, -1, 1, size * group)  # [rows, N, 1, block * G]
    unit = (blocks.batch.positions[:, None, :clean] // g).expand(-1, places, -1)
    own_unit = (blocks.batch.positions[:, here] // g).unflatten(1, (places, size))
    mass = q.new_zeros(rows, places, k.shape[2], units, dtype=torch.float32)
    for head in range(k.shape[2]):
        queries = q[:, here, head * group : (head + 1) * group].float() * q.shape[3] ** -0.5
        queries = queries.unflatten(1, (places, size)).flatten(2, 3)  # [rows, N, block * G, D]
        own = queries @ k[:, here, head].float().unflatten(1, (places, size)).mT
        # bfloat16 numbers are exact in TF32, so products of them are as exact there as in float32.
        score = (queries.flatten(1, 2) @ k[:, :clean, head].float().mT).unflatten(1, (places, -1))
        score.masked_fill_(~blocks.sees[:, :, None], -torch.inf)
        total = torch.logaddexp(score.logsumexp(-1), own.logsumexp(-1))[..., None]
        for tokens, scores in ((unit, score), (own_unit, own)):
            mass[:, :, head].scatter_add_(2, tokens, (share @ scores.sub_(total).exp_())[:, :, 0])
    return mass


def kept_units(selection: BlockSelection, rows: int, units: int) -> Tensor:
    """[L, rows, N, Hkv, n], bool: the units that a selection over rows * N requests keeps, its tail among them."""
    layers, _, heads, _ = selection.indices.shape
    kept = torch.zeros(*selection.counts.shape, units + 1, dtype=torch.bool, device=selection.indices.device)
    kept.scatter_(-1, torch.where(selection.indices < 0, units, selection.indices).long(), True)
    tail = torch.arange(units, device=kept.device) >= (selection.tail_start // selection.g)[:, None]
    return (kept[..., :units] | tail[:, None]).view(layers, rows, -1, heads, units)


def exact_rule(batch: Batch, block: int) -> Rule:
    """`packing.visible` of a batch by indices."""
    branch, noisy, place = (t.to(torch.int32) for t in (batch.branch, batch.noisy, batch.positions // block))

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return visible(branch[b, q], noisy[b, q], place[b, q], branch[b, k], noisy[b, k], place[b, k])

    return rule


def sparse_rule(batch: Batch, block: int, owner: Tensor, kept: Tensor, g: int, group: int) -> Rule:
    """`exact_rule`, but a noisy token sees of the clean text the units alone that its block keeps.

    Args:
        owner: [rows, tokens], int32, see SampledBlocks. kept: [rows, N, Hkv, n], bool. group: H / Hkv.
    """
    branch, noisy, place = (t.to(torch.int32) for t in (batch.branch, batch.noisy, batch.positions // block))
    unit = (batch.positions // g).to(torch.int32)

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = visible(branch[b, q], noisy[b, q], place[b, q], branch[b, k], noisy[b, k], place[b, k])
        free = (noisy[b, q] == 0) | (noisy[b, k] > 0)
        return seen & (free | kept[b, owner[b, q], h // group, unit[b, k]])

    return rule


class Masks:
    """Makes the attention masks of a batch, on its device.

    Args:
        batch: the rows. block: tokens of a block. group: H / Hkv. flex: for FlexAttention; False: dense masks.
    """

    def __init__(self, batch: Batch, block: int, group: int, flex: bool):
        self.batch, self.block, self.group, self.flex = batch, block, group, flex
        if flex:
            self._some, self._whole = _tiles(batch, block)

    def exact(self) -> BlockMask | Tensor:
        """What `packing.visible` allows; dense: [rows, 1, tokens, tokens], bool."""
        rule = exact_rule(self.batch, self.block)
        if not self.flex:
            return _written_out(rule, self.batch, 1)
        return _block_mask(rule, self._some & ~self._whole, self._whole)

    def sparse(self, owner: Tensor, kept: Tensor, g: int) -> list[BlockMask | Tensor]:
        """A mask per layer of kept [L, rows, N, Hkv, n], see `sparse_rule`; dense: [rows, H, tokens, tokens], bool."""
        rules = [sparse_rule(self.batch, self.block, owner, each, g, self.group) for each in kept]
        if not self.flex:
            return [_written_out(rule, self.batch, kept.shape[3] * self.group) for rule in rules]
        # The lists of every head say something else of a tile with noisy queries, so none of these is taken unread.
        noisy = (self.batch.noisy > 0).unflatten(1, (-1, _TILE)).any(-1)[:, :, None]
        whole = self._whole & ~noisy
        made = _block_mask(rules[0], self._some & ~whole, whole)
        masks = [copy.copy(made) for _ in rules]
        for mask, rule in zip(masks, rules, strict=True):
            mask.mask_mod = rule
        return masks


def _written_out(rule: Rule, batch: Batch, heads: int) -> Tensor:
    rows, tokens = batch.tokens.shape
    b, h, i = (torch.arange(n, device=batch.tokens.device) for n in (rows, heads, tokens))
    seen = rule(b[:, None, None, None], h[:, None, None], i[:, None], i)
    return seen.expand(rows, heads, tokens, tokens)


def _tiles(batch: Batch, block: int) -> tuple[Tensor, Tensor]:
    """Of `packing.visible`, [rows, tiles, tiles] each, bool: tiles with something visible, and with nothing hidden."""
    branch, noisy, place = batch.branch, batch.noisy, batch.positions // block
    some, whole = [], []
    for start in range(0, branch.shape[1], _TILES_AT_ONCE * _TILE):
        q = slice(start, start + _TILES_AT_ONCE * _TILE)
        queries = (t[:, q, None] for t in (branch, noisy, place))
        seen = visible(*queries, *(t[:, None] for t in (branch, noisy, place)))
        seen = seen.unflatten(2, (-1, _TILE)).unflatten(1, (-1, _TILE))  # [rows, tiles, _TILE, tiles, _TILE]
        some.append(seen.any(4).any(2))
        whole.append(seen.all(4).all(2))
    return torch.cat(some, 1), torch.cat(whole, 1)


def _block_mask(rule: Rule, partly: Tensor, whole: Tensor) -> BlockMask:
    """FlexAttention's mask of tiles that `rule` reads and tiles that are taken whole, [rows, tiles, tiles] each."""
    lists = []
    for flags in (partly, whole):
        order = torch.argsort(flags.to(torch.int32), dim=-1, descending=True, stable=True)
        lists += [flags.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]]
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=_TILE, mask_mod=rule)


class RowAttention:
    """The `attend` of a forward over packed rows.

    Args:
        masks: of each layer, all for FlexAttention or all dense.
        flex: FlexAttention, compiled on a GPU; not used with dense masks.
        seen: called with (layer, q, k) before each layer attends; None: not at all.
    """

    def __init__(
        self,
        masks: Sequence[BlockMask | Tensor],
        flex: Callable[..., Tensor] = flex_attention,
        seen: Callable[[int, Tensor, Tensor], None] | None = None,
    ):
        self.masks, self.flex, self.seen = masks, flex, seen

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.seen is not None:
            self.seen(layer, q, k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        mask = self.masks[layer]
        if isinstance(mask, BlockMask):
            out = self.flex(q, k, v, block_mask=mask, enable_gqa=True)
        else:
            out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return out.transpose(1, 2)
