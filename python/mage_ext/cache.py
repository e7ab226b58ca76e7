"""Paged KV cache: which pages hold whose keys and values, and nothing about tokens or attention.

`PagedCache` owns the K and V pages of all layers and lends pages; a page has one number in every layer. `RaggedBatch`
is the block tables of one batch of requests of any lengths. Forking a batch shares its full pages: they hold committed
tokens, which nobody writes again, so only the partly filled page of each request is copied.

Test: pytest tests/python/test_cache.py
"""

import weakref
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from mage_ext._arguments import check_device, check_index, check_list, check_type, got
from mage_ext._upload import upload

PAGE_SIZES = (1, 16, 32, 64, 128, 256)


class OutOfPages(RuntimeError):
    """A reservation needs more pages than are free. Nothing was changed."""


def _check_positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"PagedCache: {name} must be an integer >= 1, got {got(value)}")
    if value > _MAX_PAGES:
        raise ValueError(f"PagedCache: {name} must be in [1, {_MAX_PAGES}], got {value}")


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} must be an integer >= 0, got {got(value)}")


_GIB = 2**30
_MAX_PAGES = 2**31 - 1  # page ids are int32


def _page_bytes(num_layers: int, num_kv_heads: int, head_dim: int, page_size: int, dtype: torch.dtype) -> int:
    return 2 * num_layers * page_size * num_kv_heads * head_dim * dtype.itemsize


def _free_bytes(device: torch.device) -> int | None:
    """What can be allocated on a CUDA device, torch's own unused memory with it; None for other devices."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def _pages_of_fraction(fraction: object, arguments: dict, page_bytes: int) -> int:
    """num_pages of PagedCache.for_model(memory_fraction=fraction)."""
    if not isinstance(fraction, (int, float)) or isinstance(fraction, bool) or not 0 < fraction <= 1:
        raise ValueError(f"PagedCache: memory_fraction must be a number in (0, 1], got {got(fraction)}")
    if "num_pages" in arguments:
        raise ValueError("PagedCache: memory_fraction must stand in place of num_pages, got both")
    free = _free_bytes(check_device("PagedCache", arguments["device"]))
    if free is None:
        raise ValueError(f"PagedCache: memory_fraction must be given on cuda only, got device {arguments['device']}")
    num_pages = int(free * fraction) // page_bytes
    if num_pages < 1:
        raise OutOfPages(
            f"PagedCache: memory_fraction must give a page of {page_bytes / _GIB:.2f} GiB, got {fraction} of "
            f"{free / _GIB:.2f} GiB"
        )
    return num_pages


class PagedCache:
    """K and V pools of all layers and the allocator of their pages.

    Bytes of a page: 2 * num_layers * page_size * num_kv_heads * head_dim * bytes of dtype. Pages are not cleared: what
    a request has not written is never read.

    Args:
        num_layers, num_kv_heads, head_dim: shape of the model.
        num_pages: pages to hold, each page_size tokens of one request.
        page_size: 1, 16, 32, 64, 128 or 256 tokens.
        dtype: float32, bfloat16 or float16. device: where the pools live.
        growable: a reservation that doesn't fit enlarges the pools (both sizes exist for a moment) instead of raising
            OutOfPages.

    Raises:
        ValueError, TypeError: naming the argument. OutOfPages: the pools don't fit the device's memory.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        num_pages: int,
        page_size: int = 64,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        growable: bool = False,
    ):
        for name, value in (
            ("num_layers", num_layers),
            ("num_kv_heads", num_kv_heads),
            ("head_dim", head_dim),
            ("num_pages", num_pages),
        ):
            _check_positive(name, value)
        if not isinstance(page_size, int) or isinstance(page_size, bool) or page_size not in PAGE_SIZES:
            raise ValueError(f"PagedCache: page_size must be one of {PAGE_SIZES}, got {got(page_size)}")
        if not isinstance(dtype, torch.dtype) or dtype not in (torch.float32, torch.bfloat16, torch.float16):
            actual = dtype if isinstance(dtype, torch.dtype) else got(dtype)
            raise ValueError(f"PagedCache: dtype must be float32, bfloat16 or float16, got {actual}")
        device = check_device("PagedCache", device)
        check_type("PagedCache", "growable", growable, bool, "a bool")
        self.page_size = page_size
        self.growable = growable
        needed = num_pages * _page_bytes(num_layers, num_kv_heads, head_dim, page_size, dtype)
        free = _free_bytes(device)
        if free is not None and needed > free:
            raise OutOfPages(
                f"PagedCache: num_pages must fit the {free / _GIB:.2f} GiB that are free on {device}, got {num_pages} "
                f"of {page_size} tokens, {needed / _GIB:.2f} GiB"
            )
        try:
            self._pools = torch.empty(
                num_layers, 2, num_pages, page_size, num_kv_heads, head_dim, dtype=dtype, device=device
            )
        except RuntimeError as error:
            raise OutOfPages(
                f"PagedCache: num_pages must fit the memory of {device}, got {num_pages} of {page_size} tokens, "
                f"{needed / _GIB:.2f} GiB"
            ) from error
        self._users = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))

    @classmethod
    def for_model(cls, model: torch.nn.Module, *, memory_fraction: float | None = None, **arguments) -> "PagedCache":
        """A cache with the layers, KV heads, head_dim, dtype and device of a `Transformer`; the other arguments are the
        class's.

        Args:
            memory_fraction: in (0, 1], in place of num_pages: as many pages as fit this share of the device memory that
                is free now, on CUDA. Masses, logits and graphs of a run need the rest: 0.8 leaves them room.
        Raises:
            TypeError: model is no such model. ValueError: memory_fraction. OutOfPages: the pages don't fit the device.
        """
        if not isinstance(model, torch.nn.Module) or not all(hasattr(model, x) for x in ("embed_tokens", "config")):
            raise TypeError(f"PagedCache: model must be a Transformer, got {got(model)}")
        weight = model.embed_tokens.weight
        arguments = {"dtype": weight.dtype, "device": weight.device, **arguments}
        config = model.config
        if memory_fraction is not None:
            page = (config.num_layers, config.num_kv_heads, config.head_dim, arguments.get("page_size", 64))
            arguments["num_pages"] = _pages_of_fraction(
                memory_fraction, arguments, _page_bytes(*page, arguments["dtype"])
            )
        return cls(config.num_layers, config.num_kv_heads, config.head_dim, **arguments)

    @property
    def num_layers(self) -> int:
        return self._pools.shape[0]

    @property
    def num_kv_heads(self) -> int:
        return self._pools.shape[4]

    @property
    def head_dim(self) -> int:
        return self._pools.shape[5]

    @property
    def num_pages(self) -> int:
        return self._pools.shape[2]

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def dtype(self) -> torch.dtype:
        return self._pools.dtype

    @property
    def device(self) -> torch.device:
        return self._pools.device

    @property
    def page_bytes(self) -> int:
        """Bytes of a page in all layers."""
        return _page_bytes(self.num_layers, self.num_kv_heads, self.head_dim, self.page_size, self.dtype)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's K and V of one KV head of one layer."""
        return 2 * self.head_dim * self._pools.element_size()

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold num_tokens tokens of one request. Raises ValueError if that is no integer >= 0."""
        _check_count("PagedCache: num_tokens", num_tokens)
        return -(-num_tokens // self.page_size)

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """(k_cache, v_cache) of a layer, each [pages, page, Hkv, D]. Fetch them anew for every forward: growing
        replaces them. Raises ValueError if layer is not in [0, num_layers)."""
        check_index("PagedCache", "layer", layer, self.num_layers)
        return self._pools[layer, 0], self._pools[layer, 1]

    def allocate(self, count: int) -> list[int]:
        """`count` pages with one user each, lowest free numbers of a fresh cache first.

        Raises:
            OutOfPages: fewer are free and the cache is not growable; none is taken. ValueError: count is negative.
        """
        _check_count("PagedCache: count", count)
        if count > self.num_free:
            if not self.growable:
                raise OutOfPages(f"PagedCache: num_pages must leave {count} pages free, got {self.num_free}")
            self._grow(max(count - self.num_free, self.num_pages // 4))
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._users[page] = 1
        return pages

    def retain(self, pages: Sequence[int]) -> None:
        """One more user for each of `pages`, all of them in use; else ValueError, or TypeError if it is no list."""
        for page in self._used(pages):
            self._users[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One user less for each of `pages`; pages without users are free again. Raises as retain does, also where a
        page comes more often than it has users."""
        pages = self._used(pages)
        for page, times in Counter(pages).items():
            if times > self._users[page]:
                raise ValueError(
                    f"PagedCache: pages must have a user for each time they come, got page {page} {times} times, which "
                    f"has {self._users[page]}"
                )
        for page in reversed(pages):
            self._users[page] -= 1
            if not self._users[page]:
                self._free.append(page)

    def copy_pages(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copies pages in all layers.

        Raises:
            TypeError: sources or targets is no list. ValueError: a page does not exist, or they are not equally long.
        """
        sources, targets = self._checked(sources, "sources"), self._checked(targets, "targets")
        if len(sources) != len(targets):
            raise ValueError(f"PagedCache: targets must be as many as sources, {len(sources)}, got {len(targets)}")
        if sources:
            self._pools[:, :, upload(targets, self.device)] = self._pools[:, :, upload(sources, self.device)]

    def _used(self, pages: Sequence[int]) -> list[int]:
        pages = self._checked(pages)
        for page in pages:
            if not self._users[page]:
                raise ValueError(f"PagedCache: pages must be in use, got free page {page}")
        return pages

    def _checked(self, pages: Sequence[int], name: str = "pages") -> list[int]:
        pages = check_list("PagedCache", name, pages, "a list of page numbers")
        num_pages = self.num_pages
        for page in pages:
            if not isinstance(page, int) or isinstance(page, bool) or not 0 <= page < num_pages:
                raise ValueError(f"PagedCache: {name} must be integers in [0, {num_pages}), got {got(page)}")
        return pages

    def _grow(self, count: int) -> None:
        old, num_pages = self._pools, self.num_pages
        self._pools = old.new_empty(*old.shape[:2], num_pages + count, *old.shape[3:])
        self._pools[:, :, :num_pages] = old
        self._users += [0] * count
        self._free[:0] = range(num_pages + count - 1, num_pages - 1, -1)


def _give_back(cache: PagedCache, pages: list[list[int]]) -> None:
    """Returns the pages that a batch still has."""
    for owned in pages:
        cache.release(owned)


class RaggedBatch:
    """Block tables of B requests of any lengths on one cache, which gets their pages back when the batch is dropped.

    Fields:
        cache: the pages.

    Raises:
        TypeError: cache is no PagedCache. ValueError: num_requests is no integer >= 0.
    """

    def __init__(self, cache: PagedCache, num_requests: int):
        check_type("RaggedBatch", "cache", cache, PagedCache, "a PagedCache")
        _check_count("RaggedBatch: num_requests", num_requests)
        if num_requests >= 1 << 24:
            raise ValueError(f"RaggedBatch: num_requests must be below 2^24, got {num_requests}")
        self.cache = cache
        self._pages: list[list[int]] = [[] for _ in range(num_requests)]
        # Who drops a batch has no further use for its pages.
        weakref.finalize(self, _give_back, cache, self._pages).atexit = False
        self._block_table = torch.full((num_requests, 1), -1, dtype=torch.int32, device=cache.device)
        self._stale: set[int] = set()  # requests whose rows are others by now

    def __len__(self) -> int:
        return len(self._pages)

    @property
    def block_table(self) -> Tensor:
        """[B, max_pages], int32, on the cache's device; -1 where a request has no page. Read it anew after a change:
        rows are written when somebody asks for them, all in one copy."""
        if self._stale:
            stale, device = sorted(self._stale), self._block_table.device
            width = max(self._block_table.shape[1], *(len(self._pages[request]) for request in stale))
            missing = width - self._block_table.shape[1]
            if missing:
                self._block_table = torch.nn.functional.pad(self._block_table, (0, missing), value=-1)
            rows = [page for r in stale for page in (*self._pages[r], *[-1] * (width - len(self._pages[r])))]
            rows = upload(rows, device, torch.int32).view(len(stale), width)
            self._block_table.index_copy_(0, upload(stale, device), rows)
            self._stale.clear()
        return self._block_table

    def pages(self, request: int) -> list[int]:
        """Page numbers of a request, in the order of its tokens."""
        self._check_request(request)
        return list(self._pages[request])

    def reserve(self, request: int, num_tokens: int) -> None:
        """Gives a request the pages that it lacks for num_tokens tokens.

        Raises:
            OutOfPages: naming the request; it and all others keep what they had.
        """
        self._check_request(request)
        _check_count("RaggedBatch: num_tokens", num_tokens)
        owned = self._pages[request]
        missing = self.cache.pages_for(num_tokens) - len(owned)
        if missing <= 0:
            return
        try:
            owned += self.cache.allocate(missing)
        except OutOfPages:
            raise OutOfPages(
                f"RaggedBatch: request {request} must find {missing} free pages of {self.cache.page_size} tokens "
                f"for its {num_tokens} tokens, got {self.cache.num_free} of {self.cache.num_pages}"
            ) from None
        self._stale.add(request)

    def release(self, request: int) -> None:
        """Returns all pages of a request; its row becomes -1."""
        self._check_request(request)
        if not self._pages[request]:
            return
        self.cache.release(self._pages[request])
        self._pages[request] = []
        self._stale.add(request)

    def release_all(self) -> None:
        """Returns all pages of all requests."""
        for request in range(len(self)):
            self.release(request)

    def fork(self, lengths: Sequence[int]) -> "RaggedBatch":
        """A batch that continues from the first lengths[b] tokens of every request; the two never write a shared page.

        Full pages are shared, a partly filled one is copied, pages beyond are not taken over.

        Args:
            lengths: one per request, committed tokens; neither batch may write below them afterwards.
        Raises:
            OutOfPages: for the copies; nothing is changed. ValueError: naming the length.
            TypeError: lengths is no list.
        """
        size = self.cache.page_size
        lengths = check_list("RaggedBatch", "lengths", lengths, "a list of integers")
        if len(lengths) != len(self):
            raise ValueError(f"RaggedBatch: lengths must have one entry per request, {len(self)}, got {len(lengths)}")
        for request, length in enumerate(lengths):
            _check_count(f"RaggedBatch: lengths[{request}]", length)
            if length > len(self._pages[request]) * size:
                raise ValueError(
                    f"RaggedBatch: lengths[{request}] must be in [0, {len(self._pages[request]) * size}], got {length}"
                )
        partial = [request for request, length in enumerate(lengths) if length % size]
        copies = self.cache.allocate(len(partial))
        self.cache.copy_pages([self._pages[request][lengths[request] // size] for request in partial], copies)
        twin = RaggedBatch(self.cache, len(self))
        for request, length in enumerate(lengths):
            shared = self._pages[request][: length // size]
            self.cache.retain(shared)
            twin._pages[request] = shared
        for request, page in zip(partial, copies, strict=True):
            twin._pages[request].append(page)
        twin._stale.update(range(len(twin)))
        return twin

    def _check_request(self, request: int) -> None:
        check_index("RaggedBatch", "request", request, len(self))
