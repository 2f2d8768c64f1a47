"""The loss of a training step, computed per micro batch so that those of a global batch add up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from hybridlm.distributed.engine import Contribution
from hybridlm.model.output import GlobalBatch

# Group of a statistic in the records of metrics.jsonl, by how its name begins; all others are in "stat".
STAT_GROUPS = {"router": "moe", "indexer": "dsa"}
# Statistics against a teacher: their group is how their name begins.
TEACHER_GROUPS = ("align", "distill", "gap", "hidden")
# `metrics.router_panel` computes these from the loads of the whole step; means over micro batches would be wrong.
COMPUTED_FROM_LOADS = ("max_violation", "dead_experts")


def record_name(stat: str) -> str:
    """Name a statistic of `ModelOutput.stats` as the records do.

    Example:
        >>> record_name("indexer_recall"), record_name("my_stat"), record_name("align_error/3")
        ('dsa/indexer_recall', 'stat/my_stat', 'align/error/3')
    """
    begin, _, rest = stat.partition("_")
    if begin in TEACHER_GROUPS:
        return f"{begin}/{rest}"
    group = next((group for start, group in STAT_GROUPS.items() if stat.startswith(start)), "stat")
    return f"{group}/{stat}"


def measure_global_batch(micro_batches: Sequence[Any],
                         all_sum: Callable[[list[int]], list[int]] = list) -> GlobalBatch:
    """Count the targets and the tokens of this rank's micro batches, summed over ranks by `all_sum`."""
    counts = torch.stack([(batch.targets >= 0).sum((0, 1)) for batch in micro_batches]).sum(0)
    *targets, tokens = all_sum([*counts.tolist(), sum(batch.num_text_tokens for batch in micro_batches)])
    return GlobalBatch(tuple(targets), tokens)


def language_model_loss(model: nn.Module, micro_batch: Any, global_batch: GlobalBatch) -> Contribution:
    """Compute the loss that the model composes (next tokens, MTP, balance, ...) on one micro batch.

    Returns:
        The micro batch's share of the global batch's loss. Values: `loss/NAME` for each loss, not weighted, and
        statistics in their groups (`record_name`).
    """
    output = model(micro_batch.input_ids, targets=micro_batch.targets, cu_seqlens=micro_batch.cu_seqlens,
                   global_batch=global_batch, text_mask=micro_batch.text_mask)
    values = {f"loss/{name}": value.detach() for name, value in output.losses.items()}
    for name, value in output.stats.items():
        if not name.startswith(COMPUTED_FROM_LOADS):
            values[record_name(name)] = value * output.batch_fraction
    return Contribution(output.loss, values)


def step_loss(micro_batches: Sequence[Any],
              all_sum: Callable[[list[int]], list[int]] = list) -> Callable[[nn.Module, Any], Contribution]:
    """Return the loss function of an optimizer step: from the model and one of the micro batches to its contribution.

    Args:
        micro_batches: those of this rank.
        all_sum: sums counts over ranks; all of them call it together.
    """
    return partial(language_model_loss, global_batch=measure_global_batch(micro_batches, all_sum))
