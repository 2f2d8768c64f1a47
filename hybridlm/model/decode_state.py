"""Decode states: tensors that a layer keeps of the tokens it has seen. Updated in place, without gradients.

B rows, S tokens kept, H query heads, G key/value heads of attention, HV value heads of recurrences,
K key dim, V value dim, C channels, W taps of a convolution.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm.errors import ConfigError


class TokenCache:
    """One tensor per past token: [B, S, ...].

    The buffer takes dtype and device from the first tokens and doubles up to `max_length`. With `window`, only the
    `window - 1` newest tokens stay: those that the next token can still see; with `first_tokens`, so many from the
    start stay too, before them.
    """

    def __init__(self, max_length: int, window: int | None = None, first_tokens: int = 0):
        self.max_length = max_length
        self.window = window
        self.first_tokens = first_tokens
        self.length = 0  # tokens seen
        self._buffer: Tensor | None = None

    def append(self, x: Tensor) -> Tensor:
        """Add [B, T, ...]; return the kept tokens and the new ones, [B, S, ...].

        Raises:
            ConfigError: more tokens than `max_length`.
        """
        x = x.detach()
        start = self.length
        self.length += x.shape[1]
        if self.length > self.max_length:
            raise ConfigError("max_length", "the decode state is full", got=self.length,
                              expected=f"at most {self.max_length} tokens", hint="make it with a larger max_length")
        if self.window is not None:
            x = x if self._buffer is None else torch.cat([self._buffer, x], 1)
            newest = max(x.shape[1] - self.window + 1, self.first_tokens)
            self._buffer = torch.cat([x[:, : self.first_tokens], x[:, newest:]], 1)
            return x
        if self._buffer is None or self.length > self._buffer.shape[1]:
            self._buffer = self._grown(x, start)
        self._buffer[:, start : self.length] = x
        return self._buffer[:, : self.length]

    def _grown(self, x: Tensor, kept: int) -> Tensor:
        # The first tokens are usually a whole prompt: leave room for some more.
        capacity = max(self.length + 64, 0 if self._buffer is None else 2 * self._buffer.shape[1])
        grown = x.new_empty(x.shape[0], min(capacity, self.max_length), *x.shape[2:])
        if self._buffer is not None:
            grown[:, :kept] = self._buffer[:, :kept]
        return grown

    def joined(self, others: Sequence[TokenCache], padding: Sequence[int], max_length: int) -> TokenCache:
        """One cache of the rows of this one and of `others`, each padded in front by zeros.

        Args:
            others: caches of the same layer.
            padding: entries in front of this cache and of each of the others, which makes them equally long.
            max_length: of the result.
        """
        caches = [self, *others]
        result = TokenCache(max_length, self.window, self.first_tokens)
        result.length = self.length + padding[0]
        kept = [cache.kept for cache in caches]
        if kept[0] is not None:
            length = max(tokens.shape[1] for tokens in kept if tokens is not None)
            rows = [F.pad(tokens, (0, 0) * (tokens.dim() - 2) + (length - tokens.shape[1], 0))
                    for tokens in kept if tokens is not None]
            result._buffer = torch.cat(rows)
        return result

    @property
    def kept(self) -> Tensor | None:
        """The tokens kept, [B, S, ...]; None before the first."""
        return self._buffer if self._buffer is None or self.window is not None else self._buffer[:, : self.length]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tokens kept (the buffer may have room for more)."""
        if self._buffer is None:
            return 0
        used = self._buffer if self.window is not None else self._buffer[:, : self.length]
        return used.numel() * used.element_size()


class EntryCache:
    """One tensor for each complete window of past tokens, [B, E, ...], and the tokens of windows still open.

    Args:
        max_length: tokens of a row.
        length: tokens of a window.
        stride: tokens from one window to the next, the first of which starts at token 0.
        before: tokens in front of a window that `combine` gets too; zeros in front of token 0.
    """

    def __init__(self, max_length: int, length: int, stride: int, before: int = 0):
        self.entries = TokenCache(max(1, max_length // stride))
        self.window, self.stride, self.before = length, stride, before
        self.length = 0  # tokens seen
        self._open: Tensor | None = None

    def append(self, x_BT: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Add tokens and return the entries of all complete windows.

        Args:
            x_BT: the new tokens [B, T, ...].
            combine: makes entries [B, E, ...] of windows [B, E, before + L, ...] and the positions [B, E] of their
                first tokens, those before it not counted.
        """
        x_BT, begin = x_BT.detach(), self.entries.length * self.stride  # position of the first token behind `before`
        if self._open is None and self.before:
            self._open = x_BT.new_zeros(x_BT.shape[0], self.before, *x_BT.shape[2:])
        x_BT = x_BT if self._open is None else torch.cat([self._open, x_BT], 1)
        tokens = x_BT.shape[1] - self.before
        self.length = begin + tokens
        count = max(0, (tokens - self.window) // self.stride + 1)
        complete = self.entries.kept
        if count == 0 and complete is not None:  # without it, `combine` says what shape entries have
            self._open = x_BT
            return complete
        device = x_BT.device
        start_E = torch.arange(count, device=device) * self.stride
        token_EL = start_E[:, None] + torch.arange(self.before + self.window, device=device)
        entries = combine(x_BT[:, token_EL], (begin + start_E).expand(x_BT.shape[0], count))
        self._open = x_BT[:, count * self.stride :].clone()
        return self.entries.append(entries)

    @property
    def num_bytes(self) -> int:
        """Bytes of the entries and of the open tokens."""
        return self.entries.num_bytes + (0 if self._open is None else self._open.numel() * self._open.element_size())


def index_cache(max_length: int, pool: int | None) -> TokenCache | EntryCache:
    """Make a cache for the keys of an indexer: one key per token, or one per pool of `pool` tokens."""
    return TokenCache(max_length) if pool is None else EntryCache(max_length, pool, pool)


class NoState:
    """The decode state of a layer that keeps nothing, because it reads what an earlier layer keeps."""

    num_bytes = 0


@dataclass
class LayerState:
    """Decode states of the two branches of a layer; None for a branch that keeps none."""

    mixer: Any
    feed_forward: Any

    @property
    def num_bytes(self) -> int:
        """Bytes of both states."""
        return sum(state.num_bytes for state in (self.mixer, self.feed_forward) if state is not None)


def reorder_rows(state: Any, rows: Tensor) -> Any:
    """Reorder the rows of a decode state, as beam search needs it.

    Args:
        state: a decode state of any kind: None, tensors [B, ...], and lists, tuples, dicts and objects of such; objects
            are changed in place.
        rows: int64 [B], the row that each new row continues.

    Returns:
        The state; the same object where it is one.
    """
    if isinstance(state, Tensor):
        return state.index_select(0, rows.to(state.device))
    if isinstance(state, list | tuple):
        return type(state)(reorder_rows(item, rows) for item in state)
    if isinstance(state, dict):
        return {key: reorder_rows(item, rows) for key, item in state.items()}
    for name, value in vars(state).items() if hasattr(state, "__dict__") else ():
        setattr(state, name, reorder_rows(value, rows))
    return state


def join_rows(states: Sequence[Any], padding: Sequence[int], max_length: int) -> Any:
    """Join the decode states of one layer, for rows that may hold unlike numbers of tokens.

    Args:
        states: states of one kind, as `reorder_rows` takes them. One that is more than its tensors has a method
            `joined`, as `TokenCache`, which pads in front.
        padding: entries in front of the caches of each, which makes them equally long.
        max_length: the most tokens of a row of the result, padding included.

    Returns:
        A state of all their rows, in the same order.
    """
    first = states[0]
    if hasattr(first, "joined"):
        return first.joined(states[1:], padding, max_length)
    if isinstance(first, Tensor):
        return torch.cat(list(states))
    if isinstance(first, list | tuple):
        return type(first)(join_rows(items, padding, max_length) for items in zip(*states, strict=True))
    if isinstance(first, dict):
        return {key: join_rows([state[key] for state in states], padding, max_length) for key in first}
    if hasattr(first, "__dict__"):
        result = copy.copy(first)
        for name in vars(first):
            setattr(result, name, join_rows([getattr(state, name) for state in states], padding, max_length))
        return result
    return first


def device_of(state: Any) -> torch.device:
    """The device of the first tensor in a decode state; the CPU where it has none."""
    found = first_tensor(state)
    return torch.device("cpu") if found is None else found.device


def first_tensor(state: Any) -> Tensor | None:
    """The first tensor in a decode state."""
    if isinstance(state, Tensor):
        return state
    items = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else \
        vars(state).values() if hasattr(state, "__dict__") else ()
    return next((found for item in items if (found := first_tensor(item)) is not None), None)


@dataclass
class AttentionState:
    """Decode state of grouped-query attention: keys [B, S, G, K], values [B, S, G, V], index keys [B, S, I].

    With an indexer over pools the index keys are [B, P, I], one per pool.
    """

    keys: TokenCache
    values: TokenCache
    index_keys: TokenCache | EntryCache

    @classmethod
    def empty(cls, max_length: int, window: int | None = None, pool: int | None = None,
              first_tokens: int = 0) -> AttentionState:
        keys, values = (TokenCache(max_length, window, first_tokens) for _ in range(2))
        return cls(keys, values, index_cache(max_length, pool))

    @property
    def num_bytes(self) -> int:
        return self.keys.num_bytes + self.values.num_bytes + self.index_keys.num_bytes


@dataclass
class LatentState:
    """Decode state of MLA: the normed latent, then the rotated shared key, [B, S, kv_lora_rank + qk_rope_head_dim]."""

    latent: TokenCache
    index_keys: TokenCache | EntryCache

    @classmethod
    def empty(cls, max_length: int, pool: int | None = None) -> LatentState:
        return cls(TokenCache(max_length), index_cache(max_length, pool))

    @property
    def num_bytes(self) -> int:
        return self.latent.num_bytes + self.index_keys.num_bytes


@dataclass
class RecurrentState:
    """Decode state of linear mixers: the state matrix [B, HV, K, V], the last inputs of convolutions [B, C, W - 1].

    `matrix` is None, and `conv` empty, before the first token: both then count as zeros. A decode step runs one
    convolution for all projections, and keeps their inputs in one tensor, the entry `JOINED`, in place of theirs.
    `scan` holds the states of scans that a mixer runs beside its matrix.
    """

    JOINED: ClassVar[str] = "all"
    matrix: Tensor | None = None
    conv: dict[str, Tensor] = field(default_factory=dict)
    scan: TensorState = field(default_factory=lambda: TensorState())

    def joined_conv(self, names: Sequence[str]) -> Tensor | None:
        """The last inputs of the convolutions of `names`, one behind the other; None before the first token."""
        if self.JOINED not in self.conv and self.conv:
            self.conv = {self.JOINED: torch.cat([self.conv[name] for name in names], 1)}
        return self.conv.get(self.JOINED)

    def joined(self, others: Sequence[RecurrentState], padding: Sequence[int], max_length: int) -> RecurrentState:
        """One state of the rows of this one and of `others`."""
        states = [self, *others]
        names = next((tuple(state.conv) for state in states if self.JOINED not in state.conv), ())
        conv = [inputs for state in states if (inputs := state.joined_conv(names)) is not None]
        matrices = [state.matrix for state in states if state.matrix is not None]
        scan = join_rows([state.scan for state in states], padding, max_length)
        return RecurrentState(torch.cat(matrices), {self.JOINED: torch.cat(conv)} if conv else {}, scan)

    def set_joined_conv(self, inputs_BCW: Tensor) -> None:
        """Set the last inputs of all convolutions, one behind the other."""
        self.conv[self.JOINED] = inputs_BCW

    def separate_conv(self, widths: Mapping[str, int]) -> dict[str, Tensor]:
        """The last inputs of each convolution by its name, given their channels."""
        if self.JOINED in self.conv:
            separate = self.conv[self.JOINED].split(list(widths.values()), 1)
            self.conv = {name: inputs.contiguous() for name, inputs in zip(widths, separate, strict=True)}
        return self.conv

    @property
    def num_bytes(self) -> int:
        tensors = [*self.conv.values(), *([] if self.matrix is None else [self.matrix])]
        return sum(t.numel() * t.element_size() for t in tensors) + self.scan.num_bytes


@dataclass
class TensorState:
    """Decode state of named tensors [B, ...], such as last tokens, inputs of convolutions and recurrent states.

    A name that is missing has not been written yet; its reader takes zeros, or what the recurrence starts from.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())
