"""Parameters and buffers that stay in fp32 whoever casts the model, and the list of them in the class of each module.

Norms, decays, gates' biases and routers lose what they hold in bf16: a bias of the router moves by less than a bf16
number can, and rounded routers choose other experts. The module that owns such tensors names them in
`fp32_parameters`. That one list is obeyed by engines, by casts of the whole model or of a part (`to`, `bfloat16`,
`half`, also those of wrappers), by building under a low default dtype, and by import and export.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

log = logging.getLogger("hybridlm")

FP32_BYTES = 4  # bytes per element


def is_listed(name: str, listed: Sequence[str]) -> bool:
    """Whether a list of `fp32_parameters` holds the tensor.

    Args:
        name: of the tensor, within the module that has the list.
        listed: names of tensors, or their last parts. What was put around a listed module's own weights (an adapter, a
            wrapper) is meant too.

    Example:
        >>> [is_listed(name, ["router.weight"]) for name in ("router.weight", "router.base_layer.weight", "weight")]
        [True, True, False]
    """
    for entry in listed:
        owner, _, last = entry.rpartition(".")
        pattern = rf"(.+\.)?{re.escape(owner)}\.(.+\.)?{re.escape(last)}" if owner else rf"(.+\.)?{re.escape(last)}"
        if re.fullmatch(pattern, name):
            return True
    return False


class KeepsFP32(nn.Module):
    """A module that keeps the tensors of its list `fp32_parameters` in fp32 (or wider) when it is cast.

    `fp32_parameters` are names of parameters and buffers, or their last parts.

    Example:
        >>> class Scale(KeepsFP32):
        ...     fp32_parameters = ("scale",)
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.scale, self.map = nn.Parameter(torch.ones(2)), nn.Linear(2, 2)
        >>> module = nn.Sequential(Scale()).bfloat16()
        >>> module[0].scale.dtype, module[0].map.weight.dtype
        (torch.float32, torch.bfloat16)
    """

    fp32_parameters: ClassVar[tuple[str, ...]] = ()

    def fp32_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters and buffers that stay in fp32, by their names within this module."""
        if self.fp32_parameters:
            for name, tensor in chain(self.named_parameters(), self.named_buffers()):
                if is_listed(name, self.fp32_parameters):
                    yield name, tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept: dict[int, Tensor] = {}
        for _, tensor in self.fp32_tensors():
            kept[id(tensor)] = tensor
            if tensor.grad is not None:
                kept[id(tensor.grad)] = tensor.grad

        def apply(tensor: Tensor) -> Tensor:
            result: Any = fn(tensor)
            if id(tensor) in kept and is_narrow(result) and result.dtype != tensor.dtype:
                return tensor.to(result.device, torch.promote_types(tensor.dtype, torch.float32))
            return result

        return super()._apply(apply, recurse)


def is_narrow(tensor: Tensor) -> bool:
    """Whether the tensor is of a float type of fewer bits than fp32."""
    return tensor.is_floating_point() and tensor.dtype.itemsize < FP32_BYTES


def warn_of_narrow_tensors(model: nn.Module) -> bool:
    """Warn once of tensors that should be in fp32 and that somebody has cast one by one, past the modules.

    Their values are rounded already, so nothing is cast back. Tools that place weights themselves do this, such as
    accelerate's `load_checkpoint_and_dispatch(dtype=...)`.

    Returns:
        Whether there is anything to look at: False for a model on "meta".
    """
    found = [(f"{prefix}.{name}" if prefix else name, tensor) for prefix, module in model.named_modules()
             if isinstance(module, KeepsFP32) for name, tensor in module.fp32_tensors()]
    if any(tensor.is_meta for _, tensor in found):
        return False
    narrow = [(name, tensor) for name, tensor in found if is_narrow(tensor)]
    if narrow:
        name, tensor = narrow[0]
        log.warning("%d tensors that must stay in fp32 were cast, such as %s to %s: routers and decays are rounded; "
                    "load with from_pretrained(dtype=...), or cast the model with .to()", len(narrow), name,
                    str(tensor.dtype).removeprefix("torch."))
    return True


@torch.no_grad()
def widen_fp32_tensors(model: nn.Module) -> None:
    """Give what must stay in fp32 that dtype where a low default dtype made it narrow; only before values are set."""
    for module in model.modules():
        if isinstance(module, KeepsFP32):
            for name, tensor in list(module.fp32_tensors()):
                if is_narrow(tensor):
                    owner_name, _, last = name.rpartition(".")
                    owner = module.get_submodule(owner_name)
                    if last in owner._parameters:
                        setattr(owner, last, nn.Parameter(tensor.float(), tensor.requires_grad))
                    else:
                        owner._buffers[last] = tensor.float()
