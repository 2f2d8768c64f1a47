"""The erasing part of a delta rule: the key at which the state is read, the vector it is erased along, and when.

Legend: B rows, T tokens per row, H query/key heads, HV value heads, K key head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hybridlm_kernels.recurrence.arguments import check_per_token


@dataclass(frozen=True, eq=False)
class Erase:
    """The erasing part of a delta rule that differs from the plain one, which reads and erases at the key it writes.

    Args:
        key: the erase key p, [B, T, H, K] or [B, T, HV, K], at which the state is read; None is the write key.
        vector: the erase vector b, in the same shapes, along which the read is added; None is -beta k.
        before_decay: whether the state is read before it decays.
    """

    key: Tensor | None = None
    vector: Tensor | None = None
    before_decay: bool = False

    @classmethod
    def of(cls, name: str, key: Tensor | None, vector: Tensor | None, before_decay: bool, beta: Tensor | None,
           k_BTHK: Tensor, value_heads: int) -> Erase | None:
        """Check the arguments of an operation; None where they say nothing beyond the plain delta rule.

        Raises:
            ValueError: a shape does not fit, or beta has no place beside a free erase vector.
        """
        if key is None and vector is None and not before_decay:
            return None
        B, T, H, K = k_BTHK.shape
        shapes: dict[str, tuple[int, ...]] = {"per key head": (B, T, H, K), "per value head": (B, T, value_heads, K)}
        for label, x in (("erase_key", key), ("erase_vector", vector)):
            if x is not None:
                check_per_token(name, label, x, shapes)
        if vector is not None and beta is not None:
            raise ValueError(f"{name}: beta has no place beside erase_vector; multiply k and erase_vector by it")
        return cls(key, vector, before_decay)

    @property
    def form(self) -> str:
        """Words for what is erased and when it is read, by which backends accept or refuse a call."""
        what = "free vector" if self.vector is not None else "own key" if self.key is not None else "write key"
        return f"{what}, read {'before' if self.before_decay else 'after'} the decay"


def form_of(erase: Erase | None) -> str:
    """The form of `erase`, "plain" for None."""
    return "plain" if erase is None else erase.form


def tensors_of(erase: Erase | None) -> tuple[Tensor | None, Tensor | None]:
    """The erase key and the erase vector, None where there is none."""
    return (None, None) if erase is None else (erase.key, erase.vector)
