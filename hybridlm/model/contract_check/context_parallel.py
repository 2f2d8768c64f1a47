"""Checks of context parallelism: shards of rows have the outputs, gradients and traffic that they should have.

B rows, T tokens, D hidden size.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from hybridlm.errors import ConfigError
from hybridlm.model.contract_check.subject import CPU, Subject
from hybridlm.model.contract_check.thread_shards import ThreadShardGroup, run_on_threads
from hybridlm.model.contract_check.verdicts import NotClaimed, require, require_close
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels.packing import CuSeqlens

ROWS = 2
LENGTH = 36  # tokens per row
# Borders of documents, in tokens: cuts at 9, 12, 18, 24, 27 lie inside documents and on their borders.
# One is empty, as in a table padded to a fixed size or of a request without tokens.
DOCUMENTS = (0, 1, 17, 18, 30, 36, 36, 45, 48, 72)
SHARD_COUNTS = (2, 3, 4)
# Collective that each kind of exchange calls: in the forward, and in the backward.
COLLECTIVES = {"gather": ("all_gather", "reduce_scatter"), "exchange": ("all_to_all", "all_to_all"),
           "from_previous": ("shift", "shift")}


def check_context_parallel(subject: Subject) -> str:
    """Shards of rows give the outputs, losses and gradients of the uncut rows, packed or not."""
    shards = _claimed_shards(subject)
    module = subject.build().train()
    x_BTD = subject.inputs(ROWS, LENGTH, seed=4)
    weights_BTD = subject.inputs(ROWS, LENGTH, seed=5)
    for packed in (False, True):
        uncut = _backward(subject, module, x_BTD, weights_BTD, uncut_rows(packed), 1.0)
        for size in shards:
            compare_shards(subject, module, x_BTD, weights_BTD, uncut, packed, size)
    return f"{' and '.join(str(size) for size in shards)} shards give the outputs, losses and gradients of uncut rows"


def compare_shards(subject: Subject, module: Any, x_BTD: Tensor, weights_BTD: Tensor, uncut: Any, packed: bool,
                   size: int) -> None:
    """Raise ContractViolation unless `size` shards give `uncut`, the result of the uncut rows."""

    def run_shard(group: ThreadShardGroup) -> Any:
        seq = uncut_rows(packed).shard_rows(group)
        x_BLD, weights_BLD = seq.local_tokens(x_BTD), seq.local_tokens(weights_BTD)
        return _backward(subject, copy.deepcopy(module), x_BLD, weights_BLD, seq, 1 / size)

    parts = run_on_threads(run_shard, size)
    what = f"with {size} shards{' of packed documents' if packed else ''} and without"
    y_BTD, dx_BTD, grads, aux = uncut
    require_close(torch.cat([part[0] for part in parts], 1), y_BTD, f"outputs {what}", rtol=1e-7, atol=1e-7)
    require_close(torch.cat([part[1] for part in parts], 1), dx_BTD, f"gradients of the inputs {what}",
                  rtol=1e-7, atol=1e-7)
    for name, expected in grads.items():
        terms = [part[2][name] for part in parts if part[2][name] is not None]
        require(bool(terms) == (expected is not None), f"{name} gets a gradient only in one of two ways: {what}")
        if expected is not None:
            require_close(torch.stack(terms).sum(0), expected, f"gradients of {name} {what}", rtol=1e-7, atol=1e-7)
    for name, value in aux.items():
        # Losses and statistics of mixers are means over tokens. Expert loads of a feed-forward are not.
        if subject.is_mixer or name.startswith("loss/"):
            mean = torch.stack([part[3][name] for part in parts]).mean(0)
            require_close(mean, value, f"{name} {what}", rtol=1e-7, atol=1e-7)


def check_shard_traffic(subject: Subject) -> str:
    """`shard_traffic` of the config equals the bytes that a shard sends in a forward and a backward."""
    if subject.sources:
        raise NotClaimed("it reads from another layer, whose exchanges would be counted too")
    size = _claimed_shards(subject)[0]
    module = subject.build(torch.float32).train()

    def run_shard(group: ThreadShardGroup) -> Counter[str]:
        seq = uncut_rows(False).shard_rows(group)
        x_BTD = subject.inputs(ROWS, LENGTH // size, torch.float32)
        _backward(subject, copy.deepcopy(module), x_BTD, torch.ones_like(x_BTD), seq, 1 / size)
        return group.sent_bytes

    found = run_on_threads(run_shard, size)[1]
    expected: Counter[str] = Counter()
    for traffic in subject.config.shard_traffic(subject.context, ROWS, LENGTH // size, size, element_bytes=4):
        forward, backward = COLLECTIVES[traffic.kind]
        expected[forward] += traffic.forward
        expected[backward] += traffic.backward
    require(+found == +expected, f"shard_traffic says {_in_words(expected)}; sent: {_in_words(found)}")
    return f"sent with {size} shards: {_in_words(found)}"


def uncut_rows(packed: bool) -> SequenceInfo:
    """Two rows of 36 tokens, each one document or several."""
    return SequenceInfo.make(ROWS, LENGTH, CPU, CuSeqlens(list(DOCUMENTS)) if packed else None)


def _claimed_shards(subject: Subject) -> list[int]:
    """Find the numbers of shards that the config accepts, and those of the layers it reads from.

    Raises:
        NotClaimed: it accepts none.
    """
    accepted = []
    for size in SHARD_COUNTS:
        try:
            for tested in (subject, *subject.sources.values()):
                tested.config.check_context_parallel(size, LENGTH // size)
        except ConfigError:
            continue
        accepted.append(size)
    if not accepted:
        raise NotClaimed("check_context_parallel of the config refuses shards")
    return accepted


def _backward(subject: Subject, module: Any, x_BTD: Tensor, weights_BTD: Tensor, seq: SequenceInfo,
              loss_weight: float) -> tuple[Tensor, Tensor | None, dict[str, Tensor | None], dict[str, Tensor]]:
    """Outputs, gradients of the inputs and of the parameters, and aux.

    A loss that the module computes itself is a mean over tokens: each shard adds it with `loss_weight`.
    """
    module.zero_grad()
    x_BTD = x_BTD.clone().requires_grad_()
    y_BTD, aux = subject.run_on(module, x_BTD, seq)
    losses = [value for name, value in aux.items() if name.startswith("loss/")]
    ((y_BTD * weights_BTD).sum() + sum(losses) * loss_weight).backward()
    grads = {name: p.grad for name, p in module.named_parameters()}
    return y_BTD.detach(), x_BTD.grad, grads, {name: value.detach() for name, value in aux.items()}


def _in_words(sent_bytes: Counter[str]) -> str:
    words = [f"{number:,} bytes by {method}" for method, number in sorted(sent_bytes.items()) if number]
    return ", ".join(words) or "nothing"
