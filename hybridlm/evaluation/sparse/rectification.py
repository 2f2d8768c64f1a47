"""Sparse decoding whose keys and values are replaced, every so many tokens, by those of a dense pass over these tokens.

The dense pass attends to what earlier passes have replaced, so it gives the keys and values of dense attention to the
whole document. A text that is known can therefore be computed at once, in two streams through all layers: dense
attention, and the sparse decoding, whose queries read the keys of the dense stream before the last replacement and
those of their own stream behind it.

Source: Sun et al. 2025, ReSA (arXiv 2506.04108), section 2.3.
B rows, T tokens of a document, H query heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hybridlm.errors import ConfigError
from hybridlm.model.mixers.common.dense_attention import AttentionCall, replaced_attention
from hybridlm.model.model import HybridLM
from hybridlm_kernels.packing import CuSeqlens

PROBE_TOKENS = 8
PROBE_TOLERANCE = 1e-3  # of the largest logit


@contextmanager
def two_streams(model: HybridLM) -> Iterator[None]:
    """Context in which forwards run every row twice, and return the outputs of the second stream alone.

    Rows of the first stream stand before those of the second in everything that layers compute.
    """

    def double(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        ids_BT = args[0] if args else kwargs["input_ids"]
        borders = kwargs.get("cu_seqlens")
        if borders is not None:
            borders = CuSeqlens.of(borders, ids_BT.device).host
            end = borders[-1]
            borders = CuSeqlens([*borders, *(end + border for border in borders[1:])], ids_BT.device)
        return (torch.cat([ids_BT, ids_BT]), *args[1:]), kwargs | {"cu_seqlens": borders}

    def second_half(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output.chunk(2)[1]

    hooks = [model.register_forward_pre_hook(double, with_kwargs=True),
             model.norm.register_forward_hook(second_half)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def rectified(own_TGX: Tensor, dense_TGX: Tensor, start: int) -> Tensor:
    """Keys or values as the cache holds them: those of the dense stream up to `start`, then own ones."""
    return torch.cat([dense_TGX[:start], own_TGX[start:]])


@torch.no_grad()
def require_attention_alone(model: HybridLM) -> None:
    """Refuse a model in which something else than softmax attention to keys carries earlier tokens.

    Such layers keep a state that a pass over the newest tokens cannot replace. They are found by what they do: with
    attention that reads each query's own token alone, no output may depend on an earlier token.

    Raises:
        ConfigError: an output does.
    """

    def own_value(call: AttentionCall) -> Tensor:
        return call.v_BSGV.repeat_interleave(call.q_BTHK.shape[2] // call.v_BSGV.shape[2], 2)

    ids_T = torch.arange(PROBE_TOKENS, device=model.device) % model.config.vocab_size
    other_T = torch.cat([ids_T[-1:], ids_T[1:]])
    was_training = model.training
    model.eval()
    try:
        with replaced_attention(own_value):
            logits_BTV = model(torch.stack([ids_T, other_T])).logits[:, 1:].float()
    finally:
        model.train(was_training)
    difference = (logits_BTV[0] - logits_BTV[1]).abs().max()
    if difference > PROBE_TOLERANCE * logits_BTV.abs().max():
        raise ConfigError("--sparse", "replaces keys and values by those of a dense pass, and this model also keeps "
                          "other states of earlier tokens",
                          got=f"mixers {', '.join(sorted(set(model.config.layers())))}",
                          expected="a model whose layers all have dense softmax attention or a window of it")
