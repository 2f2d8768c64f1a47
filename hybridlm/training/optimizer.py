"""AdamW, or Muon for hidden matrices beside AdamW for the rest; state goes in and out by parameter name.

Who gets what (the `role` of a parameter):
  matrix     2-D weights of projections and routers        decay      Muon; AdamW if kept fp32 (routers)
  stack      3-D expert weights [E, A, B]                  decay      Muon on each of the E matrices
  head       the output matrix                             decay      AdamW
  embedding  the embedding, also when tied to the head     no decay   AdamW
  vector     norms, biases, A_log, dt_bias, convolutions,  no decay   AdamW
             matrices of one row or column
Embeddings are left out because decay shrinks those of rare tokens, whose gradients do not hold against it
(as in OLMo 2, arXiv 2501.00656).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hybridlm.config.schema import OptimizerConfig
from hybridlm.errors import CheckpointError
from hybridlm.tensor_storage import StoredTensor, full_shape

Role = Literal["matrix", "stack", "head", "embedding", "vector"]
DECAYED = ("matrix", "stack", "head")
STATE_KEYS = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")
VECTOR_NAMES = ("A_log", "dt_bias", "bias", "sinks")


def role(name: str, parameter: Tensor) -> Role:
    """The part a parameter plays, from its name and shape."""
    parts = name.split(".")
    convolution = any(part.endswith("conv") for part in parts)
    shape = full_shape(parameter)
    if len(shape) < 2 or 1 in shape[-2:] or convolution or parts[-1] in VECTOR_NAMES:
        return "vector"
    if "embed" in parts:
        return "embedding"
    if "lm_head" in parts:
        return "head"
    return "stack" if len(shape) == 3 else "matrix"


@dataclass(frozen=True)
class Group:
    """Parameters that share an update rule and a weight decay."""

    rule: Literal["adamw", "muon"]
    decay: bool
    names: tuple[str, ...]


def plan_groups(parameters: Iterable[tuple[str, Tensor]], kind: Literal["adamw", "muon"],
                fp32_names: Iterable[str] = ()) -> list[Group]:
    """Sort trainable parameters into groups, in a fixed order."""
    fp32 = set(fp32_names)
    members: dict[tuple[str, bool], list[str]] = {}
    for name, parameter in parameters:
        part = role(name, parameter)
        rule = "muon" if kind == "muon" and part in ("matrix", "stack") and name not in fp32 else "adamw"
        members.setdefault((rule, part in DECAYED), []).append(name)
    return [Group(rule, decay, tuple(names)) for (rule, decay), names in sorted(members.items())]  # type: ignore


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon's update, also for stacks of matrices [E, A, B]: each orthogonalised alone, in one batch.

    Learning rates are matched to the RMS of AdamW's updates (Moonlight, arXiv 2502.16982, section 2.2).
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, momentum: float, weight_decay: float):
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight.grad)
                buffer = state["momentum_buffer"].lerp_(weight.grad, 1 - momentum)
                update = self.direction(weight.grad.lerp(buffer, momentum))
                weight.mul_(1 - lr * group["weight_decay"])
                weight.add_(update, alpha=-lr)

    @staticmethod
    def direction(momentum: Tensor) -> Tensor:
        """The step for the momentum of a matrix or stack, at a learning rate of 1."""
        stack_EAB = momentum if momentum.dim() == 3 else momentum[None]
        step_EAB = orthogonalise(stack_EAB).float() * (0.2 * max(momentum.shape[-2:]) ** 0.5)
        return step_EAB.reshape(momentum.shape)


def orthogonalise(grad_EAB: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Newton-Schulz iteration towards U V^T of every matrix U S V^T in the stack, in bf16 as torch does.

    The quintic a X + (b (X X^T) + c (X X^T)^2) X with Jordan's coefficients, which push small singular values
    up fastest; it ends with singular values between about 0.5 and 1.5.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = grad_EAB.shape[-2] <= grad_EAB.shape[-1]
    x_EAB = (grad_EAB if wide else grad_EAB.mT).bfloat16()
    x_EAB = x_EAB / torch.linalg.vector_norm(x_EAB, dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram_EAA = x_EAB @ x_EAB.mT
        poly_EAA = torch.baddbmm(gram_EAA, gram_EAA, gram_EAA, beta=b, alpha=c)
        x_EAB = torch.baddbmm(x_EAB, poly_EAA, x_EAB, beta=a)
    return x_EAB if wide else x_EAB.mT


class OptimizerSet:
    """The torch optimizers of a stage behind one face. The engine may replace `members` by wrapped ones.

    Learning rates follow `set_lr(lr)`: every group holds its own multiple of it.
    """

    def __init__(self, members: list[torch.optim.Optimizer], names: dict[int, str], lr: float):
        self.members = members
        self.names = names  # id(parameter) -> name
        self.lr = lr
        self.multiples = [[group["lr"] / lr for group in member.param_groups] for member in members]

    def set_lr(self, lr: float) -> None:
        for member, multiples in zip(self.members, self.multiples, strict=True):
            for group, multiple in zip(member.param_groups, multiples, strict=True):
                group["lr"] = lr * multiple

    def split_groups(self, key: Callable[[str], Any]) -> None:
        """Divide every group into groups of parameters that have one `key` of their name."""
        for index, member in enumerate(self.members):
            groups, multiples = [], []
            for group, multiple in zip(member.param_groups, self.multiples[index], strict=True):
                keys = [key(self.names[id(parameter)]) for parameter in group["params"]]
                for one in sorted(set(keys)):
                    members = [p for p, found in zip(group["params"], keys, strict=True) if found == one]
                    groups.append({**group, "params": members})
                    multiples.append(multiple)
            member.param_groups, self.multiples[index] = groups, multiples

    def merge(self, join: Callable[[list[torch.optim.Optimizer]], torch.optim.Optimizer]) -> None:
        """Make one member of all, if there are several; it has their groups in order."""
        if len(self.members) > 1 or "betas" not in self.members[0].defaults:
            self.members, self.multiples = [join(self.members)], [list(chain.from_iterable(self.multiples))]

    def step(self) -> None:
        for member in self.members:
            member.step()

    def zero_grad(self) -> None:
        for member in self.members:
            member.zero_grad(set_to_none=True)

    def parameters(self) -> list[Tensor]:
        return [p for member in self.members for group in member.param_groups for p in group["params"]]

    def state_tensors(self) -> dict[str, Tensor]:
        """`{state key}/{parameter name}` -> tensor: everything the update rules remember."""
        tensors = {}
        for member in self.members:
            for group in member.param_groups:
                for parameter in group["params"]:
                    for key, value in member.state.get(parameter, {}).items():
                        tensors[f"{key}/{self.names[id(parameter)]}"] = value
        return tensors

    def load_state_tensors(self, saved: Mapping[str, StoredTensor], *, strict: bool = True) -> None:
        """Put back what `state_tensors` gave.

        Raises:
            CheckpointError: as `fitting`; or a tensor of another shape.
        """
        fitting = self.fitting(saved, strict=strict)
        for member in self.members:
            for group in member.param_groups:
                for parameter in group["params"]:
                    name = self.names[id(parameter)]
                    if name in fitting:
                        member.state[parameter] = {key: _placed(key, saved[f"{key}/{name}"], parameter, group, name)
                                                   for key in fitting[name]}

    def fitting(self, saved: Collection[str], *, strict: bool = True) -> dict[str, list[str]]:
        """State keys by parameter name, for the parameters of this set whose state is among the `saved` names.

        `strict=False` (a new stage) passes over what has no place.

        Raises:
            CheckpointError: state of a parameter that is not trained, or of another update rule.
        """
        found: dict[str, list[str]] = {}
        left = set(saved)
        for member in self.members:
            adam = "betas" in member.param_groups[0]
            for group in member.param_groups:
                for name in (self.names[id(parameter)] for parameter in group["params"]):
                    keys = [key for key in STATE_KEYS if f"{key}/{name}" in left]
                    left -= {f"{key}/{name}" for key in keys}
                    if keys and ("exp_avg" in keys) == adam:
                        found[name] = keys
                    elif keys and strict:
                        raise CheckpointError(f"optimizer state of '{name}' belongs to another update rule; "
                                              "resume with the optimizer the run began with")
        if left and strict:
            raise CheckpointError(f"the checkpoint holds optimizer state of '{min(left).split('/', 1)[1]}' "
                                  f"({len(left)} such tensors), which this stage does not train")
        return found


def _placed(key: str, stored: StoredTensor, parameter: Tensor, group: dict[str, Any], name: str) -> Tensor:
    """Read to where the update rule wants it: `step` counts on the host unless the rule is fused."""
    if key == "step":
        on_device = group.get("fused") or group.get("capturable")
        return stored.read().to(device=parameter.device if on_device else "cpu", dtype=torch.float32)
    if stored.shape != parameter.shape:
        raise CheckpointError(f"optimizer state of '{name}' has shape {list(stored.shape)}; "
                              f"the parameter has {list(parameter.shape)}")
    return stored.read().to(device=parameter.device)


def fp32_names(model: nn.Module) -> list[str]:
    """Parameters the model wants kept in fp32 under every engine."""
    names = getattr(model, "fp32_parameter_names", None)
    return list(names()) if callable(names) else []


def build_optimizer(model: nn.Module, config: OptimizerConfig, *, lr: float | None = None) -> OptimizerSet:
    """Optimizers over the parameters that require gradients; `lr`: the stage's peak (default: config)."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    lr = config.lr if lr is None else lr
    muon_lr = lr * (config.muon_lr / config.lr if config.muon_lr is not None else 1.0)
    rules: dict[str, list[dict[str, Any]]] = {}
    for group in plan_groups(parameters.items(), config.kind, fp32_names(model)):
        rules.setdefault(group.rule, []).append({"params": [parameters[name] for name in group.names],
                                                 "weight_decay": config.weight_decay if group.decay else 0.0})
    members: list[torch.optim.Optimizer] = []
    if "adamw" in rules:
        fused = all(p.device.type in ("cpu", "cuda") for p in parameters.values())
        members.append(torch.optim.AdamW(rules["adamw"], lr=lr, betas=config.betas, eps=config.eps,
                                         fused=fused))
    if "muon" in rules:
        members.append(Muon(rules["muon"], lr=muon_lr, momentum=config.muon_momentum,
                            weight_decay=config.weight_decay))
    return OptimizerSet(members, {id(p): name for name, p in parameters.items()}, lr)
