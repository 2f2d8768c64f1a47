"""Checks of experts over ranks, which each rank of a pool makes (test_expert_parallel.py).

N tokens, D model width, E experts, A experts per token.
"""

import json
from pathlib import Path

import torch
import torch.distributed as dist

from hybridlm.distributed.collective_counter import CountCollectives
from hybridlm.distributed.expert_parallel import ExpertParallel
from hybridlm.model.feed_forward import MoEConfig, build_feed_forward
from hybridlm.model.layer_context import LayerContext, NormConfig
from hybridlm.model.sequence import SequenceInfo

HIDDEN, LENGTH = 12, 10


def layer(parallel=None):
    config = MoEConfig(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=16, router="sigmoid",
                       bias_update_rate=0.1)
    module = build_feed_forward(config, LayerContext(hidden_size=HIDDEN, layer_index=0, num_layers=1,
                                                     norm=NormConfig(), max_position=LENGTH))
    if parallel is not None:
        parallel.shard_experts(module)
    torch.manual_seed(0)
    module.init_weights(0.5)
    return module


def check_layer():
    """One layer over 2 and 4 ranks gives what it gives alone, each rank with tokens of its own."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for size in (n for n in (2, 4) if n <= world):
        parallel = ExpertParallel.make(size)
        for dtype, tolerance in ((torch.float32, 2e-6), (torch.float64, 1e-13)):
            for only in (None, 0):  # the group's first rank holds all experts that are chosen
                compare_layer(parallel, rank, world, dtype, tolerance, only)


def compare_layer(parallel, rank, world, dtype, tolerance, only):
    undivided, sharded = layer().to(dtype), layer(parallel).to(dtype)
    if only is not None:
        for module in (undivided, sharded):
            module.router.bias.fill_(-10.0)[:3] = 10.0
    local = sharded.experts.owned
    assert len(local) == 8 // dist.get_world_size(parallel.group)
    for name, weight in sharded.experts.named_parameters():
        assert torch.equal(weight, getattr(undivided.experts, name)[local.start:local.stop])
    torch.manual_seed(1)
    x_RBTD = torch.randn(world, 2, LENGTH, HIDDEN, dtype=dtype)
    dy_RBTD = torch.randn_like(x_RBTD)
    seq = SequenceInfo.make(2, LENGTH, torch.device("cpu"))

    own = x_RBTD[rank].clone().requires_grad_()
    with CountCollectives() as counted:
        y_BTD, aux = sharded(own, seq)
        y_BTD.backward(dy_RBTD[rank])
    check_bytes(counted, parallel, sharded, own, seq)
    parallel.average_gradients(sharded)
    alone = x_RBTD.clone().requires_grad_()
    expected, loads = torch.zeros_like(x_RBTD), torch.zeros(8, dtype=torch.int64)
    for index in range(world):
        out_BTD, out_aux = undivided(alone[index], seq)
        out_BTD.backward(dy_RBTD[index])
        expected[index], loads = out_BTD.detach(), loads + out_aux["load"]
    dist.all_reduce(aux["load"])
    assert torch.equal(aux["load"], loads)
    if only is not None:
        assert int((loads > 0).sum()) == 3

    def close(found, wanted):
        scale = max(1.0, float(wanted.abs().max()))
        assert float((found - wanted).abs().max()) <= tolerance * scale, (float((found - wanted).abs().max()), scale)

    close(y_BTD.detach(), expected[rank])
    close(own.grad, alone.grad[rank])
    for name in ("gate_up", "down"):
        gradient = getattr(undivided.experts, name).grad[local.start:local.stop]
        close(getattr(sharded.experts, name).grad * world, gradient)
    router = sharded.router.weight.grad.clone()
    dist.all_reduce(router)
    close(router, undivided.router.weight.grad)
    norm = parallel.total_norm(sharded.experts.parameters(), sharded) * world
    close(norm, torch.nn.utils.get_total_norm([p.grad for p in undivided.experts.parameters()]))


def check_bytes(counted, parallel, sharded, x_BTD, seq):
    """All ranks together sent the formula's bytes: a row once to each rank that has experts of it, weights and numbers
    of all pairs, results back, and the gradients of rows, weights and results."""
    size, own = dist.get_world_size(parallel.group), dist.get_rank(parallel.group)
    ids_NA, _, _ = sharded.router(x_BTD, seq)
    rank_NA = ids_NA // (8 // size)
    visits = sum(len(set(ranks) - {own}) for ranks in rank_NA.tolist())
    numbers = torch.tensor([visits, int((rank_NA != own).sum()), counted.payload["all_to_all", size]])
    dist.all_reduce(numbers)
    visits, pairs, found = numbers.tolist()
    element, counts = x_BTD.element_size(), dist.get_world_size() * (size - 1) * 8
    assert found == visits * 4 * HIDDEN * element + pairs * (2 * element + 4) + counts


def check_training(folder, *runs):
    """Each run is a JSON object: its engine, options of `tiny_run.config`, and perhaps stages."""
    from hybridlm.training import train
    from tests.support import tiny_run
    from tests.support.engine_configs import engine_config

    for run in map(json.loads, runs):
        recipe = tiny_run.stages(*run["stages"]) if run["stages"] else None
        config = tiny_run.config(folder, recipe=recipe, optimizer={"lr": 1e-3},  # no token changes its experts
                                 **run["training"])
        config.run_dir, config.engine = str(Path(folder) / run["name"]), engine_config(**run["engine"])
        train(config, to_stderr=True)
