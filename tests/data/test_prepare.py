import importlib
import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from hybridlm.config.schema import DataConfig, DataSourceConfig
from hybridlm.data import PackedDataset, bigram_entropy, build, load_tokenizer, prepare
from hybridlm.data.prepare import digest
from hybridlm.data.shards import ShardWriter
from hybridlm.data.split import content_hash
from hybridlm.data.statistics import store_entropies
from hybridlm.errors import ConfigError, DataError
from hybridlm.sources import open_source


@pytest.fixture
def corpus(tmp_path):
    """120 files of 40 to 900 bytes, one of them empty."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(120):
        text = f"file {i}: " + "some words of text é\n" * (i % 40 + 1)
        (folder / f"{i:03d}.txt").write_text("" if i == 50 else text, encoding="utf-8")
    return folder


def config(path, tmp_path, **options):
    return DataConfig(path=str(path), cache_dir=str(tmp_path / "cache"), **options)


def documents(prepared, store):
    return [prepared.tokenizer.decode_bytes(ids) for ids in store.documents()]


def files_of(prepared):
    return {f.name: f.read_bytes() for f in prepared.sources[0].folder.iterdir() if f.suffix in (".bin", ".ends")}


def test_everything_arrives(corpus, tmp_path):
    prepared = prepare(config(corpus, tmp_path, validation_fraction=0.2))
    train, validation = documents(prepared, prepared.train[0]), documents(prepared, prepared.validation)
    texts = [f.read_bytes() for f in sorted(corpus.iterdir())]
    assert sorted(train + validation) == sorted(text for text in texts if text)
    assert train == [text for text in texts if text and text in set(train)]
    assert 8 < len(validation) < 45
    report = prepared.report()
    assert report["sources"][0]["empty_documents"] == 1
    assert report["train"]["documents"] + report["validation"]["documents"] == 119
    assert report["train"]["bytes"] + report["validation"]["bytes"] == sum(map(len, texts))
    assert report["train"]["tokens"] == report["train"]["bytes"] + report["train"]["documents"]
    assert report["sources"][0]["train"]["longest_document"] == max(map(len, train)) + 1
    assert json.loads(json.dumps(report)) == report
    tokens = prepared.train[0].read(0, prepared.train[0].num_tokens)
    assert (tokens[prepared.train[0].ends(0, prepared.train[0].num_tokens) - 1] == 256).all()


def test_default_corpus_is_quick(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    start = time.perf_counter()
    prepared = prepare(DataConfig())
    assert time.perf_counter() - start < 10
    assert prepared.cache == tmp_path / "hybridlm"
    assert prepared.train[0].num_tokens > 5e6
    assert 0.005 < prepared.validation.num_documents / prepared.train[0].num_documents < 0.05
    unigram, bigram = store_entropies(prepared.validation, prepared.tokenizer)
    assert 2 < bigram < unigram < 6
    assert bigram == pytest.approx(bigram_entropy(documents(prepared, prepared.validation)))


def test_second_call_reads_the_cache(corpus, tmp_path):
    first = prepare(config(corpus, tmp_path))
    times = {f: f.stat().st_mtime_ns for f in first.sources[0].folder.iterdir()}
    again = prepare(config(corpus, tmp_path))
    assert {f: f.stat().st_mtime_ns for f in again.sources[0].folder.iterdir()} == times
    assert again.fingerprint == first.fingerprint


def test_key_follows_all_that_matters(corpus, tmp_path):
    first = prepare(config(corpus, tmp_path))
    options = [{"validation_fraction": 0.3}, {"shard_tokens": 1000}, {"tokenizer": "bpe", "tokenizer_vocab_size": 300}]
    others = [prepare(config(corpus, tmp_path, **option)) for option in options]
    (corpus / "003.txt").write_text("changed")
    others.append(prepare(config(corpus, tmp_path)))
    assert len({p.sources[0].folder for p in (first, *others)}) == 5
    assert b"changed" in documents(others[-1], others[-1].train[0]) + documents(others[-1], others[-1].validation)


def test_few_large_documents_are_split_by_bytes_and_say_so(tmp_path):
    folder = tmp_path / "books"
    folder.mkdir()
    for i, size in enumerate([40, 3000, 9000, 700, 12000]):
        (folder / f"{i}.txt").write_text("".join(f"book {i} line {n}\n" for n in range(size)))
    report = prepare(config(folder, tmp_path, validation_fraction=0.03)).report()
    assert report["sources"][0]["held_out"] == pytest.approx(0.03, rel=0.1)
    assert report["validation"]["bytes"] / (report["train"]["bytes"] + report["validation"]["bytes"]) == \
        report["sources"][0]["held_out"]


def test_data_of_earlier_versions_is_found_and_made_as_they_did(corpus, tmp_path):
    """A run that an earlier version began reads its own split, from its own folder, or one that is made as it was."""
    settings = config(corpus, tmp_path, validation_fraction=0.2)
    old, new = prepare(settings, rules=1), prepare(settings)
    identity = {"format": 1, "source": open_source(settings).fingerprint(), "fraction": 0.2, "everything": None,
                "tokenizer": old.tokenizer.fingerprint, "shard": settings.shard_tokens}
    assert old.sources[0].folder.name == digest(identity) != new.sources[0].folder.name
    below = [content_hash(text) < 0.2 * 2**64 for text in documents(old, old.validation)]
    assert all(below)
    assert len(below) == sum(content_hash(f.read_bytes()) < 0.2 * 2**64 for f in corpus.iterdir() if f.stat().st_size)
    assert (old.rules, new.rules) == (1, 2)
    whole = config(corpus, tmp_path, validation_fraction=0.0)
    assert prepare(whole, rules=1).sources[0].folder == prepare(whole).sources[0].folder


def test_fingerprint_is_that_of_the_content(corpus, tmp_path):
    first = prepare(config(corpus, tmp_path))
    moved = corpus.rename(tmp_path / "moved")
    os.utime(moved / "003.txt", ns=(1, 1))
    again = prepare(config(moved, tmp_path))
    assert again.sources[0].folder != first.sources[0].folder
    assert again.fingerprint == first.fingerprint
    (moved / "003.txt").write_text("changed")
    others = [prepare(config(moved, tmp_path)), prepare(config(moved, tmp_path, validation_fraction=0.3))]
    assert len({first.fingerprint, *(p.fingerprint for p in others)}) == 3


def test_shards_do_not_change_the_stream(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("hybridlm.data.build.BATCH_DOCUMENTS", 7)
    whole = prepare(config(corpus, tmp_path))
    parts = prepare(config(corpus, tmp_path, shard_tokens=3000))
    assert len(parts.train[0].shards) > 5
    for a, b in ((whole.train[0], parts.train[0]), (whole.validation, parts.validation)):
        assert a.read(0, a.num_tokens).tolist() == b.read(0, b.num_tokens).tolist()
        assert a.ends(0, a.num_tokens).tolist() == b.ends(0, b.num_tokens).tolist()


@pytest.fixture(scope="module")
def processes():
    """Makes processes that need not import anything: they are forked from one that has."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.data.test_prepare"])
    return context


def prepare_and_die(where, path, cache):
    """Prepare with small shards, and be killed while the fourth is made."""
    def die(*arguments):
        os.kill(os.getpid(), signal.SIGKILL)

    commit, finish, add, rename = build.State.commit, ShardWriter.finish, ShardWriter.add, os.replace

    def dying_commit(self, folder, new):
        if self.commits == 3 and where == "before_record":
            die()
        commit(self, folder, new)

    def dying_finish(self):
        if self.name.endswith("00003") and where == "in_finish":
            self.file.flush()
            die()
        return finish(self)

    def dying_add(self, *document):
        add(self, *document)
        if self.name == "train-00003" and where == "in_shard":
            self.file.flush()
            die()

    def dying_rename(draft, target):
        if str(draft).endswith(".partial") and where == "before_rename":
            die()
        rename(draft, target)

    build.BATCH_DOCUMENTS = 7
    build.State.commit, ShardWriter.finish, ShardWriter.add = dying_commit, dying_finish, dying_add
    os.replace = dying_rename
    prepare(DataConfig(path=path, cache_dir=cache, shard_tokens=3000), progress=False)


def kill_a_process(processes, where, corpus, cache):
    """The folder that a process left behind that was killed at a given moment."""
    child = processes.Process(target=prepare_and_die, args=(where, str(corpus), str(cache)))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    partial, = (cache / "data").iterdir()
    return partial


@pytest.mark.parametrize("where", ["before_record", "in_finish", "in_shard", "before_rename"])
def test_killed_and_continued(corpus, tmp_path, monkeypatch, processes, where):
    monkeypatch.setattr("hybridlm.data.build.BATCH_DOCUMENTS", 7)
    expected = files_of(prepare(config(corpus, tmp_path / "whole", shard_tokens=3000)))
    partial = kill_a_process(processes, where, corpus, tmp_path / "cache")
    assert partial.name.endswith(".partial")
    kept = {f: f.stat().st_ino for f in partial.glob("train-0000[012].*")}
    assert len(kept) == 6
    prepared = prepare(config(corpus, tmp_path, shard_tokens=3000))
    assert files_of(prepared) == expected
    assert all((prepared.sources[0].folder / f.name).stat().st_ino == inode for f, inode in kept.items())
    names = {f.name for f in prepared.sources[0].folder.iterdir()}
    assert names == {*expected, "manifest.json", "verified.json"}
    assert prepared.report()["sources"][0]["empty_documents"] == 1


def test_damaged_leftovers_are_built_again(corpus, tmp_path, monkeypatch, processes):
    monkeypatch.setattr("hybridlm.data.build.BATCH_DOCUMENTS", 7)
    expected = files_of(prepare(config(corpus, tmp_path / "whole", shard_tokens=3000)))
    partial = kill_a_process(processes, "in_shard", corpus, tmp_path / "cache")
    (partial / "train-00001.bin").write_bytes(b"torn")
    assert files_of(prepare(config(corpus, tmp_path, shard_tokens=3000))) == expected


def in_process(options):
    return prepare(DataConfig(**options), progress=False).fingerprint


def test_processes_at_the_same_time(corpus, tmp_path, processes):
    options = {"path": str(corpus), "cache_dir": str(tmp_path / "cache"), "tokenizer": "bpe",
               "tokenizer_vocab_size": 300}
    with processes.Pool(2) as pool:
        found = pool.map(in_process, [options] * 4, chunksize=1)
    assert len(set(found)) == 1
    assert [f.name for f in (tmp_path / "cache" / "data").iterdir()] == \
        [prepare(DataConfig(**options)).sources[0].folder.name]


def test_damaged_shards_are_named(corpus, tmp_path):
    folder = prepare(config(corpus, tmp_path)).sources[0].folder
    file = folder / "train-00000.bin"
    data = bytearray(file.read_bytes())
    data[1000] ^= 4
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"train-00000\.bin does not match its checksum; delete the folder"):
        prepare(config(corpus, tmp_path))


def test_tokenizer_trained_on_training_text(corpus, tmp_path):
    (corpus / "held.txt").write_text("zqzqzq " * 2000)
    options = {"tokenizer": "bpe", "tokenizer_vocab_size": 320, "validation_path": str(corpus / "held.txt")}
    prepared = prepare(config(corpus, tmp_path, **options))
    assert prepared.tokenizer.vocab_size <= 320
    assert documents(prepared, prepared.validation) == [(corpus / "held.txt").read_bytes()]
    assert len(documents(prepared, prepared.train[0])) == 119
    assert len(prepared.tokenizer.encode("some words of text")) < 8
    assert len(prepared.tokenizer.encode("zqzqzqzq")) == 8
    assert prepare(config(corpus, tmp_path, **options)).tokenizer.fingerprint == prepared.tokenizer.fingerprint


def test_tokenizer_does_not_see_what_is_held_out(corpus, tmp_path, monkeypatch):
    module = importlib.import_module("hybridlm.data.prepare")
    seen, train = [], module.train_bpe
    monkeypatch.setattr(module, "train_bpe", lambda texts, size: train((seen.append(t) or t for t in texts), size))
    options = {"tokenizer": "bpe", "tokenizer_vocab_size": 300, "validation_fraction": 0.2}
    prepared = prepare(config(corpus, tmp_path, **options))
    assert [text.encode() for text in seen] == documents(prepared, prepared.train[0])
    seen.clear()
    monkeypatch.setattr(module, "BPE_BYTES", 2001)
    prepare(config(corpus, tmp_path, **options))
    assert 1995 < sum(len(text.encode()) for text in seen) <= 2001


def test_tokenizer_of_a_folder(corpus, tmp_path):
    load_tokenizer("bytes").save(tmp_path / "tokenizer")
    prepared = prepare(config(corpus, tmp_path, tokenizer=str(tmp_path / "tokenizer")))
    assert prepared.tokenizer.is_bytes
    assert prepared.sources[0].folder == prepare(config(corpus, tmp_path)).sources[0].folder


def test_validation_from_a_path_leaves_its_files_out_of_training(corpus, tmp_path):
    prepared = prepare(config(corpus, tmp_path, validation_path=str(corpus / "01*.txt")))
    assert len(documents(prepared, prepared.validation)) == 10
    assert len(documents(prepared, prepared.train[0])) == 109
    assert not set(documents(prepared, prepared.validation)) & set(documents(prepared, prepared.train[0]))
    assert prepared.report()["sources"][0]["left_out_files"] == 10


def test_validation_from_another_split(tmp_path):
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a b", "c d"]}),
                          "dev": datasets.Dataset.from_dict({"text": ["e f"]})}).save_to_disk(str(tmp_path / "set"))
    prepared = prepare(config(tmp_path / "set", tmp_path, validation_split="dev"))
    assert documents(prepared, prepared.train[0]) == [b"a b", b"c d"]
    assert documents(prepared, prepared.validation) == [b"e f"]
    with pytest.raises(ConfigError, match="needs validation_path beside a mixture"):
        DataConfig(mixture=[DataSourceConfig()], validation_split="dev")


def test_no_validation_when_none_is_asked_for(corpus, tmp_path):
    prepared = prepare(config(corpus, tmp_path, validation_fraction=0.0))
    assert prepared.validation is None
    assert prepared.train[0].num_documents == 119
    assert prepared.report()["validation"]["tokens"] == 0


def test_single_file_gives_both_parts(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("".join(f"line {i}\n" for i in range(2000)))
    prepared = prepare(config(file, tmp_path))
    (head,), (tail,) = documents(prepared, prepared.train[0]), documents(prepared, prepared.validation)
    assert head + tail == file.read_bytes()
    assert abs(len(tail) / len(head + tail) - 0.02) < 0.002


def test_mixture_of_kinds(corpus, tmp_path):
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps({"body": f"line number {i}"}) + "\n" for i in range(100)))
    sources = [DataSourceConfig(path=str(corpus), weight=3),
               DataSourceConfig(path=str(lines), text_field="body", weight=1)]
    prepared = prepare(config("ignored", tmp_path, mixture=sources))
    assert [store.weight for store in prepared.train] == [3, 1]
    assert prepared.train[1].num_documents + prepared.sources[1].summary("validation")["documents"] == 100
    assert all(s.summary("validation")["documents"] for s in prepared.sources)
    dataset = PackedDataset(prepared.train, 32, 1)
    assert np.bincount([dataset.sample(i).place.source for i in range(40)]).tolist() == [30, 10]
    sources[0].weight = 1
    other = prepare(config("ignored", tmp_path, mixture=sources))
    assert [s.folder for s in other.sources] == [s.folder for s in prepared.sources]
    assert other.fingerprint != prepared.fingerprint


def test_epochs_and_bytes_per_token_follow_the_weights(tmp_path):
    (tmp_path / "small.txt").write_text("é" * 50)
    (tmp_path / "large.txt").write_text("x" * 400)
    sources = [DataSourceConfig(path=str(tmp_path / "small.txt"), weight=1),
               DataSourceConfig(path=str(tmp_path / "large.txt"), weight=3)]
    prepared = prepare(config("ignored", tmp_path, mixture=sources, validation_fraction=0.0))
    assert (prepared.tokens, prepared.bytes, prepared.documents) == (101 + 401, 500, 2)
    assert prepared.bytes_per_token == pytest.approx(0.25 * 100 / 101 + 0.75 * 400 / 401)
    assert prepared.epochs(4040) == pytest.approx([10.0, 3030 / 401])
    dataset = PackedDataset(prepared.train, 101)
    places = [dataset.sample(index).place for index in range(40)]
    assert max(place.epoch for place in places if place.source == 0) + 1 == prepared.epochs(40 * 101)[0]


def test_replaced_text_is_counted(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"caf\xe9")
    (folder / "b.txt").write_bytes(b"fine")
    with pytest.raises(DataError, match="not UTF-8 at byte 3"):
        prepare(config(folder, tmp_path))
    prepared = prepare(config(folder, tmp_path, invalid_utf8="replace"))
    assert prepared.report()["sources"][0]["replaced_documents"] == 1


def test_texts_without_tokens_are_counted(tmp_path):
    import tokenizers

    backend = load_tokenizer("bytes").backend
    backend.normalizer = tokenizers.normalizers.Strip()
    backend.save(str(tmp_path / "tokenizer.json"))
    folder = tmp_path / "in"
    folder.mkdir()
    for i, text in enumerate(["  \n", " some text ", "more"]):
        (folder / f"{i}.txt").write_text(text)
    prepared = prepare(config(folder, tmp_path, tokenizer=str(tmp_path / "tokenizer.json"), validation_fraction=0.0))
    assert documents(prepared, prepared.train[0]) == [b"some text", b"more"]
    assert prepared.report()["sources"][0]["empty_documents"] == 1


def test_no_text_at_all(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": ""}\n{"text": null}\n')
    for fraction in (0.0, 0.1):
        with pytest.raises(DataError, match=r"a\.jsonl: no text found"):
            prepare(config(file, tmp_path, validation_fraction=fraction))


def test_cache_that_cannot_be_made(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"the cache folder cannot be made.*set data\.cache_dir"):
        prepare(DataConfig(path=str(corpus), cache_dir=str(tmp_path / "file" / "cache")))


def test_full_disk_is_one_clear_line(corpus, tmp_path, monkeypatch):
    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hybridlm.data.build.ShardWriter.finish", full)
    with pytest.raises(DataError, match=r"cannot be written there.*No space left on device.*make room"):
        prepare(config(corpus, tmp_path))


def test_bar_is_shown_on_terminals_only(corpus, tmp_path, capsys, monkeypatch):
    prepare(config(corpus, tmp_path))
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")
    prepare(config(corpus, tmp_path / "again"))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "preparing" in captured.err
    prepare(config(corpus, tmp_path / "again"))
    assert capsys.readouterr() == ("", "")
    assert os.listdir(tmp_path / "again" / "cache" / "data")
