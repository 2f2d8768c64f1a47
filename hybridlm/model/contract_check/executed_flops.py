"""FLOPs that are executed while a module runs, split by what they multiply."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


def _attention_flops(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, *args: Any, **kwargs: Any) -> int:
    """Both products of softmax attention over all T x S scores: a causal kernel on the CPU skips none."""
    batch, heads, queries, key_dim = q_BHTK.shape
    return 2 * batch * heads * queries * k_BHSK.shape[2] * (key_dim + v_BHSV.shape[3])


def _grouped_product_flops(x_NK: Tensor, weight_EKM: Tensor, *args: Any, **kwargs: Any) -> int:
    """Rows sorted by expert, each times the matrix of its expert."""
    return 2 * x_NK.shape[-2] * x_NK.shape[-1] * weight_EKM.shape[-1]


# torch counts matrix products and the attention kernels of GPUs; these are the others that run on a CPU.
COUNTERS = {**flop_registry, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
            torch.ops.aten._grouped_mm: _grouped_product_flops}


class ExecutedFlops(TorchDispatchMode):
    """Counts the FLOPs of everything under it; a multiply-add counts as 2.

    `weights`: products with one of `parameters`, or with a view of one.
    `others`: products of two activations, such as scores of attention.
    `elementwise`: one per element of every other operation's output.

    >>> layer, x = torch.nn.Linear(3, 5, bias=False), torch.ones(7, 3)
    >>> with ExecutedFlops(layer.parameters()) as flops, torch.no_grad():
    ...     _ = layer(x) * 2
    >>> flops.weights, flops.others, flops.elementwise
    (210, 0, 35)
    """

    def __init__(self, parameters: Iterable[Tensor]):
        super().__init__()
        self.storages = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self.weights = self.others = self.elementwise = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = COUNTERS.get(func._overloadpacket)
        if count is not None:
            operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            flops = count(*args, **(kwargs or {}), out_val=result)  # type: ignore[operator]
            if any(operand.untyped_storage().data_ptr() in self.storages for operand in operands):
                self.weights += flops
            else:
                self.others += flops
        elif not getattr(func, "is_view", False):
            outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            self.elementwise += sum(out.numel() for out in outputs if out.is_floating_point())
        return result

    @property
    def total(self) -> int:
        """All FLOPs."""
        return self.weights + self.others + self.elementwise


def count_executed_flops(module: torch.nn.Module, run: Any) -> ExecutedFlops:
    """The FLOPs of `run()`, which calls `module`, without a backward."""
    with torch.no_grad(), ExecutedFlops(module.parameters()) as flops:
        run()
    return flops
