"""Recall of a language model without any training for it: repeated random tokens, and a needle in text.

A window of attention hardly changes the loss on text, and loses both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hybridlm.model.targets import IGNORE

NEEDLE_TOKENS = 16  # random tokens that stand early in a text and come again at its end
NEEDLE_CUE = 4  # of them, which are not scored: they say what comes


@dataclass(frozen=True)
class RecallSamples:
    """Rows of token ids, and labels: the same tokens where they are scored, -100 elsewhere; int64 [B, T] each."""

    ids: Tensor
    labels: Tensor


def repeated_samples(vocab_size: int, length: int, *, rows: int = 4, seed: int = 0) -> RecallSamples:
    """Make rows of random tokens, all different, that come twice; the second copy is scored from its second token on.

    Args:
        vocab_size: tokens are drawn from all of these.
        length: tokens of one copy; fewer where the vocabulary is smaller.
        rows: number of rows.
        seed: of the tokens.

    Example:
        >>> samples = repeated_samples(50, length=3, rows=1)
        >>> samples.ids.shape, [int(n) >= 0 for n in samples.labels[0]]
        (torch.Size([1, 6]), [False, False, False, False, True, True])
    """
    generator = torch.Generator().manual_seed(seed)
    once = torch.stack([torch.randperm(vocab_size, generator=generator)[:length] for _ in range(rows)])
    length = once.shape[1]
    ids = torch.cat([once, once], 1)
    labels = torch.full_like(ids, IGNORE)
    labels[:, length + 1 :] = ids[:, length + 1 :]
    return RecallSamples(ids, labels)


def needle_samples(text: Tensor, vocab_size: int, *, seed: int = 0) -> RecallSamples:
    """Put random tokens near the start of each row of text, and again at its end, where they are scored.

    Args:
        text: int64 [B, T] of more than 4 needles' length.
        vocab_size: the needle is drawn from all of these.
        seed: of the needle.
    """
    rows, length = text.shape
    generator = torch.Generator().manual_seed(seed)
    needle = torch.randint(vocab_size, (rows, NEEDLE_TOKENS), generator=generator)
    ids = text.clone()
    start = length // 8
    ids[:, start : start + NEEDLE_TOKENS] = needle
    ids[:, -NEEDLE_TOKENS:] = needle
    labels = torch.full_like(ids, IGNORE)
    labels[:, -NEEDLE_TOKENS + NEEDLE_CUE :] = needle[:, NEEDLE_CUE:]
    return RecallSamples(ids, labels)


@torch.no_grad()
def recall_nll(model: nn.Module, samples: RecallSamples, device: torch.device) -> float:
    """Mean negative log-likelihood of the scored tokens, in nats.

    Args:
        model: a HybridLM, or what an engine has put around it, in evaluation mode.
        samples: rows and what is scored.
        device: where the model computes.
    """
    return float(model(samples.ids.to(device), labels=samples.labels.to(device)).losses["lm"])
