"""Tokenizers and chat templates of Hugging Face folders. Run: pytest tests/python/test_tokenizer.py"""

import json

import pytest

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
