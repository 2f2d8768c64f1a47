"""State matrices of linear mixers on rows that are divided: what is left of the state at the start of a shard.

B rows, T tokens, HV value heads, K key dim, V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm.model.context_parallel import RowShard


def read_incoming_state(reach_BTHvK: Tensor, incoming_BHvKV: Tensor) -> Tensor:
    """Read the state at the start of the shard with queries.

    Args:
        reach_BTHvK: the queries as they act on that state, after all decays and updates between it and them.
        incoming_BHvKV: the state that the earlier shards leave.

    Returns:
        The reads, [B, T, HV, V].
    """
    with torch.autocast(reach_BTHvK.device.type, enabled=False):
        return torch.einsum("bthk,bhkv->bthv", reach_BTHvK.to(incoming_BHvKV.dtype), incoming_BHvKV)


def compute_decay_from_start(g: Tensor | None, dtype: torch.dtype, shard: RowShard) -> Tensor:
    """The factor [B, T, HV, K] by which the state at the start of the shard has decayed at each token.

    It is 0 for documents that begin in the shard. HV and K are 1 where all heads or channels decay alike.

    Args:
        g: the logarithm of the decay as the operation takes it; None where nothing decays.
        dtype: that of the result.
        shard: this process's shard of the rows.
    """
    if g is None:
        log_BTHvK = torch.zeros(1, 1, 1, 1, dtype=dtype, device=shard.positions_BL.device)
    elif g.dim() == 1:
        steps_T1 = torch.arange(1, shard.length + 1, device=g.device)[:, None]
        log_BTHvK = (g.to(dtype) * steps_T1)[None, :, :, None]
    else:
        log_BTHvK = g.to(dtype).cumsum(1)
        log_BTHvK = log_BTHvK if g.dim() == 4 else log_BTHvK[..., None]
    return torch.where(shard.continued_tokens()[:, :, None, None], log_BTHvK, -torch.inf).exp()
