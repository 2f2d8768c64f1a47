"""Checks of the tokens that a model gets, and what layers are told of their rows.

B rows, T tokens per row, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hybridlm.model.config import ModelConfig
from hybridlm.model.output import ModelState
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import CuSeqlens

DocumentBorders = CuSeqlens | Tensor | Sequence[int]


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


def describe_rows(batch_and_length: torch.Size, device: torch.device, cu_seqlens: DocumentBorders | None,
                  state: ModelState | None, *, compiled: bool) -> SequenceInfo:
    """Describe positions and documents of the tokens of a forward, and check them against borders and state.

    Args:
        batch_and_length: rows B and tokens per row T.
        device: of the tokens.
        cu_seqlens: borders of packed documents; None: each row is one document.
        state: decode state that the tokens go on from, or None.
        compiled: layers are graphs of torch.compile, which have to serve any number of documents.

    Raises:
        ValueError: borders that do not fit the rows or stand beside a state, or more tokens than the state holds.
    """
    batch, length = batch_and_length
    if state is not None:
        if cu_seqlens is not None:
            raise ValueError("packed documents (cu_seqlens) cannot be decoded: give each its own row")
        if batch != state.batch or state.length + length > state.max_length:
            raise ValueError(f"the state holds {state.length} of at most {state.max_length} tokens in "
                             f"{state.batch} rows; got {length} more in {batch} rows")
        return SequenceInfo.make(batch, length, device, offset=state.length, padding_B=state.padding_B)
    if cu_seqlens is None:
        return SequenceInfo.make(batch, length, device)
    borders = CuSeqlens.of(cu_seqlens, device, batch * length).to(device)
    borders.check(batch, length)
    if compiled:  # the first graph already takes any number of documents
        torch._dynamo.maybe_mark_dynamic(borders.table, 0)
    return SequenceInfo.make(batch, length, device, borders)
