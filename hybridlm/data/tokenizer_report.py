"""Description of a tokenizer and of what it makes of a text, as `hybridlm tokenizer show` prints it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from hybridlm.data.tokenizer import Tokenizer
from hybridlm.sources import Source

BATCH_DOCUMENTS = 256  # encoded at once


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """Describe the vocabulary, the special tokens and the stages of a tokenizer, as plain data.

    >>> from hybridlm.data.tokenizer import load_tokenizer
    >>> report = describe_tokenizer(load_tokenizer("bytes"))
    >>> report["vocab_size"], report["merges"], report["special_tokens"]
    (257, 0, [{'id': 256, 'token': '<|endoftext|>'}])
    """
    state = json.loads(tokenizer.to_str())
    special = [{"id": token["id"], "token": token["content"]} for token in state["added_tokens"] if token["special"]]
    stages = {key: None if state[key] is None else state[key]["type"] for key in ("normalizer", "pre_tokenizer")}
    return {"name": tokenizer.name, "kind": state["model"]["type"], "vocab_size": tokenizer.vocab_size,
            "merges": len(state["model"].get("merges") or ()), **stages, "byte_level": tokenizer.is_byte_level,
            "eos": tokenizer.eos, "eos_id": tokenizer.eos_id, "special_tokens": special,
            "fingerprint": tokenizer.fingerprint}


def text_pieces(tokenizer: Tokenizer, text: str) -> list[dict[str, Any]]:
    """The tokens of a text, each with its id and the text it stands for; bytes inside a character show as U+FFFD.

    >>> from hybridlm.data.tokenizer import load_tokenizer
    >>> text_pieces(load_tokenizer("bytes"), "hi")
    [{'id': 104, 'text': 'h'}, {'id': 105, 'text': 'i'}]
    """
    return [{"id": int(i), "text": tokenizer.token_bytes[int(i)].decode("utf-8", "replace")}
            for i in tokenizer.encode(text)]


def count_tokens(tokenizer: Tokenizer, source: Source) -> dict[str, Any]:
    """Count the documents, bytes and tokens of a source; each document ends with one end of text, as in prepared data.

    Raises:
        DataError: what the source can raise.
    """
    documents = size = tokens = 0
    for batch in _batches(document.text for _, _, document in source.documents()):
        documents += len(batch)
        size += sum(map(len, batch))
        tokens += sum(len(ids) + 1 for ids in tokenizer.encode_documents(batch))
    return {"path": source.label, "documents": documents, "bytes": size, "tokens": tokens,
            "bytes_per_token": size / tokens if tokens else None}


def _batches(texts: Iterable[bytes]) -> Iterable[list[bytes]]:
    batch: list[bytes] = []
    for text in texts:
        if text:
            batch.append(text)
        if len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch = []
    if batch:
        yield batch
