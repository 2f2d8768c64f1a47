"""Training memory of a model on one device, estimated from its config.

Weights, gradients and optimizer state are exact for fp32 master weights. Activations are an estimate: the widths of the
tensors that each part keeps for its backward pass (no [T, T] scores, no logits), as counted in the torch backends.
D model width; H, G heads; K, V head dims; E experts; A experts a token; I expert width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hybridlm.model.config import ModelConfig
from hybridlm.model.cost import count_parameters, mtp_block
from hybridlm.model.feed_forward import MoEConfig
from hybridlm.model.layer_context import LayerContext
from hybridlm.model.mixers import AttentionConfig, MLAConfig
from hybridlm.model.mixers.common.recurrent import RecurrentConfig
from hybridlm.model.mixers.contract import MixerConfig

FP32 = 4
CHUNK = 32  # tokens a chunk of the linear mixers
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes on one device. `weights` are fp32 and, under bf16 autocast, the copies in bf16."""

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

    `optimizer_bytes` is the size of the optimizer state (hybridlm/optimizers/memory.py).
    """
    count = count_parameters(config)
    params = count.total_with_mtp
    element = 2 if precision == "bf16" else FP32
    per_token = activation_bytes_per_token(config, element, activation_checkpointing)
    return TrainingMemory(
        weights=params * (FP32 + (element if precision == "bf16" else 0)),
        gradients=params * FP32,
        optimizer=optimizer_bytes,
        activations=int(per_token * batch_size * sequence_length))


def activation_bytes_per_token(config: ModelConfig, element_bytes: int, checkpointing: bool = False) -> float:
    """Bytes kept a token for the backward pass. With checkpointing: the layers' inputs, and all of one layer."""
    D, layers = config.hidden_size, config.layers()
    each = [_layer_bytes(config, index, name, element_bytes) for index, name in enumerate(layers)]
    # Final norm and head: the stream, its norm, and the gradient that the fused loss computes in the forward.
    head = D * (2 * FP32 + element_bytes)
    kept = max(each) + len(each) * D * FP32 if checkpointing else sum(each)
    if config.mtp.depth:
        block = _layer_bytes(config, *mtp_block(config), element_bytes)
        kept += config.mtp.depth * (block + 4 * D * element_bytes + head)
    return kept + head


def _layer_bytes(config: ModelConfig, index: int, name: str, element: int) -> float:
    context, D = config.layer_context(index), config.hidden_size
    streams = 2 * D * (FP32 + element)  # of each branch: the residual stream and its norm
    return streams + _mixer_bytes(config.mixers[name], context, element) + _feed_forward_bytes(config, context, element)


def _mixer_bytes(mixer: MixerConfig, context: LayerContext, element: int) -> float:
    if isinstance(mixer, RecurrentConfig):
        return _recurrent_bytes(mixer)
    if isinstance(mixer, MLAConfig):
        queries, values = mixer.num_heads * mixer.qk_head_dim, mixer.num_heads * mixer.v_head_dim
        latents = 2 * (mixer.kv_lora_rank + (mixer.q_lora_rank or 0)) + mixer.qk_rope_head_dim
        kv = mixer.num_heads * (mixer.qk_nope_head_dim + mixer.v_head_dim)
        selected = FP32 * mixer.indexer.topk if mixer.indexer is not None and mixer.indexer.mode == "sparse" else 0
        return element * (latents + kv + 2 * queries + values) + selected
    if isinstance(mixer, AttentionConfig):
        queries, keys = mixer.num_heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
        copies = 1 + (mixer.qk_norm != "none")  # what the norm reads, and what attention reads
        gate = 2 * queries if mixer.output_gate == "element" else 0
        return element * (copies * (queries + keys) + keys + queries + gate)
    # A kind without a formula of its own: three tensors for each of its projections' outputs.
    return 3.0 * element * mixer.num_params(context) / context.hidden_size


def _recurrent_bytes(mixer: RecurrentConfig) -> float:
    """All in fp32, in which the linear mixers work: inputs before and after each convolution, the chunked q, k and
    v in two forms, the gate, one state and one [CHUNK, CHUNK] matrix a chunk and head, outputs around their norm."""
    widths, values = sum(mixer.channels.values()), mixer.channels["v"]
    convolution = (2 if mixer.conv_size else 1) * widths
    chunk = mixer.value_heads * (mixer.head_dim * mixer.value_dim / CHUNK + 2 * CHUNK)
    outputs = (2 if mixer.output_gate == "none" else 3) * values
    return FP32 * (convolution + 2 * widths + 2 * mixer.gate_width + chunk + outputs)


def _feed_forward_bytes(config: ModelConfig, context: LayerContext, element: int) -> float:
    feed_forward, D = config.feed_forward, context.hidden_size
    if isinstance(feed_forward, MoEConfig) and feed_forward.is_moe(context.layer_index):
        routed = feed_forward.num_experts_per_tok * 2 * feed_forward.moe_intermediate_size  # gate and up
        return element * (routed + 3 * feed_forward.shared_width) + 2 * FP32 * feed_forward.num_experts
    # gate, up and their product: one width each of the three D x I matrices
    return element * feed_forward.num_params(context) / D
