"""Text to token ids and back: `tokenizers` for the splitting, a sandboxed jinja2 for the chat template.

It knows the tokenizer files of a Hugging Face folder; it knows no model. A template is a program out of a stranger's
folder: it runs in jinja2's immutable sandbox and sees the messages and the names of special tokens, nothing else.

Test: pytest tests/python/test_tokenizer.py
"""

import json
import numbers
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from mage_ext._arguments import check_list, check_path, check_type, got

# How Qwen2 and Qwen3 split text before BPE; only for folders that bring vocab.json and merges.txt without
# tokenizer.json.
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ID_LIMIT = 1 << 32  # ids of the tokenizers library are unsigned, of 32 bits
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Tokenizer:
    """Encodes text and chats, decodes ids.

    Args:
        backend: the `tokenizers.Tokenizer` that splits.
        eos_ids: ids that end a request. mask_id: id of an undecided position, None if the tokenizer does not say.
        chat_template: jinja2 source, None if there is none. special_tokens: names such as "bos_token" to their text,
            for the template.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_ids: Iterable[int] = (),
        mask_id: int | None = None,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ):
        check_type("Tokenizer", "backend", backend, tokenizers.Tokenizer, "a tokenizers.Tokenizer")
        self.backend = backend
        self.eos_ids = tuple(_ids("eos_ids", eos_ids))
        self.mask_id = None if mask_id is None else _ids("mask_id", [mask_id])[0]
        if special_tokens is not None:
            check_type("Tokenizer", "special_tokens", special_tokens, Mapping, "a mapping of names to texts")
        self.special_tokens = dict(special_tokens or {})
        if chat_template is not None:
            check_type("Tokenizer", "chat_template", chat_template, str, "a string or None")
        self.chat_template = chat_template
        self._template = None if chat_template is None else _compile(chat_template)

    @classmethod
    def from_folder(
        cls, folder: str | Path, *, eos_ids: Iterable[int] | None = None, mask_id: int | None = None
    ) -> "Tokenizer":
        """Reads tokenizer.json (or vocab.json with merges.txt as Qwen's), tokenizer_config.json and
        chat_template.jinja.

        Args:
            folder: of the checkpoint. eos_ids, mask_id: the model's, where it knows them; None takes eos_token and
                mask_token of tokenizer_config.json.
        Raises:
            FileNotFoundError: no tokenizer in the folder. ValueError: a file that can't be read, naming it.
            TypeError: folder is no path.
        """
        check_path("Tokenizer", folder, "folder")
        folder = Path(folder)
        config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
        backend = _read_backend(folder, config)
        special_tokens = {name: _token_text(config[name]) for name in _SPECIAL_NAMES if config.get(name)}

        def id_of(name: str) -> int | None:
            return backend.token_to_id(special_tokens[name]) if name in special_tokens else None

        if eos_ids is None:
            eos_ids = () if id_of("eos_token") is None else (id_of("eos_token"),)
        return cls(
            backend,
            eos_ids=eos_ids,
            mask_id=id_of("mask_token") if mask_id is None else mask_id,
            chat_template=_read_template(folder, config),
            special_tokens=special_tokens,
        )

    @property
    def vocab_size(self) -> int:
        """Ids that the tokenizer knows, added tokens included; a model's vocabulary may be padded beyond it."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`; special tokens written out in it are recognised. add_special_tokens adds e.g. BOS where the
        tokenizer has it.

        Raises:
            TypeError: text is no string or add_special_tokens no bool. ValueError: text holds a lone surrogate.
        """
        check_type("Tokenizer", "text", text, str, "a string")
        check_type("Tokenizer", "add_special_tokens", add_special_tokens, bool, "a bool")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"Tokenizer: text must be valid Unicode, got {text[error.start]!r}") from None
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; those that the vocabulary lacks give nothing.

        Raises:
            TypeError: ids is no list or skip_special_tokens no bool. ValueError: an id is no integer in [0, 2^32).
        """
        ids = _ids("ids", ids)
        check_type("Tokenizer", "skip_special_tokens", skip_special_tokens, bool, "a bool")
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def render_chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The template's text for `messages`.

        Args:
            messages: [{"role": "user", "content": "..."}, ...], at least one. add_generation_prompt: ends where the
                answer starts.
        Raises:
            ValueError: there is no template, a message is not as above, or the template refuses or fails.
            TypeError: messages is no list or add_generation_prompt no bool.
        """
        check_type("Tokenizer", "add_generation_prompt", add_generation_prompt, bool, "a bool")
        if self._template is None:
            raise ValueError("Tokenizer: chat_template must be given to render a chat, got None")
        messages = check_list("Tokenizer", "messages", messages, "a list of messages")
        if not messages:
            raise ValueError("Tokenizer: messages must hold at least one message, got none")
        for i, message in enumerate(messages):
            if not isinstance(message, Mapping) or not all(
                isinstance(message.get(key), str) for key in ("role", "content")
            ):
                raise ValueError(f'Tokenizer: messages[{i}] must have strings "role" and "content", got {message!r}')
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise ValueError(f"Tokenizer: chat_template must render these messages, got: {error}") from None

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of render_chat(messages), up to where the answer starts."""
        return self.encode(self.render_chat(messages), add_special_tokens=False)


def byte_level_bpe(
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    *,
    split: str | None = None,
    digits: bool = False,
    nfc: bool = False,
    special_tokens: Sequence[str] = (),
) -> tokenizers.Tokenizer:
    """A byte-level BPE backend from its parts.

    Args:
        vocab: token to id, in byte-level spelling. merges: pairs in order of rank.
        split: regular expression that cuts words, matches are kept; None: the one of GPT-2.
        digits: every digit is a word of its own. nfc: text is brought to NFC first.
        special_tokens: texts that are one token wherever they occur; those outside vocab get the next free ids.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    owner = "byte_level_bpe"
    check_type(owner, "vocab", vocab, Mapping, "a mapping of tokens to ids")
    for token, number in vocab.items():
        check_type(owner, "vocab", token, str, "a mapping of tokens to ids")
        _check_id(owner, f"vocab[{token!r}]", number)
    merges = check_list(owner, "merges", merges, "a list of pairs of tokens")
    for i, pair in enumerate(merges):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise TypeError(f"{owner}: merges[{i}] must be a pair of tokens, got {pair!r}")
    special_tokens = check_list(owner, "special_tokens", special_tokens, "a list of texts")
    for i, token in enumerate(special_tokens):
        check_type(owner, f"special_tokens[{i}]", token, str, "a string")
    if split is not None:
        check_type(owner, "split", split, str, "a regular expression or None")
    for name, value in (("digits", digits), ("nfc", nfc)):
        check_type(owner, name, value, bool, "a bool")
    try:
        model = models.BPE(vocab=dict(vocab), merges=[tuple(pair) for pair in merges], fuse_unk=False)
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{owner}: merges must be pairs of tokens whose union is in vocab, got: {error}") from None
    try:
        words = Regex(split) if split is not None else None
    except Exception as error:
        raise ValueError(f"{owner}: split must be a regular expression, got {split!r}: {error}") from None
    backend = tokenizers.Tokenizer(model)
    if nfc:
        backend.normalizer = normalizers.NFC()
    steps = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if words is not None:
        steps.append(pre_tokenizers.Split(words, behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    return backend


def _check_id(owner: str, name: str, value: object) -> None:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or not 0 <= value < _ID_LIMIT:
        raise ValueError(f"{owner}: {name} must be an integer in [0, 2^32), got {got(value)}")


def _ids(name: str, values: object) -> list[int]:
    """Token ids as Python's integers; of a tensor or an array too."""
    values = check_list("Tokenizer", name, getattr(values, "tolist", lambda: values)(), "a list of token ids")
    for value in values:
        _check_id("Tokenizer", name, value)
    return values


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError naming the file if it does not hold one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}: must be readable JSON, got: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path.name}: must be a JSON object, got {type(value).__name__}")
    return value


def _read_backend(folder: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if path.exists():
        read_json(path)  # its error names the place; the library's does not
        try:
            return tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"tokenizer.json: must be a tokenizer of the tokenizers library, got: {error}") from None
    if not (folder / "vocab.json").exists() or not (folder / "merges.txt").exists():
        raise FileNotFoundError(f"Tokenizer: {folder} must hold tokenizer.json, or vocab.json and merges.txt")
    if "qwen" not in str(config.get("tokenizer_class", "")).lower():
        raise ValueError(
            "tokenizer_config.json: tokenizer_class must be Qwen2Tokenizer where tokenizer.json is missing, "
            f"got {config.get('tokenizer_class')!r}"
        )
    vocab = read_json(folder / "vocab.json")
    merges = []
    for number, line in enumerate((folder / "merges.txt").read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        pair = tuple(line.split(" "))
        if len(pair) != 2:
            raise ValueError(f"merges.txt: line {number} must be two tokens, got {line!r}")
        merges.append(pair)
    try:
        backend = byte_level_bpe(vocab, merges, split=_QWEN_SPLIT, nfc=True)
    except Exception as error:
        raise ValueError(f"vocab.json and merges.txt: must be a BPE vocabulary, got: {error}") from None
    for number, token in _added_tokens(folder, config):
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != number:
            raise ValueError(
                f"added tokens: {token.content!r} must get id {number}, got {backend.token_to_id(token.content)}; "
                "ids must continue vocab.json without gaps"
            )
    return backend


def _added_tokens(folder: Path, config: Mapping[str, Any]) -> list[tuple[int, AddedToken]]:
    """(id, token) in ascending id, of added_tokens_decoder in tokenizer_config.json and of added_tokens.json."""
    found: dict[int, AddedToken] = {}
    if (folder / "added_tokens.json").exists():
        for text, number in read_json(folder / "added_tokens.json").items():
            found[int(number)] = AddedToken(text, special=True, normalized=False)
    for number, entry in config.get("added_tokens_decoder", {}).items():
        flags = {key: bool(entry[key]) for key in ("lstrip", "rstrip", "single_word", "normalized") if key in entry}
        found[int(number)] = AddedToken(entry["content"], special=bool(entry.get("special", True)), **flags)
    return sorted(found.items(), key=lambda item: item[0])


def _token_text(value: Any) -> str:
    return value["content"] if isinstance(value, Mapping) else str(value)


def _read_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else chat_template of tokenizer_config.json: a text, or [{"name", "template"}] with one
    named "default"."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"tokenizer_config.json: chat_template must be a text, got {type(template).__name__}")
    return template


def _compile(source: str) -> jinja2.Template:
    """The template in a sandbox with the settings, filters and functions that templates of Hugging Face folders rely
    on."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ValueError(f"Tokenizer: chat_template must be a jinja2 template, got: {error}") from None
