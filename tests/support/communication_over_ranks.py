"""Checks of what travels in bf16 under ZeRO, which each of two ranks makes (test_communication.py)."""

import torch

from hybridlm import load_config
from hybridlm.data.packing import Batch
from hybridlm.distributed.engines import make_engine
from hybridlm.model.model import build_model
from hybridlm.optimizers import build_optimizer
from hybridlm.optimizers.roles import fp32_names
from hybridlm.training.losses import step_loss
from hybridlm_kernels import CuSeqlens
from tests.support.engine_configs import engine_config

LENGTH = 16


def batch(config, rank):
    generator = torch.Generator().manual_seed(rank)
    ids_1T = torch.randint(257, (1, LENGTH), generator=generator)
    targets_1Td = torch.randint(257, (1, LENGTH, 1 + config.model.mtp.depth), generator=generator)
    return Batch(ids_1T, targets_1Td, CuSeqlens([0, LENGTH]), LENGTH, LENGTH, (rank,))


def steps(system, kind, dtype):
    """The loss and gradient norm of two steps, and the model's weights, as they are saved, before and after."""
    config = load_config("train", [f"model={system}", "model.num_layers=2", "model.hidden_size=32",
                                   "model.vocab_size=257", "data.tokenizer=bytes"])
    engine = make_engine(engine_config(kind, persistence_threshold=0, timeout=120.0, communication_dtype=dtype),
                         "bf16")
    model = build_model(config, device=engine.device, shard_weights=engine.shard_weights).train()
    engine.prepare(model, build_optimizer(model, config.optimizer), fp32_names(model))
    saved, values = [], []
    for _ in range(2):
        owned = engine.owned_tensors(dict(model.named_parameters()), copied=True)
        saved.append({name: w for mine in engine.gather(owned)
                      for name, w in mine.items()})
        mine = batch(config, engine.rank)
        found = engine.compute_gradients(step_loss([mine], engine.all_sum), [mine])
        update = engine.update(found, lr=1e-2, clip=0.0)
        values.append((update.values["loss"], update.grad_norm))
    engine.release()
    return values, saved


def rounded(weight):
    return torch.equal(weight, weight.bfloat16().float())


def check_bf16_communication(system, kind):
    wanted, kept = steps(system, kind, "fp32")
    found, saved = steps(system, kind, "bf16")
    # Autocast rounds these weights in any case: the loss is the same in every bit.
    assert found[0][0] == wanted[0][0], (system, kind)
    for a, b in zip(found, wanted, strict=True):
        assert abs(a[0] / b[0] - 1) < 1e-3, (system, kind, a, b)
        assert 0 < abs(a[1] / b[1] - 1) < 0.02, (system, kind, a, b)  # gradients were rounded
    assert kept[0].keys() == saved[0].keys()
    for name, weight in saved[0].items():
        assert torch.equal(weight, kept[0][name]), (system, kind, name)
        assert not torch.equal(weight, saved[1][name]), (system, kind, name)
    # What is saved is what the optimizer has, not what has travelled.
    assert not any(rounded(w) for name, w in saved[1].items() if name.endswith("_proj.weight")), (system, kind)
