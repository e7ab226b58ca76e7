"""How text is generated: one immutable object, checked when it is made.

Test: pytest tests/python/test_bad_input.py
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from mage_ext._arguments import check_type, got
from mage_ext.paged_forward import AttentionMethod
from mage_ext.sampling import SamplerConfig
from mage_ext.selection import BlockSelection, SelectionConfig

MODES = ("exact", "mage", "method")
REFRESH_POLICIES = ("block", "blocks", "kept_mass")


@dataclass(frozen=True)
class DenoiseConfig:
    """How text is generated.

    Fields:
        mode: "exact", "mage" (exact first forward of a block, then a selection of the prefix) or "method" (the forwards
            of a block, but not its commit, as `method` has them).
        max_new_tokens: per request, >= 1; positions behind the last wanted one are not waited for.
        ignore_eos: EOS does not end a request.
        sampler: which positions are decided, how tokens are drawn.
        selection: of mode "mage". dense_layers: layers that stay exact in every forward.
        refresh: when a block selects anew instead of starting with the lists it has: "block" (always), "blocks" (every
            refresh_blocks blocks) or "kept_mass" (after a commit under whose mass the lists keep less than
            refresh_bound; with candidates, too, it is the mass of all tokens). Tokens committed after a selection are
            always attended.
        select_override: called instead of `selection.select` with its arguments (mass, prefix_lens, config, votes=);
            returns a BlockSelection. Not with candidates, which have no masses of all tokens.
        sub_block_size: positions that are decided before any later one; None: the model's own (whole block if it has
            none).
        sub_block_cache: once the first position of the current sub-block is decided, forwards behind the first
            exact_steps send that sub-block alone and the block's other K/V stay as they were. Not with mode "method".
        fuse_commit: the commit of a block and the first forward of the next are one forward of both blocks' rows, for
            families without token shift. It reads the context once instead of twice and changes nothing else.
        exact_steps: forwards of a block that are exact before the sparse ones, the last of them selects: 1 is MAGE.
        method: attention of the selecting layers in mode "method", an `AttentionMethod`: for baselines.
        strict: a request's tokens do not depend on its batch mates at all: places are padded to max_batch, prompts are
            prefilled one by one in whole chunks, attention is split at fixed boundaries, all rows are drawn. It holds
            between calls with the same max_batch and the same seed of the request (by default its number in the batch)
            and costs time. With fuse_commit or sub_block_cache it holds up to rounding: how many rows are multiplied
            together depends on the mates there.
        cuda_graphs: on CUDA, phases of a block that recur are captured once and replayed. Callbacks and overrides run
            between them. Off, every kernel is launched anew and the ranges of layers and ops can be seen.
        prefill_chunk: tokens of each request per prefill forward; multiples of the block are taken. Larger chunks fill
            the processor better, smaller ones need less memory.

    Raises:
        ValueError, TypeError: naming the field, what it must be and what came.
    """

    mode: str = "exact"
    max_new_tokens: int = 128
    ignore_eos: bool = False
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    dense_layers: tuple[int, ...] = (0, 1)
    refresh: str = "block"
    refresh_blocks: int = 1
    refresh_bound: float = 0.9
    select_override: Callable[..., BlockSelection] | None = None
    sub_block_size: int | None = None
    sub_block_cache: bool = False
    fuse_commit: bool = False
    exact_steps: int = 1
    method: AttentionMethod | None = None
    strict: bool = False
    cuda_graphs: bool = True
    prefill_chunk: int = 512

    def __post_init__(self):
        for name, value, choices in (("mode", self.mode, MODES), ("refresh", self.refresh, REFRESH_POLICIES)):
            if not isinstance(value, str) or value not in choices:
                raise ValueError(f"DenoiseConfig: {name} must be one of {', '.join(choices)}, got {value!r}")
        for name in ("max_new_tokens", "refresh_blocks", "exact_steps", "prefill_chunk", "sub_block_size"):
            value = getattr(self, name)
            if name == "sub_block_size" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"DenoiseConfig: {name} must be an integer >= 1, got {value!r}")
        for name, kind in (("sampler", SamplerConfig), ("selection", SelectionConfig)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"DenoiseConfig: {name} must be a {kind.__name__}, got {getattr(self, name)!r}")
        for name in ("ignore_eos", "sub_block_cache", "fuse_commit", "strict", "cuda_graphs"):
            check_type("DenoiseConfig", name, getattr(self, name), bool, "a bool")
        bound = self.refresh_bound
        if not isinstance(bound, (int, float)) or isinstance(bound, bool) or not 0 <= bound <= 1:
            raise ValueError(f"DenoiseConfig: refresh_bound must be a number in [0, 1], got {bound!r}")
        layers = self.dense_layers
        if not isinstance(layers, tuple) or not all(isinstance(i, int) and not isinstance(i, bool) for i in layers):
            raise TypeError(f"DenoiseConfig: dense_layers must be a tuple of layer numbers, got {layers!r}")
        if any(layer < 0 for layer in layers) or len(set(layers)) < len(layers):
            raise ValueError(f"DenoiseConfig: dense_layers must be different numbers from 0 on, got {layers!r}")
        if (self.mode == "method") != (self.method is not None):
            raise ValueError(
                f'DenoiseConfig: method must be given with mode "method" and only there, got mode {self.mode!r} and '
                f"{got(self.method)}"
            )
        if self.method is not None and not all(
            hasattr(self.method, x) for x in ("prepare", "written", "attend", "tokens_read")
        ):
            raise TypeError(f"DenoiseConfig: method must be an AttentionMethod, got {got(self.method)}")
        if self.fuse_commit and (self.mode == "method" or self.refresh != "block"):
            raise ValueError(
                'DenoiseConfig: fuse_commit must be off with mode "method" and refresh policies other than "block", '
                "whose first forwards are sparse, got True"
            )
        if self.mode == "method" and self.sub_block_cache:
            raise ValueError(
                'DenoiseConfig: sub_block_cache must be off with mode "method", whose lists come from the rows sent, '
                "got True"
            )
        if self.select_override is not None and not callable(self.select_override):
            raise TypeError(f"DenoiseConfig: select_override must be callable, got {self.select_override!r}")
        if self.select_override is not None and self.selection.candidates is not None:
            raise ValueError(
                "DenoiseConfig: select_override must be None with selection.candidates, which leave no masses of all "
                f"tokens, got {got(self.select_override)}"
            )
        if self.selection.rule == "layer" and self.selection.norm == "prefix":
            raise ValueError(
                'DenoiseConfig: selection.norm must be "context" with rule "layer", whose coverage is a share of it, '
                'got "prefix"'
            )

    def selecting_layers(self, num_layers: int) -> dict[int, int]:
        """Layers that select -> their index in a selection, for a model of num_layers; empty in mode "exact".

        Raises:
            ValueError: a dense layer the model lacks, or no layer left to select.
        """
        if self.mode == "exact":
            return {}
        for layer in self.dense_layers:
            if not 0 <= layer < num_layers:
                raise ValueError(f"DenoiseConfig: dense_layers must be in [0, {num_layers}), got {layer}")
        chosen = [layer for layer in range(num_layers) if layer not in self.dense_layers]
        if not chosen:
            raise ValueError(f"DenoiseConfig: dense_layers must leave a layer that selects, got all {num_layers}")
        return {layer: index for index, layer in enumerate(chosen)}

    @property
    def exact_prefix(self) -> int:
        """Longest prefix that a selection would keep whole; such blocks are exact."""
        return self.selection.k_min if self.selection.rule == "mass" else self.selection.k
