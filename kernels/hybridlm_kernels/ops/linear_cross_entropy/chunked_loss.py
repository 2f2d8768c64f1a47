"""Linear layer and cross entropy over chunks of tokens, so that only one chunk's logits exist at a time.

Each backend computes loss and gradient of a chunk's logits in a subclass of `LossChunks`. The walk over the tokens, the
matrix products and the autograd functions are the same for all.

N tokens, C tokens of a chunk, D features, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from hybridlm_kernels.precision import plain_backward, product_dtype

# Logits per chunk, in elements: on a CPU they should stay in the cache.
CPU_CHUNK_LOGITS = 2**18
# Tokens per chunk at least: with fewer, the time goes to reading and adding to the gradient of the weight.
MIN_CHUNK_TOKENS = 256


class LossChunks(ABC):
    """Walks over the tokens by chunks, with the chunk's logits in one buffer that all chunks share."""

    gpu_chunk_logits = 2**26  # in elements: a GPU needs enough rows to be busy

    def __init__(self, x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, ignore_index: int,
                 soft_cap: float | None, dtype: torch.dtype):
        self.x_ND, self.weight_VD, self.soft_cap = x_ND, weight_VD.to(dtype), soft_cap
        self.labels_N = labels_N.contiguous()  # a column of several, where each token has several labels
        self.ignore_index, self.counted_N = ignore_index, labels_N != ignore_index
        self.wide = torch.promote_types(dtype, torch.float32)
        vocabulary = weight_VD.shape[0]
        budget = CPU_CHUNK_LOGITS if x_ND.device.type == "cpu" else self.gpu_chunk_logits
        self.size = min(max(MIN_CHUNK_TOKENS, budget // vocabulary), max(1, x_ND.shape[0]))
        aligned = -vocabulary % 16 + vocabulary  # rows that start at a multiple of 16 are loaded in wide units
        self._logits_CV = x_ND.new_empty(self.size, aligned, dtype=dtype)[:, :vocabulary]

    def __iter__(self) -> Iterator[slice]:
        for start in range(0, self.x_ND.shape[0], self.size):
            yield slice(start, min(start + self.size, self.x_ND.shape[0]))

    def product(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The chunk's inputs in the dtype of the product, and its logits, before the soft cap."""
        x_CD = self.x_ND[rows].to(self.weight_VD.dtype)
        return x_CD, torch.mm(x_CD, self.weight_VD.T, out=self._logits_CV[: x_CD.shape[0]])

    @abstractmethod
    def loss(self, rows: slice, logits_CV: Tensor, gradient: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Loss per token (0 where it does not count), logsumexp, and the gradient of the loss by the logits.

        The gradient may ignore which tokens count, where `product_gradients` leaves out the others.
        """

    @abstractmethod
    def gradient(self, rows: slice, logits_CV: Tensor, lse_C: Tensor, dloss: Tensor, dz: Tensor) -> Tensor:
        """Gradient of dloss * loss + dz * logsumexp^2 by the logits, with logsumexp known."""

    def product_gradients(self, rows: slice, x_CD: Tensor, dlogits_CV: Tensor, dx_ND: Tensor,
                          dweight_VD: Tensor) -> None:
        """Fills rows of dx and adds to dweight."""
        torch.mm(dlogits_CV, self.weight_VD, out=dx_ND[rows])
        if dweight_VD.dtype == x_CD.dtype:
            dweight_VD.addmm_(dlogits_CV.T, x_CD)
        else:
            dweight_VD.add_(dlogits_CV.T @ x_CD)


def chunked_linear_cross_entropy(backend_chunks: type[LossChunks], x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor,
                                 ignore_index: int, z_loss: float, soft_cap: float | None
                                 ) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the operation by chunks; `backend_chunks` computes loss and gradient of each chunk's logits."""
    dtype = product_dtype(x_ND)
    # Gradients are computed in the forward, where the logits are at hand. With a z-loss the weight of its
    # gradient against the other's is known in the backward only, and the logits are computed again there.
    function = _LossWithZGradient if z_loss else _LossOnly
    with torch.autocast(x_ND.device.type, enabled=False):
        return function.apply(backend_chunks, torch.is_grad_enabled(), x_ND, weight_VD, labels_N, ignore_index,
                              soft_cap, dtype)


class _LossOnly(torch.autograd.Function):
    """Sums of the loss and of logsumexp^2; gradients of the loss computed on the way and scaled later."""

    @staticmethod
    def forward(ctx, backend_chunks, grad_enabled, x_ND, weight_VD, labels_N, ignore_index, soft_cap, dtype):
        chunks = backend_chunks(x_ND, weight_VD, labels_N, ignore_index, soft_cap, dtype)
        loss_N, lse_N = (x_ND.new_empty(x_ND.shape[0], dtype=chunks.wide) for _ in range(2))
        ctx.gradients = None
        # needs_input_grad is true for a parameter under no_grad too
        if needs_grad := grad_enabled and any(ctx.needs_input_grad[2:4]):
            dx_ND = torch.empty(x_ND.shape, dtype=dtype, device=x_ND.device)
            dweight_VD = torch.zeros(weight_VD.shape, dtype=chunks.wide, device=x_ND.device)
            ctx.gradients = (dx_ND, dweight_VD, x_ND.dtype, weight_VD.dtype)
        for rows in chunks:
            x_CD, logits_CV = chunks.product(rows)
            loss_N[rows], lse_N[rows], dlogits_CV = chunks.loss(rows, logits_CV, needs_grad)
            if needs_grad:
                chunks.product_gradients(rows, x_CD, dlogits_CV, dx_ND, dweight_VD)
        count, z_sum = chunks.counted_N.sum(), (lse_N.square() * chunks.counted_N).sum()
        ctx.mark_non_differentiable(z_sum, count)
        return loss_N.sum(), z_sum, count

    @staticmethod
    @plain_backward
    def backward(ctx, dloss, dz, dcount):
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy: a second backward needs another forward")
        dx_ND, dweight_VD, x_dtype, weight_dtype = ctx.gradients
        ctx.gradients = None  # scaled in place: they are as large as the weight
        return None, None, dx_ND.mul_(dloss).to(x_dtype), dweight_VD.mul_(dloss).to(weight_dtype), *(None,) * 4


class _LossWithZGradient(torch.autograd.Function):
    """Sums of the loss and of logsumexp^2, both differentiable, for one more product of x and the weight."""

    @staticmethod
    def forward(ctx, backend_chunks, grad_enabled, x_ND, weight_VD, labels_N, ignore_index, soft_cap, dtype):
        chunks = backend_chunks(x_ND, weight_VD, labels_N, ignore_index, soft_cap, dtype)
        loss_N, lse_N = (x_ND.new_empty(x_ND.shape[0], dtype=chunks.wide) for _ in range(2))
        for rows in chunks:
            loss_N[rows], lse_N[rows], _ = chunks.loss(rows, chunks.product(rows)[1], False)
        ctx.save_for_backward(x_ND, weight_VD, labels_N, lse_N)
        ctx.backend_chunks = backend_chunks
        ctx.options = (ignore_index, soft_cap, dtype)
        count = chunks.counted_N.sum()
        ctx.mark_non_differentiable(count)
        return loss_N.sum(), (lse_N.square() * chunks.counted_N).sum(), count

    @staticmethod
    @plain_backward
    def backward(ctx, dloss, dz, dcount):
        x_ND, weight_VD, labels_N, lse_N = ctx.saved_tensors
        chunks = ctx.backend_chunks(x_ND, weight_VD, labels_N, *ctx.options)
        dx_ND = torch.empty(x_ND.shape, dtype=ctx.options[2], device=x_ND.device)
        dweight_VD = torch.zeros(weight_VD.shape, dtype=chunks.wide, device=x_ND.device)
        for rows in chunks:
            x_CD, logits_CV = chunks.product(rows)
            dlogits_CV = chunks.gradient(rows, logits_CV, lse_N[rows], dloss, dz)
            chunks.product_gradients(rows, x_CD, dlogits_CV, dx_ND, dweight_VD)
        return None, None, dx_ND.to(x_ND.dtype), dweight_VD.to(weight_VD.dtype), *(None,) * 4
