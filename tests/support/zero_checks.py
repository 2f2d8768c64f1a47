"""Checks of the engines on a tiny model, which each of two ranks makes (test_zero.py), and a hang."""

import time
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hybridlm.config.schema import Config
from hybridlm.data.packing import Batch
from hybridlm.distributed.engine import Contribution
from hybridlm.distributed.engines import make_engine
from hybridlm.distributed.zero.optimizer import FlatOptimizer
from hybridlm.distributed.zero.partition import Fragment
from hybridlm.model.feed_forward import FeedForward
from hybridlm.model.mixers import AttentionConfig, DeltaRuleConfig, SequenceMixer
from hybridlm.model.mixers.common.indexer import IndexerConfig
from hybridlm.model.model import build_model
from hybridlm.optimizers import AdamWConfig, PerMatrixOptimizer, build_optimizer
from hybridlm.optimizers.contract import OPTIMIZERS
from hybridlm.optimizers.muon import Muon
from hybridlm.optimizers.optimizer_set import RULE
from hybridlm.planning.rank_memory import rank_memory
from hybridlm.tensor_storage import stored_tensors, unique_tensors
from hybridlm.training.losses import step_loss
from hybridlm.training.sparse_attention import freeze_idle_indexers, set_attention
from hybridlm.training.stages import Stage
from hybridlm_kernels.packing import CuSeqlens
from tests.support import tiny_run
from tests.support.engine_configs import engine_config


class Part:
    """Tokens of one rank. A loss that is not finite comes from `factor`."""

    def __init__(self, rank, factor=1.0):
        self.ids_BT = torch.randint(257, (2, 16), generator=torch.Generator().manual_seed(rank))
        self.factor = factor

    def to(self, device, non_blocking=False):
        return self


def objective(model, part):
    return Contribution(model(part.ids_BT, labels=part.ids_BT).loss * part.factor / dist.get_world_size())


def ready(kind, timeout=120.0, precision="fp32"):
    engine = make_engine(engine_config(kind, persistence_threshold=0, timeout=timeout), precision)
    model = build_model(tiny_run.model(), device=engine.device, shard_weights=engine.shard_weights)
    optimizers = build_optimizer(model, AdamWConfig(lr=1e-3))
    return engine, model, optimizers


def step(engine, number=0, factor=1.0):
    engine.begin_step(0, number)
    values = engine.compute_gradients(objective, [Part(engine.rank, factor)])
    return engine.update(values, lr=1e-3, clip=1.0)


def weights(engine):
    return {name: tensor.detach().clone() for name, tensor in engine.local_weights()}


SPARSE = {"linear": DeltaRuleConfig(num_heads=2, head_dim=16),
          "full": AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=16,
                                  indexer=IndexerConfig(num_heads=2, head_dim=16, topk=4))}
ONE_LOSS = {name: {"lm": 0.0, "mtp": 0.0, "indexer_kl": 0.0, "balance": 0.0, name: 1.0}
            for name in ("balance", "indexer_kl")}


def row(index):
    """A row of two documents; the rows differ in borders and in how many targets count."""
    generator = torch.Generator().manual_seed(index)
    ids_1T, targets_1Td = (torch.randint(257, shape, generator=generator) for shape in ((1, 16), (1, 16, 2)))
    targets_1Td[:, 15 - 3 * index:] = -100
    return Batch(ids_1T, targets_1Td, CuSeqlens([0, 5 + index, 16]), 1, 1, ())


def joined(rows):
    borders = [16 * n + b for n, one in enumerate(rows) for b in one.cu_seqlens.host[:-1]] + [16 * len(rows)]
    ids_BT, targets_BTd = (torch.cat([getattr(one, key) for one in rows]) for key in ("input_ids", "targets"))
    return Batch(ids_BT, targets_BTd, CuSeqlens(borders), 1, 1, ())


def with_losses(model, weights):
    stage = Stage(index=0, name="", steps=1, sequence_length=16, batch_size=4, lr=1.0, loss_weights=weights)
    set_attention(model, stage)
    freeze_idle_indexers(model)
    return model


def check_gradients_of_one_loss(kind, loss):
    """Two ranks with two micro batches each, against the four rows at once: balance loss or indexer's loss alone."""
    weights = ONE_LOSS[loss]
    config, rows = tiny_run.model(mixers=SPARSE), [row(index) for index in range(4)]
    dtype = torch.float64 if kind == "ddp" else torch.float32
    alone = with_losses(build_model(config), weights).to(dtype).train()
    batch = joined(rows)
    step_loss([batch])(alone, batch).loss.backward()
    wanted = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}
    engine = make_engine(engine_config(kind, persistence_threshold=0, timeout=120.0), "fp32")
    model = with_losses(build_model(config, device=engine.device, shard_weights=engine.shard_weights), weights)
    model = model.to(dtype) if kind == "ddp" else model
    engine.prepare(model, build_optimizer(model, AdamWConfig()))
    mine = rows[2 * engine.rank:2 * engine.rank + 2]
    values = engine.compute_gradients(step_loss(mine, engine.all_sum), mine)
    if kind == "ddp":
        for name, p in model.named_parameters():
            if name in wanted:
                torch.testing.assert_close(p.grad, wanted[name], rtol=1e-6, atol=1e-9, msg=name)
    norm = torch.nn.utils.get_total_norm(wanted.values())
    assert norm > 1e-4
    assert engine.update(values, lr=0.0, clip=0.0).grad_norm == pytest.approx(float(norm), rel=1e-5), (kind, weights)
    engine.release()


def check_buckets_of_ddp():
    """As they are before the first step, so they stay; no graph is searched for what has no gradient."""
    engine, model, optimizers = ready("ddp")
    engine.prepare(model, optimizers)
    reducer, trained = engine.wrapped.reducer, [*model.parameters()]
    assert not engine.wrapped.find_unused_parameters
    for number in range(2):
        order = [p for bucket in reducer._get_zeros_like_grad_buckets() for p in bucket.parameters()]
        assert [id(p) for p in order] == [id(p) for p in reversed(trained)]
        assert step(engine, number).applied
    assert not reducer._rebuild_buckets()
    with pytest.raises(RuntimeError, match=r"'layers\.0\.mixer_norm\.weight' trains but got no gradient"):
        engine.compute_gradients(lambda model, part: Contribution(model.module.embed.weight.sum()), [Part(0)])
    engine.release()


class Allocated(TorchDispatchMode):
    """Bytes that tensors made inside hold together, at most."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = weakref.WeakKeyDictionary(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                self.alive[storage] = storage.nbytes()
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


def check_build():
    """No rank holds more at once than its shard and one module; values are those of one process, before and after."""
    config = tiny_run.model(num_layers=12)
    engine = make_engine(engine_config("zero3", persistence_threshold=0))
    whole = build_model(config, seed=3)
    part = max(sum(p.numel() for p in module.parameters()) for module in whole.modules()
               if isinstance(module, SequenceMixer | FeedForward | torch.nn.Embedding))
    most = 4 * 1.1 * (whole.num_params() / 2 + 2 * part)  # a tenth for what is not weights
    assert most < 4 * 0.8 * whole.num_params()
    with Allocated() as memory:
        model = build_model(config, seed=3, device=engine.device, shard_weights=engine.shard_weights)
    assert 4 * whole.num_params() / 2 < memory.peak < most
    assert_gathered(model, whole)
    engine.prepare(model, build_optimizer(model, AdamWConfig()))
    with Allocated() as memory:
        engine.release()
    assert 4 * whole.num_params() / 2 < memory.peak < most
    assert_gathered(model, whole)


def assert_gathered(model, wanted):
    """Sharded weights, gathered, are those of the other model."""
    import deepspeed

    for (name, parameter), expected in zip(model.named_parameters(), wanted.parameters(), strict=True):
        assert parameter.numel() == 0
        with deepspeed.zero.GatheredParameters([parameter]):
            assert torch.equal(parameter, expected), name


def check_nan_on_one_rank(kind):
    """The step changes nothing anywhere; the next one goes on. `step` counts by one."""
    engine, model, optimizers = ready(kind)
    engine.prepare(model, optimizers)
    assert step(engine).applied
    before = weights(engine)
    update = step(engine, factor=float("inf") if engine.rank == 1 else 1.0)
    assert not update.applied
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(engine).items() if "load" not in name)
    assert step(engine).applied
    states = engine.deepspeed_engine.optimizer.optimizer.state.values()
    counts = {float(state["step"]) for state in states}
    assert counts == {2.0}
    flats = {id(one.flat): one.flat for one in engine.fragments.values()}
    held = sum(flat.numel() for flat in flats.values()) + sum(
        tensor.numel() for state in states for tensor in state.values())
    config = Config(model=tiny_run.model(), engine=engine.config)
    assert 4 * held == pytest.approx(rank_memory(config, 2).optimizer, rel=0.03)
    decays = {group["weight_decay"] for group in optimizers.members[0].param_groups}
    assert decays == {0.0, 0.1}
    engine.release()
    assert {parameter.numel() > 0 for parameter in model.parameters()} == {kind != "zero3"}


def check_dtypes(kind):
    """A parameter that DeepSpeed has cast is named."""
    engine, model, optimizers = ready(kind)
    prepare = engine.accelerator.prepare

    def casting(given, optimizer):
        prepared = prepare(given, optimizer)
        given.norm.weight.data = given.norm.weight.data.bfloat16()
        return prepared

    engine.accelerator.prepare = casting
    with pytest.raises(RuntimeError, match=r"'norm\.weight' in torch\.bfloat16"):
        engine.prepare(model, optimizers)
    engine.release()


def check_bf16():
    """Autocast: the loss is near that of fp32, and parameters stay as they are."""
    losses = []
    for precision in ("fp32", "bf16"):
        engine, model, optimizers = ready("zero3", precision=precision)
        engine.prepare(model, optimizers)
        losses.append(step(engine).values["loss"])
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        engine.release()
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def check_the_shell_is_ignored():
    """Variables that would turn DeepSpeed off, change its stage and accumulation, or end it."""
    found = []
    for shell in ({}, {"ACCELERATE_USE_CPU": "true", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
                       "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_GRADIENT_CLIPPING": "1e-9",
                       "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": "Nothing", "ACCELERATE_MIXED_PRECISION": "bf16",
                       "OMPI_COMM_WORLD_LOCAL_RANK": "7", "PMI_SIZE": "1", "OMP_NUM_THREADS": "4,2",
                       "DS_ACCELERATOR": "cuda"}):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in shell.items():
                patch.setenv(name, value)
            engine, model, optimizers = ready("zero1")
            engine.prepare(model, optimizers)
            update = step(engine)
            found.append((update.values["loss"], update.grad_norm, dict(weights(engine))))
            engine.release()
    (loss, norm, plain), (other_loss, other_norm, told) = found
    assert (loss, norm) == (other_loss, other_norm)
    assert all(torch.equal(tensor, told[name]) for name, tensor in plain.items())


def check_starved_experts():
    """Each rank leaves other experts idle."""
    engine, model, optimizers = ready("zero3")
    engine.prepare(model, optimizers)
    router = model.layers[1].feed_forward.router
    for number in range(5):
        router.bias.fill_(-10.0)[2 * engine.rank:2 * engine.rank + 2] = 10.0
        assert step(engine, number).applied
        assert sorted(router.load.tolist()) == [0, 0, 0, 0]  # forgotten after the step
    engine.release()


MATRIX_OPTIMIZERS = {
    "muon": lambda groups: Muon(groups, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adafactor": lambda groups: PerMatrixOptimizer(torch.optim.Adafactor, groups, lr=0.1, d=2.0)}


def check_matrix_steps(name):
    """Matrices that are cut anywhere between ranks are updated as on one."""
    make = MATRIX_OPTIMIZERS[name]
    rank, shapes = dist.get_rank(), [(8, 24), (32, 16), (24, 8), (3, 12, 8)]
    torch.manual_seed(0)
    whole = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    gradients = [torch.randn(shape) for shape in shapes]
    size = (sum(p.numel() for p in whole) + 1) // 2

    def mine(tensors):
        flat = torch.cat([*(t.detach().flatten() for t in tensors), torch.zeros(1)])
        return flat[rank * size:(rank + 1) * size].clone()

    flat = torch.nn.Parameter(mine(whole))
    alone = make([{"params": whole}])
    sharded = FlatOptimizer([make([{"params": [flat], RULE: "matrices"}])], {})
    begin = 0
    for number, parameter in enumerate(whole):
        first, last = max(begin, rank * size), min(begin + parameter.numel(), (rank + 1) * size)
        local = (first - rank * size, first - begin, last - first) if last > first else (0, 0, 0)
        sharded.fragments[str(number)] = Fragment(flat, *local, parameter.shape, dist.group.WORLD)
        begin += parameter.numel()
    for factor in (1.0, -0.5, 2.0):
        for parameter, gradient in zip(whole, gradients, strict=True):
            parameter.grad = gradient * factor
        flat.grad = mine([parameter.grad for parameter in whole])
        alone.step()
        sharded.step()
        assert torch.equal(flat.detach()[:-1], mine(whole)[:-1])


def check_step_of_every_engine(optimizer, folder):
    """A step under each engine, from weights and state that one process has saved, is that of one process.

    Sums over two ranks do not depend on their order, and nothing is clipped: what differs is how libraries round where
    memory begins elsewhere.
    """
    config = OPTIMIZERS.config_class(optimizer)()
    whole = build_model(tiny_run.model())
    alone = build_optimizer(whole, config)
    for number, kind in enumerate(("zero1", "zero2", "zero3", "ddp")):
        saved = Path(folder) / f"{config.kind}-{number}-{dist.get_rank()}"
        saved.mkdir()
        save_file(alone.state_tensors(), saved / "optimizer.safetensors")
        engine = make_engine(engine_config(kind, persistence_threshold=0, timeout=120.0), "fp32")
        model = build_model(tiny_run.model())
        model.load_state_dict(whole.state_dict())
        engine.prepare(model, build_optimizer(model, config), state=stored_tensors(saved, "optimizer"))
        engine.begin_step(0, number)
        values = engine.compute_gradients(objective, [Part(engine.rank)])
        assert engine.update(values, lr=1e-3, clip=0.0, balance=False).applied
        weights = join_ranks(engine, engine.owned_tensors(unique_tensors(engine.model)))
        state = join_ranks(engine, engine.owned_optimizer_state())
        engine.release()
        for rank in range(2):
            objective(whole, Part(rank)).loss.backward()
        alone.set_lr(1e-3)
        alone.step()
        alone.zero_grad()
        assert state.keys() == alone.state_tensors().keys()
        for name, wanted in {**dict(whole.named_parameters()), **alone.state_tensors()}.items():
            found, size = {**weights, **state}[name], float(wanted.detach().abs().max())
            torch.testing.assert_close(found, wanted.detach(), rtol=1e-5, atol=1e-5 * size,
                                       msg=lambda text, where=f"{config.kind}, {kind}, {name}": f"{where}: {text}")


def join_ranks(engine, owned):
    """The tensors that all ranks own, on each."""
    plain = {name: tensor.detach().clone() for name, tensor in owned.items()}  # without what DeepSpeed has put on them
    return {name: tensor for of_rank in engine.gather(plain) for name, tensor in of_rank.items()}


def hang():
    """The watchdogs end both processes."""
    engine, model, optimizers = ready("zero2", timeout=4.0)
    engine.prepare(model, optimizers)
    engine.begin_step(0, 6)
    if engine.rank == 1:
        time.sleep(60)
    engine.compute_gradients(objective, [Part(engine.rank)])
