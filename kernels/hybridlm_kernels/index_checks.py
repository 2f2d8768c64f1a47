"""Checks of indices whose values are on the device, on request: kernels trust them.

An index beyond its table reads memory that belongs to something else, and in a backward pass writes it. To look at
every index waits for the device, so it is done only where HYBRIDLM_CHECK_INDICES=1 is set.
"""

from __future__ import annotations

import os

from torch import Tensor

VARIABLE = "HYBRIDLM_CHECK_INDICES"


def check_indices(name: str, label: str, index: Tensor, size: int, *, lowest: int = 0, distinct: bool = False) -> None:
    """Raise ValueError where an index is outside of `lowest` to size - 1; nothing is read unless the variable is set.

    Args:
        name: the operation.
        label: the parameter.
        index: integers, any shape.
        size: of the table that they point into.
        lowest: smallest value allowed; -1 where that stands for none.
        distinct: whether those of the last dimension must differ, -1 apart.

    >>> import torch
    >>> check_indices("sparse_attention", "indices", torch.tensor([5]), 4)  # the variable is not set
    """
    if os.environ.get(VARIABLE) != "1" or not index.numel():
        return
    low, high = (int(x) for x in index.aminmax())
    if low < lowest or high >= size:
        raise ValueError(f"{name}: {label} must be from {lowest} to {size - 1}; got {low if low < lowest else high}")
    if distinct:
        ordered = index.sort(-1).values
        twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
        if bool(twice.any()):
            raise ValueError(f"{name}: {label} must be distinct in a list; "
                             f"{int(ordered[..., 1:][twice][0])} stands twice in one")
