"""Base of mixers whose decode state is a few named tensors that do not grow with the tokens."""

from __future__ import annotations

from hybridlm.model.decode_state import TensorState
from hybridlm.model.mixers.contract import SequenceMixer


class TensorStateMixer(SequenceMixer):
    """A mixer that keeps a `TensorState`: last tokens, inputs of convolutions, recurrent states.

    Its state holds nothing per token, so rows of unlike lengths can be decoded together.
    """

    def new_state(self, batch: int, max_length: int) -> TensorState:
        return TensorState()

    @property
    def decodes_padded_rows(self) -> bool:
        return True
