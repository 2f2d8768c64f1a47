import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hybridlm.data.packing import IGNORE, PackedDataset, collate, count_windows
from hybridlm.errors import DataError
from hybridlm.model.targets import build_targets
from tests.data.test_shards import EOS, make_store

SIZES = [[3, 2, 17, 5], [40, 2, 2, 9], [30]]


def positions(dataset, store, count):
    """Every (token position, depth) that is a target in `count` samples, checked against the documents."""
    flat = store.read(0, store.num_tokens)
    document = np.repeat(np.arange(store.num_documents), np.diff(store.ends(0, store.num_tokens), prepend=0))
    found = []
    for index in range(count):
        sample = dataset.sample(index)
        start = sample.place.window * dataset.sequence_length
        for t in range(dataset.sequence_length):
            for d in range(1 + dataset.depth):
                here, there = start + t, start + t + 1 + d
                inside = there < len(flat) and document[here] == document[there]
                assert sample.targets[t, d] == (flat[there] if inside else IGNORE)
                if inside:
                    found.append((there, d))
    return found


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("length", [2, 7, 16, 110, 500])
def test_every_token_is_a_target_once_an_epoch(tmp_path, length, depth):
    store, expected = make_store(tmp_path, SIZES)
    dataset = PackedDataset(store, length, depth, seed=3)
    found = positions(dataset, store, len(dataset))
    assert len(found) == len(set(found))
    for d in range(1 + depth):
        assert sum(1 for _, depth_of in found if depth_of == d) == sum(max(0, len(e) - 1 - d) for e in expected)
    samples = [dataset.sample(i) for i in range(len(dataset))]
    assert min(s.num_tokens for s in samples) > 0
    assert sum(s.num_tokens for s in samples) == store.num_tokens - store.num_documents
    assert sum(s.num_bytes for s in samples) == store.num_bytes - store.num_documents  # first bytes are not predicted


@pytest.mark.parametrize("depth", [0, 2])
def test_targets_are_those_of_the_model(tmp_path, depth):
    store, _ = make_store(tmp_path, SIZES)
    dataset = PackedDataset(store, 20, depth)
    batch = dataset.batch(range(len(dataset)))
    theirs = build_targets(batch.input_ids, depth, batch.cu_seqlens)
    ours, known = batch.targets, theirs != IGNORE
    padding = (batch.input_ids == EOS)[..., None] & (ours == IGNORE)
    assert torch.equal(ours[known & ~padding], theirs[known & ~padding])
    assert (ours != IGNORE).sum() > (theirs != IGNORE).sum() - padding.sum()  # those beyond the window


def test_inputs_are_the_stream_in_order_when_not_shuffled(tmp_path):
    store, _ = make_store(tmp_path, SIZES)
    dataset = PackedDataset(store, 16, shuffle=False)
    batch = dataset.batch(range(len(dataset)))
    flat = batch.input_ids.flatten()
    assert flat[:store.num_tokens].tolist() == store.read(0, store.num_tokens).tolist()
    assert set(flat[store.num_tokens:].tolist()) == {EOS}
    assert (batch.targets.flatten()[store.num_tokens - 1:] == IGNORE).all()


def test_borders_are_those_of_documents_and_rows(tmp_path):
    store, expected = make_store(tmp_path, SIZES)
    dataset = PackedDataset(store, 16, shuffle=False)
    batch = dataset.batch(range(len(dataset)))
    ends = np.cumsum([len(e) for e in expected]).tolist()
    rows = range(0, len(dataset) * 16 + 1, 16)
    assert batch.cu_seqlens.host == tuple(sorted({*ends, *rows}))
    batch.cu_seqlens.check(len(dataset), 16)
    assert dataset.sample(0).borders == [0, 3, 5]


def test_a_window_of_the_last_token_alone_is_not_made():
    assert [count_windows(n, 8) for n in (2, 8, 9, 10, 17, 18)] == [1, 1, 1, 2, 2, 3]


def test_corpus_smaller_than_a_window(tmp_path):
    store, expected = make_store(tmp_path, [[3, 4]])
    sample = PackedDataset(store, 12).sample(0)
    assert sample.input_ids.tolist() == expected[0] + expected[1] + [EOS] * 5
    assert sample.targets[:, 0].tolist() == [*expected[0][1:], IGNORE, *expected[1][1:], IGNORE] + [IGNORE] * 5
    assert sample.borders == [0, 3, 7]


def test_samples_do_not_depend_on_batches(tmp_path):
    store, _ = make_store(tmp_path, SIZES)
    dataset = PackedDataset(store, 8, 1, seed=5)
    whole = next(iter(dataset.batches(0, 24, 24)))
    for size in (1, 3, 8, 10):
        parts = list(PackedDataset(store, 8, 1, seed=5).batches(0, 24, size))
        assert torch.equal(torch.cat([p.input_ids for p in parts]), whole.input_ids)
        assert torch.equal(torch.cat([p.targets for p in parts]), whole.targets)
        assert sum(p.num_bytes for p in parts) == whole.num_bytes
        assert sum(p.num_tokens for p in parts) == whole.num_tokens == int((whole.targets[..., 0] != IGNORE).sum())
        assert [i for p in parts for i in p.sample_ids] == list(range(24))
    late = next(iter(PackedDataset(store, 8, 1, seed=5).batches(17, 24, 7)))
    assert torch.equal(late.input_ids, whole.input_ids[17:])


def test_bytes_follow_the_table(tmp_path):
    store, _ = make_store(tmp_path, SIZES)
    store.byte_lengths = np.arange(EOS + 1)
    batch = PackedDataset(store, 8, 1).batch(range(5))
    counted = batch.targets[..., 0][batch.targets[..., 0] != IGNORE]
    assert batch.num_bytes == int(counted.sum())


def test_mixture(tmp_path):
    stores = [make_store(tmp_path / "a", [[50, 50]], name="a", weight=0.75)[0],
              make_store(tmp_path / "b", [[30]], name="b", weight=0.25)[0]]
    dataset = PackedDataset(stores, 10, seed=2)
    assert len(dataset) == 10 + 3
    for block in range(20):
        assert sorted(dataset.sample(i).place.source for i in range(block * 4, block * 4 + 4)) == [0, 0, 0, 1]
    other = PackedDataset(stores, 10, seed=2, weights=[1, 1])
    assert [sorted(other.sample(i).place.source for i in (b, b + 1)) for b in (0, 2, 4)] == [[0, 1]] * 3


def test_torch_loaders_with_workers(tmp_path):
    store, _ = make_store(tmp_path, SIZES)
    dataset = PackedDataset(store, 8, 1, seed=5)
    loader = DataLoader(dataset, batch_size=4, collate_fn=collate, num_workers=1)
    parts = list(loader)
    assert torch.equal(torch.cat([p.input_ids for p in parts]), dataset.batch(range(len(dataset))).input_ids)
    assert len(list(dataset)) == len(dataset)


def test_batches_move(tmp_path):
    store, _ = make_store(tmp_path, SIZES)
    batch = PackedDataset(store, 8, 1).batch(range(2))
    moved = batch.to("meta")
    assert moved.input_ids.device.type == moved.targets.device.type == moved.cu_seqlens.device.type == "meta"
    assert moved.cu_seqlens.host == batch.cu_seqlens.host


def test_mistakes(tmp_path):
    store, _ = make_store(tmp_path, SIZES)
    with pytest.raises(DataError, match="got 1; a window needs at least 2"):
        PackedDataset(store, 1)
    with pytest.raises(DataError, match="no tokens"):
        PackedDataset([], 8)


def test_padding_is_marked_where_there_is_some(tmp_path):
    store, _ = make_store(tmp_path, SIZES)
    dataset = PackedDataset(store, 16, 1)
    batches = [dataset.batch([i]) for i in range(len(dataset))]
    assert sum(batch.num_text_tokens for batch in batches) == store.num_tokens
    padded = [batch for batch in batches if batch.text_mask is not None]
    assert [batch.num_text_tokens for batch in padded] == [store.num_tokens % 16]
    mask = padded[0].text_mask[0]
    assert mask.tolist() == [True] * int(mask.sum()) + [False] * int((~mask).sum())
    assert (padded[0].targets[0, ~mask] == IGNORE).all()
    assert (padded[0].input_ids[0, ~mask] == EOS).all()
    assert dataset.batch(range(len(dataset))).num_text_tokens == store.num_tokens
