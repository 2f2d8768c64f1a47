"""Tables that tokens look up rows in by whole numbers: memory that no matrix product reads.

A table may lie on another device than the tokens, such as the host: rows are looked up there and then brought over.
B rows, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hybridlm.model.parameter_roles import ParameterRole
from hybridlm.model.sequence import SequenceInfo


def token_ids(seq: SequenceInfo, reader: str) -> Tensor:
    """The ids [B, T] of the tokens held here.

    Args:
        seq: describes the tokens.
        reader: who needs them, for the error message.

    Raises:
        ValueError: the model was given embeddings.
    """
    if seq.token_ids_BT is None:
        raise ValueError(f"{reader} looks tokens up by their ids: pass input_ids, not inputs_embeds")
    return seq.token_ids_BT


def look_up(table: nn.Embedding, rows: Tensor, device: torch.device) -> Tensor:
    """Rows of a table, looked up where the table lies.

    Args:
        table: the table.
        rows: int64 [...], their indices.
        device: where they are brought.

    Returns:
        [..., width of the table] on `device`.
    """
    place = table.weight.device
    if place.type == "meta":  # offloaded: a hook brings the table to the rows
        return table(rows)
    return table(rows.to(place)).to(device)


class LookupTable(nn.Embedding):
    """A table with a role of its own, `lookup_table`: it does not decay, and may ask for a larger learning rate.

    Args:
        rows: number of rows.
        width: numbers per row.
        lr_factor: factor of the learning rate.

    >>> LookupTable(8, 2, lr_factor=5.0).parameter_roles()["weight"].lr_factor
    5.0
    """

    def __init__(self, rows: int, width: int, lr_factor: float = 1.0):
        super().__init__(rows, width)
        self.lr_factor = lr_factor

    def parameter_roles(self) -> dict[str, ParameterRole]:
        """The role of the table."""
        return {"weight": ParameterRole("lookup_table", lr_factor=self.lr_factor)}
