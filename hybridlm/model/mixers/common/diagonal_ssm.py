"""The state space model of S4D and H3: diagonal, complex, the same at every token.

    h_t = a h_{t-1} + b x_t,   y_t = 2 Re sum_s c_s h_ts + D x_t,   one x and y per channel
    zoh        a = e^{dt A},                          b = (a - 1) / A
    bilinear   a = (1 + dt A / 2) / (1 - dt A / 2),   b = dt B / (1 - dt A / 2)
    A = -e^{A_log} + i A_imag,   dt = e^{log_dt}

Source: Gu et al. 2022, On the parameterization and initialization of diagonal state space models (S4D), sections 3, 4.

B rows, T tokens, C channels, M inputs that share the parameters of a channel, S pairs of modes, N documents.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from hybridlm.model.decode_state import TensorState
from hybridlm.model.layer_context import ShardTraffic
from hybridlm.model.parameter_roles import VECTOR, ParameterRole
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import diagonal_ssm
from hybridlm_kernels.precision import wide

FP32_BYTES = 4  # bytes per element
DT_INIT = (1e-3, 1e-1)  # steps at the start are log-uniform between these
RATE_INIT = 0.5  # -Re A at the start; Im A is pi times the index of the mode
CHUNK_TOKENS = 64  # tokens per chunk of the operation, assumed by the estimate of activations

SSM_PARAMETERS = tuple(f"ssm.{name}" for name in ("A_log", "A_imag", "log_dt", "B", "C", "D"))  # of a mixer's `ssm`

Discretization = Literal["zoh", "bilinear"]


class DiagonalSSM(nn.Module):
    """The module; parameters: A_log and A_imag [C, S], log_dt and D [C], C [C, S, 2], and B [C, S, 2] (bilinear).

    A mixer that has one as `ssm` lists SSM_PARAMETERS in `fp32_parameters`.

    Args:
        channels: channels C.
        modes: pairs S of modes per channel.
        discretization: zoh with B = 1 (S4D), or bilinear with a learned B (H3).

    Example:
        >>> ssm = DiagonalSSM(channels=2, modes=3, discretization="zoh")
        >>> ssm.reset_parameters()
        >>> ssm(torch.ones(1, 4, 2, 1), SequenceInfo.make(1, 4, torch.device("cpu"))).shape
        torch.Size([1, 4, 2, 1])
    """

    def __init__(self, channels: int, modes: int, discretization: Discretization):
        super().__init__()
        self.discretization = discretization
        self.A_log, self.A_imag = (nn.Parameter(torch.zeros(channels, modes)) for _ in range(2))
        self.log_dt, self.D = (nn.Parameter(torch.zeros(channels)) for _ in range(2))
        self.C = nn.Parameter(torch.zeros(channels, modes, 2))
        self.B = nn.Parameter(torch.zeros(channels, modes, 2)) if discretization == "bilinear" else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A is -1/2 + i pi n, steps are log-uniform, C complex normal, D normal, B 1: S4D-Lin, as published."""
        nn.init.constant_(self.A_log, math.log(RATE_INIT))
        self.A_imag.copy_(math.pi * torch.arange(self.A_imag.shape[1]))
        self.log_dt.uniform_(math.log(DT_INIT[0]), math.log(DT_INIT[1]))
        nn.init.normal_(self.C, std=0.5**0.5)
        nn.init.normal_(self.D)
        if self.B is not None:
            self.B.copy_(torch.tensor([1.0, 0.0]))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Logarithms of a, and c b: both [C, S], complex."""
        A_CS = torch.complex(-wide(self.A_log).exp(), wide(self.A_imag))
        step_C1 = wide(self.log_dt).exp()[:, None]
        c_CS = torch.view_as_complex(wide(self.C))
        if self.B is None:
            log_a_CS = step_C1 * A_CS
            return log_a_CS, c_CS * (log_a_CS.exp() - 1.0) / A_CS
        half_CS = 0.5 * step_C1 * A_CS
        b_CS = torch.view_as_complex(wide(self.B)) * step_C1 / (1.0 - half_CS)
        return ((1.0 + half_CS) / (1.0 - half_CS)).log(), c_CS * b_CS

    def forward(self, x_BTCM: Tensor, seq: SequenceInfo, state: TensorState | None = None,
                name: str = "modes") -> Tensor:
        """Run the model over each document, from the decode state or an earlier shard on.

        Args:
            x_BTCM: inputs.
            seq: borders of the documents, and the shard of the rows held here.
            state: decode state that holds the last h under `name`, and then that of this call.
            name: key of h in the state.

        Returns:
            y [B, T, C, M] in fp32 at least.
        """
        log_a_CS, c_CS = self.factors()
        start = None if state is None else state.tensors.get(name)
        y_BTCM, end_NCMS = diagonal_ssm(x_BTCM, log_a_CS, c_CS, initial_state=start, cu_seqlens=seq.cu_seqlens)
        if state is not None:
            state.tensors[name] = end_NCMS
        y_BTCM = y_BTCM + wide(self.D)[:, None] * x_BTCM
        if seq.shard is None:
            return y_BTCM
        shard = seq.shard
        powers_TCS = (log_a_CS * torch.arange(1, shard.length + 1, device=x_BTCM.device)[:, None, None]).exp()
        through_B = shard.continued_tokens()
        left_BC1S = torch.where(through_B[:, -1, None, None, None], powers_TCS[-1, :, None], 0.0)
        incoming_BCMS = shard.incoming(shard.at_end(end_NCMS), left_BC1S, torch.mul)
        read_BTCM = 2.0 * torch.einsum("bcms,tcs->btcm", incoming_BCMS, c_CS * powers_TCS).real
        return y_BTCM + torch.where(through_B[..., None, None], read_BTCM, 0.0)

    def parameter_roles(self) -> dict[str, ParameterRole]:
        """All are vectors: none is a matrix of a map between channels."""
        return {name: VECTOR for name, _ in self.named_parameters()}


def count_ssm_params(channels: int, modes: int, discretization: Discretization) -> int:
    """Parameters of a DiagonalSSM.

    >>> count_ssm_params(2, 3, "zoh"), sum(p.numel() for p in DiagonalSSM(2, 3, "zoh").parameters())
    (28, 28)
    """
    return channels * (2 + modes * (4 if discretization == "zoh" else 6))


def ssm_flops(inputs: int, modes: int) -> float:
    """FLOPs per token, counted as the recurrence: step and write of every mode, its read, and the skip.

    Args:
        inputs: inputs of all channels, C M.
        modes: pairs S of modes.
    """
    return inputs * (10.0 * modes + 2.0)


def ssm_state_bytes(inputs: int, modes: int) -> int:
    """Bytes of the states in fp32."""
    return 2 * FP32_BYTES * inputs * modes


def ssm_activation_bytes(inputs: int, modes: int) -> float:
    """Bytes per token kept for the backward pass: inputs and outputs in fp32, and states at the ends of chunks."""
    return FP32_BYTES * inputs * (4.0 + 8.0 * modes / CHUNK_TOKENS)


def ssm_traffic(rows: int, channels: int, inputs: int, modes: int) -> ShardTraffic:
    """Bytes of the states at the end of a shard, and of the factors by which those at its start arrive there."""
    sent = 2 * FP32_BYTES * rows * modes * (inputs + channels)
    return ShardTraffic("gather", sent, sent)
