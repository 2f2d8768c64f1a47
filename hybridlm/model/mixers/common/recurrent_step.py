"""Decode steps of linear mixers: projections, convolutions, forget gate and output, for one token per row.

B rows, D hidden size, HV value heads, K key dim, V value dim, W taps of the convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from hybridlm.model.decode_state import RecurrentState
from hybridlm.model.decode_step import gated_norm_step, linear_step, norm_step
from hybridlm.model.mixers.common.recurrent import RecurrentMixer
from hybridlm.model.norm import activate_gate
from hybridlm_kernels.decoding import short_conv_step


def prepare_inputs(mixer: RecurrentMixer) -> Callable[[Tensor, RecurrentState], Sequence[Tensor]]:
    """Prepare the projections and convolutions: a function of the input [B, D] that returns q, k, v [B, channels]."""
    names, widths = tuple(mixer.config.channels), list(mixer.config.channels.values())
    filters = [f"{name}_conv" for name in names]
    projections = [linear_step(getattr(mixer, f"{name}_proj")) for name in names]
    before = mixer.config.conv_size - 1
    parameters = mixer._parameters

    def project(x_BD: Tensor, state: RecurrentState) -> Sequence[Tensor]:
        return [projection(x_BD) for projection in projections]

    def project_and_convolve(x_BD: Tensor, state: RecurrentState) -> Sequence[Tensor]:
        y_BC = torch.cat([projection(x_BD) for projection in projections], -1)  # one convolution for all
        start_BCW = state.joined_conv(names)
        if start_BCW is None:
            start_BCW = y_BC.new_zeros(*y_BC.shape, before)
        weight_CW = torch.cat([parameters[name] for name in filters])  # type: ignore[misc]
        y_BC, start_BCW = short_conv_step(y_BC, weight_CW, start_BCW, "silu")
        state.set_joined_conv(start_BCW)
        return y_BC.split(widths, -1)

    return project_and_convolve if mixer.config.conv_size else project


def prepare_forget_gate(mixer: RecurrentMixer) -> Callable[[Tensor], Tensor]:
    """Prepare the projection of the forget gate: a function of the input [B, D]; [B, HV], or [B, HV, K] per channel."""
    config = mixer.config
    if config.decay == "scalar":
        return linear_step(mixer.a_proj)  # type: ignore[arg-type]
    project = _low_rank_step(mixer, "f", config.gate_rank)
    shape = (-1, config.value_heads, config.head_dim)
    return lambda x_BD: project(x_BD).view(shape)


def decode_log_decay(mixer: RecurrentMixer, u: Tensor) -> Tensor:
    """The logarithm of the decay of one token per row, from the projection of the forget gate."""
    g = mixer.build_forget_gate().log_decay(u.unsqueeze(1)).squeeze(1)
    return g.to(u.dtype) if mixer.config.gate_dtype == "model" else g


def prepare_output(mixer: RecurrentMixer, norm: nn.Module | None,
                   all_heads: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """Prepare norm, output gate and o_proj: a function of o [B, HV, V] and the input [B, D] that returns y [B, D].

    Args:
        mixer: the mixer.
        norm: the output norm; None: none.
        all_heads: whether the norm is over all heads together; else over each head.
    """
    config = mixer.config
    o_proj = linear_step(mixer.o_proj)
    if config.output_gate == "none":
        plain = None if norm is None else norm_step(norm)

        def finish(o_BHvV: Tensor, x_BD: Tensor) -> Tensor:
            o = o_BHvV.flatten(-2) if all_heads else o_BHvV
            o = o if plain is None else plain(o)
            return o_proj(o if all_heads else o.flatten(-2))

        return finish
    project = _low_rank_step(mixer, "g", config.output_gate_rank)
    gated = None if norm is None else gated_norm_step(norm)

    def finish_gated(o_BHvV: Tensor, x_BD: Tensor) -> Tensor:
        o = o_BHvV.flatten(-2) if all_heads else o_BHvV
        gate = project(x_BD).view(o.shape)
        o = o * activate_gate(gate, config.output_gate) if gated is None else gated(o, gate)
        return o_proj(o if all_heads else o.flatten(-2))

    return finish_gated


def state_matrix(state: RecurrentState, v_BHvV: Tensor, key_dim: int) -> Tensor:
    """The state matrix [B, HV, K, V], contiguous, zeros before the first token."""
    if state.matrix is None:
        B, HV, V = v_BHvV.shape
        dtype = torch.promote_types(v_BHvV.dtype, torch.float32)
        state.matrix = torch.zeros(B, HV, key_dim, V, dtype=dtype, device=v_BHvV.device)
    elif not state.matrix.is_contiguous():
        state.matrix = state.matrix.contiguous()
    return state.matrix


def _low_rank_step(mixer: RecurrentMixer, name: str, rank: int | None) -> Callable[[Tensor], Tensor]:
    if rank is None:
        return linear_step(getattr(mixer, f"{name}_proj"))
    down, up = linear_step(getattr(mixer, f"{name}_a_proj")), linear_step(getattr(mixer, f"{name}_b_proj"))
    return lambda x: up(down(x))
