"""Memory of one rank, estimated from a run's config before anything is allocated.

P parameters, N ranks that divide what ZeRO divides. Weights, gradients and optimizer state are fp32 under every engine.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from hybridlm.config.schema import ZERO, Config
from hybridlm.model.cost import count_parameters
from hybridlm.model.feed_forward import MoEConfig
from hybridlm.model.memory import FP32, Precision, TrainingMemory, training_memory
from hybridlm.optimizers.memory import optimizer_state_bytes

LIVE_ELEMENTS = 1_000_000_000  # gathered weights that DeepSpeed keeps for their next use (stage3_max_live_parameters)


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes on one device, and on the `host` what is offloaded. `gathered`: weights that ZeRO-3 holds for a while, a
    layer's at least; `buffers`: what gradients travel in; `snapshot`: what the host holds while a checkpoint is
    written. Building a model takes `weights` and a layer's."""

    weights: float
    gathered: float
    gradients: float
    optimizer: float
    buffers: float
    activations: float
    host: float
    snapshot: float

    def parts(self) -> dict[str, int]:
        """By name: those of the device, their total, and those of the host."""
        parts = {field.name: round(getattr(self, field.name)) for field in fields(self)}
        host = {name: parts.pop(name) for name in ("host", "snapshot")}
        return parts | {"total": sum(parts.values())} | host


def rank_memory(config: Config, world: int) -> RankMemory:
    """What one of `world` ranks needs for a training step of the run's longest rows, under its engine.

    Copies of weights in bf16 live through the backward, and are whole under ZeRO-3 too: only
    `training.activation_checkpointing` lets them go after each layer. Experts are taken to be evenly loaded.
    """
    engine, count = config.engine, count_parameters(config.model)
    one = _whole(config, world)
    away = 1 - 1 / engine.expert_parallel  # of the experts
    share = 1 - away * count.routed / count.total_with_mtp  # of all parameters, what this rank holds or gathers
    weights, shard = FP32 * count.total_with_mtp * share, FP32 * count.total_with_mtp / world
    copies = one.weights * share - weights  # in bf16
    wire = FP32 if engine.communication_dtype == "fp32" else FP32 + 2  # a bucket of each type
    bucket = 2 * wire * min(engine.bucket_elements, count.total_with_mtp)
    activations = one.activations + (_received_rows(config, world) if engine.expert_parallel > 1 else 0)
    snapshot = (FP32 * count.total_with_mtp + one.optimizer) / world if config.training.async_checkpoint else 0.0
    if engine.kind not in ZERO:
        buffers = weights if engine.kind == "ddp" and world > 1 else 0  # DistributedDataParallel's buckets
        return RankMemory(weights=weights + copies, gathered=0, gradients=one.gradients * share,
                          optimizer=one.optimizer * share, buffers=buffers, activations=activations, host=0,
                          snapshot=snapshot)
    master = shard  # the optimizer's own copy of what it updates
    optimizer, host = master + one.optimizer / world, 0.0
    gradients = weights + shard if engine.kind == "zero1" else shard
    if engine.offload_optimizer:
        optimizer, host = 0.0, optimizer + shard  # and the gradients that it reads
    if engine.kind != "zero3":
        return RankMemory(weights=weights + copies, gathered=0, gradients=gradients, optimizer=optimizer,
                          buffers=bucket, activations=activations, host=host, snapshot=snapshot)
    layer_weights = FP32 * max(layer.params - away * layer.routed_params for layer in count.layers)
    if config.training.activation_checkpointing:  # a layer's at a time
        copies *= layer_weights / weights
    gathered = max(min(weights, FP32 * LIVE_ELEMENTS), layer_weights) + copies
    if engine.offload_parameters:
        shard, host = 0.0, host + shard
    return RankMemory(weights=shard, gathered=gathered, gradients=gradients, optimizer=optimizer, buffers=bucket,
                      activations=activations, host=host, snapshot=snapshot)


def rank_report(config: Config, world: int) -> dict[str, Any]:
    """What `hybridlm inspect` says of each of `world` processes."""
    return {"engine": config.engine.kind, "processes": world, **rank_memory(config, world).parts()}


def _micro_batch(config: Config, world: int) -> tuple[int, int]:
    """Rows that one rank computes at a time, and tokens it has of each."""
    training, shards = config.training, config.engine.context_parallel
    lengths = [stage.sequence_length or training.sequence_length for stage in config.recipe.stages]
    batch = max(stage.batch_size or training.batch_size for stage in config.recipe.stages)
    share = max(1, batch * shards // world)
    return min(training.micro_batch_size or share, share), max(lengths) // shards


def _element(config: Config) -> tuple[Precision, int]:
    return ("fp32", FP32) if config.training.precision == "fp32" else ("bf16", 2)


def _whole(config: Config, world: int) -> TrainingMemory:
    """As `training_memory` of what one rank computes at a time."""
    rows, length = _micro_batch(config, world)
    return training_memory(config.model, batch_size=rows, sequence_length=length, precision=_element(config)[0],
                           optimizer_bytes=optimizer_state_bytes(config.model, config.optimizer),
                           activation_checkpointing=config.training.activation_checkpointing)


def _received_rows(config: Config, world: int) -> int:
    """Bytes of the rows that experts keep for their backward, which one process reads from its own tokens."""
    moe, (rows, length) = config.model.feed_forward, _micro_batch(config, world)
    assert isinstance(moe, MoEConfig)
    layers = 1 if config.training.activation_checkpointing else sum(
        moe.is_moe(index) for index in range(config.model.num_layers))
    return layers * rows * length * moe.num_experts_per_tok * config.model.hidden_size * _element(config)[1]
