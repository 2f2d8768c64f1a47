import json
import pickle
from dataclasses import asdict

import numpy as np
import pytest

from hybridlm.data import shards
from hybridlm.data.shards import (
    FORMAT,
    MANIFEST,
    ShardWriter,
    TokenStore,
    check_shard,
    read_manifest,
    verify,
)
from hybridlm.errors import DataError
from hybridlm.files import write_json

EOS = 99


def make_folder(folder, sizes_by_shard, dtype="<u2"):
    """Shards whose documents have the given numbers of tokens, end of text included; ids count up."""
    folder.mkdir(exist_ok=True)
    shards, expected, token = [], [], 0
    for index, sizes in enumerate(sizes_by_shard):
        writer = ShardWriter(folder, f"train-{index:05d}", np.dtype(dtype))
        for size in sizes:
            ids = np.arange(token, token + size - 1) % 90
            token += size - 1
            writer.add(ids, EOS, size - 1)
            expected.append([*ids.tolist(), EOS])
        shards.append(writer.finish())
    write_json(folder / MANIFEST, {"format": FORMAT, "shards": {"train": [asdict(s) for s in shards]}})
    return shards, expected


def make_store(folder, sizes_by_shard, **options):
    shards, expected = make_folder(folder, sizes_by_shard)
    lengths = np.ones(EOS + 1, dtype=np.int64)
    lengths[EOS] = 0
    return TokenStore([(folder, shard) for shard in shards], lengths, **options), expected


def test_stream_over_shards(tmp_path):
    store, expected = make_store(tmp_path, [[3, 2, 5], [4], [2, 2]])
    flat = [token for document in expected for token in document]
    assert (store.num_tokens, store.num_documents, store.num_bytes) == (18, 6, 12)
    assert [document.tolist() for document in store.documents()] == expected
    ends = np.cumsum([len(document) for document in expected])
    for start in range(19):
        for stop in range(start, 19):
            assert store.read(start, stop).tolist() == flat[start:stop]
            if stop > start:
                last = np.searchsorted(ends, stop)
                assert store.ends(start, stop).tolist() == [int(e) for e in ends[:last + 1] if e > start]


def test_first_tokens_of_the_documents(tmp_path):
    store, expected = make_store(tmp_path, [[3, 4]])
    assert [d.tolist() for d in store.documents(5)] == [expected[0], expected[1][:2]]
    assert [d.tolist() for d in store.documents(3)] == [expected[0]]


def test_outside_the_stream(tmp_path):
    store, _ = make_store(tmp_path, [[3]])
    with pytest.raises(IndexError, match="stream of 3"):
        store.read(0, 4)


def test_wide_ids(tmp_path):
    writer = ShardWriter(tmp_path, "a", np.dtype("<u4"))
    writer.add(np.array([70000, 5]), 100000, 1)
    store = TokenStore([(tmp_path, writer.finish())], np.ones(100001, dtype=np.int64))
    assert store.read(0, 3).tolist() == [70000, 5, 100000]
    assert (tmp_path / "a.bin").stat().st_size == 12


def test_copies_for_workers_agree(tmp_path):
    store, _ = make_store(tmp_path, [[3, 2], [4]])
    store.read(0, 5)
    copy = pickle.loads(pickle.dumps(store))
    assert copy.read(0, 9).tolist() == store.read(0, 9).tolist()
    assert len(pickle.dumps(store)) < 3000


def test_nothing_appears_before_it_is_whole(tmp_path):
    writer = ShardWriter(tmp_path, "a", np.dtype("<u2"))
    writer.add(np.arange(5), EOS, 5)
    assert not (tmp_path / "a.bin").exists()
    shard = writer.finish()
    check_shard(tmp_path, shard, hashes=True)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.bin", "a.ends"]


@pytest.mark.parametrize("kind", ["bin", "ends"])
def test_damage_is_named(tmp_path, kind):
    make_folder(tmp_path, [[3, 2], [4, 6]])
    manifest = read_manifest(tmp_path)
    verify(tmp_path, manifest)
    file = tmp_path / f"train-00001.{kind}"
    good = file.read_bytes()
    file.write_bytes(good[:2] + bytes([good[2] ^ 1]) + good[3:])
    with pytest.raises(DataError, match=rf"train-00001\.{kind} does not match its checksum; delete the folder"):
        verify(tmp_path, manifest)
    file.write_bytes(good[:-1])
    with pytest.raises(DataError, match=rf"train-00001\.{kind} has {len(good) - 1} bytes, {len(good)} were written"):
        verify(tmp_path, manifest)
    file.unlink()
    with pytest.raises(DataError, match=rf"train-00001\.{kind} is missing"):
        verify(tmp_path, manifest)


def test_checksums_of_much_data_are_not_computed_again_unless_asked(tmp_path, monkeypatch):
    import os

    monkeypatch.setattr(shards, "HASH_AT_START_MAX_BYTES", 1)
    make_folder(tmp_path, [[3, 2]])
    manifest = read_manifest(tmp_path)
    verify(tmp_path, manifest)
    file = tmp_path / "train-00000.bin"
    stat = file.stat()
    file.write_bytes(bytes(stat.st_size))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    verify(tmp_path, manifest)
    with pytest.raises(DataError, match="checksum"):
        verify(tmp_path, manifest, force=True)
    monkeypatch.undo()  # little data: at every start
    with pytest.raises(DataError, match="checksum"):
        verify(tmp_path, manifest)


def test_bad_manifests(tmp_path):
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json: cannot be read; delete"):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps({"format": FORMAT + 1}))
    with pytest.raises(DataError, match=f"format {FORMAT + 1}, this version reads {FORMAT}"):
        read_manifest(tmp_path)
