"""What a probe is: a task made on the fly, with answers that are known, that one ability decides.

B examples, T tokens an example. A probe has a vocabulary of its own; `targets[t]` is what the model should say at
position t, after token t, or -100 where nothing is asked.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from hybridlm.errors import require

IGNORE = -100
FILL = 0  # in every probe: a token that says nothing
Split = Literal["train", "test"]
_SPLITS = ("train", "test")


@dataclass(frozen=True)
class ProbeBatch:
    """Examples of one length."""

    input_ids: Tensor  # int64 [B, T]
    targets: Tensor  # int64 [B, T]

    def to(self, device: torch.device | str) -> ProbeBatch:
        """The batch on `device`."""
        return ProbeBatch(self.input_ids.to(device), self.targets.to(device))


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A task and its difficulty. Length is not part of it: the same task is asked at any length.

    An example is a pure function of (task, length, seed, split, index); the two splits never share their draws.
    Answers of several tokens are teacher-forced: each token is asked with the right ones before it.
    """

    task: ClassVar[str] = ""
    in_context: ClassVar[bool] = False  # the examples themselves show the rule: what stood behind it before comes again

    @property
    def vocab_size(self) -> int:
        """Ids that may occur, as input or answer."""
        raise TypeError(f"{type(self).__name__} does not say its vocabulary")

    @property
    def answer_ids(self) -> range:
        """The ids that answers are drawn from."""
        raise TypeError(f"{type(self).__name__} does not say its answers")

    @property
    def min_length(self) -> int:
        """Tokens that the task takes at least."""
        raise TypeError(f"{type(self).__name__} does not say its least length")

    def make(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Input ids [T] and targets [T] of one example of exactly `length` tokens."""
        raise TypeError(f"{type(self).__name__} makes no examples")

    @property
    def chance(self) -> float:
        """Token accuracy of guessing among the possible answers."""
        return 1 / len(self.answer_ids)

    def check_length(self, length: int) -> None:
        """Raise ConfigError if the task does not fit into `length` tokens."""
        require(length >= self.min_length, "length", f"is too short for {self.task} of this difficulty", got=length,
                expected=f"at least {self.min_length}")

    def batch(self, length: int, indices: Iterable[int], *, seed: int = 0, split: Split = "train") -> ProbeBatch:
        """The examples of `indices`.

        Raises:
            ConfigError: a length that the task does not fit into; a negative seed.
        """
        self.check_length(length)
        require(seed >= 0, "seed", "must not be negative", got=seed)
        stream = [zlib.crc32(self.task.encode()), _SPLITS.index(split), seed, length]
        made = [self.make(np.random.default_rng([*stream, index]), length) for index in indices]
        return ProbeBatch(*(torch.from_numpy(np.stack(part).astype(np.int64)) for part in zip(*made, strict=True)))


@dataclass(frozen=True)
class Score:
    """Right answers. `token`: share of the answered positions; `exact`: share of the examples without an error."""

    correct: int = 0
    tokens: int = 0
    perfect: int = 0
    examples: int = 0

    @classmethod
    def of(cls, predicted_BT: Tensor, targets_BT: Tensor) -> Score:
        """Compare predictions with targets; examples in which nothing is asked do not count."""
        asked_BT = targets_BT != IGNORE
        right_BT = (predicted_BT == targets_BT) & asked_BT
        asked_B, right_B = asked_BT.sum(1), right_BT.sum(1)
        counts_B = asked_B > 0
        return cls(int(right_B.sum()), int(asked_B.sum()), int(((right_B == asked_B) & counts_B).sum()),
                   int(counts_B.sum()))

    def __add__(self, other: Score) -> Score:
        return Score(self.correct + other.correct, self.tokens + other.tokens, self.perfect + other.perfect,
                     self.examples + other.examples)

    @property
    def token(self) -> float:
        return self.correct / max(self.tokens, 1)

    @property
    def exact(self) -> float:
        return self.perfect / max(self.examples, 1)


def scatter(rng: np.random.Generator, blocks: Sequence[Sequence[int]], background_T: np.ndarray) -> np.ndarray:
    """`background_T` with the blocks written over it in their order, without overlap, all placings equally likely."""
    sizes = np.array([len(block) for block in blocks])
    free = len(background_T) - int(sizes.sum())
    slots = np.sort(rng.choice(free + len(blocks), len(blocks), replace=False))
    starts = slots + np.cumsum(sizes - 1) - (sizes - 1)
    ids_T = background_T.copy()
    for start, block in zip(starts, blocks, strict=True):
        ids_T[start:start + len(block)] = block
    return ids_T


def ask(head: np.ndarray, questions: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[np.ndarray, np.ndarray]:
    """`head`, then each (question, answers): all but the last token of an answer stand in the input."""
    ids, targets = [head], [np.full(len(head), IGNORE)]
    for question, answers in questions:
        ids.append(np.array([*question, *answers[:-1]]))
        targets.append(np.array([*[IGNORE] * (len(question) - 1), *answers]))
    return np.concatenate(ids), np.concatenate(targets)


def positive(probe: Probe, *names: str) -> None:
    """Raise ConfigError unless these parameters are at least 1."""
    for name in names:
        require(getattr(probe, name) >= 1, name, "must be positive", got=getattr(probe, name))


def at_most(probe: Probe, name: str, limit: int, why: str) -> None:
    """Raise ConfigError if a parameter passes `limit`."""
    value = getattr(probe, name)
    require(value <= limit, name, why, got=value, expected=f"at most {limit}")
