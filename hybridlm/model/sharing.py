"""Values that layers leave for later layers within one forward pass: a typed store, and who reads what.

A mixer's config says which kinds it leaves and reads (`leaves`, `reads`), so that a model in which a reader has no
source is refused when its config is made. In the forward the source calls `seq.leave`, a reader `seq.read`; both know
the layer of the source from their `LayerContext`. A layer leaves only what some layer reads.

While decoding, the source alone keeps a decode state. At each step it leaves what a reader needs of all tokens, those
of earlier steps included; a reader keeps nothing of it, and its `new_state` and `state_bytes` do not count it.

A layer that runs several times replaces what it left before. A reader in a repeated segment gets the value of the same
run of the segment, one behind it that of the last run.

Activation checkpointing runs layers again from the last to the first. Each of these runs gets the store as it was
before its layer ran for the first time. Gradients reach the source through the value itself, as through any tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class SharedKind:
    """A kind of value that one layer leaves and later layers read.

    Args:
        name: what the value is, in error messages: "the keys that an indexer selects".
        gradient: whether gradients of the readers reach the source; otherwise its tensors are detached.
        context_parallel: what readers get where rows are divided into shards. "local": the tensors of the tokens held
            here, exactly as they were left. "gathered": the value is one tensor [B, T, ...] over tokens, and readers
            get [B, S, ...] of all tokens up to the end of the shard; the source gathers once for all readers.
        every_layer: whether every layer leaves one, whatever its mixer.
    """

    name: str
    gradient: bool
    context_parallel: Literal["local", "gathered"] = "local"
    every_layer: bool = False


# The input [B, T, D] of a layer's mixer, behind its norm.
LAYER_INPUT = SharedKind("the input of a layer", gradient=True, every_layer=True)


@dataclass(frozen=True)
class SharedRead:
    """A value that a mixer reads: of `kind`, from an earlier layer that leaves one.

    `layer` is the index of that layer, or the name of a mixer, whose nearest earlier layer is read; None: the nearest
    one of any mixer. `option` is the option of the mixer that asks for it, for error messages.
    """

    kind: SharedKind
    layer: int | str | None = None
    option: str = ""


class SharedStore:
    """The values that layers have left so far in one forward pass, by kind and layer.

    >>> store, kind = SharedStore(), SharedKind("a number", gradient=False)
    >>> store.leave(kind, 2, 17)
    >>> store.read(kind, 2)
    17
    """

    def __init__(self) -> None:
        self._values: dict[tuple[SharedKind, int], Any] = {}

    def leave(self, kind: SharedKind, layer: int, value: Any) -> None:
        """Store the value of layer `layer`, which replaces an earlier one."""
        self._values[kind, layer] = value

    def read(self, kind: SharedKind, layer: int) -> Any:
        """The value that layer `layer` left.

        Raises:
            RuntimeError: it has left none in this forward.
        """
        if (kind, layer) not in self._values:
            raise RuntimeError(f"layer {layer} has not left {kind.name} in this forward")
        return self._values[kind, layer]

    def copy(self) -> SharedStore:
        """A store with the same values: what is left in one of the two is not in the other."""
        copied = SharedStore()
        copied._values = dict(self._values)
        return copied
