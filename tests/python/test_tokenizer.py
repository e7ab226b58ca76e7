"""Tokenizers and chat templates of Hugging Face folders. Run: pytest tests/python/test_tokenizer.py"""

import json

import numpy as np
import pytest
import torch

from mage_ext.models.tokenizer import Tokenizer, byte_level_bpe

_CHATML = """{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
_TEXTS = [
    "",
    "hello world",
    "  two  spaces\n\n\tand tabs\r\n",
    "It's 1234567 o'clock, isn't it?",
    "na\u00efve caf\u00e9 e\u0301 \u4f60\u597d \U0001f600",
    "<|im_start|>user\nhi<|im_end|>",
    "x<|MASK|>y",
]


def _qwen_parts():
    """A Qwen-like vocabulary: all bytes and some merges."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: number for number, symbol in enumerate(alphabet)}
    merges = []
    for left, right in [
        ("h", "e"),
        ("l", "l"),
        ("he", "ll"),
        ("hell", "o"),
        ("\u0120", "w"),
        ("1", "2"),
        ("'", "s"),
        ("i", "s"),
    ]:
        merges.append((left, right))
        vocab.setdefault(left + right, len(vocab))
    return vocab, merges


def _qwen_folder(folder):
    vocab, merges = _qwen_parts()
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|MASK|>"]
    entry = dict(lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)
    decoder = {str(len(vocab) + i): {"content": text, **entry} for i, text in enumerate(specials)}
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": decoder,
        "eos_token": "<|im_end|>",
        "pad_token": {"__type": "AddedToken", "content": "<|endoftext|>", **entry},
        "mask_token": "<|MASK|>",
        "chat_template": _CHATML,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(vocab)


def test_vocab_and_merges_equal_transformers(tmp_path):
    """A folder without tokenizer.json, as SDAR's repository has it."""
    transformers = pytest.importorskip("transformers")
    size = _qwen_folder(tmp_path)
    ours = Tokenizer.from_folder(tmp_path)
    theirs = transformers.Qwen2Tokenizer.from_pretrained(tmp_path)
    for text in _TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids, clean_up_tokenization_spaces=False)
    assert ours.eos_ids == (size + 2,) and ours.mask_id == size + 3
    assert ours.vocab_size == size + 4
    messages = [{"role": "user", "content": "hello 12"}, {"role": "assistant", "content": "well"}]
    assert ours.chat(messages) == theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    # The same folder with tokenizer.json: the same ids.
    theirs.save_pretrained(tmp_path / "fast")
    assert (tmp_path / "fast" / "tokenizer.json").exists()
    fast = Tokenizer.from_folder(tmp_path / "fast")
    assert [fast.encode(text) for text in _TEXTS] == [ours.encode(text) for text in _TEXTS]
    assert fast.chat(messages) == ours.chat(messages)


def test_decode_passes_over_special_tokens(tmp_path):
    _qwen_folder(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    ids = tokenizer.encode("<|im_start|>hello<|im_end|>")
    assert len(ids) == 3
    assert tokenizer.decode(ids) == "hello"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>hello<|im_end|>"


def test_ids_of_the_model_come_first(tmp_path):
    _qwen_folder(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path, eos_ids=[1, 2], mask_id=3)
    assert tokenizer.eos_ids == (1, 2) and tokenizer.mask_id == 3


def test_template_file_comes_before_the_config(tmp_path):
    _qwen_folder(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}{{ pad_token }}{{ messages[0].content }}")
    text = Tokenizer.from_folder(tmp_path).render_chat([{"role": "user", "content": "x"}])
    assert text == "<|im_end|><|endoftext|>x"


def test_named_templates(tmp_path):
    _qwen_folder(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "tool", "template": "no"}, {"name": "default", "template": "yes"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.from_folder(tmp_path).render_chat([{"role": "user", "content": "x"}]) == "yes"


def _tokenizer(template):
    vocab, merges = _qwen_parts()
    return Tokenizer(
        byte_level_bpe(vocab, merges, special_tokens=["<|im_start|>", "<|im_end|>"]), chat_template=template
    )


def test_chat_ends_where_the_answer_starts():
    tokenizer = _tokenizer(_CHATML)
    message = [{"role": "user", "content": "hello"}]
    assert tokenizer.render_chat(message).endswith("hello<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.render_chat(message, add_generation_prompt=False).endswith("hello<|im_end|>\n")
    assert tokenizer.decode(tokenizer.chat(message), skip_special_tokens=False) == tokenizer.render_chat(message)


def test_templates_have_what_they_rely_on():
    message = [{"role": "user", "content": "\u00e9<b>"}]
    assert _tokenizer("{{ messages[0] | tojson }}").render_chat(message) == '{"role": "user", "content": "\u00e9<b>"}'
    loop = "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    assert _tokenizer(loop).render_chat(message) == "01"
    # Blocks leave no blank lines, as transformers renders them.
    assert _tokenizer("{% if true %}\n  a\n{% endif %}\nb").render_chat(message) == "  a\nb"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for i in range(10**9) %}{% endfor %}",
    ],
)
def test_templates_are_in_a_sandbox(template):
    """Whatever a stranger's template tries, it is refused, or renders nothing of the interpreter."""
    try:
        text = _tokenizer(template).render_chat([{"role": "user", "content": "x"}])
    except ValueError as error:
        assert "chat_template must render" in str(error)
    else:
        assert text == ""


def test_digits_one_by_one():
    vocab, merges = _qwen_parts()
    tokenizer = Tokenizer(byte_level_bpe(vocab, merges, digits=True))
    assert len(tokenizer.encode("12")) == 2
    assert len(Tokenizer(byte_level_bpe(vocab, merges)).encode("12")) == 1
    assert tokenizer.decode(tokenizer.encode("a 1234 b")) == "a 1234 b"


def test_nfc():
    vocab, merges = _qwen_parts()
    composed = Tokenizer(byte_level_bpe(vocab, merges, nfc=True))
    assert composed.encode("e\u0301") == composed.encode("\u00e9")
    plain = Tokenizer(byte_level_bpe(vocab, merges))
    assert plain.encode("e\u0301") != plain.encode("\u00e9")


_BPE = byte_level_bpe({"a": 0, "b": 1}, [])
_WRONG = {
    "backend": (lambda t: Tokenizer(None), "Tokenizer: backend must be a tokenizers.Tokenizer, got None"),
    "eos_ids_none": (
        lambda t: Tokenizer(_BPE, eos_ids=None),
        "Tokenizer: eos_ids must be a list of token ids, got None",
    ),
    "eos_ids_text": (lambda t: Tokenizer(_BPE, eos_ids="a"), "Tokenizer: eos_ids must be a list of token ids, got 'a'"),
    "eos_ids_negative": (lambda t: Tokenizer(_BPE, eos_ids=[-1]), "Tokenizer: eos_ids must be an integer in .* got -1"),
    "mask_id": (lambda t: Tokenizer(_BPE, mask_id="a"), "Tokenizer: mask_id must be an integer in .* got 'a'"),
    "template": (
        lambda t: Tokenizer(_BPE, chat_template=3),
        "Tokenizer: chat_template must be a string or None, got 3",
    ),
    "special_tokens": (
        lambda t: Tokenizer(_BPE, special_tokens=["a"]),
        "Tokenizer: special_tokens must be a mapping of names to texts, got list",
    ),
    "folder": (lambda t: Tokenizer.from_folder(None), "Tokenizer: folder must be a path, got None"),
    "encode_none": (lambda t: t.encode(None), "Tokenizer: text must be a string, got None"),
    "encode_list": (lambda t: t.encode(["a"]), "Tokenizer: text must be a string, got list"),
    "encode_flag": (lambda t: t.encode("a", 1), "Tokenizer: add_special_tokens must be a bool, got 1"),
    "encode_surrogate": (lambda t: t.encode("a\ud800"), r"Tokenizer: text must be valid Unicode, got '\\ud800'"),
    "decode_none": (lambda t: t.decode(None), "Tokenizer: ids must be a list of token ids, got None"),
    "decode_text": (lambda t: t.decode("a"), "Tokenizer: ids must be a list of token ids, got 'a'"),
    "decode_number": (lambda t: t.decode(3), "Tokenizer: ids must be a list of token ids, got 3"),
    "decode_negative": (lambda t: t.decode([0, -1]), r"Tokenizer: ids must be an integer in \[0, 2\^32\), got -1"),
    "decode_large": (lambda t: t.decode([1 << 32]), "Tokenizer: ids must be an integer in .* got 4294967296"),
    "decode_float": (lambda t: t.decode([1.0]), "Tokenizer: ids must be an integer in .* got 1.0"),
    "decode_true": (lambda t: t.decode([True]), "Tokenizer: ids must be an integer in .* got True"),
    "decode_nested": (lambda t: t.decode(torch.zeros(1, 2, dtype=torch.int64)), "Tokenizer: ids must be .* got list"),
    "decode_flag": (lambda t: t.decode([0], None), "Tokenizer: skip_special_tokens must be a bool, got None"),
    "messages": (lambda t: t.chat(3), "Tokenizer: messages must be a list of messages, got 3"),
    "messages_text": (lambda t: t.render_chat("hi"), "Tokenizer: messages must be a list of messages, got 'hi'"),
    "prompt_flag": (
        lambda t: t.render_chat([{"role": "user", "content": "a"}], "yes"),
        "Tokenizer: add_generation_prompt must be a bool, got 'yes'",
    ),
    "vocab": (lambda t: byte_level_bpe(None, []), "byte_level_bpe: vocab must be a mapping of tokens to ids, got None"),
    "vocab_id": (
        lambda t: byte_level_bpe({"a": -1}, []),
        r"byte_level_bpe: vocab\['a'\] must be an integer in .* got -1",
    ),
    "merges": (lambda t: byte_level_bpe({}, 3), "byte_level_bpe: merges must be a list of pairs of tokens, got 3"),
    "merge": (lambda t: byte_level_bpe({}, ["ab"]), r"byte_level_bpe: merges\[0\] must be a pair of tokens, got 'ab'"),
    "merge_unknown": (
        lambda t: byte_level_bpe({"a": 0}, [("a", "z")]),
        "byte_level_bpe: merges must be pairs of tokens whose union is in vocab, got: ",
    ),
    "split": (lambda t: byte_level_bpe({}, [], split=3), "byte_level_bpe: split must be a regular expression or None"),
    "split_broken": (
        lambda t: byte_level_bpe({}, [], split="("),
        r"byte_level_bpe: split must be a regular expression, got '\(': ",
    ),
    "digits": (lambda t: byte_level_bpe({}, [], digits=1), "byte_level_bpe: digits must be a bool, got 1"),
    "nfc": (lambda t: byte_level_bpe({}, [], nfc=None), "byte_level_bpe: nfc must be a bool, got None"),
    "specials": (
        lambda t: byte_level_bpe({}, [], special_tokens=[3]),
        r"byte_level_bpe: special_tokens\[0\] must be a string, got 3",
    ),
}


@pytest.mark.parametrize("case", _WRONG)
def test_names_what_is_of_another_type(case):
    call, message = _WRONG[case]
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        call(Tokenizer(_BPE, chat_template="x"))


@pytest.mark.parametrize("kind", [list, tuple, iter, np.array, torch.tensor])
def test_ids_of_any_kind_are_decoded(kind):
    assert Tokenizer(_BPE).decode(kind([0, 1, 7])) == "ab"
