"""Training memory of a model on one device, estimated from its config.

Weights, gradients and optimizer state are exact for fp32 master weights. Activations are an estimate: the widths of the
tensors that each part keeps for its backward pass (no [T, T] scores, no logits), as counted in the torch backends. Each
mixer and feed-forward states its own (`activation_bytes`); this file adds what belongs to the model.
D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hybridlm.model.config import ModelConfig
from hybridlm.model.cost import count_parameters, mtp_block
from hybridlm.model.layer_context import LayerContext

FP32_BYTES = 4  # bytes per element
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes on one device. `weights` are fp32 and, under bf16 autocast, the copies in bf16 of all but lookup tables."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def training_memory(config: ModelConfig, *, batch_size: int, sequence_length: int, precision: Precision = "bf16",
                    optimizer_bytes: int, activation_checkpointing: bool = False) -> TrainingMemory:
    """Memory of one training step on `batch_size` sequences of `sequence_length` tokens (a micro batch).

    Args:
        config: the model.
        batch_size: sequences of a micro batch.
        sequence_length: tokens per sequence.
        precision: dtype of matrix products; master weights are fp32.
        optimizer_bytes: bytes of optimizer state (hybridlm/optimizers/memory.py).
        activation_checkpointing: whether layers are computed again in the backward.
    """
    count = count_parameters(config)
    params = count.total_with_mtp
    element = 2 if precision == "bf16" else FP32_BYTES
    per_token = activation_bytes_per_token(config, element, activation_checkpointing)
    return TrainingMemory(
        weights=params * FP32_BYTES + (element * (params - count.lookup) if precision == "bf16" else 0),
        gradients=params * FP32_BYTES,
        optimizer=optimizer_bytes,
        activations=int(per_token * batch_size * sequence_length))


def activation_bytes_per_token(config: ModelConfig, element_bytes: int, checkpointing: bool = False) -> float:
    """Bytes per token kept for the backward pass; with checkpointing the inputs of layers, and one complete layer.

    Args:
        config: the model.
        element_bytes: bytes per element of an activation, 2 under bf16.
        checkpointing: whether layers are computed again in the backward.
    """
    D = config.hidden_size
    runs, layers = config.runs(), config.layers()
    streams = sum(config.residual.stream_bytes(config.layer_context(index)) for index in runs)
    each = [_layer_bytes(config, index, layers[index], element_bytes) for index in runs]
    # Final norm and head: the stream, its norm, and the gradient that the fused loss computes in the forward.
    head = D * (2 * FP32_BYTES + element_bytes)
    kept = max(each) + streams if checkpointing else sum(each)
    if config.mtp.depth:
        block = _layer_bytes(config, *mtp_block(config), element_bytes, config.mtp_context())
        kept += config.mtp.depth * (block + 4 * D * element_bytes + head)
    return kept + head


def _layer_bytes(config: ModelConfig, index: int, name: str, element: int,
                 stream: LayerContext | None = None) -> float:
    """Bytes per token of one layer; `stream` is what its residual is told, None: the context of the layer."""
    context = config.layer_context(index)
    branches = config.present_branches(name)
    wide = element * (context.mixer_width - context.hidden_size)
    return (wide + sum(config.residual.activation_bytes(stream or context, element, branch) for branch in branches)
            + config.mixers[name].activation_bytes(context, element)
            + config.feed_forward_after(name).activation_bytes(context, element))
