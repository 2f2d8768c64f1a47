"""Reads and writes of residual streams by small matrix products; the backward keeps the inputs in their own dtypes.

M streams, D model width; leading dims are those of tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm_kernels.precision import plain_backward, wide


def read_streams(streams: Tensor, read: Tensor) -> Tensor:
    """The torch backend; arguments as in the public function, already checked."""
    return _Read.apply(streams, read)


def write_streams(streams: Tensor, carry: Tensor | None, write: Tensor, output: Tensor) -> Tensor:
    """The torch backend; arguments as in the public function, already checked."""
    return _Write.apply(streams, carry, write, output)


class _Read(torch.autograd.Function):
    """A weighted sum over streams."""

    @staticmethod
    def forward(ctx, streams, read):
        ctx.save_for_backward(streams, read)
        with torch.autocast(streams.device.type, enabled=False):
            return (wide(read)[..., None, :] @ wide(streams)).squeeze(-2).to(streams.dtype)

    @staticmethod
    @plain_backward
    def backward(ctx, dx):
        streams, read = ctx.saved_tensors
        dx = wide(dx)
        dread = (wide(streams) @ dx[..., None]).squeeze(-1)
        return (wide(read)[..., None] * dx[..., None, :]).to(streams.dtype), dread.to(read.dtype)


class _Write(torch.autograd.Function):
    """Weighted sums of the streams, and a branch's output added to each."""

    @staticmethod
    def forward(ctx, streams, carry, write, output):
        # Without carry weights the streams have the gradient of the result, and are not needed.
        ctx.save_for_backward(None if carry is None else streams, carry, write, output)
        ctx.dtype = streams.dtype
        with torch.autocast(streams.device.type, enabled=False):
            carried = wide(streams)
            if carry is not None:
                carried = torch.einsum("...ij,...id->...jd", wide(carry), carried)
            return (carried + wide(write)[..., None] * wide(output)[..., None, :]).to(streams.dtype)

    @staticmethod
    @plain_backward
    def backward(ctx, dy):
        streams, carry, write, output = ctx.saved_tensors
        dy = wide(dy)
        dstreams, dcarry = dy, None
        if carry is not None:
            dstreams = wide(carry) @ dy
            dcarry = torch.einsum("...id,...jd->...ij", wide(streams), dy).to(carry.dtype)
        dwrite = (dy @ wide(output)[..., None]).squeeze(-1)
        doutput = (wide(write)[..., None, :] @ dy).squeeze(-2)
        return dstreams.to(ctx.dtype), dcarry, dwrite.to(write.dtype), doutput.to(output.dtype)
