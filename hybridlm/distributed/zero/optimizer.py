"""All optimizers of a stage as one over the flat partitions of DeepSpeed's ZeRO.

Optimizers that work element by element do not notice. Of one that needs whole matrices (a `MatrixOptimizer`), ranks
make the element-wise parts on what they hold; the step of each matrix is made by one rank, its owner, to which the
others send their elements and which sends the result back. Gradients are clipped before: DeepSpeed's own Muon clips
what is orthogonalised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hybridlm.distributed.zero.partition import Fragment
from hybridlm.optimizers.contract import MatrixOptimizer, OptimizerConfig
from hybridlm.optimizers.optimizer_set import RULE, check_state_shape
from hybridlm.tensor_storage import StoredTensor


class FlatOptimizer(torch.optim.Optimizer):
    """One optimizer whose groups are those of the `members`, in order; each group is stepped by its member.

    Args:
        members: torch optimizers whose groups name their rule.
        rules: the config of each optimizer kind among the groups, by kind.

    `fragments`, by parameter name, say where each parameter's elements are; set once DeepSpeed has laid them out.
    `matrix_state` is the state of matrix steps by parameter name; all ranks have the names, the owner the tensors.
    """

    def __init__(self, members: Sequence[torch.optim.Optimizer], rules: Mapping[str, OptimizerConfig]):
        super().__init__([group for member in members for group in member.param_groups], {})
        self.members = {member.param_groups[0][RULE]: member for member in members}
        self.rules = rules
        self.fragments: dict[str, Fragment] = {}
        self.matrix_state: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """DeepSpeed calls it on all ranks alike, with the groups that are due; the others have no parameters."""
        for group in self.param_groups:
            member = self.members[group[RULE]]
            if isinstance(member, MatrixOptimizer):
                for flat in group["params"]:
                    if flat.grad is not None:
                        self._step_matrices(member, flat, flat.grad, group)
            else:
                member.param_groups, member.state = [group], self.state
                member.step()

    def _step_matrices(self, member: MatrixOptimizer, flat: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        values = member.combine(grad, self.state[flat], group)
        for number, (name, fragment) in enumerate(self._within(flat)):
            owner = number % dist.get_world_size(fragment.group)
            matrix = fragment.gather(values, flat.device, owner)
            weight = fragment.gather(flat, flat.device, owner) if member.needs_weight else None
            state = self.matrix_state.setdefault(name, {})
            if owner == dist.get_rank(fragment.group):
                # `broadcast` sends memory in order, so what it sends must be contiguous.
                matrix = member.matrix_step(matrix, weight, state, group).contiguous()
            dist.broadcast(matrix, group=fragment.group, group_src=owner)
            fragment.write_back(values, matrix)
        member.apply(flat, values, group)

    def _within(self, flat: Tensor) -> list[tuple[str, Fragment]]:
        return [(name, fragment) for name, fragment in self.fragments.items() if fragment.flat is flat]

    def _owner(self, name: str) -> int:
        """The rank, within the group of the parameter's fragment, that makes its matrix step."""
        fragment = self.fragments[name]
        number = [found for found, _ in self._within(fragment.flat)].index(name)
        return number % dist.get_world_size(fragment.group)

    def matrix_state_shapes(self, name: str, rule: str) -> dict[str, tuple[int, ...]]:
        """Shapes of a parameter's state that its owner has; none for optimizers that work element by element."""
        member = self.members[rule]
        if not isinstance(member, MatrixOptimizer):
            return {}
        shapes = self.rules[rule].state_shapes(self.fragments[name].shape)
        return {key: shape for key, shape in shapes.items() if key not in member.flat_state}

    def gather_matrix_state(self, name: str, rule: str, device: torch.device) -> dict[str, Tensor]:
        """The owner's state of a parameter on all ranks of its group, which call it together; none before a step."""
        if name not in self.matrix_state:
            return {}
        group, owner, mine = self.fragments[name].group, self._owner(name), self.matrix_state[name]
        gathered = {}
        for key, shape in self.matrix_state_shapes(name, rule).items():
            value = torch.empty(shape, device=device)
            if owner == dist.get_rank(group):
                value.copy_(mine[key])
            dist.broadcast(value, group=group, group_src=owner)
            gathered[key] = value
        return gathered

    def load_matrix_state(self, name: str, saved: Mapping[str, StoredTensor], rule: str) -> None:
        """Read saved state of a parameter on the rank that owns it.

        Raises:
            CheckpointError: a tensor of another shape.
        """
        fragment, mine = self.fragments[name], self.matrix_state.setdefault(name, {})
        for key, shape in self.matrix_state_shapes(name, rule).items():
            check_state_shape(name, saved[key].shape, shape)
            if self._owner(name) == dist.get_rank(fragment.group):
                mine[key] = saved[key].read().to(fragment.flat.device if shape else "cpu", torch.float32)
