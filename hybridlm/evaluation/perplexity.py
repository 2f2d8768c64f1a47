"""Perplexity by position, which shows how much a model gains from the tokens before.

B rows, T tokens per row, N tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm.data.packing import IGNORE, Batch
from hybridlm.model.model import HybridLM
from hybridlm.training.metrics import bits_per_byte, perplexity
from hybridlm_kernels.packing import CuSeqlens

CHUNK_TOKENS = 1024  # tokens whose logits are in memory at once
FIRST_BUCKET_POSITIONS = 16


@torch.no_grad()
def normed_states(model: HybridLM, ids_BT: Tensor, cu_seqlens: CuSeqlens | None = None) -> Tensor:
    """Run the model up to the input of its output matrix, [B, T, D], without making the B x T x V logits."""
    normed: list[Tensor] = []
    hook = model.norm.register_forward_hook(lambda module, inputs, output: normed.append(output))
    try:
        model(ids_BT, cu_seqlens=cu_seqlens, logits_to_keep=1)
    finally:
        hook.remove()
    return normed[0]


@torch.no_grad()
def token_losses(model: HybridLM, batch: Batch) -> Tensor:
    """Loss of each next token in nats, fp32 [B, T]; 0 where there is no target. Never makes B x T x V logits."""
    x_ND = normed_states(model, batch.input_ids, batch.cu_seqlens).flatten(0, 1)
    targets_N = batch.targets[..., 0].flatten()
    losses = [F.cross_entropy(model.logits(x_ND[None, i:i + CHUNK_TOKENS])[0].float(), targets_N[i:i + CHUNK_TOKENS],
                              ignore_index=IGNORE, reduction="none") for i in range(0, len(x_ND), CHUNK_TOKENS)]
    return torch.cat(losses).view(batch.input_ids.shape)


def buckets(length: int) -> list[int]:
    """Lower borders of the position buckets below `length`.

    >>> buckets(100)
    [0, 16, 32, 64]
    """
    borders = [0]
    while (following := max(FIRST_BUCKET_POSITIONS, 2 * borders[-1])) < length:
        borders.append(following)
    return borders


def perplexity_by_position(model: HybridLM, batches: Iterable[Batch], length: int) -> dict[str, Any]:
    """Compute loss per token, perplexity and bits per byte over the batches, and the first two by position.

    A position counts the tokens before this one that the model sees: those of the same document and window of
    `length` tokens. A bucket holds positions from `start` up to, not including, `stop`.
    """
    borders = torch.tensor(buckets(length))
    nats_K, count_K = torch.zeros(len(borders), dtype=torch.float64), torch.zeros(len(borders), dtype=torch.int64)
    num_bytes, was_training = 0, model.training
    model.eval()
    try:
        for batch in batches:
            moved = batch.to(model.device)
            losses_N = token_losses(model, moved).flatten().cpu().double()
            bucket_N = torch.bucketize(moved.cu_seqlens.positions().flatten().cpu(), borders, right=True) - 1
            counted_N = batch.targets[..., 0].flatten() != IGNORE
            nats_K += torch.zeros_like(nats_K).index_add_(0, bucket_N, losses_N)
            count_K += torch.bincount(bucket_N[counted_N], minlength=len(borders))
            num_bytes += batch.num_bytes
    finally:
        model.train(was_training)
    stops = [*borders[1:].tolist(), length]
    rows = [{"start": start, "stop": stop, **_loss(nats, count)} for start, stop, nats, count
            in zip(borders.tolist(), stops, nats_K.tolist(), count_K.tolist(), strict=True)]
    total = float(nats_K.sum())
    return {**_loss(total, int(count_K.sum())), "bits_per_byte": bits_per_byte(total, num_bytes),
            "bytes": num_bytes, "sequence_length": length, "by_position": rows}


def _loss(nats: float, tokens: int) -> dict[str, float | int | None]:
    """Tokens, loss and perplexity of a bucket; None where it has no tokens."""
    mean = nats / tokens if tokens else None
    return {"tokens": tokens, "loss": mean, "perplexity": None if mean is None else perplexity(mean)}
