"""Bytes that ranks send one another in a training step, from the config alone: what a plan for many GPUs is made with.

The payload of a collective operation is the whole tensor that it reduces, gathers or scatters; of an all-to-all, what
goes to other ranks. Experts are taken to be evenly loaded. A few numbers a step (losses, norms) are left out.
`scripts/dev/bench_scaling.py` holds the payloads against those that `counting` finds.

"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import comb
from typing import Literal

import torch

from hybridlm.distributed.collective_counter import wire_bytes
from hybridlm.distributed.memory import LIVE_ELEMENTS
from hybridlm.model.config import ModelConfig
from hybridlm.model.cost import count_parameters, mtp_block
from hybridlm.model.feed_forward import MoEConfig
from hybridlm.model.model import HybridLM

EngineKind = Literal["ddp", "zero1", "zero2", "zero3"]
FP32, INT32, INT64 = 4, 4, 8


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a step is spread: each of `ranks` processes computes `micro_batches` times, each time its shards of `rows`
    rows, which are `length` tokens long as a whole. `element_bytes`: of an activation, 2 under bf16. `matrix_bytes`: of
    an element of the matrices that autocast multiplies, as their gradients travel (and under zero3 they themselves): 2
    with `engine.communication_dtype=bf16`.
    """

    ranks: int
    engine: EngineKind = "ddp"
    expert_parallel: int = 1
    context_parallel: int = 1
    rows: int = 1
    length: int
    micro_batches: int = 1
    element_bytes: int = 2
    matrix_bytes: int = 4
    activation_checkpointing: bool = False

    @property
    def tokens(self) -> int:
        """Of one rank and micro batch."""
        return self.rows * self.length // self.context_parallel

    @property
    def replicas(self) -> int:
        """Communicator that hold the same experts."""
        return self.ranks // self.expert_parallel

    @property
    def forwards(self) -> int:
        """In a step; those that activation checkpointing repeats included."""
        return self.micro_batches * (2 if self.activation_checkpointing else 1)


@dataclass(frozen=True)
class Traffic:
    """What one rank hands to one kind of collective operation in a step. `layers`: how many layers share in it."""

    part: str
    kind: str
    ranks: int
    payload: float
    layers: int

    @property
    def sent(self) -> float:
        """Bytes that leave the rank."""
        return wire_bytes(self.kind, self.payload, self.ranks)


def traffic(config: ModelConfig, layout: Layout, matrices: int | None = None) -> list[Traffic]:
    """Everything that a rank sends in a step but what goes to itself.

    `matrices` is `matrix_params(config)`, for callers with many layouts of one model.

    Raises:
        ConfigError: a part that does not fit into its layer.
    """
    count = count_parameters(config)
    split = count.routed if layout.expert_parallel > 1 else 0
    if layout.matrix_bytes == FP32:
        matrices = split  # which these are makes no difference: no model is built to count them
    elif matrices is None:
        matrices = matrix_params(config)
    found = [*_weights_and_gradients("", count.total_with_mtp - split, matrices - split, layout.ranks, layout,
                                     len(_blocks(config)))]
    moe = sum(config.feed_forward.is_moe(index) for index, _ in _blocks(config))
    if split:
        held = split / layout.expert_parallel
        found += _weights_and_gradients("expert ", held, held, layout.replicas, layout, moe)
        found += _expert_rows(config, layout, moe)
    if isinstance(config.feed_forward, MoEConfig):
        loads = moe * INT64 * config.feed_forward.num_experts
        found.append(Traffic("router loads", "all_reduce", layout.ranks, loads, moe))
    if layout.context_parallel > 1:
        found += _shards(config, layout)
    return [one for one in found if one.ranks > 1]


def _blocks(config: ModelConfig) -> list[tuple[int, str]]:
    """Index and mixer of every layer, those of multi-token prediction included."""
    return [*enumerate(config.layers()), *[mtp_block(config)] * config.mtp.depth]


def matrix_params(config: ModelConfig) -> int:
    """Elements of the matrices that autocast multiplies."""
    with torch.device("meta"):
        return sum(p.numel() for p in HybridLM(config).autocast_parameters().values())


def _weights_and_gradients(prefix: str, params: float, matrices: float, ranks: int, layout: Layout,
                           layers: int) -> Iterator[Traffic]:
    """Of so many parameters, `matrices` of which travel in `layout.matrix_bytes`.

    ZeRO-1 and -2 reduce whole buckets and keep their part (DeepSpeed's `use_multi_rank_bucket_allreduce`), ZeRO-2 after
    every micro batch; ZeRO-3 gathers the weights for a forward and again for its backward, but for the last
    `LIVE_ELEMENTS`.
    """
    whole, passes = FP32 * params, layout.micro_batches
    size = whole + (layout.matrix_bytes - FP32) * matrices
    gradients, weights = f"{prefix}gradients", f"{prefix}weights"
    if layout.engine == "zero3":
        again = size * max(0.0, 1 - LIVE_ELEMENTS / params)
        yield Traffic(weights, "all_gather", ranks, passes * (size + again), layers)
        yield Traffic(gradients, "reduce_scatter", ranks, passes * size, layers)
        return
    yield Traffic(gradients, "all_reduce", ranks, size * (passes if layout.engine == "zero2" else 1), layers)
    if layout.engine != "ddp":
        yield Traffic(weights, "all_gather", ranks, whole, layers)


def _expert_rows(config: ModelConfig, layout: Layout, layers: int) -> Iterator[Traffic]:
    """A forward sends a token's row once to each rank that has experts of it, a weight and a number for each expert,
    and a result back; a backward the gradients of rows, weights and results."""
    moe, ranks = config.feed_forward, layout.expert_parallel
    assert isinstance(moe, MoEConfig)
    rows = layout.tokens * (ranks - 1) * chance_of_a_visit(moe, ranks) * config.hidden_size * layout.element_bytes
    pairs = layout.tokens * moe.num_experts_per_tok * (1 - 1 / ranks)
    forward, backward = 2 * rows + pairs * (FP32 + INT32) + (ranks - 1) * 2 * INT32, 2 * rows + pairs * FP32
    step = layout.forwards * forward + layout.micro_batches * backward
    yield Traffic("expert rows", "all_to_all", ranks, layers * step, layers)


def chance_of_a_visit(moe: MoEConfig, ranks: int) -> float:
    """That one of `ranks` ranks holds an expert of a token, if all choices that the router's groups leave are equally
    likely. A rank has whole groups of experts or a part of one."""
    groups, chosen, size = moe.num_groups, moe.topk_groups, moe.num_experts // moe.num_groups
    held = moe.num_experts // ranks
    spans, each = max(1, held // size), min(held, size)  # groups that a rank has experts of, and how many of each
    absent = 0.0
    for among in range(max(0, chosen - groups + spans), min(spans, chosen) + 1):
        likely = comb(spans, among) * comb(groups - spans, chosen - among) / comb(groups, chosen)
        absent += likely * comb(chosen * size - among * each, moe.num_experts_per_tok) / comb(
            chosen * size, moe.num_experts_per_tok)
    return 1 - absent


def _shards(config: ModelConfig, layout: Layout) -> Iterator[Traffic]:
    """What the mixers ask of the other shards of their rows; each says itself how much that is."""
    shards, away = layout.context_parallel, 1 - 1 / layout.context_parallel
    payload, layers = dict.fromkeys(("all_gather", "reduce_scatter", "all_to_all"), 0.0), Counter[str]()
    for index, name in _blocks(config):
        for one in config.mixers[name].shard_traffic(config.layer_context(index), layout.rows, layout.length // shards,
                                                     shards, layout.element_bytes):
            forward, backward = layout.forwards * one.forward, layout.micro_batches * one.backward
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
