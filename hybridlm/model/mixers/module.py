"""The contract of the module of a sequence mixer.

Abstract methods have to be written; all others have an answer that suits a plain mixer.

B rows, T tokens, D hidden size, H heads.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from hybridlm.model.decode_step import DecodeStep
from hybridlm.model.fp32_parameters import KeepsFP32
from hybridlm.model.parameter_roles import ParameterRole, find_roles
from hybridlm.model.sequence import SequenceInfo

# Results of one layer beside its output: named losses ("loss/NAME"), and statistics that are reported over all layers
# ("stat/NAME") or also for each ("layer/NAME").
Aux = dict[str, Tensor]
AttentionMode = Literal["dense", "sparse"]  # attention to all keys, or to those that a selector chooses


class SequenceMixer(KeepsFP32, abc.ABC):
    """A module that mixes information along the sequence: x [B, T, D] -> y [B, T, D].

    `fp32_parameters` are names of parameters, or their last parts, that stay in fp32 (`KeepsFP32`).
    """

    # Parameters in which the output is piecewise constant, as it is in the inputs then: their gradient is that of a
    # stand-in, such as differences of flipped bits, and no derivative.
    piecewise_constant: ClassVar[tuple[str, ...]] = ()

    @abc.abstractmethod
    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: Any | None = None) -> tuple[Tensor, Aux]:
        """Compute the output of every token from itself and the earlier tokens of its document.

        Args:
            x_BTD: input of the branch.
            seq: positions and borders of the documents.
            state: this layer's decode state from `new_state`, updated in place; None in training.

        Returns:
            y [B, T, D], and the layer's losses and statistics.
        """

    @abc.abstractmethod
    def new_state(self, batch: int, max_length: int) -> Any:
        """Empty decode state for `batch` sequences of at most `max_length` tokens; it has `num_bytes`."""

    def prepare_step(self) -> DecodeStep | None:
        """Prepare decoding of one token per row without gradients, where that can be faster than `forward`.

        Returns:
            A function of (x [B, 1, D], seq, state) that returns what `forward` would; see `hybridlm.model.decode_step`.
            By default None: `forward` itself decodes.
        """
        return None

    @property
    def decodes_padded_rows(self) -> bool:
        """Whether one token per row can be decoded when rows hold unlike numbers of tokens.

        The decode states of shorter rows are then padded in front (`SequenceInfo.padding_B`). A kind whose state is a
        function of the row alone, without one entry per token, always can; by default the answer is no.
        """
        return False

    @abc.abstractmethod
    def init_weights(self, std: float) -> None:
        """Set every parameter and buffer to its initial value as published; plain projections are normal(0, std)."""

    def calibrate(self, half_life_H: Tensor) -> None:
        """Set what attention gives no weights for so that the layer starts near the attention whose weights it has.

        Convolutions become the identity, decays get a half-life per head, gates that can be open start so. By default
        nothing is set.

        Args:
            half_life_H: tokens after which the decay of each head of the replaced attention is 1/2.
        """

    def look_back(self, x_BTD: Tensor, seq: SequenceInfo) -> Tensor | None:
        """Mean distance in tokens from queries to the keys they read, per head; None without softmax attention.

        Args:
            x_BTD: input of the mixer.
            seq: positions and borders of the documents.

        Returns:
            Distances [H], weighted by attention. The first token of each document is left out: it is a sink, read for
            having none.
        """
        return None

    def output_projection(self) -> tuple[nn.Linear, int] | None:
        """The projection behind the heads' outputs, and their number; None where heads do not reach it one by one."""
        return None

    def without_linear_branch(self, x_BTD: Tensor, seq: SequenceInfo) -> Tensor:
        """The output [B, T, D] without what the mixer keeps in a state of fixed size; by default that is zero.

        Args:
            x_BTD: input of the mixer.
            seq: positions and borders of the documents.
        """
        return torch.zeros_like(x_BTD)

    def set_attention(self, mode: AttentionMode | None, loss_weights: Mapping[str, float]) -> None:
        """Follow a training stage: where the mixer has a selector, its mode and the weight of its loss.

        Args:
            mode: `dense` or `sparse`; None is as in the config.
            loss_weights: weights of losses by name that replace those of the config.
        """

    def set_topk(self, topk: int | None) -> None:
        """Select so many tokens per query, where the mixer has a selector.

        Args:
            topk: a multiple of `topk_multiple` of the config; None is as in the config.
        """

    def selected_keys(self) -> int | None:
        """Keys that a query reads at most as the mixer is set now; None where it does not select by itself."""
        return None

    def freeze_idle_parameters(self, later: Sequence[SequenceMixer] = ()) -> None:
        """Freeze parameters of a selector whose loss has no weight: nothing trains them, nothing must decay them.

        Args:
            later: the mixers of the model behind this one, whose losses may reach a selection that they share.
        """

    def measure_selection(self, on: bool) -> None:
        """Let forwards report the share of dense attention that a selection reads, where the mixer has a selector."""

    def parameter_roles(self) -> dict[str, ParameterRole]:
        """The role of every parameter of the mixer, by its name within the mixer.

        Raises:
            TypeError: a parameter that is neither a linear map nor a vector, and that the kind does not declare.
        """
        return find_roles(self, head_rows=self.head_rows())

    def head_rows(self) -> dict[str, int]:
        """Linear maps of the mixer whose rows are one block per head, with their number of heads."""
        return {}
