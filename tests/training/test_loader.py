import math

import pytest
import torch

from hybridlm.data import PackedDataset, prepare
from hybridlm.distributed.engines.single import SingleConfig, SingleEngine
from hybridlm.model.model import build_model
from hybridlm.training.loader import global_batches, micro_batches
from hybridlm.training.validation import validate
from tests.support import tiny_run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare(tiny_run.config(tmp_path_factory.mktemp("loader")).data, progress=False)


def samples(batches, count):
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return [[micro_batch.sample_ids for micro_batch in batch] for batch in taken]


def test_batches_follow_the_cursor(data):
    dataset = PackedDataset(data.train, 32, 1, seed=0)
    options = {"batch_size": 4, "rows": range(4), "micro_batch_size": 2}
    expected = samples(global_batches(dataset, first_sample=0, **options), 3)
    assert expected == [[(0, 1), (2, 3)], [(4, 5), (6, 7)], [(8, 9), (10, 11)]]
    assert samples(global_batches(dataset, first_sample=8, **options), 1) == expected[2:]
    assert samples(global_batches(dataset, first_sample=0, batch_size=4, rows=range(2, 4), micro_batch_size=None),
                   2) == [[(2, 3)], [(6, 7)]]


def test_what_a_sample_raises_reaches_the_trainer(data):
    class Broken(PackedDataset):
        def sample(self, index):
            if index == 5:
                raise OSError("shard is gone")
            return super().sample(index)

    batches = global_batches(Broken(data.train, 32), first_sample=0, batch_size=4, rows=range(4), micro_batch_size=None)
    assert len(next(batches)) == 1
    with pytest.raises(OSError, match="shard is gone"):
        next(batches)


def test_validation_is_a_mean_over_tokens_however_it_is_cut(data):
    model = build_model(tiny_run.model(), seed=0).train()
    engine = SingleEngine(SingleConfig(device="cpu"))
    engine.prepare(model, None)
    dataset = PackedDataset([data.validation], 32, 1, seed=0)
    one, many = (validate(engine, micro_batches(dataset, range(10), size)) for size in (10, 3))
    assert one.keys() == many.keys()
    assert one["validation_loss"] == pytest.approx(many["validation_loss"], rel=1e-6)
    assert one["validation_loss/mtp"] == pytest.approx(many["validation_loss/mtp"], rel=1e-2)
    assert one["validation_tokens"] == sum(dataset.sample(i).num_tokens for i in range(10))
    assert one["validation_bits_per_byte"] == pytest.approx(one["validation_loss"] / math.log(2), rel=1e-6)
    assert one["validation_perplexity"] == pytest.approx(math.exp(one["validation_loss"]))
    assert model.training
    assert all(not load.any() for load in model.router_loads().values())
    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()
