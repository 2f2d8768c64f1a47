"""Several steps of the delta rule per token, as a plain delta rule over rows (DeltaProduct).

A token of n steps is n rows: the decay acts at the first, the query reads at the last.

Legend: B rows, T tokens per row, n steps per token, H query/key heads, K key head dim.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad

from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.recurrence.arguments import Borders, borders_of
from hybridlm_kernels.recurrence.gates import Gate, log_decay


def spread_over_steps(steps: int, q_BTHK: Tensor, g: Tensor | None, gate: Gate | None,
                      cu_seqlens: Borders) -> tuple[Tensor, Tensor | None, CuSeqlens | None]:
    """The queries [B, T n, H, K], the decay of every row and the borders of documents in rows.

    Raises:
        ValueError: fewer than two steps, or a query or decay without a time dimension.
    """
    if steps < 1 or q_BTHK.dim() != 4 or (g is not None and g.dim() < 3):
        shapes = f"q {list(q_BTHK.shape)}, g {None if g is None else list(g.shape)}"
        raise ValueError(f"delta_rule: steps must be 1 or more, q [batch, time, heads, dim] and g one per token; got "
                         f"steps={steps}, {shapes}")
    if gate is not None and g is not None:
        gate.check("delta_rule", g)
    g = log_decay(g, gate)
    if g is not None:
        g = pad(g[:, :, None], (*(0, 0) * (g.dim() - 2), 0, steps - 1)).flatten(1, 2)
    borders = borders_of(cu_seqlens, q_BTHK.shape[0], q_BTHK.shape[1], q_BTHK.device)
    borders = None if borders is None else borders.in_rows(steps)
    return pad(q_BTHK[:, :, None], (0, 0, 0, 0, steps - 1, 0)).flatten(1, 2), g, borders
