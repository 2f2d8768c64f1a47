"""Checks of costs: the numbers that a config states against those of the built module."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hybridlm.errors import counted
from hybridlm.model.contract_check.executed_flops import count_executed_flops
from hybridlm.model.contract_check.subject import CPU, Subject
from hybridlm.model.contract_check.verdicts import NotClaimed, require
from hybridlm.model.feed_forward.contract import FeedForwardConfig
from hybridlm.model.mixers.contract import MixerConfig
from hybridlm.model.sequence import SequenceInfo

FLOPS_RTOL = 0.01  # relative to the executed FLOPs
FLOPS_LENGTHS = (64, 256)  # tokens of a sequence
ACTIVATION_LENGTH = 256  # tokens of a sequence
# activation_bytes is an estimate from widths. At the small sizes of a check, what a backend keeps besides (scores of a
# window, indices, states of chunks) weighs more than in a model.
ACTIVATION_FACTOR = 4.0
FP32_BYTES = 4  # bytes per element


def check_parameter_count(subject: Subject) -> str:
    """`num_params` of the config is the number of parameters of the module."""
    with torch.device("meta"):
        module = subject.new_module()
    built = sum(parameter.numel() for parameter in module.parameters())
    counted = subject.config.num_params(subject.context)
    require(counted == built, f"num_params says {counted:,}, the module has {built:,}")
    config = subject.config
    if isinstance(config, FeedForwardConfig):
        active = config.num_params(subject.context, active=True)
        routed = config.routed_params(subject.context)
        require(0 < active <= built, f"num_params(active=True) says {active:,} of {built:,}")
        require(built - routed <= active, f"{active:,} parameters are active, fewer than the {built - routed:,} that "
                "belong to no routed expert")
    return f"{built:,} parameters"


def check_flops(subject: Subject) -> str:
    """`flops_per_token` of the config fits what a forward executes.

    It lies between the products with weights, which are counted exactly, and everything that is executed: a config
    counts a recurrence as the paper writes it and causal attention as half a square, a backend does more than that.
    It grows with the context where the executed FLOPs do, and only there.
    """
    module = subject.build(torch.float32)
    declared = {}
    executed = {}
    short, long = _flops_lengths(subject)
    for length in (short, long):
        x_BTD = subject.inputs(1, length, torch.float32)
        seq = SequenceInfo.make(1, length, CPU)
        subject.run_sources(x_BTD, seq)
        executed[length] = count_executed_flops(module, partial(module, x_BTD, seq))
        declared[length] = sum(_declared(subject, length).values())
        least, most = executed[length].weights / length, executed[length].total / length
        require(least * (1 - FLOPS_RTOL) <= declared[length] <= most * (1 + FLOPS_RTOL),
                f"flops_per_token says {declared[length]:,.0f} at {length} tokens; a forward executes "
                f"{least:,.0f} with weights and {most:,.0f} in all")
    if isinstance(subject.config, MixerConfig):
        grows = declared[long] > declared[short]
        if subject.config.is_linear:
            require(not grows, "is_linear says that a token costs the same at any context, flops_per_token does not")
        elif executed[long].others / long > 2 * executed[short].others / short:
            require(grows, f"flops_per_token is the same at {short} and {long} tokens, products of activations are not")
    found = executed[long]
    return (f"{declared[long]:,.0f} per token at {long} tokens; executed: {found.weights / long:,.0f} with weights, "
            f"{found.others / long:,.0f} between activations, {found.elementwise / long:,.0f} elementwise")


def _flops_lengths(subject: Subject) -> tuple[int, int]:
    """Tokens of the two sequences; with routed experts as many per expert, since small groups of tokens are padded."""
    config = subject.config
    experts = config.routed_experts() if isinstance(config, FeedForwardConfig) else None
    factor = 1 if experts is None else math.ceil(experts.total / experts.per_token)
    short, long = FLOPS_LENGTHS
    return factor * short, factor * long


def _declared(subject: Subject, length: int) -> dict[str, float]:
    if isinstance(subject.config, MixerConfig):
        return subject.config.flops_per_token(subject.context, length)
    return subject.config.flops_per_token(subject.context)


def check_parameter_roles(subject: Subject) -> str:
    """`parameter_roles` says of every parameter what it is, so that optimizers know how to update it."""
    with torch.device("meta"):
        module: Any = subject.new_module()
    roles = module.parameter_roles()
    shapes = {name: list(parameter.shape) for name, parameter in module.named_parameters()}
    require(roles.keys() == shapes.keys(), "parameter_roles and the module differ in "
            f"{', '.join(sorted(roles.keys() ^ shapes.keys()))}")
    for name, role in roles.items():
        require(not role.kind.endswith("matrix") or (len(shapes[name]) == 2 and shapes[name][0] % role.heads == 0),
                f"{name} of shape {shapes[name]} cannot be a {role.kind} with {counted(role.heads, 'head')}")
    kinds = Counter(role.kind for role in roles.values())
    return ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items())) or "no parameters"


@torch.no_grad()
def check_state_bytes(subject: Subject) -> str:
    """`state_bytes` of the config is the size of the decode state, and does not grow for a linear mixer."""
    module = subject.build(torch.float32)
    state = subject.new_state(module, 1, 40)
    if state is None:
        require(subject.config.state_bytes(subject.context, 31) == 0, "new_state gives none, state_bytes counts some")
        raise NotClaimed("keeps no state")
    subject.run(module, subject.inputs(1, 31, torch.float32), state=state)
    said = subject.config.state_bytes(subject.context, 31, element_bytes=FP32_BYTES)
    require(said == state.num_bytes, f"state_bytes says {said:,} after 31 tokens, the state has {state.num_bytes:,}")
    near, far = (subject.config.state_bytes(subject.context, n) for n in (50_000, 100_000))
    if getattr(subject.config, "is_linear", False):
        require(near == far, f"is_linear says that the state keeps its size, state_bytes says {near:,} after 50,000 "
                f"tokens and {far:,} after 100,000")
    return f"{said:,} bytes after 31 tokens, {far:,} after 100,000 with elements of two bytes"


def check_activation_bytes(subject: Subject) -> str:
    """`activation_bytes` of the config is near what autograd keeps for a backward."""
    module = subject.build(torch.float32)
    x_BTD = subject.inputs(1, ACTIVATION_LENGTH, torch.float32).requires_grad_()
    seq = SequenceInfo.make(1, ACTIVATION_LENGTH, CPU)
    subject.run_sources(x_BTD, seq)
    kept = kept_bytes(module, x_BTD, partial(module, x_BTD, seq)) / ACTIVATION_LENGTH
    said = subject.config.activation_bytes(subject.context, FP32_BYTES)
    require(kept / ACTIVATION_FACTOR <= said <= kept * ACTIVATION_FACTOR,
            f"activation_bytes says {said:,.0f} per token, autograd keeps {kept:,.0f} beside the input: a factor of "
            f"{ACTIVATION_FACTOR:g} is allowed")
    return f"{said:,.0f} bytes per token in fp32, autograd keeps {kept:,.0f} beside the input"


def kept_bytes(module: torch.nn.Module, x_BTD: Tensor, run: Any) -> int:
    """Count the bytes that autograd keeps for the backward of `run()`, each storage once.

    The module's own tensors do not count, nor does its input, which the residual stream counts.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers(), x_BTD)}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = run()
    assert outputs is not None  # alive until here, and with it what it keeps
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
