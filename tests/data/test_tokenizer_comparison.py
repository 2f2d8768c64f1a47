"""Which changes of a tokenizer's file are another tokenizer."""

import json

import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from hybridlm.data.tokenizer import EOS, Tokenizer, train_bpe
from hybridlm.data.tokenizer_comparison import tokenizer_differences

TEXT = "to be, or not to be: that is the question\n" * 20


@pytest.fixture(scope="module")
def base():
    return train_bpe([TEXT], 300)


def changed(base, change):
    """A copy of a tokenizer whose tokenizer.json `change` has edited."""
    state = json.loads(base.to_str())
    change(state)
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(state)), EOS, "changed")


def with_backend(base, change):
    backend = tokenizers.Tokenizer.from_str(base.to_str())
    change(backend)
    return Tokenizer(backend, EOS, "changed")


def test_what_decides_no_id_is_no_difference(base):
    def dress(backend):
        backend.post_processor = processors.TemplateProcessing(single=f"{EOS} $A", pair=None,
                                                               special_tokens=[(EOS, 0)])
        backend.decoder = tokenizers.decoders.Fuse()
        backend.enable_truncation(16)
        backend.enable_padding()
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False)

    other = with_backend(base, dress)
    assert other.fingerprint != base.fingerprint
    assert tokenizer_differences(base, other) == []
    assert other.encode(TEXT).tolist() == base.encode(TEXT).tolist()


def drop_merge(state):
    state["model"]["merges"] = state["model"]["merges"][:-1]


def swap_ids(state):
    vocab = state["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


@pytest.mark.parametrize(("change", "named"), [
    (drop_merge, "the merges"), (swap_ids, "the vocabulary (other ids for 'a', 'b')"),
    (lambda state: state["model"].update(ignore_merges=True), "the model (ignore_merges None and True)"),
    (lambda state: state.update(normalizer={"type": "NFC"}), "the normaliser (none and NFC)"),
    (lambda state: state["pre_tokenizer"].update(add_prefix_space=True), "the pre-tokenizer")])
def test_what_decides_ids_is_named(base, change, named):
    found = tokenizer_differences(base, changed(base, change))
    assert len(found) == 1
    assert found[0].startswith(named)


def test_added_tokens_count_where_a_text_can_hold_them(base):
    spelled = with_backend(base, lambda backend: backend.add_tokens(["question"]))
    assert tokenizer_differences(base, spelled) == [
        f"the vocabulary ({base.vocab_size} and {base.vocab_size + 1} ids)",
        "the added tokens that are matched in a text"]
    ends = with_backend(base, lambda backend: backend.add_special_tokens(["<stop>"]))
    other_end = Tokenizer(tokenizers.Tokenizer.from_str(ends.to_str()), "<stop>", "other end")
    assert tokenizer_differences(ends, other_end) == [f"the token that ends a text ({EOS} and <stop>)"]


def test_scores_and_kinds_of_models():
    def unigram(score):
        backend = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("aa", score), ("</s>", 0.0)], 0))
        backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])
        return Tokenizer(backend, "</s>", "unigram")

    assert tokenizer_differences(unigram(-1.5), unigram(-1.5)) == []
    assert tokenizer_differences(unigram(-1.5), unigram(-3.0)) == ["the scores of the vocabulary"]
    words = Tokenizer(tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "aa": 2, "</s>": 3}, "<unk>")),
                      "</s>", "words")
    found = tokenizer_differences(unigram(-1.5), words)
    assert found[-2:] == ["the model (type Unigram and WordLevel, unk_id 0 and None, unk_token None and <unk>)",
                          "the normaliser (NFKC+Strip and none)"]
