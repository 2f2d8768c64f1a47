"""Roles of a model's parameters: which of them decay, and which are kept in fp32.

Modules say the roles (hybridlm/model/parameter_roles.py). Weight decay applies to

  matrix, head_matrix, expert_stack, router, stream_mixing, output_head      yes
  embedding (also when tied to the head), lookup_table                       no
  vector, convolution                                                        no

Embeddings do not decay because that shrinks those of rare tokens, whose gradients do not hold against it (as in
OLMo 2, arXiv 2501.00656).
"""

from __future__ import annotations

from torch import nn

from hybridlm.model.parameter_roles import ParameterRole, find_roles

DECAYED_ROLES = ("matrix", "head_matrix", "expert_stack", "router", "stream_mixing", "output_head")
VECTOR_ROLES = ("vector", "convolution")


def parameter_roles(model: nn.Module) -> dict[str, ParameterRole]:
    """The role of every parameter of a model, by name.

    Example:
        >>> roles = parameter_roles(nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 3)))
        >>> {name: role.kind for name, role in roles.items()}
        {'0.weight': 'embedding', '1.weight': 'matrix', '1.bias': 'vector'}
    """
    answer = getattr(model, "parameter_roles", None)
    return answer() if callable(answer) else find_roles(model)


def fp32_names(model: nn.Module) -> list[str]:
    """Names of the parameters that the model wants kept in fp32 under every engine."""
    names = getattr(model, "fp32_parameter_names", None)
    return list(names()) if callable(names) else []
