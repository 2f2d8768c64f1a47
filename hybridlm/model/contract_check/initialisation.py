"""Check of initialisation: every tensor gets a finite value, the same on every device."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor

from hybridlm.model.contract_check.subject import Subject
from hybridlm.model.contract_check.verdicts import require

FILL_VALUES = (float("nan"), 1e30)  # in memory before `init_weights`, which produces neither


def check_initialisation(subject: Subject) -> str:
    """`init_weights` sets every parameter and buffer of a module built on "meta", to values that its seed decides."""
    first, second = (_initialised(subject, fill) for fill in FILL_VALUES)
    for name, value in _tensors(first).items():
        other = _tensors(second)[name]
        require(bool(torch.isfinite(value).all()) if value.is_floating_point() else True,
                f"init_weights leaves '{name}' without a finite value")
        require(torch.equal(value, other), f"init_weights leaves '{name}' as the memory was, in part or all of it")
    x_BTD = subject.inputs(1, 17, torch.float32)
    built_at_once = _draw(subject.new_module())
    y_BTD = subject.run(built_at_once, x_BTD)[0]
    require(torch.equal(subject.run(first, x_BTD)[0], y_BTD),
            "a module that was built on meta computes something else than one that was built on the CPU: "
            "what is no parameter or buffer must be made when it is used")
    return f"{len(_tensors(first))} tensors are set, on meta and on the CPU alike"


def _initialised(subject: Subject, fill: float) -> Any:
    """The module, initialised over memory that holds `fill`."""
    with torch.device("meta"):
        module = subject.new_module()
    module = module.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in _tensors(module).values():
            tensor.fill_(fill if tensor.is_floating_point() else int(fill == FILL_VALUES[0]))
    return _draw(module)


def _draw(module: Any) -> Any:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        module.init_weights(0.02)
    return module


def _tensors(module: Any) -> dict[str, Tensor]:
    return dict(chain(module.named_parameters(), module.named_buffers()))
