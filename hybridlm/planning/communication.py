"""Bytes that ranks send one another in a training step, from the config alone: for planning runs on many GPUs.

The payload of a collective operation is the whole tensor that it reduces, gathers or scatters; of an all-to-all, what
goes to other ranks. Experts are taken to be evenly loaded. A few numbers per step (losses, norms) are left out.
`scripts/dev/bench_scaling.py` holds the payloads against those that `CountCollectives` counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from math import comb

import torch

from hybridlm.distributed.collective_counter import wire_bytes
from hybridlm.distributed.engine_config import ENGINES, FP32_BYTES, EngineConfig
from hybridlm.model.config import ModelConfig
from hybridlm.model.cost import all_blocks, all_runs, count_parameters
from hybridlm.model.feed_forward import RoutedExperts
from hybridlm.model.model import HybridLM

INT32_BYTES = 4
FP64_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class ParallelPlan:
    """The distribution of a training step over ranks.

    Args:
        ranks: processes.
        engine: with its options, among them `expert_parallel` and `context_parallel`.
        rows: rows of one micro batch, of which a rank computes its shards.
        length: tokens of a complete row.
        micro_batches: forwards, each with its backward, of one rank in one step.
        element_bytes: bytes per element of an activation; 2 under bf16.
        activation_checkpointing: layers are computed again in the backward.
    """

    ranks: int
    engine: EngineConfig = field(default_factory=lambda: ENGINES.config_class("ddp")())
    rows: int = 1
    length: int
    micro_batches: int = 1
    element_bytes: int = 2
    activation_checkpointing: bool = False

    @property
    def tokens(self) -> int:
        """Tokens one rank processes in one micro batch."""
        return self.rows * self.length // self.engine.context_parallel

    @property
    def expert_copies(self) -> int:
        """Ranks that hold the same experts."""
        return self.ranks // self.engine.expert_parallel

    @property
    def forwards(self) -> int:
        """Forwards of one step, those that activation checkpointing repeats included."""
        return self.micro_batches * (2 if self.activation_checkpointing else 1)


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank hands to one kind of collective operation in one step: `payload`, for the purpose `name`,
    in a group of `ranks`. `layers`: how many layers take part; what each run of a layer sends counts per run."""

    name: str
    kind: str
    ranks: int
    payload: float
    layers: int

    @property
    def sent(self) -> float:
        """Bytes that leave the rank."""
        return wire_bytes(self.kind, self.payload, self.ranks)


def step_traffic(config: ModelConfig, plan: ParallelPlan, matrices: int | None = None) -> list[Traffic]:
    """List everything that a rank sends to other ranks in one training step.

    Args:
        config: the model.
        plan: how the step is spread.
        matrices: `matrix_params(config)`, for callers with many plans for one model.

    Raises:
        ConfigError: a part that does not fit into its layer.
    """
    count = count_parameters(config)
    sharded = count.routed if plan.engine.expert_parallel > 1 else 0
    if plan.engine.matrix_bytes == FP32_BYTES:
        matrices = sharded  # which parameters these are makes no difference: no model is built to count them
    elif matrices is None:
        matrices = matrix_params(config)
    blocks = all_blocks(config)
    moe_layers = sum(config.feed_forward_after(name).is_moe(index) for index, name in blocks)
    found = _parameter_traffic(plan, "", count.total_with_mtp - sharded, matrices - sharded, plan.ranks, len(blocks))
    if sharded:
        local = sharded / plan.engine.expert_parallel
        found += _parameter_traffic(plan, "expert ", local, local, plan.expert_copies, moe_layers)
        found += _expert_rows(config, plan)
    sums = sum(config.feed_forward_after(name).step_sum_numbers(index) for index, name in blocks)
    if sums:
        found.append(Traffic("router sums", "all_reduce", plan.ranks, FP64_BYTES * sums, moe_layers))
    if plan.engine.context_parallel > 1:
        found += _shards(config, plan)
    return [traffic for traffic in found if traffic.ranks > 1]


def matrix_params(config: ModelConfig) -> int:
    """Count the elements of the matrices that autocast multiplies."""
    with torch.device("meta"):
        return sum(p.numel() for p in HybridLM(config).autocast_parameters().values())


def _parameter_traffic(plan: ParallelPlan, prefix: str, params: float, matrices: float, ranks: int,
                       layers: int) -> list[Traffic]:
    """Traffic of `params` parameters that `ranks` ranks share, `matrices` of them in matrices that autocast
    multiplies."""
    return [Traffic(f"{prefix}{collective.tensor}", collective.kind, ranks, collective.payload, layers)
            for collective in plan.engine.parameter_traffic(params, matrices, plan.micro_batches)]


def _expert_rows(config: ModelConfig, plan: ParallelPlan) -> Iterator[Traffic]:
    """Traffic of tokens on their way to experts and back.

    A forward sends a token's row once to each rank that has experts of it, a weight and a number for each expert, and
    a result back; a backward sends the gradients of rows, weights and results.
    """
    routed, ranks = config.feed_forward.routed_experts(), plan.engine.expert_parallel
    assert routed is not None
    layers = sum(config.feed_forward_after(name).is_moe(index) for index, name in all_runs(config))
    width = routed.width(config.hidden_size)
    rows = plan.tokens * (ranks - 1) * visit_probability(routed, ranks) * width * plan.element_bytes
    pairs = plan.tokens * routed.per_token * (1 - 1 / ranks)
    forward = 2 * rows + pairs * (FP32_BYTES + INT32_BYTES) + (ranks - 1) * 2 * INT32_BYTES
    backward = 2 * rows + pairs * FP32_BYTES
    step = plan.forwards * forward + plan.micro_batches * backward
    yield Traffic("expert rows", "all_to_all", ranks, layers * step, layers)


def visit_probability(experts: RoutedExperts, ranks: int) -> float:
    """Probability that one of `ranks` ranks holds an expert of a token, if all choices that the router's groups leave
    are equally likely. A rank has whole groups of experts or a part of one."""
    groups, chosen, size = experts.num_groups, experts.topk_groups, experts.total // experts.num_groups
    held = experts.total // ranks
    spans, each = max(1, held // size), min(held, size)  # groups that a rank has experts of, and how many of each
    absent = 0.0
    for among in range(max(0, chosen - groups + spans), min(spans, chosen) + 1):
        likely = comb(spans, among) * comb(groups - spans, chosen - among) / comb(groups, chosen)
        absent += likely * comb(chosen * size - among * each, experts.per_token) / comb(
            chosen * size, experts.per_token)
    return 1 - absent


def _shards(config: ModelConfig, plan: ParallelPlan) -> Iterator[Traffic]:
    """Traffic between the shards of rows; each mixer says itself how much it asks for."""
    shards, away = plan.engine.context_parallel, 1 - 1 / plan.engine.context_parallel
    payload, layers = dict.fromkeys(("all_gather", "reduce_scatter", "all_to_all"), 0.0), Counter[str]()
    for index, name in all_runs(config):
        context, length = config.layer_context(index), plan.length // shards
        of_branches = [branch.shard_traffic(context, plan.rows, length, shards, plan.element_bytes)
                       for branch in (config.mixers[name], config.feed_forward_after(name))]
        for one in chain(*of_branches):
            forward, backward = plan.forwards * one.forward, plan.micro_batches * one.backward
            if one.kind == "gather":  # whose transpose is a reduce-scatter
                payload["all_gather"] += shards * forward
                payload["reduce_scatter"] += shards * backward
            else:
                payload["all_to_all"] += away * (forward + backward)
            layers[one.kind] += 1
    shared = {"all_to_all": max(layers["exchange"], layers["from_previous"])}
    for kind, size in payload.items():
        if size:
            yield Traffic("shards of rows", kind, shards, size, shared.get(kind, layers["gather"]))
