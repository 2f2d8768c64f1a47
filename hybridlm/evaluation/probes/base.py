"""The contract of probes and their registry.

A probe is a task whose examples are made on the fly, whose answers are known, and which one ability decides. It has a
vocabulary of its own; `targets[t]` is the token that the model should predict at position t, after token t, or -100
where nothing is asked. B examples, T tokens per example. A new one is a class and its registration, in one file:

    @dataclass(frozen=True, kw_only=True)
    class Repeat(Probe): ...

    register_probe("repeat_4", Repeat, period=4)
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from hybridlm.config.serialization import from_dict
from hybridlm.errors import ConfigError, did_you_mean_or_own, require
from hybridlm.kind_registry import KindError

IGNORE = -100
FILL = 0  # id of the token without meaning, the same in every probe
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
class Probe(ABC):
    """A task and its difficulty; its fields are the parameters. The same task is asked at any length.

    An example is a pure function of (task, length, seed, split, index); the two splits never share their draws.
    Answers of several tokens are teacher-forced: each token is asked with the right ones before it.
    """

    task: ClassVar[str] = ""
    in_context: ClassVar[bool] = False  # an example itself shows its rule: what followed a key before follows it again

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids that may occur, as input or answer: 0 .. vocab_size - 1."""

    @property
    @abstractmethod
    def answer_ids(self) -> range:
        """The ids that answers are drawn from."""

    @property
    @abstractmethod
    def min_length(self) -> int:
        """Fewest tokens into which an example fits."""

    @abstractmethod
    def make(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Make one example of exactly `length` tokens.

        Args:
            rng: the only source of randomness.
            length: tokens, at least `min_length`.

        Returns:
            Input ids [T] and targets [T], integers; targets are -100 where nothing is asked.
        """

    @property
    def chance(self) -> float:
        """Token accuracy of guessing among the possible answers."""
        return 1 / len(self.answer_ids)

    def check_length(self, length: int) -> None:
        """Raise ConfigError if the task does not fit into `length` tokens."""
        require(length >= self.min_length, "length", f"is too short for {self.task} of this difficulty", got=length,
                expected=f"at least {self.min_length}")

    def batch(self, length: int, indices: Iterable[int], *, seed: int = 0, split: Split = "train") -> ProbeBatch:
        """Make the examples with these indices.

        Args:
            length: tokens per example.
            indices: numbers of the examples, from 0 on.
            seed: the examples of two seeds are independent.
            split: those of `train` and `test` are independent too.

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
    """Counts of right answers, and the two accuracies made of them.

    `correct` of `tokens` asked positions are right, and `perfect` of `examples` have no error.

    >>> score = Score(correct=3, tokens=4, perfect=1, examples=2)
    >>> score.token, (score + score).exact
    (0.75, 0.5)
    """

    correct: int = 0
    tokens: int = 0
    perfect: int = 0
    examples: int = 0

    @classmethod
    def of(cls, predicted_BT: Tensor, targets_BT: Tensor) -> Score:
        """Compare predicted tokens with targets, both [B, T]; examples in which nothing is asked do not count."""
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
        """Fraction of the asked positions that are right."""
        return self.correct / max(self.tokens, 1)

    @property
    def exact(self) -> float:
        """Fraction of the examples without an error."""
        return self.perfect / max(self.examples, 1)


PROBES: dict[str, tuple[type[Probe], dict[str, Any]]] = {}  # name -> its class, and the parameters that make it


def register_probe(name: str, probe: type[Probe], **defaults: Any) -> None:
    """Register a probe under the name by which `--probe` and sweeps choose it.

    One class may stand under several names with different parameters. Registering the same class again, as a reload
    of its file does, replaces the earlier registration.

    Args:
        name: the probe's name.
        probe: its class.
        defaults: parameters in which this probe differs from the class.

    Raises:
        KindError: the name is taken by another class, or the class lacks a method of `Probe` or a `task`.
    """
    if not issubclass(probe, Probe) or not probe.task:
        raise KindError(f"probe '{name}': {probe.__name__} needs hybridlm.evaluation.probes.Probe as a base class and "
                        "the name of its task as `task`")
    lacking = sorted(probe.__abstractmethods__)
    if lacking:
        raise KindError(f"probe '{name}': {probe.__name__} lacks {' and '.join(lacking)}; see the docstrings in "
                        f"{Probe.__module__} for what is expected")
    registered = PROBES.get(name)
    if registered is not None and _qualified_name(registered[0]) != _qualified_name(probe):
        raise KindError(f"probe '{name}' is taken by {_qualified_name(registered[0])}; give {probe.__name__} another "
                        "name")
    PROBES[name] = (probe, defaults)


def make_probe(name: str, parameters: Mapping[str, Any] | None = None) -> Probe:
    """Make the probe of this name.

    Args:
        name: one that is registered.
        parameters: values that replace the probe's defaults.

    Raises:
        ConfigError: no such probe or parameter, or a value that it cannot have.

    >>> from hybridlm.evaluation.probes import make_probe
    >>> batch = make_probe("parity").batch(length=6, indices=[0, 1], seed=0)
    >>> batch.input_ids.shape, bool((batch.targets[:, 0] == batch.input_ids[:, 0]).all())
    (torch.Size([2, 6]), True)
    """
    if name not in PROBES:
        raise ConfigError("probe", "no probe of this name", got=name, expected=f"one of {', '.join(PROBES)}",
                          hint=did_you_mean_or_own(name, PROBES, "probe"))
    cls, defaults = PROBES[name]
    return from_dict(cls, {**defaults, **(parameters or {})}, f"probe.{name}")


def _qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def place_blocks(rng: np.random.Generator, blocks: Sequence[Sequence[int]], background_T: np.ndarray) -> np.ndarray:
    """Write the blocks over a copy of `background_T` [T], in their order, without overlap, uniformly at random."""
    sizes = np.array([len(block) for block in blocks])
    free = len(background_T) - int(sizes.sum())
    slots = np.sort(rng.choice(free + len(blocks), len(blocks), replace=False))
    starts = slots + np.cumsum(sizes - 1) - (sizes - 1)
    ids_T = background_T.copy()
    for start, block in zip(starts, blocks, strict=True):
        ids_T[start:start + len(block)] = block
    return ids_T


def append_questions(head: np.ndarray, questions: Sequence[tuple[Sequence[int], Sequence[int]]]
                     ) -> tuple[np.ndarray, np.ndarray]:
    """Append questions and their answers to an example.

    Args:
        head: ids [T'] in which nothing is asked.
        questions: (question ids, answer ids); all but the last token of an answer stand in the input.

    Returns:
        Input ids [T] and targets [T].
    """
    ids, targets = [head], [np.full(len(head), IGNORE)]
    for question, answers in questions:
        ids.append(np.array([*question, *answers[:-1]]))
        targets.append(np.array([*[IGNORE] * (len(question) - 1), *answers]))
    return np.concatenate(ids), np.concatenate(targets)


def require_positive(probe: Probe, *names: str) -> None:
    """Raise ConfigError unless the parameters of these names are at least 1."""
    for name in names:
        require(getattr(probe, name) >= 1, name, "must be positive", got=getattr(probe, name))


def require_at_most(probe: Probe, name: str, limit: int, why: str) -> None:
    """Raise ConfigError if the parameter `name` is above `limit`; `why` completes the message."""
    value = getattr(probe, name)
    require(value <= limit, name, why, got=value, expected=f"at most {limit}")
