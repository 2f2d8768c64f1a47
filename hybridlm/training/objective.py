"""What a step minimises, written so that the parts of a batch add up to the whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from hybridlm.distributed.engine import Contribution, Objective
from hybridlm.model.output import GlobalBatch

GROUPS = {"router": "moe", "indexer": "dsa"}  # a statistic's group in the records, by how its name begins
# The panel from the step's own loads (`metrics.router_panel`) says these exactly; those of a part would not.
FROM_LOADS = ("max_violation", "dead_experts")


def global_batch(parts: Sequence[Any], over_ranks: Callable[[list[int]], list[int]] = list) -> GlobalBatch:
    """Counted targets and positions of the parts together, those of all ranks."""
    counts = torch.stack([(part.targets >= 0).sum((0, 1)) for part in parts]).sum(0)
    *targets, tokens = over_ranks([*counts.tolist(), sum(part.input_ids.numel() for part in parts)])
    return GlobalBatch(tuple(targets), tokens)


def language_model(batch: GlobalBatch) -> Objective:
    """Next tokens, with what the model adds to them (MTP, balance, z): the loss the model itself composes."""

    def contribute(model: nn.Module, part: Any) -> Contribution:
        output = model(part.input_ids, targets=part.targets, cu_seqlens=part.cu_seqlens, global_batch=batch)
        values = {f"loss/{name}": value.detach() for name, value in output.losses.items()}
        for name, value in output.stats.items():
            if not name.startswith(FROM_LOADS):
                group = next((group for start, group in GROUPS.items() if name.startswith(start)), "stat")
                values[f"{group}/{name}"] = value * output.batch_fraction
        return Contribution(output.loss, values)

    return contribute
