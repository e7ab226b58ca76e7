"""Text to token ids and back: `tokenizers` for the splitting, a sandboxed jinja2 for the chat template.

It knows the tokenizer files of a Hugging Face folder; it knows no model. A template is a program out of a stranger's
folder: it runs in jinja2's immutable sandbox and sees the messages and the names of special tokens, nothing else.

Test: pytest tests/python/test_tokenizer.py
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

# How Qwen2 and Qwen3 split text before BPE; only for folders that bring vocab.json and merges.txt without
# tokenizer.json.
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Tokenizer:
    """Encodes text and chats, decodes ids.

    Args:
        backend: the `tokenizers.Tokenizer` that splits.
        eos_ids: ids that end a request. mask_id: id of an undecided position, None if the tokenizer does not say.
        chat_template: jinja2 source, None if there is none. special_tokens: names such as "bos_token" to their text,
            for the template.
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
        self.backend = backend
        self.eos_ids = tuple(eos_ids)
        self.mask_id = mask_id
        self.special_tokens = dict(special_tokens or {})
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
        """
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
        tokenizer has it."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def render_chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The template's text for `messages`.

        Args:
            messages: [{"role": "user", "content": "..."}, ...], at least one. add_generation_prompt: ends where the
                answer starts.
        Raises:
            ValueError: there is no template, a message is not as above, or the template refuses or fails.
        """
        if self._template is None:
            raise ValueError("Tokenizer: chat_template must be given to render a chat, got None")
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
    """
    backend = tokenizers.Tokenizer(models.BPE(vocab=dict(vocab), merges=list(merges), fuse_unk=False))
    if nfc:
        backend.normalizer = normalizers.NFC()
    steps = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if split is not None:
        steps.append(pre_tokenizers.Split(Regex(split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    return backend


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
