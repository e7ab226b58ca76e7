"""The page allocator and the block tables. Run: pytest tests/python/test_cache.py"""

import hypothesis.stateful as stateful
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

from mage_ext import cache as cache_module
from mage_ext.cache import PAGE_SIZES, OutOfPages, PagedCache, RaggedBatch
from mage_ext.testing.tiny import tiny_config, tiny_model


def _cache(num_pages=8, page_size=16, **arguments):
    return PagedCache(2, 2, 8, num_pages=num_pages, page_size=page_size, **arguments)


def test_layers_are_views_of_one_pool():
    cache = _cache()
    k, v = cache.layer(1)
    assert k.shape == v.shape == (8, 16, 2, 8)
    k.fill_(1)
    v.fill_(2)
    cache.layer(0)[0].fill_(3)
    assert cache.layer(1)[0].unique().tolist() == [1] and cache.layer(1)[1].unique().tolist() == [2]
    assert k.data_ptr() % 16 == 0 and v.data_ptr() % 16 == 0


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_pages_for(page_size):
    cache = _cache(page_size=page_size)
    for tokens in (0, 1, page_size - 1, page_size, page_size + 1, 3 * page_size):
        pages = cache.pages_for(tokens)
        assert pages * page_size >= tokens > (pages - 1) * page_size


def test_token_bytes():
    assert _cache(dtype=torch.bfloat16).token_bytes == 2 * 8 * 2
    assert _cache(dtype=torch.float32).token_bytes == 2 * 8 * 4


def test_reserve_fills_the_row_and_keeps_what_is_there():
    batch = RaggedBatch(_cache(), 3)
    batch.reserve(1, 17)
    first = batch.pages(1)
    batch.reserve(1, 40)
    assert batch.pages(1)[:2] == first and len(batch.pages(1)) == 3
    batch.reserve(1, 16)  # nothing is given back
    assert len(batch.pages(1)) == 3
    batch.reserve(0, 1)
    assert batch.block_table.dtype == torch.int32
    assert batch.block_table.tolist() == [[*batch.pages(0), -1, -1], batch.pages(1), [-1, -1, -1]]
    assert batch.cache.num_free == 8 - 4


def test_rows_are_written_when_they_are_read(monkeypatch):
    """All that changed in one copy, nothing where nobody asks."""
    uploads = []
    upload = cache_module.upload
    monkeypatch.setattr(cache_module, "upload", lambda values, *a: uploads.append(len(values)) or upload(values, *a))
    batch = RaggedBatch(_cache(num_pages=12), 4)
    for request, tokens in enumerate((17, 40, 5, 33)):
        batch.reserve(request, tokens)
    batch.release(2)
    assert not uploads
    rows = [[*batch.pages(r), *[-1] * (3 - len(batch.pages(r)))] for r in range(4)]
    assert batch.block_table.tolist() == rows and uploads == [4 * 3, 4]
    batch.release(1)
    batch.reserve(2, 64)
    rows = [[*batch.pages(r), *[-1] * (4 - len(batch.pages(r)))] for r in range(4)]
    assert batch.block_table.tolist() == rows and uploads[2:] == [2 * 4, 2]
    batch.release_all()
    assert len(uploads) == 4 and (batch.block_table == -1).all()


def test_only_the_request_that_does_not_fit_is_refused():
    batch = RaggedBatch(_cache(num_pages=4), 3)
    batch.reserve(0, 32)
    before = batch.block_table.clone()
    with pytest.raises(OutOfPages, match=r"request 1 must find 3 free pages .* got 2 of 4"):
        batch.reserve(1, 48)
    assert torch.equal(batch.block_table, before) and batch.cache.num_free == 2
    batch.reserve(2, 32)
    assert batch.cache.num_free == 0
    batch.release(0)
    assert batch.cache.num_free == 2 and batch.block_table[0].tolist() == [-1, -1]
    batch.reserve(1, 32)


def test_growth_keeps_contents_and_numbers():
    cache = _cache(num_pages=2, growable=True)
    batch = RaggedBatch(cache, 2)
    batch.reserve(0, 32)
    cache.layer(0)[0][:] = torch.arange(2.0).view(2, 1, 1, 1)
    batch.reserve(1, 70)
    assert cache.num_pages == 2 + 5 and cache.num_free == 0
    assert cache.layer(0)[0][:2, 0, 0, 0].tolist() == [0, 1]
    assert sorted(batch.pages(0) + batch.pages(1)) == list(range(7))


def _write(cache, batch, request, position, value):
    page = batch.pages(request)[position // cache.page_size]
    for layer in range(cache.num_layers):
        for pool in cache.layer(layer):
            pool[page, position % cache.page_size] = value


def _read(cache, batch, request, position):
    page = batch.pages(request)[position // cache.page_size]
    values = {
        float(x)
        for layer in range(cache.num_layers)
        for pool in cache.layer(layer)
        for x in pool[page, position % cache.page_size].flatten()
    }
    assert len(values) == 1
    return values.pop()


def test_fork_shares_full_pages_and_copies_partial_ones():
    cache = _cache(num_pages=12)
    batch = RaggedBatch(cache, 3)
    lengths = [40, 32, 0]
    for request, length in enumerate(lengths):
        batch.reserve(request, length + 16)
        for position in range(length):
            _write(cache, batch, request, position, 100 * request + position)
    used = cache.num_pages - cache.num_free
    twin = batch.fork(lengths)
    assert cache.num_pages - cache.num_free == used + 1  # the partial page of request 0
    assert twin.pages(0)[:2] == batch.pages(0)[:2] and twin.pages(0)[2] != batch.pages(0)[2]
    assert twin.pages(1) == batch.pages(1)[:2] and twin.pages(2) == []
    twin.reserve(0, 48)
    _write(cache, twin, 0, 40, -1)
    _write(cache, batch, 0, 40, -2)
    assert _read(cache, twin, 0, 40) == -1 and _read(cache, batch, 0, 40) == -2
    for request, length in enumerate(lengths):
        for position in range(length):
            assert _read(cache, twin, request, position) == 100 * request + position
    batch.release_all()
    assert _read(cache, twin, 0, 39) == 39  # shared pages stay until the last user leaves
    twin.release_all()
    assert cache.num_free == cache.num_pages


def test_fork_without_pages_changes_nothing():
    cache = _cache(num_pages=3)
    batch = RaggedBatch(cache, 1)
    batch.reserve(0, 48)
    with pytest.raises(OutOfPages):
        batch.fork([40])
    assert batch.fork([32]).pages(0) == batch.pages(0)[:2]


def test_fork_of_more_than_is_reserved_is_an_error():
    batch = RaggedBatch(_cache(), 1)
    batch.reserve(0, 16)
    with pytest.raises(ValueError, match=r"lengths\[0\] must be in \[0, 16\], got 17"):
        batch.fork([17])


def test_release_and_retain_of_a_free_page_are_errors():
    cache = _cache()
    with pytest.raises(ValueError, match="in use, got free page 3"):
        cache.release([3])
    with pytest.raises(ValueError, match="in use, got free page 3"):
        cache.retain([3])
    page, free = cache.allocate(1)[0], cache.num_free
    other = (page + 1) % cache.num_pages
    with pytest.raises(ValueError, match=f"in use, got free page {other}"):
        cache.retain([page, other])
    with pytest.raises(ValueError, match=f"a user for each time they come, got page {page} 2 times, which has 1"):
        cache.release([page, page])
    assert cache.num_free == free
    cache.release([page])  # nothing was counted
    assert cache.num_free == free + 1


@pytest.mark.parametrize(
    ("match", "call"),
    [
        (r"RaggedBatch: lengths must have one entry per request, 2, got 1", lambda b: b.fork([16])),
        (r"RaggedBatch: lengths must have one entry per request, 2, got 3", lambda b: b.fork([16, 16, 0])),
        (r"RaggedBatch: lengths\[1\] must be an integer >= 0, got -1", lambda b: b.fork([16, -1])),
        (r"RaggedBatch: lengths\[0\] must be an integer >= 0, got 1.5", lambda b: b.fork([1.5, 0])),
        (r"RaggedBatch: request must be an integer in \[0, 2\), got -1", lambda b: b.reserve(-1, 16)),
        (r"RaggedBatch: request must be an integer in \[0, 2\), got 2", lambda b: b.reserve(2, 16)),
        (r"RaggedBatch: request must .* got -2", lambda b: b.release(-2)),
        (r"RaggedBatch: request must .* got '0'", lambda b: b.release("0")),
        (r"RaggedBatch: request must .* got -1", lambda b: b.pages(-1)),
        (r"RaggedBatch: num_tokens must be an integer >= 0, got -5", lambda b: b.reserve(0, -5)),
        (r"PagedCache: count must be an integer >= 0, got -1", lambda b: b.cache.allocate(-1)),
        (r"PagedCache: pages must be integers in \[0, 8\), got -8", lambda b: b.cache.release([-8])),
        (r"PagedCache: pages must be integers in \[0, 8\), got 0.0", lambda b: b.cache.release([1, 0.0])),
        (r"PagedCache: pages must be integers in \[0, 8\), got 8", lambda b: b.cache.retain([0, 8])),
    ],
)
def test_a_bad_argument_is_named_and_changes_nothing(match, call):
    batch = RaggedBatch(_cache(), 2)
    batch.reserve(0, 17)
    batch.reserve(1, 16)
    before = (batch.block_table.clone(), list(batch.cache._users), list(batch.cache._free))
    with pytest.raises(ValueError, match=match):
        call(batch)
    assert torch.equal(batch.block_table, before[0])
    assert (batch.cache._users, batch.cache._free) == before[1:]


class _Allocator(stateful.RuleBasedStateMachine):
    """Any sequence of reserve, fork and release keeps the books: a page has as many users as tables name it."""

    def __init__(self):
        super().__init__()
        self.cache = PagedCache(1, 1, 8, num_pages=10, page_size=16)
        self.batches = [(RaggedBatch(self.cache, 2), [0, 0])]

    @stateful.rule(batch=st.integers(0, 9), request=st.integers(0, 1), tokens=st.integers(1, 80))
    def reserve(self, batch, request, tokens):
        tables, lengths = self.batches[batch % len(self.batches)]
        try:
            tables.reserve(request, tokens)
            lengths[request] = max(lengths[request], min(tokens, len(tables.pages(request)) * 16))
        except OutOfPages:
            pass

    @stateful.rule(batch=st.integers(0, 9))
    def fork(self, batch):
        tables, lengths = self.batches[batch % len(self.batches)]
        try:
            self.batches.append((tables.fork(lengths), list(lengths)))
        except OutOfPages:
            pass

    @stateful.rule(batch=st.integers(0, 9), request=st.integers(0, 1))
    def release(self, batch, request):
        tables, lengths = self.batches[batch % len(self.batches)]
        tables.release(request)
        lengths[request] = 0

    @stateful.invariant()
    def books_are_kept(self):
        users = [0] * self.cache.num_pages
        writable = []
        for tables, lengths in self.batches:
            for request in range(2):
                pages = tables.pages(request)
                row = tables.block_table[request].tolist()
                assert row[: len(pages)] == pages and set(row[len(pages) :]) <= {-1}
                writable += pages[lengths[request] // 16 :]
                for page in pages:
                    users[page] += 1
        assert users == self.cache._users
        assert sorted(self.cache._free) == [page for page, count in enumerate(users) if count == 0]
        for page in writable:  # whoever may still write a page has it alone
            assert users[page] == 1


_Allocator.TestCase.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
test_allocator = _Allocator.TestCase


_WRONG = {
    "page_size_tensor": (
        lambda c: _cache(page_size=torch.ones(2)),
        "PagedCache: page_size must be one of .* got Tensor",
    ),
    "page_size_float": (lambda c: _cache(page_size=16.0), "PagedCache: page_size must be one of .* got 16.0"),
    "dtype": (lambda c: _cache(dtype="float32"), "PagedCache: dtype must be float32, .* got 'float32'"),
    "device": (lambda c: _cache(device="tpux"), "PagedCache: device must be a torch.device or its name, got 'tpux'"),
    "device_none": (lambda c: _cache(device=None), "PagedCache: device must be a torch.device or its name, got None"),
    "growable": (lambda c: _cache(growable="no"), "PagedCache: growable must be a bool, got 'no'"),
    "model": (lambda c: PagedCache.for_model(None, num_pages=1), "PagedCache: model must be a Transformer, got None"),
    "module": (
        lambda c: PagedCache.for_model(torch.nn.ReLU(), num_pages=1),
        "PagedCache: model must be a Transformer, got ReLU",
    ),
    "pages_for_none": (lambda c: c.pages_for(None), "PagedCache: num_tokens must be an integer >= 0, got None"),
    "pages_for_negative": (lambda c: c.pages_for(-1), "PagedCache: num_tokens must be an integer >= 0, got -1"),
    "layer": (lambda c: c.layer(2), r"PagedCache: layer must be an integer in \[0, 2\), got 2"),
    "layer_negative": (lambda c: c.layer(-1), r"PagedCache: layer must be an integer in \[0, 2\), got -1"),
    "layer_text": (lambda c: c.layer("a"), r"PagedCache: layer must be an integer in \[0, 2\), got 'a'"),
    "allocate": (lambda c: c.allocate(1.0), "PagedCache: count must be an integer >= 0, got 1.0"),
    "retain": (lambda c: c.retain(None), "PagedCache: pages must be a list of page numbers, got None"),
    "release": (lambda c: c.release(0), "PagedCache: pages must be a list of page numbers, got 0"),
    "release_text": (lambda c: c.release("0"), "PagedCache: pages must be a list of page numbers, got '0'"),
    "copy_sources": (lambda c: c.copy_pages([8], [0]), r"PagedCache: sources must be integers in \[0, 8\), got 8"),
    "copy_targets": (lambda c: c.copy_pages([0], [-1]), r"PagedCache: targets must be integers in \[0, 8\), got -1"),
    "copy_lengths": (lambda c: c.copy_pages([0, 1], [2]), "PagedCache: targets must be as many as sources, 2, got 1"),
    "batch_cache": (lambda c: RaggedBatch(None, 1), "RaggedBatch: cache must be a PagedCache, got None"),
    "batch_tensor": (lambda c: RaggedBatch(torch.ones(2), 1), "RaggedBatch: cache must be a PagedCache, got Tensor"),
    "batch_size": (lambda c: RaggedBatch(c, -1), "RaggedBatch: num_requests must be an integer >= 0, got -1"),
    "batch_size_none": (lambda c: RaggedBatch(c, None), "RaggedBatch: num_requests must be an integer >= 0, got None"),
    "pages": (lambda c: RaggedBatch(c, 2).pages("a"), r"RaggedBatch: request must be an integer in \[0, 2\), got 'a'"),
    "fork": (lambda c: RaggedBatch(c, 2).fork(None), "RaggedBatch: lengths must be a list of integers, got None"),
    "fork_entry": (
        lambda c: RaggedBatch(c, 2).fork([0, "a"]),
        r"RaggedBatch: lengths\[1\] must be an integer >= 0, got 'a'",
    ),
}


@pytest.mark.parametrize("case", _WRONG)
def test_names_what_is_of_another_type(case):
    call, message = _WRONG[case]
    cache = _cache()
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        call(cache)
    assert cache.num_free == 8


# --------------------------------------------------------------------------- pools of the memory that is there


@pytest.mark.parametrize("fraction", [0, -0.1, 1.5, True, "half", float("nan")])
def test_memory_fraction_is_checked(fraction):
    model = tiny_model(tiny_config("llama"))
    with pytest.raises(ValueError, match=r"memory_fraction must be a number in \(0, 1\], got"):
        PagedCache.for_model(model, memory_fraction=fraction)
    with pytest.raises(ValueError, match="memory_fraction must stand in place of num_pages, got both"):
        PagedCache.for_model(model, memory_fraction=0.5, num_pages=4)
    with pytest.raises(ValueError, match="memory_fraction must be given on cuda only, got device cpu"):
        PagedCache.for_model(model, memory_fraction=0.5)


@pytest.mark.gpu
def test_memory_fraction_fills_what_is_free():
    model = tiny_model(tiny_config("llama"), dtype=torch.bfloat16).to("cuda")
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    cache = PagedCache.for_model(model, memory_fraction=0.25)
    assert 0.2 * free < cache.num_pages * cache.page_bytes <= 0.26 * free
    assert cache.page_bytes == cache.token_bytes * 64 * cache.num_kv_heads * cache.num_layers
    with pytest.raises(OutOfPages, match=r"num_pages must fit the .* GiB that are free on cuda.*, got .* GiB"):
        PagedCache.for_model(model, num_pages=8 * cache.num_pages)
