"""Gradients of a batch do not depend on how it is cut."""

import pytest
import torch

from hybridlm.data.packing import IGNORE, Batch
from hybridlm.distributed.engines.single import SingleConfig, SingleEngine
from hybridlm.model.config import MTPConfig
from hybridlm.model.model import build_model
from hybridlm.training.losses import step_loss
from hybridlm_kernels.packing import CuSeqlens
from tests.support import tiny_run

ROWS, T = 4, 16


def row(index):
    """One row; the rows differ in borders and in how many targets count."""
    generator = torch.Generator().manual_seed(index)
    ids = torch.randint(257, (1, T), generator=generator)
    targets = torch.randint(257, (1, T, 3), generator=generator)
    targets[:, T - 3 * index - 1:, 0] = IGNORE
    targets[:, T - 2 * index - 3:, 1:] = IGNORE
    return ids, targets, [0, 5 + index]


def batch(indices):
    rows = [row(i) for i in indices]
    borders = [n * T + b for n, (_, _, borders) in enumerate(rows) for b in borders] + [len(rows) * T]
    return Batch(torch.cat([r[0] for r in rows]), torch.cat([r[1] for r in rows]), CuSeqlens(borders), 1, 1, ())


def gradients(cut, dtype=torch.float64, **options):
    model = build_model(tiny_run.model(mtp=MTPConfig(depth=2), z_loss=0.01, **options), seed=0).to(dtype).train()
    engine = SingleEngine(SingleConfig(device="cpu"))
    engine.prepare(model, None)
    parts = [batch(indices) for indices in cut]
    values = engine.compute_gradients(step_loss(parts), parts)
    loads = {name: load.clone() for name, load in model.router_loads().items()}
    return {n: p.grad for n, p in model.named_parameters()}, values, loads


@pytest.mark.parametrize("cut", [[[0], [1], [2], [3]], [[0, 1], [2, 3]], [[0, 1, 2], [3]]])
def test_parts_add_up_to_the_whole(cut):
    whole, values, loads = gradients([[0, 1, 2, 3]])
    parts, part_values, part_loads = gradients(cut)
    for name, grad in whole.items():
        torch.testing.assert_close(parts[name], grad, rtol=1e-6, atol=1e-9, msg=name)
    for name in ("loss", "loss/lm", "loss/mtp", "loss/balance", "loss/z"):
        assert float(part_values[name]) == pytest.approx(float(values[name]), rel=1e-5), name
    assert all(torch.equal(part_loads[name], load) for name, load in loads.items())


def test_a_mean_of_means_would_be_another_loss():
    """The rows count different numbers of tokens, so the test above can fail."""
    _, values, _ = gradients([[0, 1, 2, 3]])
    alone = [float(gradients([[i]])[1]["loss/lm"]) for i in range(ROWS)]
    assert abs(sum(alone) / ROWS - float(values["loss/lm"])) > 1e-3
