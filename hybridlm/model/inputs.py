"""Checks of the tokens that a model gets. B rows, T tokens per row, D model width."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm.model.config import ModelConfig


def check_tokens(input_ids: Tensor | None, inputs_embeds: Tensor | None, config: ModelConfig) -> Tensor:
    """Check that token ids or embeddings were given, and that a model can read them.

    Args:
        input_ids: int64 [B, T], or None.
        inputs_embeds: [B, T, D], or None.
        config: of the model.

    Returns:
        The one of both that was given.

    Raises:
        ValueError: both or none were given, or with a shape or an id that the model does not have.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("pass input_ids or inputs_embeds, and not both")
    if inputs_embeds is not None:
        width = config.hidden_size
        if inputs_embeds.dim() != 3 or 0 in inputs_embeds.shape or inputs_embeds.shape[2] != width:
            raise ValueError(f"inputs_embeds must be [batch, time, {width}] with at least one token; got "
                             f"{list(inputs_embeds.shape)}")
        return inputs_embeds
    assert input_ids is not None
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids must be [batch, time] with at least one token; got {list(input_ids.shape)}")
    # On a GPU looking costs a synchronisation, and a compiled graph cannot look.
    if input_ids.device.type == "cpu" and not torch.compiler.is_dynamo_compiling():
        least, most = (int(end) for end in input_ids.aminmax())
        if least < 0 or most >= config.vocab_size:
            raise ValueError(f"input_ids must be from 0 to {config.vocab_size - 1}, the model's vocabulary; "
                             f"got {least if least < 0 else most}")
    return input_ids
