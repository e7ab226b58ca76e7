"""The optimized forward against the plain one, what packing keeps, what it refuses; models of the real geometries.

Run: pytest tests/python/test_transformer.py
"""

import copy
import dataclasses
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention, silu

from mage_ext import ops
from mage_ext.models import fused
from mage_ext.models.adapter import adapter_tensors, add_adapter, apply_adapter
from mage_ext.models.geometry import GEOMETRIES, random_model
from mage_ext.models.transformer import RMSNorm, Transformer, rotary, rotary_frequencies, rotate
from mage_ext.testing.tiny import VARIANTS, tiny_config, tiny_model

DTYPES = [torch.float32, torch.bfloat16]
BENCH = Path(__file__).resolve().parents[2] / "bench"


def bidirectional(layer, q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)


def inputs(config, batch=2, rows=24, device="cpu"):
    """tokens and positions [batch, rows]; requests begin at different positions."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(config.vocab_size, (batch, rows), generator=generator)
    positions = torch.arange(rows) + 7 * torch.arange(batch)[:, None]
    return tokens.to(device), positions.to(device)


def assert_as_good(got, plain, exact):
    """The error against float64 is on average at most twice that of the plain modules in the same precision.

    The largest one may be four times theirs: of 24 rows it depends on how the roundings fall. With noise of bfloat16's
    rounding at every module of these models, it is 3 to 4 times as large in one draw as in another (the average 2).
    """
    error, plain_error = ((x.double() - exact).abs() for x in (got, plain))
    assert error.mean() <= 2 * plain_error.mean()
    assert error.max() <= 4 * plain_error.max()
    assert plain_error.max() < exact.abs().max()  # or nothing is compared


# --- the optimized forward ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_optimized_equals_plain(variant, dtype):
    config = tiny_config(variant)
    plain, optimized = tiny_model(config, dtype=dtype), tiny_model(config, dtype=dtype)
    assert optimized.optimize() is optimized and optimized.optimized and not plain.optimized
    for batch, rows in ((2, 24), (1, 1), (3, 8)):
        tokens, positions = inputs(config, batch, rows)
        exact = copy.deepcopy(plain).double()(tokens, positions, bidirectional)
        got = optimized(tokens, positions, bidirectional)
        assert got.dtype == dtype and got.shape == (batch, rows, config.vocab_size)
        assert_as_good(got, plain(tokens, positions, bidirectional), exact)
    expanded = torch.arange(24)[None]  # positions that all requests share
    tokens = inputs(config)[0]
    assert_as_good(
        optimized(tokens, expanded, bidirectional),
        plain(tokens, expanded, bidirectional),
        copy.deepcopy(plain).double()(tokens, expanded, bidirectional),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_functions_between_products_round_as_the_plain_modules(dtype):
    heads, kv_heads, dim, rows, eps = 4, 2, 16, 11, 1e-6
    norm = RMSNorm(32, eps).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x, y = torch.randn(2, rows, 32).to(dtype)
    total, normed = fused.add_norm(x, y, norm.weight, eps)
    assert torch.equal(total, x + y) and torch.equal(normed, norm(x + y))

    gate, up = torch.randn(2, rows, 48).to(dtype)
    # Not bit for bit: on some processors torch's silu rounds by where in memory an element lies.
    ulps = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(fused.silu_mul(torch.cat((gate, up), -1)), silu(gate) * up, rtol=ulps, atol=0)

    qkv = torch.randn(1, rows, heads + 2 * kv_heads, dim).to(dtype)
    positions = torch.randint(1 << 17, (1, rows))
    cos, sin = rotary(positions, dim, 1e6, dtype)
    table = fused.rotary_table(positions[0], rotary_frequencies(dim, 1e6, positions.device), dtype)
    q, k, _ = qkv.split((heads, kv_heads, kv_heads), 2)
    got = fused.rotate_qk(qkv[0].flatten(1), *table, heads, kv_heads)
    assert torch.equal(got, torch.cat((rotate(q, cos, sin), rotate(k, cos, sin)), 2)[0])

    q_norm, k_norm = RMSNorm(dim, eps).to(dtype), RMSNorm(dim, eps).to(dtype)
    torch.nn.init.normal_(q_norm.weight)
    torch.nn.init.normal_(k_norm.weight)
    got = fused.norm_rotate_qk(qkv[0].flatten(1), *table, heads, kv_heads, q_norm.weight, k_norm.weight, eps)
    assert torch.equal(got, torch.cat((rotate(q_norm(q), cos, sin), rotate(k_norm(k), cos, sin)), 2)[0])


def test_ops_take_the_views_that_attend_gets():
    config = tiny_config("fast_dllm_v2")
    plain, optimized = tiny_model(config), tiny_model(config).optimize()
    tokens, positions = inputs(config, batch=2, rows=24)
    block_table = torch.tensor([[3, 0], [1, 2]], dtype=torch.int32)
    seq_lens = torch.tensor([24, 24], dtype=torch.int32)

    def paged(layer, q, k, v):
        k_cache, v_cache = torch.zeros(2, 4, 16, config.num_kv_heads, config.head_dim)
        ops.append_kv(k, v, k_cache, v_cache, block_table, torch.zeros_like(seq_lens))
        return ops.block_attention(q, k_cache, v_cache, block_table, seq_lens, max_seq_len=24)[0]

    strides = []

    def watched(layer, q, k, v):
        strides.append((q.is_contiguous(), v.is_contiguous()))
        return paged(layer, q, k, v)

    exact = copy.deepcopy(plain).double()(tokens, positions, bidirectional)
    assert_as_good(optimized(tokens, positions, watched), plain(tokens, positions, paged), exact)
    assert strides == [(False, False)] * config.num_layers


def test_no_gradient_flows():
    model = tiny_model(tiny_config("llama")).optimize()
    assert not model(*inputs(model.config), bidirectional).requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", ["fast_dllm_v2", "sdar"])
def test_compiled_equals_plain(variant, dtype):
    torch._dynamo.reset()
    config = tiny_config(variant)
    plain, compiled = tiny_model(config, dtype=dtype), tiny_model(config, dtype=dtype).optimize(compile=True)
    exact = copy.deepcopy(plain).double()
    for batch, rows in ((2, 24), (1, 1), (3, 8)):
        tokens, positions = inputs(config, batch, rows)
        got, expected = (model(tokens, positions, bidirectional) for model in (compiled, plain))
        assert_as_good(got, expected, exact(tokens, positions, bidirectional))
    if variant == "fast_dllm_v2" and dtype == torch.float32:
        return
    count = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled(*inputs(config, 4, 16), bidirectional)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == count  # other rows compile nothing


# --- packing --------------------------------------------------------------------------------------------------------


def storages(model) -> dict[int, int]:
    """Bytes of every storage that the parameters use, by address."""
    found = [parameter.untyped_storage() for parameter in model.parameters()]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


@pytest.mark.parametrize("variant", VARIANTS)
def test_packing_keeps_names_values_and_memory(variant):
    config = tiny_config(variant)
    plain, model = tiny_model(config), tiny_model(config)
    before = storages(model)
    model.optimize()
    after = storages(model)
    assert sum(after.values()) == sum(before.values())
    fewer = 5 if config.qkv_bias else 3  # q|k|v save two, gate|up one, the biases of q|k|v two
    assert len(before) - len(after) == fewer * config.num_layers
    expected, got = plain.state_dict(), model.state_dict()
    assert list(got) == list(expected)
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    if config.tie_embeddings:
        assert model.lm_head.weight is model.embed_tokens.weight
    layer = model.packed_layers[0]
    assert layer.qkv.shape == ((config.num_heads + 2 * config.num_kv_heads) * config.head_dim, config.hidden_size)
    assert layer.gate_up.shape == (2 * config.intermediate_size, config.hidden_size)


@pytest.mark.parametrize("variant", ["fast_dllm_v2", "sdar"])
def test_weights_can_be_loaded_into_a_packed_model(variant):
    config = tiny_config(variant)
    model, other = tiny_model(config, seed=0).optimize(), tiny_model(config, seed=1)
    model.load_state_dict(other.state_dict())
    tokens, positions = inputs(config)
    exact = copy.deepcopy(other).double()(tokens, positions, bidirectional)
    assert_as_good(model(tokens, positions, bidirectional), other(tokens, positions, bidirectional), exact)


@pytest.mark.parametrize("first", ["adapter", "optimize"])
def test_adapters_fold_before_and_after(first):
    config = tiny_config("fast_dllm_v2")
    wrapped_model = tiny_model(config)
    wrapped = add_adapter(wrapped_model, rank=3)
    for module in wrapped.values():
        torch.nn.init.normal_(module.b, std=0.1)
    tensors = adapter_tensors(wrapped, wrapped_model.embed_tokens.weight[config.mask_id])
    plain, model = tiny_model(config), tiny_model(config)
    apply_adapter(plain, tensors)
    if first == "optimize":
        model.optimize()
        apply_adapter(model, tensors)
    else:
        apply_adapter(model, tensors)
        model.optimize()
    tokens, positions = inputs(config)
    exact = copy.deepcopy(plain).double()(tokens, positions, bidirectional)
    assert_as_good(model(tokens, positions, bidirectional), plain(tokens, positions, bidirectional), exact)


# --- misuse ---------------------------------------------------------------------------------------------------------


def test_optimize_refuses_what_it_cannot_pack():
    config = tiny_config("llama")
    with pytest.raises(ValueError, match="optimize: model must not be optimized, got one that is"):
        tiny_model(config).optimize().optimize()
    with pytest.raises(TypeError, match="optimize: compile must be a bool, got 1"):
        tiny_model(config).optimize(compile=1)
    with pytest.raises(ValueError, match=r"model must be frozen \(requires_grad_\(False\)\), got embed_tokens"):
        Transformer(config).optimize()
    wrapped = tiny_model(config)
    add_adapter(wrapped, rank=2)
    with pytest.raises(ValueError, match="q_proj must be a plain linear, got AdaptedLinear"):
        wrapped.optimize()
    mixed = tiny_model(config)
    mixed.layers[1].mlp.half()
    with pytest.raises(ValueError, match=r"layers.1.mlp.gate_proj.weight must have the dtype of embed_tokens"):
        mixed.optimize()
    with pytest.raises(ValueError, match="packed_layers: model must be optimized"):
        _ = tiny_model(config).packed_layers


@pytest.mark.parametrize(
    "action, words",
    [
        (lambda model: model.half(), "a change of device or dtype"),
        (copy.deepcopy, "a copy"),
        (pickle.dumps, "a copy"),
        (lambda model: model.requires_grad_(), "training"),
        (lambda model: model.load_state_dict(model.state_dict(), assign=True), "assign=True"),
        (lambda model: add_adapter(model, rank=2), "add_adapter: model must not be optimized"),
    ],
)
def test_an_optimized_model_refuses_what_would_part_it_from_its_weights(action, words):
    model = tiny_model(tiny_config("llama")).optimize()
    with pytest.raises(ValueError, match=words):
        action(model)
    model.eval().requires_grad_(False)
    plain = tiny_model(tiny_config("llama"))
    action(plain)  # before optimize() all of it works


# --- real geometries ------------------------------------------------------------------------------------------------


def test_geometries_have_the_sizes_of_their_models():
    """Parameters, in billions, of Qwen2.5-1.5B, Qwen2.5-7B and Qwen3-8B."""
    for name, billions in (("1.5B", 1.5437), ("7B", 7.6156), ("8B", 8.1907)):
        config = GEOMETRIES[name]
        with torch.device("meta"):
            model = Transformer(config)
        count = sum(parameter.numel() for parameter in model.parameters())
        assert count / 1e9 == pytest.approx(billions, abs=1e-4)
        assert config.max_positions >= 128 * 1024 + 1024 and config.eos_ids == () and config.head_dim == 128


@pytest.mark.parametrize("name", GEOMETRIES)
def test_random_model_keeps_activations_in_range(name):
    small = dict(vocab_size=200, mask_id=199, hidden_size=256, intermediate_size=512, num_heads=4, num_kv_heads=2)
    model = random_model(name, device="cpu", num_layers=GEOMETRIES[name].num_layers, **small)
    assert model.config == dataclasses.replace(GEOMETRIES[name], **small)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert (model.lm_head.weight is model.embed_tokens.weight) == model.config.tie_embeddings
    assert model.embed_tokens.weight.dtype == torch.bfloat16
    logits = model.optimize()(*inputs(model.config), bidirectional)
    assert logits.isfinite().all() and 0.3 < logits.float().std() < 3


def test_random_model_follows_its_seed():
    small = dict(vocab_size=200, mask_id=199, hidden_size=64, intermediate_size=64, num_layers=1, dtype=torch.float32)
    first, again, other = (random_model("8B", device="cpu", seed=seed, **small) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert first.lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        (dict(name="3B"), ValueError, "name must be one of 1.5B, 7B, 8B, got '3B'"),
        (dict(name=7), TypeError, "name must be a text, got 7"),
        (dict(dtype=torch.int8), ValueError, "dtype must be float32, bfloat16 or float16, got torch.int8"),
        (dict(seed=0.5), TypeError, "seed must be an integer, got 0.5"),
        (dict(device="nowhere"), ValueError, "device must be a torch.device or its name"),
        (dict(num_layers=0), ValueError, "num_layers must be a positive integer, got 0"),
        (dict(layers=2), ValueError, "changes must be fields of ModelConfig, got layers"),
    ],
)
def test_random_model_refuses(arguments, error, words):
    with pytest.raises(error, match=words):
        random_model(**{"name": "7B", "device": "cpu", **arguments})


# --- bench/gemm_chain.py --------------------------------------------------------------------------------------------


def test_products_of_the_bench_are_those_of_the_forward(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    before = set(sys.modules)
    import gemm_chain

    config = GEOMETRIES["7B"]
    facts = {product.name: product for product in gemm_chain.products(config)}
    assert (facts["qkv"].outputs, facts["qkv"].inputs, facts["qkv"].count) == (4608, 3584, 28)
    down = facts["down"]
    weights = 28 * 3584 * 18944
    assert down.bytes(32) == 2 * (weights + 28 * 32 * (3584 + 18944))
    assert down.flops(32) == down.flops(64) == 2 * 64 * weights
    assert down.floor_us(32) == pytest.approx(down.bytes(32) / 3.05e12 * 1e6)
    assert down.floor_us(512) == pytest.approx(2 * 512 * weights / 700e12 * 1e6)
    model = tiny_model(tiny_config("fast_dllm_v2")).optimize()
    calls = gemm_chain.product_calls(model, rows=5)
    for product in gemm_chain.products(model.config):
        outs = [call() for call in calls[product.name]]
        assert len(outs) == product.count and {out.shape for out in outs} == {(5, product.outputs)}
    with pytest.raises(ValueError, match="time_forward: rows must be a positive multiple of 32, got 40"):
        gemm_chain.time_forward(model, 40)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCH)):
            del sys.modules[name]


# --- on the GPU -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_graph_of_the_optimized_forward_replays(name, compile):
    """Against the plain modules and float64; the captured forward takes new tokens and positions, without a sync."""
    small = dict(num_layers=2, vocab_size=1000, mask_id=999, device="cuda")
    plain, model = random_model(name, **small), random_model(name, **small).optimize(compile=compile)
    exact = random_model(name, **small).double()
    tokens, positions = inputs(plain.config, 3, 32, "cuda")
    model(tokens, positions, bidirectional)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.hidden(tokens, positions, bidirectional)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = model(tokens, positions, bidirectional)
    tokens.copy_(tokens.flip(0))
    positions.add_(100_000)
    graph.replay()
    assert torch.equal(captured, model(tokens, positions, bidirectional))
    assert_as_good(captured, plain(tokens, positions, bidirectional), exact(tokens, positions, bidirectional))


@pytest.mark.gpu
def test_packing_takes_one_layer_of_memory_more():
    model = random_model("1.5B", device="cuda", num_layers=6)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    model.optimize()
    layer = sum(parameter.numel() for parameter in model.layers[0].parameters()) * 2
    assert torch.cuda.max_memory_allocated() - before < layer
    assert torch.cuda.memory_allocated() - before < 1 << 20
    assert torch.cuda.memory_reserved() - reserved < 2 * layer  # what earlier tests left decides how blocks fit
