"""A model that training compares forwards with: the contract, and the divergence of next-token distributions.

B rows, T tokens, N tokens that count, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hybridlm.model.output import ModelOutput

CHUNK_LOGITS = 2**23  # logits of each model that are in memory at once


@dataclass(frozen=True)
class GuidedForward:
    """A forward with targets as a guide gets it.

    Args:
        model: the model that made it.
        input_ids: int64 [B, T], complete rows; None where the model was given embeddings.
        cu_seqlens: borders of packed documents, as the forward got them.
        hidden_states: the stream before the first layer and after each one, if the guide reads it.
        x_BTD: the output of the final norm, of the tokens held here.
        labels_BT: next tokens, -100 where none counts.
        count: tokens that losses are divided by; None: those that count here.
        loss: the language-model loss of this forward.
        batch_fraction: share of this forward in the global batch.
        text_BT: False for padding among the tokens held here; None: there is none.
    """

    model: Any
    input_ids: Tensor | None
    cu_seqlens: Any
    hidden_states: Sequence[Tensor]
    x_BTD: Tensor
    labels_BT: Tensor
    count: int | None
    loss: Tensor
    batch_fraction: float | Tensor
    text_BT: Tensor | None = None


class Guide(Protocol):
    """Computes losses and statistics of a forward by name, such as the divergence from a teacher.

    Attributes:
        reads_hidden_states: whether it gets the stream after each layer, which then stays in memory.
    """

    reads_hidden_states: bool

    def __call__(self, forward: GuidedForward) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return losses, each the share of this forward in that of the global batch, and statistics."""


def follow_guide(guide: Guide, forward: GuidedForward, output: ModelOutput,
                 weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Add the losses of a guide to those of a forward.

    Args:
        guide: what compares the forward.
        forward: the forward.
        output: its result, whose losses and loss are changed.
        weights: of the losses by name; those that are not named have 0.

    Returns:
        The statistics of the guide.
    """
    losses, stats = guide(forward)
    for name, value in losses.items():
        output.losses[name] = value
        weight = weights.get(name, 0.0)
        if weight:
            assert output.loss is not None
            output.loss = output.loss + weight * output.losses[name]
    return stats


def chunked_kl(x_ND: Tensor, teacher_x_ND: Tensor, logits: Callable[[Tensor], Tensor],
               teacher_logits: Callable[[Tensor], Tensor], *, vocab_size: int, temperature: float = 1.0,
               chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """Sum of KL(teacher || student) over tokens, without ever holding all logits.

    With a temperature t both distributions are softmax(logits / t), and the sum is multiplied by t^2, so that gradients
    keep their size (Hinton et al. 2015, section 2.1).

    Args:
        x_ND: the student's outputs of its final norm.
        teacher_x_ND: the teacher's.
        logits: from [n, D] to the student's logits [n, V].
        teacher_logits: the same of the teacher, whose width may be another.
        vocab_size: V.
        temperature: t.
        chunk: tokens at a time; None: as many as CHUNK_LOGITS allows.

    Returns:
        The sum of the divergences in nats, and the number of tokens for which both predict the same.

    Example:
        >>> x, other = torch.eye(3), torch.eye(3)[[1, 2, 0]]
        >>> kl, same = chunked_kl(x, other, lambda x: 2 * x, lambda x: 2 * x, vocab_size=3)
        >>> round(float(kl), 3), int(same)  # 3 (p_1 - p_2) 2, with p of (2, 0, 0)
        (4.083, 0)
    """

    def sums(x_nD: Tensor, teacher_x_nD: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            teacher_nV = teacher_logits(teacher_x_nD).float()
        student_nV = logits(x_nD).float()
        agrees = (student_nV.argmax(-1) == teacher_nV.argmax(-1)).sum()
        kl = F.kl_div((student_nV / temperature).log_softmax(-1), (teacher_nV / temperature).log_softmax(-1),
                      reduction="sum", log_target=True)
        return kl * temperature**2, agrees

    def checkpointed(x_nD: Tensor, teacher_x_nD: Tensor) -> tuple[Tensor, Tensor]:
        return checkpoint(sums, x_nD, teacher_x_nD, use_reentrant=False)

    if not len(x_ND):
        return x_ND.sum() * 0.0, torch.zeros((), dtype=torch.int64, device=x_ND.device)
    chunk = chunk or max(1, CHUNK_LOGITS // vocab_size)
    run = checkpointed if torch.is_grad_enabled() else sums
    parts = [run(x, t) for x, t in zip(x_ND.split(chunk), teacher_x_ND.split(chunk), strict=True)]
    kls, agreements = zip(*parts, strict=True)
    return torch.stack(kls).sum(), torch.stack(agreements).sum()


def relative_errors(student: Sequence[Tensor], teacher: Sequence[Tensor], text_BT: Tensor | None = None) -> Tensor:
    """|student - teacher|^2 / |teacher|^2 of each pair of tensors [B, ...], in fp32: [number of pairs].

    It is the mean of one ratio per row, which does not depend on how rows are divided into micro batches.

    Args:
        student: tensors [B, ...], with padding [B, T, ...].
        teacher: tensors of the same shapes.
        text_BT: bool, False for padding; the text of all rows then has one ratio, as where padding has been taken out.
            None: there is no padding.

    Example:
        >>> relative_errors([torch.tensor([[1.0, 0.0]])], [torch.tensor([[1.0, 2.0]])]).tolist()
        [0.800000011920929]
    """
    def per_row(x: Tensor) -> Tensor:
        x = x if text_BT is None else x[text_BT][None]
        return x.float().square().flatten(1).sum(1)

    return torch.stack([(per_row(a.float() - b.float()) / per_row(b).clamp(min=1e-30)).mean()
                        for a, b in zip(student, teacher, strict=True)])

