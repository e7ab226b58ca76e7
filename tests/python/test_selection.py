"""SelectionConfig, BlockSelection, select and its baselines. Run: pytest tests/python/test_selection.py"""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mage_ext import ops, reference
from mage_ext.selection import BlockSelection, SelectionConfig, random_selection, recency_selection, select

TENSORS = ("indices", "counts", "kept_mass", "tail_start", "overflow")


def generator(seed):
    return torch.Generator().manual_seed(seed)


def make_case(seed, config, shape=(2, 3, 2, 20)):
    """mass, prefix_lens and, for rule "layer", votes."""
    g = generator(seed)
    mass = torch.softmax(torch.randn(shape, generator=g) * 2, -1)
    lengths = torch.randint(0, shape[-1] * config.g + 1, shape[1:2], generator=g, dtype=torch.int32)
    votes = None
    if config.rule == "layer":
        row_mass = torch.log_softmax(torch.randn(*shape, 12, generator=g) * 2, -2)
        votes = [ops.row_votes(row_mass[l], lengths, k=config.k, g=config.g) for l in range(shape[0])]
        votes = tuple(torch.stack(part) for part in zip(*votes, strict=True))
    return mass, lengths, votes


@st.composite
def configs(draw):
    g = draw(st.sampled_from(ops.GRANULARITIES))
    return SelectionConfig(
        rule=draw(st.sampled_from(ops.SELECT_RULES)),
        k=g * draw(st.integers(0, 12)),
        k_min=g * draw(st.integers(0, 3)),
        p=draw(st.sampled_from([0.2, 0.8, 1.0])),
        g=g,
        sinks=draw(st.sampled_from([0, 4, 2 * g])),
        recents=draw(st.sampled_from([0, 10, 3 * g])),
        capacity=draw(st.sampled_from([None, None, 5, 40])),
    )


def assert_same(actual, expected):
    assert actual.g == expected.g
    for name in TENSORS:
        a, b = getattr(actual, name), getattr(expected, name)
        assert torch.equal(torch.nan_to_num(a, nan=-1), torch.nan_to_num(b, nan=-1)), name


def make_selection():
    config = SelectionConfig(k=96, g=16, sinks=4)
    mass, _, _ = make_case(0, config)
    return select(mass, torch.tensor([320, 100, 0], dtype=torch.int32), config), mass


# --- select and the baselines ----------------------------------------------------------------------------------------


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 2**20), configs())
def test_select_is_the_operator(seed, config):
    mass, lengths, votes = make_case(seed, config)
    selection = select(mass, lengths, config, votes=votes).validate()
    capacity = config.capacity_units(20, 2, 2)
    names = dict(zip(("votes", "union_size", "coverage"), votes or (None,) * 3, strict=True))
    expected = reference.select_kv(
        mass,
        lengths,
        g=config.g,
        capacity=capacity,
        rule=config.rule,
        k=config.k,
        k_min=config.k_min,
        p=config.p,
        sinks=config.sinks,
        recents=config.recents,
        **names,
    )
    assert_same(selection, BlockSelection(*expected[:4], config.g, expected[4]))
    if config.capacity is None:
        assert not selection.overflow.any()  # the default capacity holds whatever the rule can ask for


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 2**20), configs())
def test_baselines_have_the_same_size_and_forced_units(seed, config):
    mass, lengths, votes = make_case(seed, config)
    chosen = select(mass, lengths, config, votes=votes)
    for baseline in (
        recency_selection(mass, lengths, config, votes=votes).validate(),
        random_selection(mass, lengths, config, seed, votes=votes).validate(),
    ):
        assert torch.equal(baseline.counts, chosen.counts)
        assert torch.equal(baseline.tail_start, chosen.tail_start)
        for l, b, h in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(2)).tolist():
            units, count = baseline.units(b, l, h), int(chosen.counts[l, b, h])
            prefix, eligible = int(lengths[b]), int(lengths[b]) // config.g
            sinks = [u for u in range(eligible) if u * config.g < config.sinks][:count]
            assert units[: len(sinks)] == sinks
            recents = (
                [u for u in range(eligible) if (u + 1) * config.g > prefix - config.recents] if config.recents else []
            )
            recents = [u for u in recents if u not in sinks][::-1][: count - len(sinks)]
            assert set(recents) <= set(units)
            attended = [*units, *range(eligible, 20)]
            assert baseline.kept_mass[l, b, h] == pytest.approx(float(mass[l, b, h, attended].sum()), abs=1e-6)


def test_recency_takes_the_latest_units():
    mass = torch.rand(1, 1, 1, 10)
    lengths = torch.tensor([150], dtype=torch.int32)  # unit 9 is partial and charged
    config = SelectionConfig(k=64, g=16, sinks=1)
    assert recency_selection(mass, lengths, config).units(0, 0, 0) == [0, 7, 8]


def test_random_depends_on_seed_layer_and_head_alone():
    config = SelectionConfig(k=80, g=16)
    mass = torch.rand(3, 4, 2, 40)
    lengths = torch.full((4,), 640, dtype=torch.int32)
    seeds = torch.tensor([1, 2, 1, 3])
    selection = random_selection(mass, lengths, config, seeds)
    assert torch.equal(selection.indices[:, 0], selection.indices[:, 2])
    assert not torch.equal(selection.indices[:, 0], selection.indices[:, 1])
    assert not torch.equal(selection.indices[0], selection.indices[1])
    assert not torch.equal(selection.indices[:, :, 0], selection.indices[:, :, 1])
    alone = random_selection(mass[:, 1:2], lengths[:1], config, 2)
    assert torch.equal(alone.indices[:, 0], selection.indices[:, 1])
    # Every unit is as likely as any other: 512 draws of 5 of 40 units.
    many = random_selection(torch.rand(1, 512, 1, 40), lengths[:1].expand(512).contiguous(), config, torch.arange(512))
    hits = torch.bincount(many.indices.flatten().long(), minlength=40)
    assert ((hits - 64.0).abs() < 5 * (512 * 0.125 * 0.875) ** 0.5).all()


def test_baselines_keep_less_mass_than_select():
    config = SelectionConfig(k=80, g=16)
    mass, lengths, _ = make_case(5, config)
    best = select(mass, lengths, config).kept_mass
    assert (recency_selection(mass, lengths, config).kept_mass <= best + 1e-6).all()
    assert (random_selection(mass, lengths, config, 7).kept_mass <= best + 1e-6).all()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SelectionConfig(k=128, g=32), 4),
        (SelectionConfig(k=6400, g=32), 100),
        (SelectionConfig(k=0, g=32), 1),
        (SelectionConfig(rule="layer", k=128, g=32), 40),
        (SelectionConfig(rule="layer", k=32, k_min=640, g=32), 20),
        (SelectionConfig(rule="joint", k=128, g=32), 8),
        (SelectionConfig(rule="mass", g=32), 100),
        (SelectionConfig(rule="mass", g=32, capacity=7), 7),
    ],
)
def test_default_capacity(config, expected):
    assert config.capacity_units(num_units=100, num_layers=10, num_kv_heads=2) == expected


# --- the object ------------------------------------------------------------------------------------------------------


def test_inspection():
    selection, _ = make_selection()
    assert (selection.num_layers, selection.capacity) == (2, 6)
    units = selection.units(0, 1, 0)
    assert len(units) == 6 and units[0] == 0 and units == sorted(set(units))
    assert selection.tokens(0, 1, 0) == [token for unit in units for token in range(unit * 16, unit * 16 + 16)]
    assert selection.units(2, 0, 0) == []
    indices, counts, tail_start = selection.layer(1)
    assert torch.equal(indices, selection.indices[1]) and torch.equal(counts, selection.counts[1])
    assert tail_start.tolist() == [320, 96, 0]


def test_save_and_load(tmp_path):
    selection, _ = make_selection()
    edited = selection.with_units(0, 0, 1, [3, 1])
    edited.save(tmp_path / "selection.safetensors")
    assert_same(BlockSelection.load(tmp_path / "selection.safetensors"), edited)


def test_edit():
    selection, _ = make_selection()
    edited = selection.with_units(request=0, layer=1, head=0, units=[19, 0, 7])
    assert edited.units(0, 1, 0) == [0, 7, 19] and math.isnan(edited.kept_mass[1, 0, 0])
    assert edited.validate() is edited
    changed = torch.zeros(2, 3, 2, dtype=torch.bool)
    changed[1, 0, 0] = True
    assert torch.equal(edited.indices[~changed], selection.indices[~changed])
    assert torch.equal(edited.counts[~changed], selection.counts[~changed])
    assert selection.units(0, 1, 0) != [0, 7, 19]  # the original stays
    assert edited.with_units(0, 1, 0, []).units(0, 1, 0) == []


def test_from_units():
    selection = BlockSelection.from_units([[[[5, 2], []], [[0], [1]]]], tail_start=[96, 32], g=16)
    assert selection.indices.tolist() == [[[[2, 5], [-1, -1]], [[0, -1], [1, -1]]]]
    assert selection.counts.tolist() == [[[2, 0], [1, 1]]]
    assert selection.kept_mass.isnan().all() and not selection.overflow.any()
    assert BlockSelection.from_units([[[[]]]], [0], 1, capacity=3).indices.shape == (1, 1, 1, 3)


def test_to_keeps_the_values():
    selection, _ = make_selection()
    assert_same(selection.to("cpu"), selection)
    assert selection.to("meta").indices.device.type == "meta"


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"indices\[0, 0, 1, 2\] must be greater than the entry before it, got 1", {"indices": [0, 1, 1]}),
        (r"indices\[0, 0, 1, 1\] must be greater than the entry before it, got 0", {"indices": [4, 0, 1]}),
        (r"indices\[0, 0, 1, 0\] must be in \[0, tail_start / g\), got 20", {"indices": [20, 21, 22]}),
        (r"indices\[0, 0, 1, 0\] must be in \[0, tail_start / g\), got -1", {"indices": [-1, 1, 2]}),
        (r"indices\[0, 0, 1, 0\] must be -1 after the count, got", {"count": 0}),
        (r"counts\[0, 0, 1\] must be in \[0, capacity = 6\], got 7", {"count": 7}),
        (r"counts\[0, 0, 1\] must be in \[0, capacity = 6\], got -2", {"count": -2}),
        (r"tail_start\[1\] must be a multiple of g = 16 >= 0, got 97", {"tail": 97}),
        (r"tail_start\[1\] must be a multiple of g = 16 >= 0, got -16", {"tail": -16}),
    ],
)
def test_validate_names_the_first_bad_value(message, change):
    selection, _ = make_selection()
    indices, counts, tail_start = selection.indices.clone(), selection.counts.clone(), selection.tail_start.clone()
    if "indices" in change:
        indices[0, 0, 1, :3] = torch.tensor(change["indices"], dtype=torch.int32)
    if "count" in change:
        counts[0, 0, 1] = change["count"]
    if "tail" in change:
        tail_start[1] = change["tail"]
    bad = dataclasses.replace(selection, indices=indices, counts=counts, tail_start=tail_start)
    with pytest.raises(ValueError, match=f"BlockSelection: {message}"):
        bad.validate()


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "indices must be torch.int32, got torch.int64", {"indices": torch.zeros(2, 3, 2, 6).long()}),
        (TypeError, "indices must be a tensor, got list", {"indices": [1]}),
        (ValueError, r"indices must be \[L, B, Hkv, Kmax\], got \[2, 3\]", {"indices": torch.zeros(2, 3).int()}),
        (ValueError, r"counts must have shape \[2, 3, 2\], got \[2, 3\]", {"counts": torch.zeros(2, 3).int()}),
        (TypeError, "kept_mass must be torch.float32, got torch.float64", {"kept_mass": torch.zeros(2, 3, 2).double()}),
        (ValueError, r"tail_start must have shape \[3\], got \[2\]", {"tail_start": torch.zeros(2).int()}),
        (TypeError, "overflow must be torch.bool, got torch.int32", {"overflow": torch.zeros(2, 3, 2).int()}),
        (ValueError, r"g must be one of \(1, 16, 32, 64\), got 8", {"g": 8}),
        (
            ValueError,
            "counts must be on cpu like indices, got meta",
            {"counts": torch.zeros(2, 3, 2, device="meta").int()},
        ),
    ],
)
def test_construction_names_the_bad_field(error, message, change):
    selection, _ = make_selection()
    with pytest.raises(error, match=f"BlockSelection: {message}"):
        dataclasses.replace(selection, **change)


@pytest.mark.parametrize(
    ("message", "units", "tail_start", "kwargs"),
    [
        (r"units\[0\]\[0\]\[0\] must be in \[0, 2\) \(tail_start / g\), got 2", [[[[2]]]], [32], {}),
        (r"units\[0\]\[0\]\[0\] must be in \[0, 2\) .*, got -1", [[[[-1]]]], [32], {}),
        (r"units\[0\]\[0\]\[0\] must not repeat a unit, got 1 twice", [[[[1, 1]]]], [32], {}),
        (r"units\[1\] must have 1 requests of 1 heads each", [[[[1]]], [[[1], [0]]]], [32], {}),
        ("units must have a layer, a request and a head", [], [32], {}),
        ("units must have at most capacity = 1 entries, got 2", [[[[0, 1]]]], [32], {"capacity": 1}),
        (r"tail_start must have shape \[1\], got \[2\]", [[[[0]]]], [32, 32], {}),
        (r"tail_start\[0\] must be a multiple of g = 16 >= 0, got 33", [[[[0]]]], [33], {}),
        ("units must be integers, got 1.7", [[[[1.7]]]], [32], {}),
        ("units must be integers, got True", [[[[True]]]], [32], {}),
        ("units must be integers, got '1'", [[[["1"]]]], [32], {}),
        ("tail_start must be integers, got 32.5", [[[[1]]]], [32.5], {}),
    ],
)
def test_from_units_names_what_is_wrong(message, units, tail_start, kwargs):
    with pytest.raises(ValueError, match=f"BlockSelection: {message}"):
        BlockSelection.from_units(units, tail_start, 16, **kwargs)


def test_with_units_names_what_is_wrong():
    selection, _ = make_selection()
    with pytest.raises(ValueError, match=r"units must be in \[0, 6\) \(tail_start / g\), got 6"):
        selection.with_units(1, 0, 0, [6])
    with pytest.raises(ValueError, match="units must not repeat a unit, got 2 twice"):
        selection.with_units(0, 0, 0, [2, 3, 2])
    with pytest.raises(ValueError, match="units must have at most capacity = 6 entries, got 7"):
        selection.with_units(0, 0, 0, range(7))
    with pytest.raises(ValueError, match=r"units must be integers, got 1\.0"):
        selection.with_units(0, 0, 0, [1.0])
    assert selection.with_units(0, 0, 0, torch.tensor([3, 1])).units(0, 0, 0) == [1, 3]


@pytest.mark.parametrize(
    ("error", "got", "seed"),
    [
        (TypeError, "1.5", 1.5),
        (TypeError, "True", True),
        (TypeError, "None", None),
        (TypeError, "torch.float32", torch.tensor([1.0, 2.0])),
        (ValueError, "9223372036854775808", 1 << 63),
    ],
)
def test_random_selection_names_a_bad_seed(error, got, seed):
    config = SelectionConfig(k=32, g=16)
    with pytest.raises(error, match=f"random_selection: seed must .* got {got}"):
        random_selection(torch.rand(1, 2, 1, 6), torch.tensor([96, 64], dtype=torch.int32), config, seed)


def test_load_names_what_is_wrong(tmp_path):
    selection, _ = make_selection()
    good = {name: getattr(selection, name) for name in TENSORS}
    header = {"format": "mage_ext.BlockSelection/1", "g": "16"}
    path = tmp_path / "selection.safetensors"

    def load(tensors, metadata):
        save_file(tensors, path, metadata=metadata)
        return BlockSelection.load(path)

    assert_same(load(good, header), selection)
    with pytest.raises(ValueError, match=r"must be of format mage_ext.BlockSelection/1, got None"):
        load(good, None)
    with pytest.raises(ValueError, match=r"must be of format .*, got 'other'"):
        load(good, {**header, "format": "other"})
    with pytest.raises(ValueError, match=r"must have the tensors indices, .*, got counts, indices$"):
        load({name: good[name] for name in ("indices", "counts")}, header)
    with pytest.raises(ValueError, match=r"must name g in its metadata, got 'x'"):
        load(good, {**header, "g": "x"})
    with pytest.raises(ValueError, match="g must be one of"):
        load(good, {**header, "g": "7"})
    with pytest.raises(ValueError, match=r"counts\[0, 0, 0\] must be in"):
        load({**good, "counts": good["counts"] + 9}, header)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="must be a safetensors file, got"):
        BlockSelection.load(path)
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match="must be a safetensors file, got"):
        BlockSelection.load(path)


# --- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "kwargs"),
    [
        ("rule must be one of fixed, layer, mass, joint, got 'topk'", {"rule": "topk"}),
        ("g must be one of 1, 16, 32, 64, got 8", {"g": 8}),
        ("g must be one of 1, 16, 32, 64, got True", {"g": True}),
        ("k must be a multiple of g = 32, got 100", {"k": 100}),
        ("k must be an integer >= 0, got -32", {"k": -32}),
        ("k must be an integer >= 0, got 64.0", {"k": 64.0}),
        ("k_min must be a multiple of g = 32, got 31", {"k_min": 31}),
        ("sinks must be an integer >= 0, got -1", {"sinks": -1}),
        ("recents must be an integer >= 0, got None", {"recents": None}),
        ("sinks must be at most 1073741824, got 1073741825", {"sinks": 2**30 + 1}),
        ("k_min must be at most 1073741824, got 2147483648", {"k_min": 2**31}),
        ("capacity must be an integer >= 1, got 0", {"capacity": 0}),
        ("capacity must be at most 4194304 units, got 4194305", {"capacity": 2**22 + 1}),
        (r"p must be a number in \(0, 1\], got nan", {"p": math.nan}),
        (r"p must be a number in \(0, 1\], got 0", {"p": 0}),
        (r"p must be a number in \(0, 1\], got 1.01", {"p": 1.01}),
        ("score must be one of mean, max, got 'sum'", {"score": "sum"}),
        ("score_rows must be one of open, all, got 'some'", {"score_rows": "some"}),
        ("norm must be one of context, prefix, got None", {"norm": None}),
        ("candidates must be an integer >= 16, got 4096.0", {"k": 64, "g": 1, "candidates": 4096.0}),
        ('candidates must be None but .*, got 4096 with g = 16 and rule "fixed"', {"g": 16, "candidates": 4096}),
        ('candidates must be .*, got 4096 with g = 1 and rule "mass"', {"rule": "mass", "g": 1, "candidates": 4096}),
        (
            r"candidates must be a multiple of 16 in \[144, 4194304\] with k = 97, got 128",
            {"k": 97, "g": 1, "candidates": 128},
        ),
        (
            r"candidates must be a multiple of 16 in \[96, 4194304\] with k = 64, got 130",
            {"k": 64, "g": 1, "candidates": 130},
        ),
        (r"candidates must be a multiple of 16 in .*, got 4194320", {"g": 1, "candidates": 2**22 + 16}),
        ("candidates must be an integer >= 16, got -16", {"k": 64, "g": 1, "candidates": -16}),
        ("k must be at most 4194272 with candidates, got 4194304", {"k": 2**22, "g": 1, "candidates": 2**22}),
    ],
)
def test_config_names_the_bad_field(message, kwargs):
    with pytest.raises(ValueError, match=f"SelectionConfig: {message}"):
        SelectionConfig(**kwargs)


def test_select_names_the_bad_argument():
    mass, lengths, _ = make_case(1, SelectionConfig())
    with pytest.raises(ValueError, match='select: votes must be given with rule "layer", got None'):
        select(mass, lengths, SelectionConfig(rule="layer"))
    with pytest.raises(ValueError, match=r"select: mass must be \[L, B, Hkv, n\], got \[3, 2, 20\]"):
        select(mass[0], lengths, SelectionConfig())


# --- arguments of another type ---------------------------------------------------------------------------------------

_MASS, _LENGTHS = torch.rand(2, 3, 2, 20), torch.tensor([320, 100, 0], dtype=torch.int32)
_LAYER = SelectionConfig(rule="layer", k=96, g=16)
_CALLS = {
    "config_g_float": (lambda s: SelectionConfig(g=16.0), "SelectionConfig: g must be one of .* got 16.0"),
    "config_g_tensor": (lambda s: SelectionConfig(g=torch.ones(2)), "SelectionConfig: g must be one of .* got Tensor"),
    "config_score": (lambda s: SelectionConfig(score=["mean"]), "SelectionConfig: score must be one of .* got list"),
    "capacity_units": (
        lambda s: SelectionConfig().capacity_units(None, 1, 1),
        "SelectionConfig: num_units must be an integer >= 0, got None",
    ),
    "capacity_layers": (
        lambda s: SelectionConfig().capacity_units(4, -1, 1),
        "SelectionConfig: num_layers must be an integer >= 0, got -1",
    ),
    "capacity_heads": (
        lambda s: SelectionConfig().capacity_units(4, 1, 1.5),
        "SelectionConfig: num_kv_heads must be an integer >= 0, got 1.5",
    ),
    "indices_list": (
        lambda s: dataclasses.replace(s, indices=[1]),
        "BlockSelection: indices must be a tensor, got list",
    ),
    "g_true": (lambda s: dataclasses.replace(s, g=True), "BlockSelection: g must be one of .* got True"),
    "units_none": (
        lambda s: BlockSelection.from_units(None, [64], 16),
        "BlockSelection: units must be lists of unit numbers, got None",
    ),
    "units_flat": (
        lambda s: BlockSelection.from_units([1, 2], [64], 16),
        "BlockSelection: units must be lists of unit numbers, got 1",
    ),
    "units_text": (
        lambda s: BlockSelection.from_units("ab", [64], 16),
        "BlockSelection: units must be lists of unit numbers, got 'ab'",
    ),
    "units_too_large": (
        lambda s: BlockSelection.from_units([[[[1 << 31]]]], [64], 16),
        "BlockSelection: units must be integers of 32 bits, got 2147483648",
    ),
    "tail_start": (
        lambda s: BlockSelection.from_units([[[[1]]]], 64, 16),
        "BlockSelection: tail_start must be a list, got 64",
    ),
    "tail_start_too_large": (
        lambda s: BlockSelection.from_units([[[[1]]]], [1 << 40], 16),
        "BlockSelection: tail_start must be integers of 32 bits, got",
    ),
    "from_units_g": (
        lambda s: BlockSelection.from_units([[[[1]]]], [64], torch.ones(2)),
        "BlockSelection: g must be one of .* got Tensor",
    ),
    "capacity_text": (
        lambda s: BlockSelection.from_units([[[[1]]]], [64], 16, capacity="4"),
        "BlockSelection: capacity must be an integer >= 1, got '4'",
    ),
    "device_unknown": (
        lambda s: BlockSelection.from_units([[[[1]]]], [64], 16, device="tpux"),
        "BlockSelection: device must be a torch.device or its name, got 'tpux'",
    ),
    "to_none": (lambda s: s.to(None), "BlockSelection: device must be a torch.device or its name, got None"),
    "to_list": (lambda s: s.to(["cpu"]), "BlockSelection: device must be a torch.device or its name, got list"),
    "layer": (lambda s: s.layer(2), r"BlockSelection: layer must be an integer in \[0, 2\), got 2"),
    "layer_none": (lambda s: s.layer(None), r"BlockSelection: layer must be an integer in \[0, 2\), got None"),
    "request": (lambda s: s.units(-1, 0, 0), r"BlockSelection: request must be an integer in \[0, 3\), got -1"),
    "head": (lambda s: s.tokens(0, 0, 1.5), r"BlockSelection: head must be an integer in \[0, 2\), got 1.5"),
    "with_units_layer": (
        lambda s: s.with_units(0, True, 0, []),
        r"BlockSelection: layer must be an integer in \[0, 2\), got True",
    ),
    "with_units_none": (
        lambda s: s.with_units(0, 0, 0, None),
        "BlockSelection: units must be lists of unit numbers, got None",
    ),
    "save_none": (lambda s: s.save(None), "BlockSelection: path must be a path, got None"),
    "save_number": (lambda s: s.save(3), "BlockSelection: path must be a path, got 3"),
    "load_none": (lambda s: BlockSelection.load(None), "BlockSelection: path must be a path, got None"),
    "votes_of_two": (
        lambda s: select(_MASS, _LENGTHS, _LAYER, votes=(_MASS, _MASS)),
        "select: votes must be the three tensors of row_votes, got tuple of 2",
    ),
    "votes_number": (
        lambda s: select(_MASS, _LENGTHS, _LAYER, votes=3),
        "select: votes must be the three tensors of row_votes, got 3",
    ),
    "votes_none": (
        lambda s: select(_MASS, _LENGTHS, _LAYER, votes=(_MASS, None, _MASS)),
        r"select: votes\[1\] must be a tensor, got None",
    ),
    "seed_float": (
        lambda s: random_selection(_MASS, _LENGTHS, SelectionConfig(), 1.5),
        "random_selection: seed must be an integer or an int64 tensor, got 1.5",
    ),
    "seed_shape": (
        lambda s: random_selection(_MASS, _LENGTHS, SelectionConfig(), torch.zeros(2, dtype=torch.int64)),
        r"random_selection: seed must be one integer or \[B\] = \[3\], got \[2\]",
    ),
}


@pytest.mark.parametrize("case", _CALLS)
def test_names_what_is_of_another_type(case):
    call, message = _CALLS[case]
    selection, _ = make_selection()
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        call(selection)


@pytest.mark.parametrize("name", ["select", "recency_selection", "random_selection"])
def test_selections_name_what_is_of_another_type(name):
    function = {"select": select, "recency_selection": recency_selection}.get(
        name, lambda *args: random_selection(*args, 1)
    )
    good = [_MASS, _LENGTHS, SelectionConfig()]
    expected = ["mass must be a tensor", "prefix_lens must be a tensor", "config must be a SelectionConfig"]
    for number, wanted in enumerate(expected):
        for bad, got in ((None, "None"), ("a", "'a'"), ([1.0], "list"), (3, "3")):
            with pytest.raises(TypeError, match=f"^{name}: {wanted}, got {got}$"):
                function(*good[:number], bad, *good[number + 1 :])
    with pytest.raises(ValueError, match=rf"^{name}: mass must be \[L, B, Hkv, n\], got \[3, 2, 20\]$"):
        function(_MASS[0], *good[1:])
    assert function(*good).counts.shape == (2, 3, 2)


def test_files_in_folders_that_are_missing(tmp_path):
    selection, _ = make_selection()
    with pytest.raises(
        FileNotFoundError, match=r"^BlockSelection: path must be in a folder that exists, got .*missing"
    ):
        selection.save(tmp_path / "missing" / "lists.safetensors")
    with pytest.raises(ValueError, match=r"^BlockSelection: path must be a file that can be written, got "):
        selection.save(tmp_path)
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"^BlockSelection: path must be a file that exists, got "):
            BlockSelection.load(path)
    assert list(tmp_path.iterdir()) == []
