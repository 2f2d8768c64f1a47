import json
import pickle

import numpy as np
import pytest
import tokenizers
from tokenizers import normalizers, pre_tokenizers

from hybridlm.data.document_pieces import cut_before_words, cut_text
from hybridlm.data.tokenizer import (
    EOS,
    Tokenizer,
    check_vocab,
    load_tokenizer,
    train_bpe,
)
from hybridlm.errors import DataError

CORPUS = ["def f(x):\n    return x + 1\n" * 30, "Größe: naïve café 日本語 😀\n" * 30, "the cat sat on the mat. " * 30]


def random_texts(count):
    """Texts of characters from all of Unicode, short and long, control characters and spaces among them."""
    draw = np.random.default_rng(0)
    for number in range(count):
        limit = (128, 0x800, 0xD800, 0x110000)[number % 4]
        codes = draw.integers(0, limit, draw.integers(0, 40))
        yield "".join(chr(c) for c in codes if not 0xD800 <= c < 0xE000) + draw.choice(["", " ", "\n\n", "\r\n\t"])


@pytest.fixture(scope="module")
def byte():
    return load_tokenizer("bytes")


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(iter(CORPUS), 400)


def test_byte_ids_are_byte_values(byte):
    assert byte.encode(bytes(range(256))).tolist() == list(range(256))
    assert (byte.vocab_size, byte.eos_id, byte.dtype.str) == (257, 256, "<u2")
    assert byte.token_bytes == [*(bytes([b]) for b in range(256)), b""]


def test_library_form_gives_the_same_ids(byte):
    for text in (*CORPUS, "a\x00\r\n\t  b", EOS):
        assert byte.backend.encode(text, add_special_tokens=False).ids == byte.encode(text).tolist()


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_any_text_comes_back(kind, request):
    tokenizer = request.getfixturevalue(kind)
    for text in random_texts(150):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(ids) == text.encode()
        assert tokenizer.byte_lengths[ids].sum() == len(text.encode())


def test_any_bytes_come_back(byte):
    data = np.random.default_rng(1).integers(0, 256, 5000, dtype=np.uint8).tobytes()
    assert byte.decode_bytes(byte.encode(data)) == data


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_streaming_gives_whole_characters(kind, request):
    tokenizer = request.getfixturevalue(kind)
    for text in random_texts(50):
        stream = tokenizer.stream()
        pieces = [stream.push(i) for i in tokenizer.encode(text)]
        assert "".join(pieces) == text
        assert stream.finish() == ""


def test_streaming_shows_broken_characters(byte):
    stream = byte.stream()
    assert [stream.push(b) for b in (0xF0, 0x9F, 0x98, 0x80)] == ["", "", "", "😀"]
    assert stream.push(0xE6) == ""
    assert stream.push(65) == "\ufffdA"
    assert stream.push(256) == ""
    assert stream.push(0xE6) + stream.finish() == "\ufffd"


def test_special_tokens_in_text_stay_text(byte, bpe):
    for tokenizer in (byte, bpe):
        ids = tokenizer.encode(f"a{EOS}b")
        assert tokenizer.eos_id not in ids
        assert tokenizer.decode(ids) == f"a{EOS}b"
        assert tokenizer.decode([*ids, tokenizer.eos_id]) == f"a{EOS}b"


def test_training_is_deterministic(bpe):
    again = train_bpe(iter(CORPUS), 400)
    assert again.fingerprint == bpe.fingerprint
    assert bpe.eos_id == 0
    assert 257 < bpe.vocab_size <= 400
    assert len(bpe.encode(CORPUS[0])) < len(CORPUS[0]) / 2


def test_vocabulary_needs_room_for_bytes():
    with pytest.raises(DataError, match=r"got 256.*at least 257"):
        train_bpe(iter(CORPUS), 256)


def test_encoding_many_is_encoding_each(bpe):
    documents = [text.encode() for text in (*CORPUS, "", "x")]
    for many, one in zip(bpe.encode_documents(documents), documents, strict=True):
        assert many.tolist() == bpe.encode(one).tolist()


def test_long_documents_are_encoded_in_parts(bpe):
    text = "lorem ipsum dolor 日本\n" * 40000
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    whole = bpe.backend.encode(text, add_special_tokens=False).ids
    assert len(whole) <= len(ids) <= len(whole) + 6


@pytest.mark.parametrize("cut", [cut_text, cut_before_words])
@pytest.mark.parametrize("text", ["ab cd\nef gh " * 9, "x" * 100, "a b " * 20, "\n" * 50, "a  b" * 30, "  x" * 40])
def test_cuts_lose_nothing(text, cut):
    pieces = cut(text, 16)
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 16
    assert all(pieces)


def words_tokenizer(normalizer=None, pre_tokenizer=None):
    """A small BPE whose tokens cross no spaces, as SentencePiece trains them, and what it does at a text's edges."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizer or pre_tokenizers.Metaspace()
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    text = "".join(f"line {i} of a long document\n\tand more\n" for i in range(200))
    backend.train_from_iterator([text], tokenizers.trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", "</s>", *bytes_], show_progress=False))
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizer
    backend.add_tokens(["<tab>"])
    return Tokenizer(backend, "</s>", "words")


AT_EDGES = {
    "metaspace, first": {"pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="first")},
    "metaspace, always": {"pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="always")},
    "words, metaspace": {"pre_tokenizer": pre_tokenizers.Sequence([
        pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")])},
    "prepend": {"normalizer": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])},
    "strip": {"normalizer": normalizers.Strip(), "pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="never")},
    "byte level with a space": {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)}}


@pytest.mark.parametrize("kind", AT_EDGES)
def test_pieces_have_no_edges_of_their_own(kind, monkeypatch):
    """A document prefix, or stripping, acts once per document: the ids are those of the undivided text."""
    monkeypatch.setattr("hybridlm.data.tokenizer.MAX_ENCODED_CHARACTERS", 400)
    tokenizer = words_tokenizer(**AT_EDGES[kind])
    assert tokenizer.acts_at_edges
    long = "  " + "".join(f"line {i} of a long  document\n\tand more <tab> é\n" for i in range(150)) + " \n "
    texts = [long, "short", "", long[5:3000], "word " * 300]
    ids = tokenizer.encode_documents([text.encode() for text in texts])
    for text, found in zip(texts, ids, strict=True):
        assert found.tolist() == tokenizer.backend.encode(text, add_special_tokens=False).ids


def test_a_text_without_spaces_gets_one_prefix(monkeypatch):
    monkeypatch.setattr("hybridlm.data.tokenizer.MAX_ENCODED_CHARACTERS", 50)
    for kind in ("metaspace, first", "metaspace, always", "prepend"):
        tokenizer = words_tokenizer(**AT_EDGES[kind])
        text = "line\n" * 40
        ids = tokenizer.encode(text).tolist()
        assert tokenizer.decode_bytes(ids) == b" " + text.encode()


def test_most_tokenizers_do_nothing_at_edges(byte, bpe):
    assert not byte.acts_at_edges
    assert not bpe.acts_at_edges


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_saved_tokenizer_loads_here_and_in_transformers(kind, tmp_path, request):
    from transformers import AutoTokenizer

    tokenizer = request.getfixturevalue(kind)
    tokenizer.save(tmp_path)
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    text = "naïve 😀\n  def f():\t"
    assert ours.fingerprint == tokenizer.fingerprint
    assert ours.name == tokenizer.name
    assert ours.encode(text).tolist() == tokenizer.encode(text).tolist() == theirs(text).input_ids
    assert theirs.eos_token_id == tokenizer.eos_id
    assert len(theirs) == tokenizer.vocab_size
    assert theirs.decode(theirs(text).input_ids) == text
    assert load_tokenizer(tmp_path / "tokenizer.json").eos_id == tokenizer.eos_id


def test_folder_of_transformers(tmp_path, bpe):
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=bpe.backend, eos_token=EOS).save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode(CORPUS[1]).tolist() == bpe.encode(CORPUS[1]).tolist()
    assert loaded.eos_id == bpe.eos_id


def test_copies_for_workers_agree(bpe):
    copy = pickle.loads(pickle.dumps(bpe))
    assert copy.fingerprint == bpe.fingerprint
    assert copy.encode(CORPUS[2]).tolist() == bpe.encode(CORPUS[2]).tolist()


def test_token_bytes_with_byte_fallback():
    vocab = {"<unk>": 0, "</s>": 1, "▁the": 2, "é": 3, "<0xF0>": 4, "<0x9F>": 5, "<0x98>": 6, "<0x80>": 7}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[], unk_token="<unk>",
                                                         byte_fallback=True))
    backend.add_special_tokens(["</s>"])
    tokenizer = Tokenizer(backend, "</s>", "spm")
    assert tokenizer.token_bytes[1:4] == [b"", b" the", "é".encode()]
    assert tokenizer.decode_bytes([2, 3, 4, 5, 6, 7]) == " theé😀".encode()


def test_token_bytes_of_word_pieces_and_added_tokens():
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "un": 1, "##do": 2}, unk_token="[UNK]"))
    backend.add_special_tokens(["[EOS]"])
    backend.add_tokens(["<tab>"])
    tokenizer = Tokenizer(backend, "[EOS]", "words")
    assert tokenizer.token_bytes[1:] == [b" un", b"do", b"", b"<tab>"]


def test_end_of_text_must_be_known(tmp_path):
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "stop": 1}, unk_token="a"))
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"which token ends a text; set data\.tokenizer_eos"):
        load_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path, "stop").eos_id == 1
    with pytest.raises(DataError, match="no token 'halt'"):
        load_tokenizer(tmp_path / "tokenizer.json", "halt")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "stop"}}))
    assert load_tokenizer(tmp_path).eos_id == 1


def test_broken_or_missing_tokenizers(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="not a tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match="no such file or folder"):
        load_tokenizer("./nowhere/tokenizer.json")
    with pytest.raises(DataError, match="prepare the data first"):
        load_tokenizer("bpe")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="transformers cannot load it"):
        load_tokenizer(tmp_path / "empty")


def test_ids_above_the_model_vocabulary(byte):
    check_vocab(byte, 257)
    with pytest.raises(DataError, match=r"got 200, but tokenizer bytes has ids up to 256.*at least 257"):
        check_vocab(byte, 200)


def test_large_vocabularies_need_wider_ids():
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(70000)}, unk_token="w0"))
    tokenizer = Tokenizer(backend, "w1", "wide")
    assert tokenizer.dtype == np.dtype("<u4")
    assert tokenizer.encode_documents([b"w69999"])[0].tolist() == [69999]
