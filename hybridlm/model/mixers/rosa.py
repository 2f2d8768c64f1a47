"""ROSA of RWKV-8: what followed the longest earlier match of the last symbols, where signs of channels are the symbols.

    q, k, v = W x_q + b, ...;   w_t, j_t = the longest w, and for it the latest j < t, with q_{t-w+1..t} = k_{j-w+1..j}
    y_t = scale * sign(v_{j_t + 1});   out = W_o y + b                                 streams of `bits` channels

q, k and v read the token mixed with the one before it. Signs have no derivative: the gradient of q, k and v is the
published one, the difference that flipping each bit makes.

Source: Peng, RWKV-LM, folder RWKV-v8: 260212_rosa1bitLM_L12.py, 260222_rosa4bitLM_L12.py (layers),
251014_rosa_1bit_train.py (gradient).

B rows, T tokens, S tokens kept, D hidden size and channels, G streams.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from hybridlm.errors import ConfigError, require
from hybridlm.model.decode_state import TensorState
from hybridlm.model.layer_context import LayerContext
from hybridlm.model.mixers.common.init import init_projections
from hybridlm.model.mixers.common.token_shift import lerp_with_previous, previous_tokens
from hybridlm.model.mixers.contract import Aux, MixerConfig, SequenceMixer, register_mixer
from hybridlm.model.parameter_roles import VECTOR, ParameterRole, find_roles
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import suffix_match

RUN_BYTES = 4  # bytes per run length in the decode state
SIGN_BYTES = 2  # bytes per channel in the decode state: the signs of key and value


@dataclass(kw_only=True)
class ROSAConfig(MixerConfig):
    """Configuration of ROSA.

    Args:
        bits: channels whose signs make one symbol, 1 to 8; it divides the hidden size.
        unmatched: what a token reads without a match: -scale, as after a match with a bit of 0 (`minus`), or 0
            (`zero`).

    Raises:
        ConfigError: a number of bits that is not 1 to 8.
    """

    kind: str = "rosa"
    bits: int = 1
    unmatched: Literal["minus", "zero"] = "minus"

    def __post_init__(self) -> None:
        require(1 <= self.bits <= 8, "bits", "must be 1 to 8", got=self.bits)

    def streams(self, context: LayerContext) -> int:
        """Streams G of symbols.

        Raises:
            ConfigError: bits that do not divide the hidden size.
        """
        require(context.hidden_size % self.bits == 0, "bits", "must divide the hidden size", got=self.bits,
                expected=f"a divisor of {context.hidden_size}")
        return context.hidden_size // self.bits

    def num_params(self, context: LayerContext) -> int:
        return 4 * context.hidden_size**2 + 8 * context.hidden_size

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        """The projections: matches are operations on whole numbers, three per stream and pair of tokens."""
        return {"projections": 8.0 * context.hidden_size**2}

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        """Bytes of the signs of keys and values, of run lengths, and of the last token."""
        return (context.hidden_size * (SIGN_BYTES * context_length + element_bytes)
                + RUN_BYTES * self.streams(context) * max(context_length - 1, 0))

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        """Bytes per token kept for the backward pass: mixed inputs, q, k, v, y and the index behind each match."""
        return context.hidden_size * 9.0 * element_bytes + 4.0 * self.streams(context)

    def check_context_parallel(self, shards: int, length: int) -> None:
        raise ConfigError("kind", "cannot work on split rows: a match may begin anywhere in its document",
                          got=self.kind, expected="engine.context_parallel=1")


@register_mixer("rosa", ROSAConfig)
class ROSA(SequenceMixer):
    """Parameters: q_proj, k_proj, v_proj, o_proj [D, D] with biases, scale [D], mix [3, D] for q, k and v."""

    fp32_parameters: ClassVar[tuple[str, ...]] = ("scale", "mix")
    piecewise_constant: ClassVar[tuple[str, ...]] = (
        "mix", *(f"{name}_proj.{part}" for name in "qkv" for part in ("weight", "bias")))
    config: ROSAConfig

    def __init__(self, config: ROSAConfig, context: LayerContext):
        super().__init__()
        self.config = config
        config.streams(context)
        D = context.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(D, D) for _ in range(4))
        self.scale = nn.Parameter(torch.zeros(D))
        self.mix = nn.Parameter(torch.zeros(3, D))

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: TensorState | None = None) -> tuple[Tensor, Aux]:
        before_BTD = previous_tokens(x_BTD, seq, state)
        q_BTD, k_BTD, v_BTD = (proj(lerp_with_previous(x_BTD, before_BTD, mix).to(x_BTD.dtype)) for proj, mix in
                               zip((self.q_proj, self.k_proj, self.v_proj), self.mix, strict=True))
        match = partial(suffix_match, scale_C=self.scale, bits=self.config.bits, unmatched=self.config.unmatched)
        if state is None:
            y_BTD, _ = match(q_BTD, k_BTD, v_BTD, cu_seqlens=seq.cu_seqlens)
            return self.o_proj(y_BTD.to(x_BTD.dtype)), {}
        kept = state.tensors
        for name, x in (("keys", k_BTD), ("values", v_BTD)):
            kept[name] = torch.cat([*([kept[name]] if name in kept else []), x > 0], 1)
        y_BTD, runs_BRG = match(q_BTD, kept["keys"], kept["values"], runs_BRG=kept.get("runs"), final_runs=True)
        assert runs_BRG is not None
        kept["runs"] = runs_BRG
        return self.o_proj(y_BTD.to(x_BTD.dtype)), {}

    def parameter_roles(self) -> dict[str, ParameterRole]:
        return find_roles(self, {"mix": VECTOR})

    def new_state(self, batch: int, max_length: int) -> TensorState:
        return TensorState()

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """Nothing is mixed and scale is 1 at the start, as in the authors' code; projections are normal(0, std)."""
        init_projections(self, std)
        nn.init.ones_(self.scale)
        nn.init.zeros_(self.mix)
