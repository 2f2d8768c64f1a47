"""The contract of methods that make softmax attention of a trained model sparse, and their registry.

A method says which keys each query of a document reads. A new one is a class and its registration, in one file:

    @dataclass(frozen=True, kw_only=True)
    class Nearest(SparseMethod): ...

    register_sparse_method("nearest", Nearest)

T tokens of a document, Q queries of a piece, H query heads, G key/value heads, R = H/G, K head dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybridlm.config.serialization import from_dict
from hybridlm.errors import ConfigError, did_you_mean_or_own, require
from hybridlm.kind_registry import KindError


class KeyReader(ABC):
    """The method at work on one document in one layer."""

    @abstractmethod
    def reads(self, rows: slice, scores_HQT: Tensor) -> Tensor | None:
        """Find the keys that some queries read.

        Args:
            rows: the queries.
            scores_HQT: scores of the layer, scaled; -inf where a query does not see a key.

        Returns:
            Mask [H, Q, T]; keys that a query does not see, and its own, need not be right. None where these queries
            read all keys, as in a prompt: they do not count for what is read.
        """

    def correction(self, rows: slice) -> Tensor | None:
        """Logarithms [H, Q, T] that are added to the scores of the keys that are read; None adds nothing.

        Args:
            rows: the queries, for which `reads` has just been asked.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class SparseMethod(ABC):
    """A method and its options.

    Args:
        dense_layers: first softmax layers of the model that stay dense.
    """

    dense_layers: int = 0

    def __post_init__(self) -> None:
        self.require_at_least(0, "dense_layers")

    def require_at_least(self, least: int, *names: str) -> None:
        """Raise ConfigError unless the options are at least `least`."""
        for name in names:
            require(getattr(self, name) >= least, name, "is too small", got=getattr(self, name),
                    expected=f"at least {least}")

    def require_share(self, *names: str) -> None:
        """Raise ConfigError unless the options are above 0 and at most 1."""
        for name in names:
            require(0 < getattr(self, name) <= 1, name, "is no share", got=getattr(self, name),
                    expected="above 0, at most 1")

    @abstractmethod
    def reader(self, q_THK: Tensor, k_TGK: Tensor, scale: float, window: int | None = None) -> KeyReader:
        """Begin a document.

        Args:
            q_THK: its queries, as attention multiplies them.
            k_TGK: its keys.
            scale: factor of the scores.
            window: last keys that a query sees, its own included; None sees all. Keys outside are worth nothing.
        """

    def piece_length(self, length: int) -> int | None:
        """Borders between pieces of queries that the method needs; None for any."""
        return None

    def rectified_every(self) -> int:
        """Tokens after which keys and values are replaced by those of a dense pass (`rectification`); 0: never.

        `reader` then gets, for the queries between two passes, keys as the cache holds them.
        """
        return 0


@dataclass(frozen=True, kw_only=True)
class BudgetMethod(SparseMethod):
    """A method that reads a given number of keys.

    Args:
        budget: keys that a query reads, as the method counts them.
    """

    budget: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "budget")


@dataclass(frozen=True, kw_only=True)
class PromptMethod(SparseMethod):
    """A method that reads a prompt densely, and selects among its keys for the queries behind it.

    Args:
        prompt: tokens of the prompt; 0 takes half of each document.
    """

    prompt: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(0, "prompt")

    def piece_length(self, length: int) -> int | None:
        return self.prompt_tokens(length)

    def prompt_tokens(self, length: int) -> int:
        """Tokens of the prompt of a document."""
        return min(length, self.prompt or length // 2)


def visible_keys(rows: slice, tokens: int, window: int | None, device: torch.device) -> Tensor:
    """Mask [Q, T] of the keys that the queries of a piece see: their own and earlier ones, in a window the last.

    >>> visible_keys(slice(2, 4), 4, 2, torch.device("cpu")).int()
    tensor([[0, 1, 1, 0],
            [0, 0, 1, 1]], dtype=torch.int32)
    """
    s_T = torch.arange(tokens, device=device)
    t_Q1 = s_T[rows, None]
    return (s_T <= t_Q1) & (s_T > t_Q1 - (tokens if window is None else window))


SPARSE_METHODS: dict[str, type[SparseMethod]] = {}


def register_sparse_method(name: str, method: type[SparseMethod]) -> None:
    """Add a method under a name.

    Raises:
        KindError: the name is taken, or the class lacks a method of the contract.
    """
    lacking = sorted(getattr(method, "__abstractmethods__", ()))
    if lacking:
        raise KindError(f"sparse method '{name}': {method.__name__} lacks {' and '.join(lacking)}")
    taken = SPARSE_METHODS.get(name)
    if taken is not None and taken.__qualname__ != method.__qualname__:
        raise KindError(f"sparse method '{name}' is taken by {taken.__name__}")
    SPARSE_METHODS[name] = method


def make_sparse_method(name: str, options: Mapping[str, Any]) -> SparseMethod:
    """Make a method from its name and options.

    Raises:
        ConfigError: there is no such method or option, or a value cannot be used.

    >>> make_sparse_method("quest", {"budget": 32}).budget
    32
    """
    if name not in SPARSE_METHODS:
        known = sorted(SPARSE_METHODS)
        raise ConfigError("--sparse", "no such method", got=name, expected=f"one of {', '.join(known)}",
                          hint=did_you_mean_or_own(name, known, "method"))
    return from_dict(SPARSE_METHODS[name], dict(options), f"--sparse {name}")
