"""Roles of parameters: each module says what its parameters are, and an optimizer decides by role how to update them.

A mixer or feed-forward answers with its method `parameter_roles`; `find_roles` is the answer of everything that is
built from linear maps, embeddings and vectors alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

RoleKind = Literal["matrix", "head_matrix", "expert_stack", "router", "stream_mixing", "vector", "convolution",
                   "embedding", "lookup_table", "output_head"]


@dataclass(frozen=True)
class ParameterRole:
    """Role of a parameter in a model, by which optimizers choose how to update it.

    matrix        2-D weight of a projection
    head_matrix   the same, its rows being `heads` blocks of equal size, one per head
    expert_stack  3-D weights of routed experts [E, A, B]: one matrix per expert
    router        2-D weight that scores experts
    stream_mixing 2-D weight from which a residual of several streams computes how they are mixed
    vector        norms, biases, per-head numbers, and matrices of one row or one column
    convolution   2-D weight of a depthwise convolution [channels, taps]: one vector per channel
    embedding     the token embedding, also when it is tied to the output head
    lookup_table  rows that layers look up by token ids or n-grams
    output_head   the output matrix

    Args:
        kind: one of these.
        heads: blocks of rows.
        lr_factor: factor of the learning rate that the parameter's module asks for.

    Raises:
        ValueError: `heads` on a role that has none.
    """

    kind: RoleKind
    heads: int = 1
    lr_factor: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        if self.heads < 1 or (self.heads > 1 and self.kind != "head_matrix"):
            raise ValueError(f"a {self.kind} has no {self.heads} blocks of rows")


VECTOR = ParameterRole("vector")
CONVOLUTION = ParameterRole("convolution")


def matrix_role(rows: int, columns: int, kind: RoleKind = "matrix", *, heads: int = 1) -> ParameterRole:
    """Find the role of a matrix by its shape; with one row or one column it is a vector.

    >>> matrix_role(64, 32, heads=4)
    ParameterRole(kind='head_matrix', heads=4, lr_factor=1.0)
    >>> matrix_role(1, 32)
    ParameterRole(kind='vector', heads=1, lr_factor=1.0)
    """
    if 1 in (rows, columns):
        return VECTOR
    return ParameterRole("head_matrix", heads) if heads > 1 else ParameterRole(kind)


def find_roles(module: nn.Module, declared: Mapping[str, ParameterRole] | None = None,
               head_rows: Mapping[str, int] | None = None) -> dict[str, ParameterRole]:
    """Roles of all parameters of `module`, by the names of `module.named_parameters()`.

    Linear weights are matrices, embedding weights embeddings, parameters of one dim vectors. A submodule with a method
    `parameter_roles` states its own. `declared` roles replace all of these; names that the module does not
    have are ignored, so that a kind can declare what only some of its options create.

    Args:
        module: the module with the parameters.
        declared: role by parameter name.
        head_rows: linear maps whose rows are one block per head, with their number of heads.

    Shapes of linear maps are read from their declared sizes, because an engine may have divided the tensors.

    Raises:
        TypeError: a parameter of two dims or more that neither the rules nor `declared` know.
    """
    declared = dict(declared or {})
    for name, heads in (head_rows or {}).items():
        linear = getattr(module, name, None)
        if isinstance(linear, nn.Linear):
            declared[f"{name}.weight"] = matrix_role(linear.out_features, linear.in_features, heads=heads)
    roles: dict[str, ParameterRole] = {}
    for name, parameter in module.named_parameters(recurse=False):
        if isinstance(module, nn.Linear) and name == "weight":
            roles[name] = matrix_role(module.out_features, module.in_features)
        elif isinstance(module, nn.Embedding):
            roles[name] = ParameterRole("embedding")
        elif parameter.dim() < 2:
            roles[name] = VECTOR
        elif name not in declared:
            raise TypeError(f"{type(module).__name__}.{name} has {parameter.dim()} dims and no role: "
                            "name it in parameter_roles()")
    for child_name, child in module.named_children():
        answer = getattr(child, "parameter_roles", None)
        of_child = answer() if callable(answer) else find_roles(child)
        roles |= {f"{child_name}.{name}": role for name, role in of_child.items()}
    own_names = {name for name, _ in module.named_parameters()}
    return roles | {name: role for name, role in declared.items() if name in own_names}
