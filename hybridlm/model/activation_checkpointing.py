"""A layer under activation checkpointing: its inner activations are computed again in the backward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from hybridlm.model.mixers.contract import Aux
from hybridlm.model.residual.contract import Stream
from hybridlm.model.sequence import SequenceInfo
from hybridlm.model.sharing import SharedStore


def run_checkpointed(module: nn.Module, stream: Stream, seq: SequenceInfo,
                     *extra: Any) -> tuple[Stream, dict[str, Aux]]:
    """Run a layer whose inner activations are computed again in the backward.

    Each computation starts from what earlier layers have left before this layer ran: values that later layers leave
    must not reach the second one.
    """
    before = seq.shared.copy()
    after: list[SharedStore] = []

    def run(stream: Stream, *extra: Any) -> tuple[Stream, dict[str, Aux]]:
        local = replace(seq, shared=before.copy())
        out = module(stream, local, *extra)
        after.append(local.shared)
        return out

    out = checkpoint(run, stream, *extra, use_reentrant=False, preserve_rng_state=False)
    seq.shared = after[0]
    return out
