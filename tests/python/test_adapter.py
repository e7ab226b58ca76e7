"""Low-rank adapters: wrapped and folded models agree, storage keeps what it promises, misfits are refused.

Run: pytest tests/python/test_adapter.py
"""

import pytest
import torch
from safetensors.torch import load_file, save_file

from mage_ext.models.adapter import (
    AdaptedLinear,
    adapter_cut,
    adapter_tensors,
    add_adapter,
    apply_adapter,
    cut_tensors,
    load_adapter,
    save_adapter,
)
from mage_ext.models.config import Cut
from mage_ext.testing.tiny import tiny_config, tiny_model

CONFIG = tiny_config("llama_shift", vocab_size=50, mask_id=3)
LINEARS = CONFIG.num_layers * 7


def causal(layer, q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def logits(model, tokens, dtype=torch.float32):
    return model(tokens, torch.arange(tokens.shape[1])[None], causal)


def random_tensors(rank=3, seed=1):
    """An adapter that changes the model visibly."""
    model = tiny_model(CONFIG)
    wrapped = add_adapter(model, rank)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in wrapped.values():
            module.b.copy_(0.1 * torch.randn(module.b.shape, generator=generator))
    return model, wrapped, torch.randn(CONFIG.hidden_size, generator=generator)


def test_fresh_adapter_changes_nothing_and_trains_alone():
    model, tokens = tiny_model(CONFIG), torch.arange(4, 40)[None]
    before = logits(model, tokens)
    wrapped = add_adapter(model, rank=4)
    assert len(wrapped) == LINEARS and all(name.startswith("layers.") for name in wrapped)
    torch.testing.assert_close(logits(model, tokens), before, rtol=0, atol=0)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * LINEARS and all(name.endswith((".a", ".b")) for name in trained)
    logits(model, tokens).square().mean().backward()
    assert all(module.b.grad.abs().max() > 0 for module in wrapped.values())


@pytest.mark.parametrize("scale", [2.0, 0.3])
def test_wrapped_and_folded_models_agree(scale):
    tokens = torch.arange(4, 40)[None]
    wrapped_model, plain = tiny_model(CONFIG), tiny_model(CONFIG)
    wrapped = add_adapter(wrapped_model, rank=5, scale=scale)
    for module in wrapped.values():
        torch.nn.init.normal_(module.b, std=0.1)
    unchanged = logits(plain, tokens)
    apply_adapter(plain, adapter_tensors(wrapped, wrapped_model.embed_tokens.weight[CONFIG.mask_id]))
    assert not any(isinstance(module, AdaptedLinear) for module in plain.modules())
    expected, got = logits(wrapped_model, tokens), logits(plain, tokens)
    assert (expected - unchanged).abs().max() > 0.1
    # Both round in float32; float64 says by how much.
    wide = tiny_model(CONFIG).double()
    apply_adapter(wide, adapter_tensors(wrapped, wrapped_model.embed_tokens.weight[CONFIG.mask_id]))
    exact = logits(wide, tokens)
    error = (expected - exact).abs().max()
    assert (got - exact).abs().max() <= 4 * error and error < 1e-3


def test_mask_row_replaces_the_embedding_of_the_mask_token_alone():
    model, before = tiny_model(CONFIG), tiny_model(CONFIG).embed_tokens.weight
    row = torch.arange(CONFIG.hidden_size).float()
    apply_adapter(model, {"mask_row": row})
    others = [i for i in range(CONFIG.vocab_size) if i != CONFIG.mask_id]
    assert torch.equal(model.embed_tokens.weight[CONFIG.mask_id], row)
    assert torch.equal(model.embed_tokens.weight[others], before[others])


def test_int8_error_is_half_a_step_of_its_rank(tmp_path):
    _, wrapped, mask_row = random_tensors()
    tensors = adapter_tensors(wrapped, mask_row)
    tensors["layers.0.mlp.up_proj.b"][:, 1] = 0  # a rank that does nothing has no scale to divide by
    save_adapter(tmp_path / "a.safetensors", tensors, base="tiny.gguf")
    stored, got = load_file(tmp_path / "a.safetensors"), load_adapter(tmp_path / "a.safetensors", base="tiny.gguf")
    assert set(got) == set(tensors) and len(stored) == 4 * LINEARS + 1
    for name, value in tensors.items():
        if name == "mask_row":
            assert torch.equal(got[name], value.to(torch.bfloat16).float())
            continue
        assert stored[name].dtype == torch.int8
        scale = stored[name + ".scale"]
        # The scale is that of the largest value of a rank: a row of a, a column of b.
        dim = 1 if name.endswith(".a") else 0
        torch.testing.assert_close(scale, value.abs().amax(dim, keepdim=True).clamp_min(1e-12) / 127)
        assert ((got[name] - value).abs() <= scale * (0.5 + 1e-4)).all()
    assert not got["layers.0.mlp.up_proj.b"][:, 1].any()


def test_folded_int8_is_within_the_bound_of_its_factors(tmp_path):
    """|B'A' - BA| <= |B| e_a + e_b |A| + e_b e_a, elementwise, where e are half steps."""
    _, wrapped, mask_row = random_tensors()
    tensors = adapter_tensors(wrapped, mask_row)
    save_adapter(tmp_path / "a.safetensors", tensors, base="tiny.gguf")
    got = load_adapter(tmp_path / "a.safetensors")
    model, plain = tiny_model(CONFIG), tiny_model(CONFIG)
    apply_adapter(model, got)
    state, before = model.state_dict(), plain.state_dict()
    for name in wrapped:
        a, b = tensors[name + ".a"].double(), tensors[name + ".b"].double()
        e_a = (a.abs().amax(1, keepdim=True) / 254).expand_as(a)
        e_b = (b.abs().amax(0, keepdim=True) / 254).expand_as(b)
        bound = b.abs() @ e_a + e_b @ a.abs() + e_b @ e_a
        folded = state[name + ".weight"].double() - before[name + ".weight"].double()
        assert ((folded - b @ a).abs() <= bound * 1.001 + 1e-6).all()  # 1e-6: float32 of the sum of weights
        assert (folded - b @ a).abs().max() > 1e-6


def test_bfloat16_file_rounds_once(tmp_path):
    _, wrapped, mask_row = random_tensors()
    tensors = adapter_tensors(wrapped, mask_row)
    save_adapter(tmp_path / "a.safetensors", tensors, base="tiny.gguf", int8=False)
    got = load_adapter(tmp_path / "a.safetensors", base="tiny.gguf")
    assert all(torch.equal(got[name], value.to(torch.bfloat16).float()) for name, value in tensors.items())


# --- what is refused ------------------------------------------------------------------------------------------------

Q = "layers.0.self_attn.q_proj"
WRONG_TENSORS = {  # name -> tensor (None: removed), message
    "no a": ({Q + ".a": None}, f"{Q} must be a linear of the model's layers with factors a and b"),
    "no such layer": (
        {"layers.9.self_attn.q_proj.a": torch.ones(3, 32), "layers.9.self_attn.q_proj.b": torch.ones(64, 3)},
        "layers.9.self_attn.q_proj must be a linear",
    ),
    "a norm": (
        {"layers.0.input_layernorm.a": torch.ones(3, 1), "layers.0.input_layernorm.b": torch.ones(32, 3)},
        "layers.0.input_layernorm must be a linear",
    ),
    "the head": ({"lm_head.a": torch.ones(3, 32), "lm_head.b": torch.ones(50, 3)}, "lm_head must be a linear"),
    "rank": ({Q + ".a": torch.ones(4, 32)}, rf"{Q} must have a \[r, 32\] and b \[64, r\], got \[4, 32\] and \[64, 3\]"),
    "input": ({Q + ".a": torch.ones(3, 31)}, rf"{Q} must have a \[r, 32\] .* got \[3, 31\]"),
    "output": ({Q + ".b": torch.ones(63, 3)}, rf"{Q} must have .* got \[3, 32\] and \[63, 3\]"),
    "dims": ({Q + ".b": torch.ones(64)}, rf"{Q} must have .* and \[64\]"),
    "mask row": ({"mask_row": torch.ones(31)}, r"mask_row must be \[32\], got \[31\]"),
    "stranger": ({"embed_tokens": torch.ones(32)}, "embed_toke.* must be a linear"),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_apply_refuses_and_changes_nothing(case):
    changes, message = WRONG_TENSORS[case]
    _, wrapped, mask_row = random_tensors()
    tensors = {**adapter_tensors(wrapped, mask_row), **changes}
    model, before = tiny_model(CONFIG), tiny_model(CONFIG).state_dict()
    with pytest.raises(ValueError, match=f"apply_adapter: {message}"):
        apply_adapter(model, {name: value for name, value in tensors.items() if value is not None})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


WRONG_FILES = {  # changes of the stored tensors, message
    "no scale": ({Q + ".a.scale": None}, rf"{Q}.a.scale must be float32 \[3, 1\] beside an int8 factor, got none"),
    "scale of b": ({Q + ".b.scale": torch.ones(3, 1)}, rf"{Q}.b.scale must be float32 \[1, 3\] .* \[3, 1\]"),
    "scale dtype": ({Q + ".a.scale": torch.ones(3, 1).half()}, rf"{Q}.a.scale must be float32 .* got torch.float16"),
    "scale nan": ({Q + ".a.scale": torch.full((3, 1), torch.nan)}, f"{Q}.a must hold finite values"),
    "factor inf": ({Q + ".b": torch.full((64, 3), torch.inf)}, f"{Q}.b must hold finite values"),
    "no partner": (
        {Q + ".b": None, Q + ".b.scale": None},
        f"{Q}.a must be mask_row or a factor .a or .b with its partner",
    ),
    "stranger": ({"notes": torch.ones(3)}, "notes must be mask_row or a factor"),
    "vector": ({Q + ".a": torch.ones(3)}, rf"{Q}.a must be a matrix, got shape \[3\]"),
    "dtype": ({Q + ".a": torch.ones(3, 32, dtype=torch.int32)}, f"{Q}.a must be int8 or of a float dtype, got"),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_load_refuses(case, tmp_path):
    changes, message = WRONG_FILES[case]
    _, wrapped, mask_row = random_tensors()
    path = tmp_path / "a.safetensors"
    save_adapter(path, adapter_tensors(wrapped, mask_row), base="tiny.gguf")
    stored = {name: value for name, value in {**load_file(path), **changes}.items() if value is not None}
    save_file(stored, path, metadata={"format": "mage-adapter-1", "base": "tiny.gguf"})
    with pytest.raises(ValueError, match=f"load_adapter: {message}"):
        load_adapter(path)


def test_load_refuses_other_files(tmp_path):
    path = tmp_path / "a.safetensors"
    for content in (None, b"", b"\xff" * 64, (2**62).to_bytes(8, "little") + b"{}"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=r"load_adapter: path must name an adapter file, got 'a.safetensors'"):
            load_adapter(path)
    save_file({"mask_row": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"format of 'a.safetensors' must be 'mage-adapter-1', got None"):
        load_adapter(path)
    save_file({"mask_row": torch.ones(2)}, path, metadata={"format": "mage-adapter-1", "base": "tiny.gguf"})
    with pytest.raises(ValueError, match=r"base must be 'other.gguf', got 'tiny.gguf'"):
        load_adapter(path, base="other.gguf")
    with pytest.raises(ValueError, match="load_adapter: path must name an adapter file"):
        load_adapter(tmp_path)


def test_add_adapter_refuses():
    with pytest.raises(ValueError, match="add_adapter: rank must be at least 1, got 0"):
        add_adapter(tiny_model(CONFIG), 0)
    model = tiny_model(CONFIG)
    add_adapter(model, 2)
    with pytest.raises(ValueError, match="add_adapter: model must be plain"):
        add_adapter(model, 2)


# --- cuts -----------------------------------------------------------------------------------------------------------


def test_file_says_what_was_cut(tmp_path):
    _, wrapped, mask_row = random_tensors()
    tensors, cut = adapter_tensors(wrapped, mask_row), Cut((1, 4, 6), 2.5e5, 4096)
    path = tmp_path / "a.safetensors"
    save_adapter(path, tensors, base="tiny.gguf", cut=cut)
    assert adapter_cut(path) == cut and set(load_adapter(path, "tiny.gguf", cut)) == set(tensors)
    for other in (None, Cut((1, 4, 7), 2.5e5, 4096)):
        with pytest.raises(
            ValueError, match=r"cut must be Cut\(layers=\(1, 4, 6\).* as 'a.safetensors' was .*, got (None|Cut)"
        ):
            load_adapter(path, "tiny.gguf", other)
    save_adapter(path, tensors, base="tiny.gguf")
    assert adapter_cut(path) is None
    with pytest.raises(ValueError, match=r"cut must be None as 'a.safetensors' was made for the whole base, got Cut"):
        load_adapter(path, cut=cut)
    for text in (
        "[]",
        "{",
        "[" * 100_000,
        '{"layers": [2, 1], "rope_theta": 1.0, "max_positions": 1}',
        '{"layers": [2]}',
    ):
        save_file({"mask_row": mask_row}, path, metadata={"format": "mage-adapter-1", "base": "x", "cut": text})
        with pytest.raises(ValueError, match="load_adapter: cut must be layers, rope_theta and max_positions, got"):
            adapter_cut(path)


def test_tensors_of_a_cut_are_those_of_its_layers():
    _, wrapped, mask_row = random_tensors()
    tensors = adapter_tensors(wrapped, mask_row)
    last = CONFIG.num_layers - 1
    kept = cut_tensors(tensors, Cut((last,), 1e4, 64))
    assert len(kept) == 1 + 2 * LINEARS // CONFIG.num_layers and kept["mask_row"] is tensors["mask_row"]
    for name, value in kept.items():
        if name != "mask_row":
            assert name.startswith("layers.0.") and value is tensors[name.replace("layers.0.", f"layers.{last}.")]


@pytest.mark.parametrize("layers", [(), (1, 1), (2, 1), (-1, 0), [0, 1], (0, 1.0), (True,)])
def test_cut_refuses(layers):
    with pytest.raises(ValueError, match="Cut: layers must be ascending layer numbers, at least one, got"):
        Cut(layers, 1e4, 64)
