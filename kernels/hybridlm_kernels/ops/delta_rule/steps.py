"""Several steps of the delta rule per token, as a plain delta rule over rows (DeltaProduct).

A token of n steps is n rows: the decay acts at the first, the query reads at the last.

Legend: B rows, T tokens per row, n steps per token, H query/key heads, HV value heads, K key head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from hybridlm_kernels.recurrence.erase import Erase
from hybridlm_kernels.recurrence.gates import Gate, log_decay

Backend = Callable[..., tuple[Tensor, Tensor]]


def spread_over_steps(backend: Backend) -> Backend:
    """Extend a backend of the delta rule that knows one row per token to `steps` rows per token.

    It is called with queries and decays spread over rows, [B, T n, ...], and gives back the outputs of last rows.

    Args:
        backend: takes the arguments of a backend without `steps`, and without `erase` where that is None.
    """

    def run(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHvV: Tensor, g: Tensor | None, beta_BTHv: Tensor | None, scale: float,
            state_NHvKV: Tensor | None, borders: Any, qk_l2norm: bool, gate: Gate | None, beta_sigmoid: float | None,
            final_state: bool, erase: Erase | None, steps: int) -> tuple[Tensor, Tensor]:
        if steps != 1:
            q_BTHK = pad(q_BTHK[:, :, None], (0, 0, 0, 0, steps - 1, 0)).flatten(1, 2)
            g, gate = log_decay(g, gate), None
            if g is not None:
                g = pad(g[:, :, None], (*(0, 0) * (g.dim() - 2), 0, steps - 1)).flatten(1, 2)
        more = () if erase is None else (erase,)  # backends that refuse every form do not know the argument
        o_BTHvV, state_NHvKV = backend(q_BTHK, k_BTHK, v_BTHvV, g, beta_BTHv, scale, state_NHvKV, borders, qk_l2norm,
                                       gate, beta_sigmoid, final_state, *more)
        return o_BTHvV if steps == 1 else o_BTHvV[:, steps - 1 :: steps], state_NHvKV

    return run
