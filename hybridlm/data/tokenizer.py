"""Text to token ids and back, around the `tokenizers` library.

Three origins: `bytes` (ids 0..255 are byte values, 256 ends a text), a byte-level BPE trained on the corpus, or
anyone's tokenizer.json. Whatever the origin, a table says which bytes each id stands for: bits per byte and
streaming rest on it.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from hybridlm.data.document_pieces import acts_at_edges, cut_before_words, cut_text, piece_state, puts_a_space
from hybridlm.errors import DataError
from hybridlm.files import step_folders

EOS = "<|endoftext|>"
KNOWN_EOS = (EOS, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|im_end|>", "[EOS]", "<｜end▁of▁sentence｜>")
MAX_ENCODED_CHARACTERS = 1 << 18  # encoded at once: an encoding takes many times its text's memory
HEX = re.compile(r"<0x([0-9A-Fa-f]{2})>")
CONFIG_FILE = "tokenizer_config.json"
COMPANION_FILES = ("chat_template.jinja", "special_tokens_map.json", "added_tokens.json")


def byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    next_stand_in = iter(range(256, 512))
    return [chr(b if b in plain else next(next_stand_in)) for b in range(256)]


def byte_tokenizer() -> tokenizers.Tokenizer:
    """Byte-level BPE without merges: each id is its byte value, and 256 is the end of a text."""
    vocab = {character: byte for byte, character in enumerate(byte_characters())}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(EOS, special=True, normalized=False)])
    return backend


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE: id 0 ends a text, then come the 256 bytes, then merges.

    The same texts in the same order give the same tokenizer. Texts are cut as in `encode_documents`.

    Args:
        texts: the corpus.
        vocab_size: ids at most, at least 257.

    Raises:
        DataError: a vocabulary without room for every byte.
    """
    if vocab_size < 257:
        raise DataError(f"data.tokenizer_vocab_size: got {vocab_size}; a byte-level vocabulary needs at least 257 "
                        "(256 bytes and the end of text)")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    special = tokenizers.AddedToken(EOS, special=True, normalized=False)
    pieces = (piece for text in texts for piece in cut_text(text, MAX_ENCODED_CHARACTERS))
    backend.train_from_iterator(pieces, tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[special], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    return Tokenizer(backend, EOS, "bpe")


class _Piece(NamedTuple):
    """A text to encode; whether it is the first and the last of its document, and whether a space stands before it."""

    text: str
    first: bool
    last: bool
    spaced: bool


class Tokenizer:
    """A tokenizer that adds no special tokens; text that spells a special token stays text.

    `backend`: the `tokenizers` object; `eos_id` ends every document; `vocab_size`: highest id + 1;
    `token_bytes[id]`: the bytes an id stands for, empty for special tokens.

    Raises:
        DataError: the end-of-text token is not in the vocabulary.
    """

    def __init__(self, backend: tokenizers.Tokenizer, eos: str, name: str):
        eos_id = backend.token_to_id(eos)
        if eos_id is None:
            raise DataError(f"tokenizer {name}: no token '{eos}' in its vocabulary; set data.tokenizer_eos to the "
                            "token that ends a text")
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        self.backend, self.eos, self.eos_id, self.name = backend, eos, eos_id, name
        self.companions: dict[str, str] = {}  # files beside tokenizer.json that it came with, by name
        self._piece_backends: dict[tuple[bool, bool, bool], tokenizers.Tokenizer] = {}
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    def __repr__(self) -> str:
        return f"Tokenizer({self.name!r}, vocab_size={self.vocab_size}, eos_id={self.eos_id})"

    def __getstate__(self) -> dict[str, Any]:
        return {"text": self.to_str(), "eos": self.eos, "name": self.name, "companions": self.companions}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(tokenizers.Tokenizer.from_str(state["text"]), state["eos"], state["name"])  # type: ignore[misc]
        self.companions = state["companions"]

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of every id.

        They are exact for byte-level vocabularies, exact but for the space before a text for SentencePiece ones, and
        for others the text that a token shows.
        """
        return _byte_table(self.backend, self.vocab_size)

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        """The number of bytes that each id stands for, int64 [vocab_size]."""
        return np.array([len(b) for b in self.token_bytes], dtype=np.int64)

    @cached_property
    def is_bytes(self) -> bool:
        """Whether ids are byte values, so that encoding needs no library."""
        state = json.loads(self.to_str())
        return (self.vocab_size == 257 and not state["model"].get("merges") and state["normalizer"] is None
                and self.is_byte_level and self.token_bytes[:256] == [bytes([b]) for b in range(256)])

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether the bytes of a text's tokens, one after the other, are the text."""
        state = json.loads(self.to_str())
        return _has(state["decoder"], "ByteLevel") and state["normalizer"] is None

    @cached_property
    def acts_at_edges(self) -> bool:
        """Whether a text's start or end is treated in its own way (a space before it, white space stripped)."""
        return acts_at_edges(json.loads(self.to_str()))

    def encode(self, text: str | bytes) -> np.ndarray:
        """Token ids, int64 [N], without the end of text. Bytes must be UTF-8, except for a byte tokenizer."""
        return self.encode_documents([text.encode() if isinstance(text, str) else text])[0].astype(np.int64)

    def encode_markup(self, text: str, *, template: bool = False) -> list[int]:
        """Token ids of a text in which special tokens are meant, as transformers reads it.

        Args:
            text: the text; one that spells a special token gives its id.
            template: add what the tokenizer puts around every text, such as a token that begins it.

        >>> load_tokenizer("bytes").encode_markup("hi<|endoftext|>")
        [104, 105, 256]
        """
        return self._markup.encode(text, add_special_tokens=template).ids

    @cached_property
    def _markup(self) -> tokenizers.Tokenizer:
        """The same tokenizer, to which special tokens are special."""
        return tokenizers.Tokenizer.from_str(self.to_str())

    def encode_documents(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Token ids of many documents at once, in the smallest type that holds them.

        Documents above 2^18 characters are encoded piece by piece. What the tokenizer does at the start and the end of
        a text it does at those of the document; see `hybridlm.data.document_pieces`. A token that would have crossed
        the end of a line where two pieces meet becomes two.
        """
        if self.is_bytes:
            return [np.frombuffer(document, dtype=np.uint8) for document in documents]
        cut = cut_before_words if self.acts_at_edges else cut_text
        pieces: list[_Piece] = []
        owners: list[int] = []
        for owner, document in enumerate(documents):
            texts = cut(document.decode("utf-8"), MAX_ENCODED_CHARACTERS)
            pieces += [self._piece(text, number == 0, number == len(texts) - 1) for number, text in enumerate(texts)]
            owners += [owner] * len(texts)
        parts: list[list[np.ndarray]] = [[] for _ in documents]
        for owner, encoding in zip(owners, self._encode_pieces(pieces), strict=True):
            parts[owner].append(np.array(encoding.ids, dtype=self.dtype))
        return [p[0] if len(p) == 1 else np.concatenate(p) for p in parts]

    def _encode_pieces(self, pieces: list[_Piece]) -> Iterable[Any]:
        size = 0
        batch: list[str] = []
        for number, piece in enumerate(pieces):
            batch.append(piece.text)
            size += len(piece.text)
            backend = self._backend_for(piece)
            follows = number + 1 < len(pieces) and self._backend_for(pieces[number + 1]) is backend
            if size >= 8 * MAX_ENCODED_CHARACTERS or not follows:
                yield from backend.encode_batch_fast(batch, add_special_tokens=False)
                batch, size = [], 0

    def _piece(self, text: str, first: bool, last: bool) -> _Piece:
        spaced = not first and text.startswith(" ")
        return _Piece(text[1:] if spaced and self._puts_a_space else text, first, last, spaced)

    @cached_property
    def _puts_a_space(self) -> bool:
        return puts_a_space(json.loads(self.to_str()))

    def _backend_for(self, piece: _Piece) -> tokenizers.Tokenizer:
        """The tokenizer of a whole document, or that of a piece whose start or end is not the document's."""
        if (piece.first and piece.last) or not self.acts_at_edges:
            return self.backend
        key = piece.first, piece.last, piece.spaced
        if key not in self._piece_backends:
            state = piece_state(json.loads(self.to_str()), first=key[0], last=key[1], spaced=key[2])
            backend = tokenizers.Tokenizer.from_str(json.dumps(state))
            backend.encode_special_tokens = True
            self._piece_backends[key] = backend
        return self._piece_backends[key]

    @property
    def dtype(self) -> np.dtype:
        """The type in which ids are stored: uint16 where it suffices, else uint32."""
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the ids; special tokens give none."""
        table = self.token_bytes
        return b"".join([table[int(i)] for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids without special tokens; bytes that are not UTF-8 show as U+FFFD."""
        if self.is_byte_level:
            return self.decode_bytes(ids).decode("utf-8", "replace")
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def decode_markup(self, ids: Iterable[int]) -> str:
        """The text of the ids with special tokens spelled out; bytes that are not UTF-8 show as U+FFFD."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def stream(self) -> StreamDecoder:
        """A decoder for ids that arrive one by one."""
        return StreamDecoder(self)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides the ids of a text."""
        return hashlib.sha256(f"{self.to_str()}\n{self.eos_id}".encode()).hexdigest()

    def to_str(self, pretty: bool = False) -> str:
        """The content of tokenizer.json."""
        return self.backend.to_str(pretty=pretty)

    def files(self) -> dict[str, str]:
        """The files that let this package and transformers (AutoTokenizer) load the tokenizer, by name.

        What the folder that it came from said of it stays: chat template, tokens that begin and pad a text, lengths.
        """
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "name": self.name,
                                  "clean_up_tokenization_spaces": False, "model_max_length": 10**30}
        config |= json.loads(self.companions.get(CONFIG_FILE, "{}"))
        if _content(config.get("eos_token")) != self.eos:
            config["eos_token"] = self.eos
        return {**self.companions, "tokenizer.json": self.to_str(pretty=True),
                CONFIG_FILE: json.dumps(config, indent=1)}

    def save(self, folder: str | Path) -> None:
        """Write `files()` into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in self.files().items():
            (folder / name).write_text(text, encoding="utf-8")

    @classmethod
    def from_folder(cls, folder: str | Path, eos: str | None = None) -> Tokenizer:
        """The tokenizer of a folder with tokenizer.json (a checkpoint, a transformers model).

        Raises:
            DataError: no tokenizer.json, a damaged one, or no end-of-text token.
        """
        folder = Path(folder)
        companions = {name: (folder / name).read_text(encoding="utf-8") for name in (CONFIG_FILE, *COMPANION_FILES)
                      if (folder / name).is_file()}
        try:
            config = json.loads(companions.get(CONFIG_FILE, "{}"))
        except ValueError as error:
            raise DataError(f"{folder / CONFIG_FILE}: not JSON ({error})") from None
        found = cls.from_file(folder / "tokenizer.json", eos or _content(config.get("eos_token")), config.get("name"))
        found.companions = companions
        return found

    @classmethod
    def from_file(cls, file: str | Path, eos: str | None = None, name: str | None = None) -> Tokenizer:
        """The tokenizer of a tokenizer.json; the end of text is looked for among the usual names.

        Raises:
            DataError: no such file, a damaged one, or no end-of-text token.
        """
        file = Path(file)
        if not file.is_file():
            raise DataError(f"{file}: no such tokenizer file")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"{file}: not a tokenizer of the `tokenizers` library ({error})") from None
        return cls(backend, eos or guess_eos(backend, str(file)), name or str(file))


def _content(token: str | dict[str, Any] | None) -> str | None:
    """The text of a special token, which configs write as a string or as an object."""
    return token.get("content") if isinstance(token, dict) else token


class StreamDecoder:
    """Turns ids that arrive one by one into text, holding back the start of an unfinished UTF-8 character."""

    def __init__(self, tokenizer: Tokenizer):
        self.table = tokenizer.token_bytes
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Return the text that `token` completes, perhaps none."""
        return self.utf8.decode(self.table[int(token)])

    def finish(self) -> str:
        """Return the bytes that were held back, as U+FFFD."""
        return self.utf8.decode(b"", final=True)


def guess_eos(backend: tokenizers.Tokenizer, name: str) -> str:
    """The usual end-of-text token that the vocabulary holds.

    Raises:
        DataError: none of them.
    """
    for token in KNOWN_EOS:
        if backend.token_to_id(token) is not None:
            return token
    raise DataError(f"tokenizer {name}: it does not say which token ends a text; set data.tokenizer_eos")


def load_tokenizer(spec: str | Path, eos: str | None = None) -> Tokenizer:
    """Load a tokenizer; only a name on the Hugging Face hub may ask the network.

    Args:
        spec: `bytes`, a tokenizer.json, a folder (a checkpoint, a run with checkpoints, or a model of transformers), or
            a name on the hub.
        eos: the token that ends a text, where the files do not say it.

    Raises:
        DataError: nothing there, or no usable tokenizer in it.

    >>> tokenizer = load_tokenizer("bytes")
    >>> tokenizer.encode("hi").tolist(), tokenizer.decode([104, 105]), tokenizer.eos_id
    ([104, 105], 'hi', 256)
    """
    spec = str(spec)
    if spec == "bytes":
        return Tokenizer(byte_tokenizer(), EOS, "bytes")
    if spec == "bpe":
        raise DataError("tokenizer bpe: it is trained on a corpus; prepare the data first and load it from there")
    path = Path(spec).expanduser()
    if path.is_file():
        return Tokenizer.from_file(path, eos)
    folder = _folder_with_tokenizer(path)
    if folder is not None:
        return Tokenizer.from_folder(folder, eos)
    if not path.is_dir() and (spec.endswith(".json") or spec.startswith((".", "~", "/")) or spec.count("/") > 1):
        raise DataError(f"tokenizer {spec}: no such file or folder; expected bytes, bpe, a tokenizer.json, a folder "
                        "or a name")
    return _from_transformers(spec if not path.is_dir() else str(path), eos)


def _folder_with_tokenizer(path: Path) -> Path | None:
    """The folder with tokenizer.json: the given one, or the newest checkpoint of a run that has it; else None."""
    folders = [path, *step_folders(path), *step_folders(path / "checkpoints")]
    return next((folder for folder in folders if (folder / "tokenizer.json").is_file()), None)


def _from_transformers(name: str, eos: str | None) -> Tokenizer:
    from transformers import AutoTokenizer

    from hybridlm.sources.hub import NotFound, look_up

    try:
        loaded = look_up(lambda: AutoTokenizer.from_pretrained(name))
    except NotFound as error:
        here = "no tokenizer.json in this folder or in a checkpoint of it" if Path(name).is_dir() else \
            "no such file or folder here"
        raise DataError(f"tokenizer {name}: {here}, and transformers cannot load it ({error}); "
                        "expected bytes, bpe, a tokenizer.json, a folder or a name") from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise DataError(f"tokenizer {name}: it has no fast form (tokenizer.json), which hybridlm needs")
    backend = tokenizers.Tokenizer.from_str(backend.to_str())
    return Tokenizer(backend, eos or loaded.eos_token or guess_eos(backend, name), name)


def check_vocab(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise DataError if the tokenizer has ids that a model of `vocab_size` has no embedding for."""
    if tokenizer.vocab_size > vocab_size:
        raise DataError(f"model.vocab_size: got {vocab_size}, but tokenizer {tokenizer.name} has ids up to "
                        f"{tokenizer.vocab_size - 1}; set model.vocab_size to at least {tokenizer.vocab_size}")


def _has(part: dict[str, Any] | None, kind: str) -> bool:
    """Whether a stage of a tokenizer, or one inside a sequence of them, is of `kind`."""
    if part is None:
        return False
    inner = part.get("decoders") or part.get("pretokenizers") or part.get("normalizers") or []
    return part.get("type") == kind or any(_has(p, kind) for p in inner)


def _byte_table(backend: tokenizers.Tokenizer, size: int) -> list[bytes]:
    state = json.loads(backend.to_str())
    byte_level = _has(state["decoder"], "ByteLevel") or _has(state["pre_tokenizer"], "ByteLevel")
    word_piece = state["model"].get("type") == "WordPiece"
    value = {character: byte for byte, character in enumerate(byte_characters())}
    table = [b""] * size
    for token, index in backend.get_vocab(with_added_tokens=False).items():
        if byte_level:
            table[index] = b"".join(bytes([value[c]]) if c in value else c.encode() for c in token)
        elif HEX.fullmatch(token):
            table[index] = bytes([int(token[3:5], 16)])
        elif word_piece:
            table[index] = (token[2:] if token.startswith("##") else " " + token).encode()
        else:
            table[index] = token.replace("▁", " ").encode()
    for added in state["added_tokens"]:
        table[added["id"]] = b"" if added["special"] else added["content"].encode()
    return table
