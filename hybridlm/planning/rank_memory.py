"""Memory of one rank, estimated from a run's config before anything is allocated.

Weights, gradients and optimizer state are fp32 under every engine; which of them are sharded, the engine's config says.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hybridlm.config.schema import Config
from hybridlm.distributed.engine_config import FP32_BYTES, RankMemory, StepMemory
from hybridlm.model.cost import all_runs, count_parameters
from hybridlm.model.memory import Precision, TrainingMemory, training_memory
from hybridlm.optimizers.memory import optimizer_state_bytes


def rank_memory(config: Config, ranks: int) -> RankMemory:
    """Estimate what one of `ranks` ranks needs for a training step of its largest micro batch, under its engine.

    Experts are taken to be evenly loaded. Building a model takes `weights` and the weights of one more layer.
    """
    engine, count = config.engine, count_parameters(config.model)
    params = count.total_with_mtp
    undivided = _undivided_memory(config, ranks)
    elsewhere = 1 - 1 / engine.expert_parallel  # fraction of the routed experts that other ranks hold
    local_params = params * (1 - elsewhere * count.routed / params)
    memory = engine.rank_memory(StepMemory(
        ranks=ranks, params=params, local_params=local_params,
        layer_params=max(layer.params - elsewhere * layer.routed_params for layer in count.layers),
        bf16_copies=undivided.weights * local_params / params - FP32_BYTES * local_params,
        optimizer=undivided.optimizer, activation_checkpointing=config.training.activation_checkpointing))
    activations = undivided.activations + (_received_rows(config, ranks) if engine.expert_parallel > 1 else 0)
    snapshot = (FP32_BYTES * params + undivided.optimizer) / ranks if config.training.async_checkpoint else 0.0
    teacher = FP32_BYTES * params if config.teacher is not None else 0.0  # whole on each rank; as large as the model
    return replace(memory, weights=memory.weights + teacher, activations=activations, snapshot=snapshot)


def rank_report(config: Config, ranks: int) -> dict[str, Any]:
    """Return what `hybridlm inspect` shows of each of `ranks` processes: engine, processes, and bytes by name."""
    return {"engine": config.engine.kind, "processes": ranks, **rank_memory(config, ranks).to_dict()}


def micro_batch(config: Config, ranks: int) -> tuple[int, int]:
    """Return the rows that one rank computes at a time, and the tokens it has of each, in the stage with most tokens.

    >>> from hybridlm import load_config
    >>> micro_batch(load_config("train", ["training.batch_size=8", "training.sequence_length=64"]), 2)
    (4, 64)
    """
    training, shards = config.training, config.engine.context_parallel
    sizes = []
    for stage in config.recipe.stages:
        local_rows = max(1, (stage.batch_size or training.batch_size) * shards // ranks)
        length = (stage.sequence_length or training.sequence_length) // shards
        sizes.append((min(training.micro_batch_size or local_rows, local_rows), length))
    return max(sizes, key=lambda size: size[0] * size[1])


def _activation_dtype(config: Config) -> tuple[Precision, int]:
    """Return the precision of activations and their bytes per element."""
    return ("fp32", FP32_BYTES) if config.training.precision == "fp32" else ("bf16", 2)


def _undivided_memory(config: Config, ranks: int) -> TrainingMemory:
    """Estimate a training step on the rows of one rank as if that rank held the whole model."""
    rows, length = micro_batch(config, ranks)
    return training_memory(config.model, batch_size=rows, sequence_length=length,
                           precision=_activation_dtype(config)[0],
                           optimizer_bytes=optimizer_state_bytes(config.model, config.optimizer),
                           activation_checkpointing=config.training.activation_checkpointing)


def _received_rows(config: Config, ranks: int) -> int:
    """Bytes of rows received from other ranks that experts keep for their backward; in one process they read them from
    its own tokens."""
    moe, (rows, length) = config.model.feed_forward, micro_batch(config, ranks)
    routed = moe.routed_experts()
    assert routed is not None
    layers = 1 if config.training.activation_checkpointing else sum(
        config.model.feed_forward_after(name).is_moe(index) for index, name in all_runs(config.model))
    width = routed.width(config.model.hidden_size) * _activation_dtype(config)[1]
    return layers * rows * length * routed.per_token * width
