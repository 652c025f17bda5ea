"""Text to ids and back: one interface over SentencePiece, a Hugging Face folder, and plain bytes.

Text never yields control tokens: "<end_of_turn>" in a prompt is its characters, whichever the tokenizer. Turns are
built from ids by `chat`.
"""

from __future__ import annotations

import abc
import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sst_jax.data import vocabulary as vocabularies
from sst_jax.data.gguf_header import metadata_of
from sst_jax.errors import InputError
from sst_jax.families.registry import TEXT_ENDS, TURN_ENDS

MARKER = "sst_tokenizer.json"  # says which of our own tokenizers a folder holds
START_OF_TURN, END_OF_TURN = "<start_of_turn>", "<end_of_turn>"
HF_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "chat_template.jinja",
)

# What `Tokenizer.chat` does, for users of an exported folder.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% set system = messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' %}"
    "{% for message in (messages[1:] if system else messages) %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}"
    "{{ (system if loop.first else '') + (message['content'] | trim) + '<end_of_turn>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)


class Tokenizer(abc.ABC):
    """Ids are ints below `vocab_size`. `stop_ids` end a generation: eos, and of TURN_ENDS and TEXT_ENDS what there is.

    bos_id is None where the vocabulary has no BOS; add_bos is False there.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int
    pad_id: int
    add_bos: bool = True

    @abc.abstractmethod
    def encode_text(self, text: str) -> list[int]:
        """Return ids of the text alone: no BOS, no control tokens."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text; special tokens and ids beyond the vocabulary are dropped, broken UTF-8 becomes U+FFFD."""

    @abc.abstractmethod
    def piece_id(self, piece: str) -> int | None:
        """Return the id of a whole piece such as "<start_of_turn>", or None."""

    @abc.abstractmethod
    def files(self) -> dict[str, bytes]:
        """Return what to store beside the weights, by file name, so that `load_tokenizer` reads an equal tokenizer
        back.
        """

    @abc.abstractmethod
    def export_files(self) -> dict[str, bytes]:
        """Return files from which `transformers.AutoTokenizer.from_pretrained(folder)` gives the same ids."""

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Return ids of the text, after BOS if `bos` and the model is one that wants it."""
        first = [self.bos_id] if bos and self.add_bos and self.bos_id is not None else []
        return first + self.encode_text(text)

    @property
    def turn_end_id(self) -> int:
        """What ends a turn of a chat: a piece made for it, or what ends a text."""
        return next((index for piece in TURN_ENDS if (index := self.piece_id(piece)) is not None), self.eos_id)

    @property
    def stop_ids(self) -> frozenset[int]:
        ends = (self.piece_id(piece) for piece in (*TURN_ENDS, *TEXT_ENDS))
        return frozenset({self.eos_id, *(index for index in ends if index is not None)})

    @property
    def digest(self) -> str:
        """sha256 over `files()`: equal digests give equal ids."""
        total = hashlib.sha256()
        for name, data in sorted(self.files().items()):
            total.update(f"{name}\0{len(data)}\0".encode() + data)
        return total.hexdigest()

    def chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> list[int]:
        """Return ids of a conversation in Gemma's turns, with exactly one BOS.

        `messages` are {"role": "user" | "assistant" | "system", "content": text}: at most one system message, first,
        which goes into the first user turn; then user and assistant in turn, as the model was trained.
        Raises: InputError for any other order, and where the vocabulary has no turn tokens.
        """
        start, end = self.piece_id(START_OF_TURN), self.piece_id(END_OF_TURN)
        if start is None or end is None or self.bos_id is None:
            raise InputError(f"chat needs the tokens {START_OF_TURN} and {END_OF_TURN}, which this vocabulary lacks")
        ids = [self.bos_id]
        for role, content in _turns(messages):
            ids += [start, *self.encode_text(f"{role}\n{content}"), end, *self.encode_text("\n")]
        return [*ids, start, *self.encode_text("model\n")] if add_generation_prompt else ids


def _turns(messages: Sequence[Mapping[str, str]]) -> Iterator[tuple[str, str]]:
    system = ""
    for index, message in enumerate(messages):
        role, content = message["role"], message["content"].strip()
        if role == "system" and index == 0:
            system = message["content"] + "\n\n"
            continue
        user_turn = (index - bool(system)) % 2 == 0
        if role != ("user" if user_turn else "assistant"):
            raise InputError(
                f"chat message {index} is from {role!r}; after an optional system message, user and assistant alternate"
            )
        yield ("user", system + content) if index == bool(system) else ("user" if user_turn else "model", content)
    if len(messages) == bool(system):
        raise InputError("chat needs at least one user message")


class SentencePieceTokenizer(Tokenizer):
    """Over `sentencepiece`, from the bytes of a ModelProto (a `tokenizer.model` file)."""

    def __init__(self, model: bytes, add_bos: bool = True):
        import sentencepiece

        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError, UnicodeDecodeError) as error:  # the last: its own message quotes the bytes
            raise InputError(f"not a SentencePiece model: {error}") from error
        sp = self._processor
        self._model, self.add_bos = model, add_bos
        self.vocab_size = sp.get_piece_size()
        self.bos_id, self.eos_id = sp.bos_id(), sp.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise InputError("SentencePiece model names no BOS or no EOS piece")
        self.pad_id = max(sp.pad_id(), 0)

    @classmethod
    def from_gguf_vocabulary(
        cls, tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], facts: Mapping[str, Any]
    ) -> SentencePieceTokenizer:
        """Build the tokenizer from a GGUF's vocabulary.

        `facts` is its metadata by full key ("tokenizer.ggml.bos_token_id", ...).

        Raises: InputError when the vocabulary is not SentencePiece, or its parts disagree.
        """
        vocabulary = vocabularies.vocabulary_from_gguf(tokens, scores, types, facts)
        return cls(vocabularies.to_model_proto(vocabulary), facts.get("tokenizer.ggml.add_bos_token", True))

    def encode_text(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        sp = self._processor
        return sp.decode(
            [i for i in map(int, ids) if i < self.vocab_size and not (sp.is_control(i) or sp.is_unknown(i))]
        )

    def piece_id(self, piece: str) -> int | None:
        index = self._processor.piece_to_id(piece)
        return index if self._processor.id_to_piece(index) == piece else None

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.model": self._model, MARKER: _json({"kind": "sentencepiece", "add_bos": self.add_bos})}

    def export_files(self) -> dict[str, bytes]:
        vocabulary = vocabularies.from_model_proto(self._model)
        return {"tokenizer.model": self._model} | _export(vocabulary, self.add_bos)


class HuggingFaceTokenizer(Tokenizer):
    """Over transformers, from a local folder's `tokenizer.json` as it stands; code in the folder is never run."""

    def __init__(self, folder: str | Path):
        import transformers

        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            raise InputError(f"{folder}: holds no tokenizer.json")
        self._files = {name: (folder / name).read_bytes() for name in HF_FILES if (folder / name).is_file()}
        try:
            # Not AutoTokenizer: importing it imports torch where torch is installed.
            self._tokenizer = hf = transformers.PreTrainedTokenizerFast.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
            first, bare = hf("a")["input_ids"][0], hf("a", add_special_tokens=False)["input_ids"][0]
        except BaseException as error:  # the tokenizers library raises bare Exception for a broken file, or panics
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise InputError(f"{folder}: transformers cannot read its tokenizer: {error}") from error
        if hf.eos_token_id is None or (hf.bos_token_id is None and first != bare):
            raise InputError(f"{folder}: its tokenizer names no eos_token, or puts one in front that is no bos_token")
        self.bos_id, self.eos_id = hf.bos_token_id, hf.eos_token_id
        self.pad_id = self.eos_id if hf.pad_token_id is None else hf.pad_token_id
        # Of the tokens added behind the vocabulary only those that are used (Llama's): Gemma's image token is one, and
        # text models have no row for it.
        self.vocab_size = max(hf.vocab_size, 1 + max(self.eos_id, self.pad_id, self.bos_id or 0))
        self.add_bos = first != bare and first == self.bos_id
        self._specials = {str(token): index for index, token in hf.added_tokens_decoder.items() if token.special}

    @classmethod
    def from_gguf_facts(cls, facts: Mapping[str, Any]) -> HuggingFaceTokenizer:
        """Build the tokenizer from the `tokenizer.*` metadata of a GGUF whose vocabulary is byte-level BPE ("gpt2").

        Raises: InputError as `vocabulary.byte_level_json`; KeyError for a key that is missing.
        """
        tokens = facts["tokenizer.ggml.tokens"]
        ids = {name: facts.get(f"tokenizer.ggml.{key}_token_id") for name, key in _NAMED.items()}
        for name, index in ids.items():
            if index is not None and not 0 <= index < len(tokens):
                raise InputError(f"GGUF vocabulary of {len(tokens)} has {name} {index}")
        named = {name: tokens[index] for name, index in ids.items() if index is not None}
        config = _config(named, facts.get("tokenizer.ggml.add_bos_token", False), facts.get("tokenizer.chat_template"))
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "tokenizer.json").write_bytes(vocabularies.byte_level_json(facts))
            (Path(folder) / "tokenizer_config.json").write_bytes(config)
            return cls(folder)

    def chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> list[int]:
        """Return ids of a conversation in the turns of the folder's chat template; Gemma's by `Tokenizer.chat`.

        What looks like a special token inside a message is its characters.
        Raises: InputError as there, and where the folder has no template or the template refuses.
        """
        if self.piece_id(START_OF_TURN) is not None:
            return super().chat(messages, add_generation_prompt)
        list(_turns(messages))  # the same orders are refused
        special = re.compile("|".join(map(re.escape, sorted(self._specials, key=len, reverse=True))))
        # A character that no message holds, to break what looks special until the template has been filled in.
        held = {character for message in messages for character in message["content"]}
        mark = next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in held)
        broken = [
            {**message, "content": special.sub(lambda found: found[0][0] + mark + found[0][1:], message["content"])}
            for message in messages
        ]
        try:
            text = self._tokenizer.apply_chat_template(
                broken, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template from the checkpoint, run in a sandbox: it may fail in any way
            raise InputError(f"chat needs a template that takes these messages: {error}") from error
        ids, at = [], 0
        for found in special.finditer(text):
            ids += [*self.encode_text(text[at : found.start()].replace(mark, "")), self._specials[found[0]]]
            at = found.end()
        return ids + self.encode_text(text[at:].replace(mark, ""))

    def encode_text(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        known = [i for i in map(int, ids) if i < len(self._tokenizer)]
        return self._tokenizer.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def piece_id(self, piece: str) -> int | None:
        index = self._tokenizer.convert_tokens_to_ids(piece)
        return index if index is not None and self._tokenizer.convert_ids_to_tokens(index) == piece else None

    def files(self) -> dict[str, bytes]:
        return dict(self._files)

    def export_files(self) -> dict[str, bytes]:
        return self.files()


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes after six specials, in the order of Gemma's: what the tiny models and the tests use."""

    SPECIALS = ("<pad>", "<eos>", "<bos>", "<unk>", START_OF_TURN, END_OF_TURN)
    pad_id, eos_id, bos_id = 0, 1, 2
    vocab_size = len(SPECIALS) + 256

    def encode_text(self, text: str) -> list[int]:
        return [len(self.SPECIALS) + byte for byte in text.encode("utf-8")]

    def decode(self, ids: Sequence[int]) -> str:
        first = len(self.SPECIALS)
        return bytes(i - first for i in map(int, ids) if first <= i < self.vocab_size).decode("utf-8", errors="replace")

    def piece_id(self, piece: str) -> int | None:
        return self.SPECIALS.index(piece) if piece in self.SPECIALS else None

    def files(self) -> dict[str, bytes]:
        return {MARKER: _json({"kind": "byte"})}

    def export_files(self) -> dict[str, bytes]:
        # A BPE with no merges falls back to bytes everywhere, which is what this tokenizer is.
        count = len(self.SPECIALS)
        types = [vocabularies.CONTROL] * count + [vocabularies.BYTE] * 256
        types[3] = vocabularies.UNKNOWN
        pieces = [*self.SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))]
        return _export(vocabularies.Vocabulary(pieces, [0.0] * len(pieces), types, 3, 2, 1, 0), self.add_bos)


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


_NAMED = {"unk": "unknown", "bos": "bos", "eos": "eos", "pad": "padding"}  # special tokens, as GGUF names them


def _config(named: Mapping[str, str], add_bos: bool, template: str | None) -> bytes:
    """Return a tokenizer_config.json; `named` are the pieces of _NAMED that there are."""
    config = {
        # The class that takes tokenizer.json as it stands; GemmaTokenizer would rebuild parts of it.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": add_bos,
        **{f"{name}_token": piece for name, piece in named.items()},
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131_072,
        "padding_side": "left",
    }
    return _json(config if template is None else {**config, "chat_template": template})


def _export(vocabulary: vocabularies.Vocabulary, add_bos: bool) -> dict[str, bytes]:
    ids = {"unk": vocabulary.unk_id, "bos": vocabulary.bos_id, "eos": vocabulary.eos_id, "pad": vocabulary.pad_id}
    named = {name: vocabulary.pieces[index] for name, index in ids.items() if index is not None}
    template = CHAT_TEMPLATE if START_OF_TURN in vocabulary.pieces else None
    return {
        "tokenizer.json": vocabularies.to_tokenizers_json(vocabulary, add_bos),
        "tokenizer_config.json": _config(named, add_bos, template),
    }


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Return the tokenizer of a folder (ours by its marker, else Hugging Face's files, else a `tokenizer.model`) or
    GGUF file.

    Raises: InputError naming the folder when it holds none, or a broken one.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        return _gguf(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such folder to read a tokenizer from")
    if (path / MARKER).is_file():
        try:
            marker = json.loads((path / MARKER).read_bytes())
            kind, add_bos = marker["kind"], marker.get("add_bos", True)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{path / MARKER}: not a tokenizer marker") from error
        if not isinstance(add_bos, bool):
            raise InputError(f"{path / MARKER}: add_bos={add_bos!r} must be true or false")
        if kind == "byte":
            return ByteTokenizer()
        if kind != "sentencepiece":
            raise InputError(f"{path / MARKER}: unknown kind {kind!r}")
        return _sentencepiece(path, add_bos)
    if (path / "tokenizer.json").is_file():
        return HuggingFaceTokenizer(path)
    if (path / "tokenizer.model").is_file():
        return _sentencepiece(path, True)
    raise InputError(f"{path}: holds no tokenizer (none of {MARKER}, tokenizer.json, tokenizer.model)")


def _gguf(path: Path) -> Tokenizer:
    facts = metadata_of(path)
    try:
        vocabularies.check_facts(facts)
        if facts.get("tokenizer.ggml.model") == "gpt2":
            return HuggingFaceTokenizer.from_gguf_facts(facts)
        tokens, scores, types = (facts[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
        return SentencePieceTokenizer.from_gguf_vocabulary(tokens, scores, types, facts)
    except KeyError as error:
        raise InputError(f"{path}: its metadata lacks {error}") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _sentencepiece(folder: Path, add_bos: bool) -> SentencePieceTokenizer:
    file = folder / "tokenizer.model"
    if not file.is_file():
        raise InputError(f"{folder}: {MARKER} promises a tokenizer.model, which is missing")
    try:
        return SentencePieceTokenizer(file.read_bytes(), add_bos)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
