"""The optimizers of a training stage as one object, whose state is saved and loaded by parameter name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from hybridlm.errors import CheckpointError
from hybridlm.model.init import parameter_scales
from hybridlm.optimizers.contract import OPTIMIZERS, MatrixOptimizer, OptimizerConfig
from hybridlm.optimizers.roles import DECAYED_ROLES, fp32_names, parameter_roles
from hybridlm.tensor_storage import StoredTensor, full_shape

RULE = "rule"  # key of a torch parameter group: the kind of the optimizer that updates it


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with the same update rule (the config of an optimizer kind), weight decay and learning rate.

    `lr_factor` multiplies the learning rate and divides the weight decay; `options` replace those of the rule.
    """

    rule: OptimizerConfig
    decay: bool
    names: tuple[str, ...]
    lr_factor: float = 1.0
    options: Mapping[str, float] = field(default_factory=dict)


def plan_groups(model: nn.Module, config: OptimizerConfig) -> list[ParameterGroup]:
    """Sort the trainable parameters of a model into groups, in a fixed order."""
    kept_fp32 = set(fp32_names(model))
    roles = parameter_roles(model)
    rules: dict[str, OptimizerConfig] = {}
    scales = parameter_scales(model)
    members: dict[tuple[str, bool, float, tuple[tuple[str, float], ...]], list[str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rule = config.rule_for(roles[name], name in kept_fp32)
            rules[rule.kind] = rule
            scale = scales.get(name)
            factor, options = (1.0, {}) if scale is None else (rule.lr_factor(scale), rule.scaled_options(scale))
            factor *= roles[name].lr_factor
            key = (rule.kind, roles[name].kind in DECAYED_ROLES, factor, tuple(options.items()))
            members.setdefault(key, []).append(name)
    order = sorted(members, key=lambda key: (rules[key[0]] is config, *key))  # the fallback comes first
    return [ParameterGroup(rules[key[0]], key[1], tuple(members[key]), key[2], dict(key[3])) for key in order]


def build_optimizer(model: nn.Module, config: OptimizerConfig, *, lr: float | None = None) -> OptimizerSet:
    """Build the optimizers over the parameters of a model that require gradients.

    Args:
        model: the model; it may say the roles of its parameters and which of them are kept in fp32.
        config: the config of an optimizer kind.
        lr: peak learning rate of the stage (default: that of the config); rates of other groups keep their ratio to it.

    Example:
        >>> from hybridlm.optimizers import MuonConfig
        >>> model = nn.ModuleDict({"embed": nn.Embedding(4, 2), "proj": nn.Linear(2, 3)})
        >>> for group in plan_groups(model, MuonConfig()):
        ...     print(group.rule.kind, group.decay, group.names)
        adamw False ('embed.weight', 'proj.bias')
        muon True ('proj.weight',)
        >>> len(build_optimizer(model, MuonConfig()).members)
        2
    """
    parameters = dict(model.named_parameters())
    lr = config.lr if lr is None else lr
    groups: dict[str, list[dict[str, Any]]] = {}
    rules: dict[str, OptimizerConfig] = {}
    for group in plan_groups(model, config):
        rules[group.rule.kind] = group.rule
        options: dict[str, Any] = {
            "params": [parameters[name] for name in group.names], RULE: group.rule.kind,
            "weight_decay": config.weight_decay / group.lr_factor if group.decay else 0.0, **group.options}
        if group.lr_factor != 1.0:
            options["lr"] = lr * (group.rule.peak_lr / config.lr) * group.lr_factor
        groups.setdefault(group.rule.kind, []).append(options)
    members = []
    for kind, rule in rules.items():
        build = OPTIMIZERS.implementation(kind)
        members.append(build(rule, groups[kind], lr * (rule.peak_lr / config.lr)))
    return OptimizerSet(members, rules, {id(p): name for name, p in parameters.items()}, lr)


class OptimizerSet:
    """The torch optimizers of a stage. The engine may replace `members` by wrapped ones.

    Args:
        members: the torch optimizers; every parameter group names its rule.
        rules: the config of each optimizer kind among the groups, by kind.
        names: names of the parameters, by id.
        lr: the learning rate at which the members were built; every group keeps its own multiple of it.
    """

    def __init__(self, members: list[torch.optim.Optimizer], rules: dict[str, OptimizerConfig], names: dict[int, str],
                 lr: float):
        self.members = members
        self.rules = rules
        self.names = names
        self.lr_multiples = [[group["lr"] / lr for group in member.param_groups] for member in members]

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of every group to its multiple of `lr`."""
        for member, multiples in zip(self.members, self.lr_multiples, strict=True):
            for group, multiple in zip(member.param_groups, multiples, strict=True):
                group["lr"] = lr * multiple

    def subdivide_groups(self, key: Callable[[str], Any]) -> None:
        """Divide every group into groups of parameters whose names have the same `key`."""
        for index, member in enumerate(self.members):
            groups = []
            multiples = []
            for group, multiple in zip(member.param_groups, self.lr_multiples[index], strict=True):
                keys = [key(self.names[id(parameter)]) for parameter in group["params"]]
                for wanted in sorted(set(keys)):
                    chosen = [p for p, found in zip(group["params"], keys, strict=True) if found == wanted]
                    groups.append({**group, "params": chosen})
                    multiples.append(multiple)
            member.param_groups = groups
            self.lr_multiples[index] = multiples

    def scale_lr(self, factor: Callable[[str], float]) -> None:
        """Multiply the learning rate of each parameter by a factor of its name, from now on."""
        if all(factor(self.names[id(parameter)]) == 1 for parameter in self.parameters()):
            return
        self.subdivide_groups(factor)
        for member, multiples in zip(self.members, self.lr_multiples, strict=True):
            for index, group in enumerate(member.param_groups):
                scale = factor(self.names[id(group["params"][0])])
                multiples[index] *= scale
                group["lr"] *= scale

    @property
    def needs_complete_matrices(self) -> bool:
        """Whether a member reads all elements of a matrix, so that it cannot work on a shard of one."""
        return any(isinstance(member, MatrixOptimizer) for member in self.members)

    def merge(self, join: Callable[[list[torch.optim.Optimizer]], torch.optim.Optimizer]) -> None:
        """Replace the members by one, `join(members)`, that has their groups in order."""
        self.members = [join(self.members)]
        self.lr_multiples = [list(chain.from_iterable(self.lr_multiples))]

    def step(self) -> None:
        """Make one step of all members."""
        for member in self.members:
            member.step()

    def zero_grad(self) -> None:
        """Set all gradients to None."""
        for member in self.members:
            member.zero_grad(set_to_none=True)

    def parameters(self) -> list[Tensor]:
        """List the parameters of all groups, in order."""
        return [parameter for _, _, parameter in self._each()]

    def _each(self) -> Iterator[tuple[torch.optim.Optimizer, dict[str, Any], Tensor]]:
        for member in self.members:
            for group in member.param_groups:
                for parameter in group["params"]:
                    yield member, group, parameter

    def state_tensors(self) -> dict[str, Tensor]:
        """Collect all state of the optimizers: `{state key}/{parameter name}` -> tensor."""
        tensors = {}
        for member, _, parameter in self._each():
            for key, value in member.state.get(parameter, {}).items():
                tensors[f"{key}/{self.names[id(parameter)]}"] = value
        return tensors

    def load_state_tensors(self, saved: Mapping[str, StoredTensor], *, strict: bool = True) -> None:
        """Load state that `state_tensors` collected.

        Raises:
            CheckpointError: as `matching_state`; or a tensor of another shape.
        """
        matching = self.matching_state(saved, strict=strict)
        for member, group, parameter in self._each():
            name = self.names[id(parameter)]
            if name in matching:
                shapes = self.rules[group[RULE]].state_shapes(full_shape(parameter))
                member.state[parameter] = {
                    key: _read_state(name, saved[f"{key}/{name}"], shapes[key], parameter, group)
                    for key in matching[name]}

    def matching_state(self, saved: Collection[str], *, strict: bool = True) -> dict[str, list[str]]:
        """State keys by parameter name, for the parameters of this set whose state is among the `saved` names.

        Args:
            saved: names of saved tensors, `{state key}/{parameter name}`.
            strict: refuse state of parameters that are not trained; False ignores it, as a new stage does.

        Raises:
            CheckpointError: state of a parameter that is not trained, or of another update rule.
        """
        keys: dict[str, set[str]] = {}
        for key, _, name in (entry.partition("/") for entry in saved):
            keys.setdefault(name, set()).add(key)
        found: dict[str, list[str]] = {}
        for _, group, parameter in self._each():
            name = self.names[id(parameter)]
            wanted = list(self.rules[group[RULE]].state_shapes(full_shape(parameter)))
            stored = keys.pop(name, set())
            if stored == set(wanted):
                found[name] = wanted
            elif stored and strict:
                raise CheckpointError(f"optimizer state of '{name}' belongs to another update rule; "
                                      "resume with the optimizer the run began with")
        if keys and strict:
            number = sum(len(each) for each in keys.values())
            raise CheckpointError(f"the checkpoint holds optimizer state of '{min(keys)}' ({number} such tensors), "
                                  "which this stage does not train")
        return found


def check_state_shape(name: str, shape: Iterable[int], expected: Iterable[int]) -> None:
    """Raise CheckpointError unless saved optimizer state of the parameter `name` has the expected shape."""
    if list(shape) != list(expected):
        raise CheckpointError(f"optimizer state of '{name}' has shape {list(shape)}; the model's parameter needs "
                              f"{list(expected)}")


def _read_state(name: str, stored: StoredTensor, shape: tuple[int, ...], parameter: Tensor,
                group: dict[str, Any]) -> Tensor:
    """Read a tensor of state to the device where the optimizer keeps it: counts of steps on the host unless fused."""
    check_state_shape(name, stored.shape, shape)
    if not shape:
        on_device = group.get("fused") or group.get("capturable")
        return stored.read().to(device=parameter.device if on_device else "cpu", dtype=torch.float32)
    return stored.read().to(device=parameter.device)
