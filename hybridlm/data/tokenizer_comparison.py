"""Whether two tokenizers give a text the same ids, and where they differ.

The ids of a text are decided by the model (its vocabulary, merges and options), the normaliser, the pre-tokenizer, the
added tokens and the token that ends a document. The post-processor of a tokenizer.json (a template that puts a BOS
before each text, for instance), its decoder, truncation and padding decide none of them here: documents are encoded
without special tokens. So files that differ there alone are one tokenizer.
"""

from __future__ import annotations

import json
from typing import Any

from hybridlm.data.tokenizer import Tokenizer

MAX_NAMED_TOKENS = 3  # in one difference


def tokenizer_differences(first: Tokenizer, second: Tokenizer) -> list[str]:
    """Describe what makes two tokenizers give different ids, one short phrase per difference.

    Args:
        first: one tokenizer, such as that of a checkpoint.
        second: the other, such as that of the data.

    Returns:
        The differences, those that matter most first; empty where any text has the same ids under both.

    >>> from hybridlm.data.tokenizer import load_tokenizer, train_bpe
    >>> tokenizer_differences(load_tokenizer("bytes"), load_tokenizer("bytes"))
    []
    >>> tokenizer_differences(load_tokenizer("bytes"), train_bpe(["to be or not to be"], 260))[0]
    'the vocabulary (257 and 260 ids)'
    """
    if first.fingerprint == second.fingerprint:
        return []
    before, after = (json.loads(tokenizer.to_str()) for tokenizer in (first, second))
    models = before["model"], after["model"]
    found = _vocabulary_differences(first, second)
    if not found and _scores(models[0]) != _scores(models[1]):
        found.append("the scores of the vocabulary")
    if models[0].get("merges") != models[1].get("merges"):
        counts = " and ".join(str(len(model.get("merges") or ())) for model in models)
        found.append(f"the merges ({counts})")
    one, other = _set_options(models[0]), _set_options(models[1])
    if keys := sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key)):
        found.append(f"the model ({', '.join(f'{key} {one.get(key)} and {other.get(key)}' for key in keys)})")
    for key, name in (("normalizer", "the normaliser"), ("pre_tokenizer", "the pre-tokenizer")):
        if _stage(before[key]) != _stage(after[key]):
            kinds = _kinds(before[key]), _kinds(after[key])
            found.append(f"{name} ({kinds[0]}, with other options)" if kinds[0] == kinds[1]
                         else f"{name} ({kinds[0]} and {kinds[1]})")
    if _matched_in_text(before) != _matched_in_text(after):
        found.append("the added tokens that are matched in a text")
    if first.eos_id != second.eos_id:
        found.append(f"the token that ends a text ({first.eos} and {second.eos})")
    return found


def _vocabulary_differences(first: Tokenizer, second: Tokenizer) -> list[str]:
    vocabularies = [tokenizer.backend.get_vocab(with_added_tokens=True) for tokenizer in (first, second)]
    if vocabularies[0] == vocabularies[1]:
        return []
    if first.vocab_size != second.vocab_size:
        return [f"the vocabulary ({first.vocab_size} and {second.vocab_size} ids)"]
    tokens = sorted(token for token, _ in set(vocabularies[0].items()) ^ set(vocabularies[1].items()))
    named = ", ".join(repr(token) for token in dict.fromkeys(tokens[:2 * MAX_NAMED_TOKENS]))
    return [f"the vocabulary (other ids for {named}{', ...' if len(tokens) > 2 * MAX_NAMED_TOKENS else ''})"]


def _scores(model: dict[str, Any]) -> Any:
    """The scores of a Unigram vocabulary, which lists (token, score) in the order of the ids."""
    return model["vocab"] if isinstance(model.get("vocab"), list) else None


def _set_options(model: dict[str, Any]) -> dict[str, Any]:
    """The options of a model without those that are off, which files write as null, as false or not at all."""
    return {key: value for key, value in model.items()
            if key not in ("vocab", "merges") and not (value is None or value is False or value == "")}


def _matched_in_text(state: dict[str, Any]) -> list[dict[str, Any]]:
    """The added tokens that a text can hold; special ones are never read from a text."""
    return sorted((token for token in state["added_tokens"] if not token["special"]), key=lambda token: token["id"])


def _stage(stage: Any) -> Any:
    """A normaliser or pre-tokenizer without the options that decide offsets alone."""
    if isinstance(stage, list):
        return [_stage(part) for part in stage]
    if isinstance(stage, dict):
        return {key: _stage(value) for key, value in stage.items() if key != "trim_offsets"}
    return stage


def _kinds(stage: dict[str, Any] | None) -> str:
    """Name a stage, and those inside a sequence of them."""
    if stage is None:
        return "none"
    inner = stage.get("normalizers") or stage.get("pretokenizers")
    return "+".join(_kinds(part) for part in inner) if inner else str(stage["type"])
