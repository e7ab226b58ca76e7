"""Phases of a generation as CUDA graphs: what is queued a second time is captured, then replayed.

A phase is a function of tensors that live as long as the graphs, so a replay works on what they hold by then: lengths,
tables, lists, tokens. The first call of a phase runs it as it is, which also warms libraries and compilers up; the
second captures it. Where graphs are off, every call runs the function.

Test: pytest tests/python/test_step_graphs.py
"""

import dataclasses
import weakref
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from mage_ext.cache import PagedCache
    from mage_ext.denoise_config import DenoiseConfig

T = TypeVar("T")


class StepGraphs:
    """Graphs, and the tensors they work on, that calls of `generate` with one model and one cache share.

    They hold device memory for the largest batch and context seen, and start anew when a call needs a longer context or
    when the cache has grown. Calls whose configurations are equal, but for max_new_tokens and select_override, share
    graphs; others get their own beside them.

    Fields:
        enabled: phases are captured: on CUDA, unless the configuration of the last call says no.
        bound: tokens per request that the graphs take.
    """

    def __init__(self):
        self.enabled = False
        self.bound = 0
        self._user: weakref.ref | None = None
        self._owner: tuple[torch.nn.Module, PagedCache] | None = None
        self._pools: tuple[int, int] | None = None  # address, pages
        self._config: DenoiseConfig | None = None
        self._seen: set[Hashable] = set()
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, object]] = {}
        self._kept: dict[Hashable, object] = {}
        self._memory: tuple[int, int] | None = None

    @property
    def num_graphs(self) -> int:
        """Captured so far."""
        return len(self._graphs)

    def take(self, user: object) -> None:
        """Makes `user` the one generation that works with these tensors, until it leaves or is gone.

        Raises:
            ValueError: another one does.
        """
        current = None if self._user is None else self._user()
        if current is not None and current is not user:
            raise ValueError(
                "generate: graphs must be of one generation at a time, got those of one that has not come to its end"
            )
        self._user = weakref.ref(user)

    def leave(self, user: object) -> None:
        """Ends what `take` began."""
        if self._user is not None and self._user() is user:
            self._user = None

    def bind(self, model: torch.nn.Module, cache: "PagedCache", config: "DenoiseConfig", max_seq_len: int) -> None:
        """Prepares for a call whose requests have at most max_seq_len tokens.

        Raises:
            ValueError: the graphs belong to another model or cache.
        """
        if self._owner is None:
            self._owner = (model, cache)
        for name, one, other in zip(("model", "cache"), (model, cache), self._owner, strict=True):
            if one is not other:
                raise ValueError(
                    f"generate: graphs must belong to this {name}, got those of another; give all calls the same {name}"
                )
        # No phase depends on these: an override runs between graphs.
        self._config = dataclasses.replace(config, max_new_tokens=1, select_override=None)
        self.enabled = config.cuda_graphs and cache.device.type == "cuda"
        pools = cache.layer(0)[0].data_ptr(), cache.num_pages
        if max_seq_len > self.bound or pools != self._pools:
            for store in (self._seen, self._graphs, self._kept):
                store.clear()
            self._memory = None
            self._pools = pools
            # Steps of an eighth of the next power of two: requests that are a little longer need no new graphs.
            step = max(1 << max(max_seq_len.bit_length() - 3, 0), 64)
            self.bound = -(-max_seq_len // step) * step

    def keep(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returned at the first call with this key under this configuration."""
        key = (self._config, key)
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def run(self, key: Hashable, phase: Callable[[], T]) -> T:
        """Queues a phase and returns what it returned. Of a replay these are the tensors of the capture, which hold
        what the replay writes.

        Raises:
            RuntimeError: the phase can't be captured, for example because it waits for the device.
        """
        if not self.enabled:
            return phase()
        key = (self._config, key)
        if key not in self._graphs:
            if key not in self._seen:
                self._seen.add(key)
                return phase()
            if self._memory is None:
                self._memory = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
                result = phase()
            self._graphs[key] = graph, result
        graph, result = self._graphs[key]
        graph.replay()
        return result
