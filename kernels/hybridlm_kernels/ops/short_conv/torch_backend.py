"""Short causal convolution as a sum of shifted products, with its own backward pass.

Documents are laid out one after another, each with W - 1 rows in front of it that hold its state, or zeros. On these
rows no tap needs a mask; the outputs at the rows in front are meaningless and dropped.

Legend: B rows, T tokens, C channels, W taps, N documents, E = B T + N (W - 1) rows laid out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.precision import plain_backward
from hybridlm_kernels.recurrence.arguments import math_dtype

# Elements of one tensor processed at a time: several tensors of that size stay in the second-level cache of a CPU.
BLOCK_MAX_ELEMENTS = {"cpu": 2**18, "cuda": 2**40}


def short_conv(x_BTC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, activation: str | None,
               state_NCW: Tensor | None, borders: CuSeqlens | None) -> tuple[Tensor, Tensor]:
    """The torch backend; arguments as in the public function, already checked. `state_NCW` holds W - 1 inputs."""
    return _TorchShortConv.apply(x_BTC, weight_CW, bias_C, state_NCW, activation == "silu", borders)


class _TorchShortConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, silu: bool,
                borders: CuSeqlens | None) -> Any:
        rows = _PaddedRows(x.shape, weight.shape[1], borders, x.device)
        dtype = math_dtype(x)
        x_EC = rows.spread(x, state, dtype)
        taps_WC = weight.to(dtype).t().contiguous()
        z_EC = torch.empty_like(x_EC)
        y_EC = torch.empty_like(x_EC) if silu else z_EC
        for a, b in rows.blocks():
            z = z_EC[a:b]
            if bias is None:
                torch.mul(rows.shifted(x_EC, a, b, 0), taps_WC[0], out=z)
            else:
                torch.addcmul(bias.to(dtype), rows.shifted(x_EC, a, b, 0), taps_WC[0], out=z)
            for w in range(1, rows.taps):
                z.addcmul_(rows.shifted(x_EC, a, b, w), taps_WC[w])
            if silu:
                torch.ops.aten.silu.out(z, out=y_EC[a:b])
        ctx.save_for_backward(x_EC, taps_WC, z_EC if silu else None)
        ctx.rows = rows
        ctx.dtypes = [None if t is None else t.dtype for t in (x, weight, bias, state)]
        return rows.collect(y_EC).to(x.dtype).contiguous(), rows.ends(x_EC).to(x.dtype)

    @staticmethod
    @plain_backward
    def backward(ctx: Any, dy: Tensor, d_final: Tensor) -> Any:
        x_EC, taps_WC, z_EC = ctx.saved_tensors
        rows: _PaddedRows = ctx.rows
        dy_EC = rows.spread(dy, None, x_EC.dtype)
        dx_EC = torch.zeros_like(x_EC)
        d_taps, d_bias = torch.zeros_like(taps_WC), taps_WC.new_zeros(taps_WC.shape[1])
        for a, b in rows.blocks():
            dz = dy_EC[a:b]
            if z_EC is not None:
                dz = torch.ops.aten.silu_backward(dz, z_EC[a:b])
            for w in range(rows.taps):
                rows.shifted(dx_EC, a, b, w).addcmul_(dz, taps_WC[w])
                d_taps[w] += (dz * rows.shifted(x_EC, a, b, w)).sum(0)
            if ctx.dtypes[2] is not None:
                d_bias += dz.sum(0)
        rows.add_to_ends(dx_EC, d_final)
        grads = rows.collect(dx_EC), d_taps.t(), d_bias, rows.starts(dx_EC)
        return *(None if dtype is None else grad.to(dtype)
                 for grad, dtype in zip(grads, ctx.dtypes, strict=True)), None, None


class _PaddedRows:
    """The E rows of a batch whose documents have their states in front, and the way between them and tokens."""

    def __init__(self, shape: torch.Size, taps: int, borders: CuSeqlens | None, device: torch.device):
        self.batch, self.length, self.channels = shape
        self.taps, self.before, self.packed, self.device = taps, taps - 1, borders is not None, device
        self.documents = self.batch if borders is None else borders.num_documents
        self.rows = self.batch * self.length + self.documents * self.before
        if borders is not None:
            key = ("short_conv", taps, device)
            if key not in borders.cache:
                borders.cache[key] = self._indices(borders)
            self.row_of_token, self.token_of_row, self.start_rows, self.end_rows = borders.cache[key]

    def _indices(self, borders: CuSeqlens) -> tuple[Tensor, ...]:
        document = np.repeat(np.arange(self.documents), borders.lengths)
        row_of_token = np.arange(borders.num_tokens) + (document + 1) * self.before
        token_of_row = np.zeros(self.rows, dtype=np.int64)  # token 0 where there is none
        token_of_row[row_of_token] = np.arange(borders.num_tokens)
        n = np.arange(self.documents)
        first = (np.asarray(borders.host[:-1]) + n * self.before)[:, None] + np.arange(self.before)
        last = (np.asarray(borders.host[1:]) + n * self.before)[:, None] + np.arange(self.before)
        return tuple(torch.from_numpy(np.ascontiguousarray(x.reshape(-1), dtype=np.int64)).to(self.device)
                     for x in (row_of_token, token_of_row, first, last))

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Ranges of output rows in blocks; the first W - 1 rows have no full window and are left out."""
        numbers = BLOCK_MAX_ELEMENTS.get(self.device.type, BLOCK_MAX_ELEMENTS["cuda"])
        size = max(16, numbers // self.channels)
        for a in range(self.before, self.rows, size):
            yield a, min(a + size, self.rows)

    def shifted(self, x_EC: Tensor, a: int, b: int, tap: int) -> Tensor:
        """The inputs that tap `tap` multiplies for the output rows a to b."""
        return x_EC[a - self.before + tap : b - self.before + tap]

    def spread(self, x_BTC: Tensor, state_NCW: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The tokens with their states in front, zeros for None: [E, C]."""
        before = 0 if state_NCW is None else state_NCW.to(dtype).mT
        if self.packed:
            x_EC = x_BTC.reshape(-1, self.channels).index_select(0, self.token_of_row).to(dtype)
            x_EC[self.start_rows] = before if isinstance(before, int) else before.reshape(-1, self.channels)
            return x_EC
        x_BEC = torch.empty(self.batch, self.before + self.length, self.channels, dtype=dtype, device=self.device)
        x_BEC[:, : self.before] = before
        x_BEC[:, self.before :] = x_BTC
        return x_BEC.view(-1, self.channels)

    def collect(self, y_EC: Tensor) -> Tensor:
        """The rows of the tokens: [B, T, C]."""
        if self.packed:
            return y_EC.index_select(0, self.row_of_token).view(self.batch, self.length, -1)
        return y_EC.view(self.batch, -1, self.channels)[:, self.before :]

    def starts(self, x_EC: Tensor) -> Tensor:
        """The rows in front of every document: [N, C, W-1]."""
        return self._pick(x_EC, 0)

    def ends(self, x_EC: Tensor) -> Tensor:
        """The last rows of every document: [N, C, W-1]."""
        return self._pick(x_EC, 1)

    def _pick(self, x_EC: Tensor, end: int) -> Tensor:
        if self.packed:
            rows = x_EC.index_select(0, self.end_rows if end else self.start_rows)
            rows = rows.view(self.documents, self.before, self.channels)
        else:
            first = self.length if end else 0
            rows = x_EC.view(self.batch, -1, self.channels)[:, first : first + self.before]
        return rows.mT.contiguous()

    def add_to_ends(self, dx_EC: Tensor, d_final: Tensor) -> None:
        """Add the gradient of `ends` to the gradient of the rows."""
        d_NWC = d_final.to(dx_EC.dtype).mT
        if self.packed:
            dx_EC.index_add_(0, self.end_rows, d_NWC.reshape(-1, self.channels))
        else:
            dx_EC.view(self.batch, -1, self.channels)[:, self.length :] += d_NWC
