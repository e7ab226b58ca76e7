"""The reader of GGUF files against values worked out here, the gguf package, and files that lie.

Run: pytest tests/python/test_gguf.py
"""

import struct

import numpy as np
import pytest

from mage_ext.models.builtin import load_base
from mage_ext.models.gguf import GGUFFile

UINT8, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, FLOAT64 = 0, 4, 5, 6, 7, 8, 9, 10, 12
F32, F16, Q4_0, Q4_1, Q8_0 = 0, 1, 2, 3, 8
CODES = {UINT8: "<B", UINT32: "<I", INT32: "<i", FLOAT32: "<f", BOOL: "<?", UINT64: "<Q", FLOAT64: "<d"}


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def entry(key, kind, value, of=None):
    """A metadata entry; `of` is the type of an array's entries."""

    def plain(kind, value):
        return text(value) if kind == STRING else struct.pack(CODES[kind], value)

    body = plain(kind, value) if kind != ARRAY else struct.pack("<IQ", of, len(value))
    if kind == ARRAY:
        body += b"".join(plain(of, item) for item in value)
    return text(key) + struct.pack("<I", kind) + body


def tensor(name, dims, kind, offset):
    """A tensor's entry; dims as in the file, innermost first."""
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def gguf_bytes(entries=(), tensors=(), data=b"", alignment=32, magic=b"GGUF", version=3, counts=None):
    counts = counts or (len(tensors), len(entries))
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


@pytest.fixture
def opened(tmp_path):
    """Writes bytes to a file and opens it."""

    def open_(raw):
        path = tmp_path / "model.gguf"
        path.write_bytes(raw)
        return GGUFFile(path)

    return open_


# --- what is read ---------------------------------------------------------------------------------------------------


def test_metadata_of_every_kind(opened):
    file = opened(
        gguf_bytes(
            [
                entry("a.byte", UINT8, 255),
                entry("a.int", INT32, -7),
                entry("a.big", UINT64, 2**63),
                entry("a.float", FLOAT32, 0.5),
                entry("a.double", FLOAT64, 0.1),
                entry("a.bool", BOOL, True),
                entry("a.text", STRING, "Ġé"),
                entry("a.texts", ARRAY, ["x", "", "ü"], STRING),
                entry("a.ints", ARRAY, [1, -2, 3], INT32),
                entry("a.none", ARRAY, [], FLOAT32),
            ]
        )
    )
    assert file.metadata == {
        "a.byte": 255,
        "a.int": -7,
        "a.big": 2**63,
        "a.float": 0.5,
        "a.double": 0.1,
        "a.bool": True,
        "a.text": "Ġé",
        "a.texts": ["x", "", "ü"],
        "a.ints": [1, -2, 3],
        "a.none": [],
    }
    assert file.tensors == {}
    assert (file.value("a.int", int), file.value("a.text", str), file.value("b", int, 5)) == (-7, "Ġé", 5)
    assert file.values("a.ints", int) == [1, -2, 3]


def test_plain_tensors_and_their_shapes(opened):
    values = np.arange(6, dtype="<f4") / 4
    halves = np.array([1.5, -2.0, 65504.0, 2**-24], "<f2")
    data = values.tobytes() + bytes(8) + halves.tobytes()
    file = opened(gguf_bytes([], [tensor("w", (3, 2), F32, 0), tensor("v", (4,), F16, 32)], data))
    assert file.tensors == {"w": ((2, 3), "F32"), "v": ((4,), "F16")}
    assert file.tensor("w").tolist() == [[0.0, 0.25, 0.5], [0.75, 1.0, 1.25]]
    assert file.tensor("v").tolist() == [1.5, -2.0, 65504.0, 2**-24]
    assert file.tensor("v").dtype == file.tensor("w").dtype == np.float32


def test_alignment_of_the_file_is_followed(opened):
    values = np.array([1.0, 2.0], "<f4").tobytes()
    entries = [entry("general.alignment", UINT32, 64)]
    file = opened(gguf_bytes(entries, [tensor("w", (2,), F32, 64)], bytes(64) + values, alignment=64))
    assert file.tensor("w").tolist() == [1.0, 2.0]


def test_q8_0_by_hand(opened):
    quants = list(range(-16, 16))
    data = struct.pack("<e32b", 0.5, *quants) + struct.pack("<e32b", -0.25, *([127, -128] * 16))
    got = opened(gguf_bytes([], [tensor("w", (32, 2), Q8_0, 0)], data)).tensor("w")
    assert got.tolist() == [[0.5 * q for q in quants], [-31.75, 32.0] * 16]


def test_q4_1_by_hand(opened):
    low, high = [i % 16 for i in range(16)], [15 - i for i in range(16)]  # low nibbles are values 0..15 of the block
    packed = bytes(a | b << 4 for a, b in zip(low, high, strict=True))
    data = struct.pack("<ee", 0.5, -3.0) + packed
    got = opened(gguf_bytes([], [tensor("w", (32,), Q4_1, 0)], data)).tensor("w")
    assert got.tolist() == [0.5 * q - 3.0 for q in low + high]


@pytest.mark.parametrize("kind, name", [(Q4_1, "Q4_1"), (Q8_0, "Q8_0")])
def test_quantised_tensors_as_the_gguf_package_reads_them(kind, name, tmp_path):
    gguf = pytest.importorskip("gguf")
    values = np.random.default_rng(0).standard_normal((5, 96)).astype(np.float32) * 3
    kind = gguf.GGMLQuantizationType[name]
    raw = gguf.quants.quantize(values, kind)
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("w", raw, raw_dtype=kind)
    writer.add_tensor("v", values)
    writer.add_array("texts", ["a", "b"])
    writer.add_float32("f", 0.125)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(path)
    assert file.tensors == {"w": ((5, 96), name), "v": ((5, 96), "F32")}
    assert file.metadata["texts"] == ["a", "b"] and file.metadata["f"] == 0.125
    np.testing.assert_array_equal(file.tensor("w"), gguf.quants.dequantize(raw, kind))
    np.testing.assert_array_equal(file.tensor("v"), values)
    # And they are the values, within half a step of their block of 32 and the rounding of scale and minimum to fp16.
    blocks = values.reshape(-1, 32)
    largest = np.abs(blocks).max(1)
    half_step = (blocks.max(1) - blocks.min(1)) / 30 if name == "Q4_1" else largest / 254
    error = np.abs(file.tensor("w").reshape(-1, 32) - blocks).max(1)
    assert (error <= half_step + largest * 2**-10).all() and error.max() > 0


# --- what is refused ------------------------------------------------------------------------------------------------

HUGE = 2**64 - 1
ONE = entry("k", UINT32, 1)
HOSTILE = {
    "empty": (b"", "must be a GGUF file, got one of 0 bytes"),
    "short": (b"GGUF\x03\0\0\0", "must be a GGUF file, got one of 8 bytes"),
    "magic": (gguf_bytes(magic=b"GGML"), "version 3, got magic b'GGML', version 3"),
    "version": (gguf_bytes(version=2), "version 3, got magic b'GGUF', version 2"),
    "big endian": (gguf_bytes(version=3 << 24), "version 3, got magic b'GGUF', version 50331648"),
    "keys": (gguf_bytes([ONE], counts=(0, HUGE)), f"number of metadata keys must fit in model.gguf, got {HUGE}"),
    "tensors": (gguf_bytes([ONE], counts=(2**60, 1)), f"number of tensors must fit in model.gguf, got {2**60}"),
    "one key too many": (gguf_bytes([ONE], counts=(0, 2), alignment=1), "metadata keys must fit .*, got 2"),
    "key length": (gguf_bytes([struct.pack("<Q", HUGE) + bytes(64)]), f"must hold {HUGE} bytes at 32, got a file"),
    "string length": (
        gguf_bytes([text("k") + struct.pack("<IQ", STRING, 2**40) + b"abc"]),
        f"must hold {2**40} bytes at 45",
    ),
    "array length": (
        gguf_bytes([text("k") + struct.pack("<IIQ", ARRAY, FLOAT32, 2**62)]),
        f"number of entries of 'k' must fit in model.gguf, got {2**62}",
    ),
    "string array length": (
        gguf_bytes([text("k") + struct.pack("<IIQ", ARRAY, STRING, 2**40)]),
        f"number of entries of 'k' must fit in model.gguf, got {2**40}",
    ),
    "array of arrays": (
        gguf_bytes([text("k") + struct.pack("<IIQ", ARRAY, ARRAY, 1) + bytes(32)]),
        "entries of metadata key 'k' must be scalars or strings, got type 9",
    ),
    "metadata type": (
        gguf_bytes([text("k") + struct.pack("<II", 13, 1)]),
        "type of metadata key 'k' must be in 0..12, got 13",
    ),
    "key twice": (gguf_bytes([ONE, ONE]), "metadata key 'k' must stand once, got it twice"),
    "key not UTF-8": (gguf_bytes([entry(b"k\xff", UINT32, 1)]), "a metadata key must be UTF-8, got byte 0xff at 33"),
    "text not UTF-8": (gguf_bytes([entry("k", STRING, b"\x80")]), "metadata key 'k' must be UTF-8, got byte 0x80"),
    "name not UTF-8": (gguf_bytes([], [tensor(b"\xc3", (1,), F32, 0)], bytes(4)), "a tensor's name must be UTF-8"),
    "rank 0": (gguf_bytes([], [tensor("w", (), F32, 0)], bytes(64)), "rank of tensor 'w' must be in 1..4, got 0"),
    "rank 5": (gguf_bytes([], [tensor("w", (1,) * 5, F32, 0)], bytes(64)), "rank of tensor 'w' must be in 1..4, got 5"),
    "rank huge": (
        gguf_bytes([], [text("w") + struct.pack("<I", 2**32 - 1)], bytes(64)),
        "rank of tensor 'w' must be in 1..4, got 4294967295",
    ),
    "dim 0": (
        gguf_bytes([], [tensor("w", (4, 0), F32, 0)], bytes(64)),
        r"dims of tensor 'w' must be positive, got \(0",
    ),
    "dims overflow": (
        gguf_bytes([], [tensor("w", (2**32, 2**32, 2**32), F32, 0)], bytes(64)),
        "tensor 'w' must end within the file",
    ),
    "type": (
        gguf_bytes([], [tensor("w", (32,), Q4_0, 0)], bytes(64)),
        "type of tensor 'w' must be one of F16, F32, Q4_1, Q8_0, got type number 2",
    ),
    "part of a block": (
        gguf_bytes([], [tensor("w", (48,), Q8_0, 0)], bytes(128)),
        r"last dim of Q8_0 tensor 'w' must be a multiple of 32, got \(48,\)",
    ),
    "tensor twice": (
        gguf_bytes([], [tensor("w", (1,), F32, 0)] * 2, bytes(64)),
        "tensor 'w' must stand once, got it twice",
    ),
    "offset": (gguf_bytes([], [tensor("w", (4,), F32, 2**63)], bytes(64)), "tensor 'w' must end within the file"),
    "offset alignment": (
        gguf_bytes([], [tensor("w", (4,), F32, 4)], bytes(64)),
        "offset of tensor 'w' must be a multiple of 32, got 4",
    ),
    "data cut": (
        gguf_bytes([], [tensor("w", (32, 4), Q4_1, 0)], bytes(79)),
        r"tensor 'w' must end within the file \(175 bytes\), got an end at 176; the file is truncated",
    ),
    "alignment 0": (
        gguf_bytes([entry("general.alignment", UINT32, 0)]),
        "general.alignment must be a power of two, got 0",
    ),
    "alignment 48": (gguf_bytes([entry("general.alignment", UINT32, 48)]), "must be a power of two, got 48"),
    "alignment negative": (gguf_bytes([entry("general.alignment", INT32, -32)]), "must be a power of two, got -32"),
    "alignment text": (
        gguf_bytes([entry("general.alignment", STRING, "32")]),
        "'general.alignment' must be of type int, got str",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files(case, opened):
    raw, message = HOSTILE[case]
    with pytest.raises(ValueError, match=f"gguf: .*{message}"):
        opened(raw)


def test_no_file(tmp_path):
    for path in (tmp_path / "missing.gguf", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"gguf: path must be a GGUF file, got '.*', which is not a file"):
            GGUFFile(path)


def test_every_truncation_is_an_error(opened):
    entries = [entry("a", ARRAY, ["x", "yz"], STRING), entry("general.alignment", UINT32, 8)]
    whole = gguf_bytes(entries, [tensor("w", (32, 2), Q8_0, 0)], bytes(68), alignment=8)
    opened(whole).tensor("w")
    for length in range(len(whole)):
        with pytest.raises(ValueError, match="gguf: "):
            opened(whole[:length])


def test_flipped_bytes_never_read_outside(opened):
    """Any byte of the header changed: either an error of ours, or a file whose tensors can be read."""
    entries = [entry("a", ARRAY, ["x", "yz"], STRING), entry("b", FLOAT32, 1.0)]
    whole = bytearray(gguf_bytes(entries, [tensor("w", (32, 2), Q8_0, 0), tensor("v", (2,), F32, 96)], bytes(128)))
    read = refused = 0
    for at in range(len(whole) - 128):
        for flip in (1, 0x80, 0xFF):
            raw = whole.copy()
            raw[at] ^= flip
            try:
                file = opened(bytes(raw))
            except ValueError as error:
                assert str(error).startswith("gguf: ")
                refused += 1
            else:
                assert all(file.tensor(name).shape == shape for name, (shape, _) in file.tensors.items())
                read += 1
    assert read > 10 and refused > 200


def test_values_that_are_missing_or_of_another_type(opened):
    file = opened(gguf_bytes([entry("n", UINT32, 3), entry("f", ARRAY, [1.0], FLOAT32), entry("b", BOOL, True)]))
    for call, message in (
        (lambda: file.value("m", int), "model.gguf must hold metadata key 'm', got none of that name"),
        (lambda: file.value("n", str), "metadata key 'n' must be of type str, got int"),
        (lambda: file.value("b", int), "metadata key 'b' must be of type int, got bool"),
        (lambda: file.values("n", int), "metadata key 'n' must be of type list, got int"),
        (lambda: file.values("f", int), "metadata key 'f' must be a list of int, got an entry of float"),
        (lambda: file.tensor("w"), "model.gguf must hold tensor 'w', got none of that name"),
    ):
        with pytest.raises(ValueError, match=f"gguf: {message}"):
            call()


# --- a whole model --------------------------------------------------------------------------------------------------

HIDDEN, INNER, HEADS, KV_HEADS, LAYERS = 8, 12, 2, 1, 2
TOKENS = ["<|endoftext|>", "<empty_output>", "a", "b", "Ġ", "ab", "1", "2"]
LAYER = {
    "attn_norm": (HIDDEN,),
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (HIDDEN // 2, HIDDEN),
    "attn_v": (HIDDEN // 2, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_norm": (HIDDEN,),
    "ffn_gate": (INNER, HIDDEN),
    "ffn_up": (INNER, HIDDEN),
    "ffn_down": (HIDDEN, INNER),
}


def tiny_llama(changed=None, shapes=None):
    """GGUF bytes of a Llama of two layers, and its weights. changed: key -> entry, shapes: tensor -> shape, or None."""
    entries = {
        "general.architecture": entry("general.architecture", STRING, "llama"),
        "llama.block_count": entry("llama.block_count", UINT32, LAYERS),
        "llama.context_length": entry("llama.context_length", UINT32, 64),
        "llama.embedding_length": entry("llama.embedding_length", UINT32, HIDDEN),
        "llama.feed_forward_length": entry("llama.feed_forward_length", UINT32, INNER),
        "llama.attention.head_count": entry("llama.attention.head_count", UINT32, HEADS),
        "llama.attention.head_count_kv": entry("llama.attention.head_count_kv", UINT32, KV_HEADS),
        "llama.rope.freq_base": entry("llama.rope.freq_base", FLOAT32, 10000.0),
        "llama.attention.layer_norm_rms_epsilon": entry("llama.attention.layer_norm_rms_epsilon", FLOAT32, 1e-5),
        "tokenizer.ggml.model": entry("tokenizer.ggml.model", STRING, "gpt2"),
        "tokenizer.ggml.pre": entry("tokenizer.ggml.pre", STRING, "smollm"),
        "tokenizer.ggml.tokens": entry("tokenizer.ggml.tokens", ARRAY, TOKENS, STRING),
        "tokenizer.ggml.token_type": entry("tokenizer.ggml.token_type", ARRAY, [3, 3] + [1] * 6, INT32),
        "tokenizer.ggml.merges": entry("tokenizer.ggml.merges", ARRAY, ["a b"], STRING),
        "tokenizer.ggml.eos_token_id": entry("tokenizer.ggml.eos_token_id", UINT32, 0),
    }
    entries |= changed or {}
    all_shapes = {"token_embd.weight": (len(TOKENS), HIDDEN), "output_norm.weight": (HIDDEN,)}
    all_shapes |= {f"blk.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in LAYER.items()}
    all_shapes |= shapes or {}
    rng, table, data, weights = np.random.default_rng(0), [], b"", {}
    for name, shape in all_shapes.items():
        if shape is not None:
            table.append(tensor(name, shape[::-1], F32, len(data)))
            weights[name] = rng.standard_normal(shape).astype("<f4")
            data += weights[name].tobytes() + bytes(-weights[name].nbytes % 32)
    return gguf_bytes([e for e in entries.values() if e is not None], table, data), weights


def test_a_whole_model_is_read(tmp_path):
    raw, weights = tiny_llama()
    (tmp_path / "tiny.gguf").write_bytes(raw)
    config, model, tokenizer = load_base(tmp_path / "tiny.gguf", block_size=16)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (2, 2, 1, 4)
    assert (config.mask_id, config.eos_ids, config.block_size, config.token_shift) == (1, (0,), 16, True)
    assert config.tie_embeddings and model.lm_head.weight is model.embed_tokens.weight
    state = model.state_dict()
    np.testing.assert_array_equal(state["embed_tokens.weight"], weights["token_embd.weight"])
    np.testing.assert_array_equal(state["layers.1.mlp.down_proj.weight"], weights["blk.1.ffn_down.weight"])
    np.testing.assert_array_equal(state["layers.1.self_attn.v_proj.weight"], weights["blk.1.attn_v.weight"])
    # Rows of a head of 4: pairs (0, 1), (2, 3) in the file, halves (0, 2), (1, 3) here.
    expected = weights["blk.0.attn_q.weight"][[0, 2, 1, 3, 4, 6, 5, 7]]
    np.testing.assert_array_equal(state["layers.0.self_attn.q_proj.weight"], expected)
    assert tokenizer.encode("ab a12<empty_output>") == [5, 4, 2, 6, 7, 1]


WRONG_MODELS = {
    "architecture": (
        {"general.architecture": entry("general.architecture", STRING, "gpt2")},
        {},
        "must be 'llama', got",
    ),
    "no heads": ({"llama.attention.head_count": None}, {}, "must hold metadata key 'llama.attention.head_count'"),
    "heads of layers": (
        {"llama.attention.head_count": entry("llama.attention.head_count", ARRAY, [2, 2], INT32)},
        {},
        "'llama.attention.head_count' must be of type int, got list",
    ),
    "0 heads": (
        {"llama.attention.head_count": entry("llama.attention.head_count", UINT32, 0)},
        {},
        "num_heads must be a positive",
    ),
    "layers": (
        {"llama.block_count": entry("llama.block_count", UINT64, 2**62)},
        {},
        "llama.block_count must fit the tensors of the file",
    ),
    "hidden": (
        {"llama.embedding_length": entry("llama.embedding_length", UINT64, 2**40)},
        {},
        r"tensor 'token_embd.weight' must be \[8, 1099511627776\], got \[8, 8\]",
    ),
    "scaled rotary": (
        {"llama.rope.scaling.type": entry("llama.rope.scaling.type", STRING, "yarn")},
        {},
        "llama.rope.scaling.type must be 'none', got 'yarn'",
    ),
    "partial rotary": (
        {"llama.rope.dimension_count": entry("llama.rope.dimension_count", UINT32, 2)},
        {},
        "llama.rope.dimension_count must be the head dim 4, got 2",
    ),
    "tokenizer": (
        {"tokenizer.ggml.pre": entry("tokenizer.ggml.pre", STRING, "llama-bpe")},
        {},
        "tokenizer.ggml.pre must be 'smollm', got 'llama-bpe'",
    ),
    "no mask token": (
        {"tokenizer.ggml.tokens": entry("tokenizer.ggml.tokens", ARRAY, ["x"] * 8, STRING)},
        {},
        "tokenizer.ggml.tokens must hold '<empty_output>'",
    ),
    "tokens of numbers": (
        {"tokenizer.ggml.tokens": entry("tokenizer.ggml.tokens", ARRAY, [1] * 8, INT32)},
        {},
        "'tokenizer.ggml.tokens' must be a list of str, got an entry of int",
    ),
    "token types": (
        {"tokenizer.ggml.token_type": entry("tokenizer.ggml.token_type", ARRAY, [3], INT32)},
        {},
        "tokenizer.ggml.token_type must have 8 entries, got 1",
    ),
    "merge": (
        {"tokenizer.ggml.merges": entry("tokenizer.ggml.merges", ARRAY, ["a b", "abc"], STRING)},
        {},
        "tokenizer.ggml.merges must be pairs of tokens, got 'abc'",
    ),
    "merge of unknown": (
        {"tokenizer.ggml.merges": entry("tokenizer.ggml.merges", ARRAY, ["x y"], STRING)},
        {},
        "tokenizer.ggml.merges must be a BPE over the tokens, got",
    ),
    "eos": (
        {"tokenizer.ggml.eos_token_id": entry("tokenizer.ggml.eos_token_id", UINT32, 8)},
        {},
        r"tokenizer.ggml.eos_token_id must be in \[0, 8\), got 8",
    ),
    "tensor missing": (
        {},
        {"blk.1.ffn_up.weight": None, "output.weight": (8, 8)},
        "'blk.1.ffn_up.weight' must be .*none",
    ),
    "tensor shape": (
        {},
        {"blk.0.attn_k.weight": (8, 8)},
        r"tensor 'blk.0.attn_k.weight' must be \[4, 8\], got \[8, 8\]",
    ),
    "bias": ({}, {"blk.0.attn_q.bias": (8,)}, "tensor 'blk.0.attn_q.bias' must be one of a Llama of 2 layers"),
    "rope factors": ({}, {"rope_freqs.weight": (2,)}, "tensor 'rope_freqs.weight' must be one of a Llama"),
    "third layer": ({}, {"blk.2.attn_q.weight": (8, 8)}, "tensor 'blk.2.attn_q.weight' must be one of a Llama of 2"),
}


@pytest.mark.parametrize("case", WRONG_MODELS)
def test_files_that_are_no_such_model(case, tmp_path):
    changed, shapes, message = WRONG_MODELS[case]
    (tmp_path / "tiny.gguf").write_bytes(tiny_llama(changed, shapes)[0])
    with pytest.raises(ValueError, match=message):
        load_base(tmp_path / "tiny.gguf")
