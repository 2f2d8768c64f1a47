"""Linear layer and cross entropy over chunks of tokens, so that only one chunk's logits exist at a time.

N tokens, C tokens of a chunk, D features, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm_kernels.precision import plain_backward, product_dtype

# Logits of a chunk, in elements: on a CPU they should stay in the cache, a GPU needs enough rows to be busy. With too
# few rows a chunk spends its time on reading and adding to the gradient of the weight.
CPU_ELEMENTS = 2**18
GPU_ELEMENTS = 2**26
LEAST_ROWS = 256


def linear_cross_entropy(x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, ignore_index: int = -100,
                         z_loss: float = 0.0, soft_cap: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    dtype = product_dtype(x_ND)
    # Gradients are computed in the forward, where the logits are at hand. With a z-loss the weight of its
    # gradient against the other's is known in the backward only, and the logits are computed again there.
    function = _RecomputedLoss if z_loss else _Loss
    with torch.autocast(x_ND.device.type, enabled=False):
        loss_N, z_N, count = function.apply(x_ND, weight_VD, labels_N, ignore_index, soft_cap, dtype)
    return loss_N, z_N, count


class _Chunks:
    """Walks over the tokens, with the chunk's logits in buffers that all chunks share."""

    def __init__(self, x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, ignore_index: int,
                 soft_cap: float | None, dtype: torch.dtype):
        self.x_ND, self.weight_VD, self.soft_cap = x_ND, weight_VD.to(dtype), soft_cap
        self.wide = torch.promote_types(dtype, torch.float32)
        self.counted_N = labels_N != ignore_index
        self.labels_N1 = labels_N.where(self.counted_N, 0)[:, None]
        vocabulary = weight_VD.shape[0]
        budget = CPU_ELEMENTS if x_ND.device.type == "cpu" else GPU_ELEMENTS
        self.size = min(max(LEAST_ROWS, budget // vocabulary), max(1, x_ND.shape[0]))
        self.logits_CV = x_ND.new_empty(self.size, vocabulary, dtype=dtype)
        self.other_CV = x_ND.new_empty(self.size, vocabulary, dtype=self.wide)

    def __iter__(self):
        for start in range(0, self.x_ND.shape[0], self.size):
            yield slice(start, min(start + self.size, self.x_ND.shape[0]))

    def logits(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The chunk's inputs in the dtype of the product, and its logits in fp32 or better, capped."""
        x_CD = self.x_ND[rows].to(self.weight_VD.dtype)
        logits_CV = torch.mm(x_CD, self.weight_VD.T, out=self.logits_CV[: x_CD.shape[0]]).to(self.wide)
        if self.soft_cap is not None:
            logits_CV = logits_CV.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        return x_CD, logits_CV

    def backward(self, rows: slice, x_CD: Tensor, dlogits_CV: Tensor, logits_CV: Tensor, dx_ND: Tensor,
                 dweight_VD: Tensor) -> None:
        """From the gradient of the capped logits; adds to dweight, fills rows of dx."""
        if self.soft_cap is not None:  # d cap*tanh(l/cap)/dl = 1 - tanh^2
            slope_CV = logits_CV.div_(self.soft_cap).square_().neg_().add_(1.0)
            dlogits_CV = dlogits_CV.mul_(slope_CV)
        dlogits_CV = dlogits_CV.to(x_CD.dtype)
        torch.mm(dlogits_CV, self.weight_VD, out=dx_ND[rows])
        if dweight_VD.dtype == x_CD.dtype:
            dweight_VD.addmm_(dlogits_CV.T, x_CD)
        else:
            dweight_VD.add_(dlogits_CV.T @ x_CD)


class _Loss(torch.autograd.Function):
    """Sums of the loss and of logsumexp^2; gradients of the loss computed on the way and scaled later."""

    @staticmethod
    def forward(ctx, x_ND, weight_VD, labels_N, ignore_index, soft_cap, dtype):
        chunks = _Chunks(x_ND, weight_VD, labels_N, ignore_index, soft_cap, dtype)
        loss_N, z_N = (x_ND.new_empty(x_ND.shape[0], dtype=chunks.wide) for _ in range(2))
        needs_grad = any(ctx.needs_input_grad[:2])
        if needs_grad:
            dx_ND = torch.empty(x_ND.shape, dtype=dtype, device=x_ND.device)
            dweight_VD = torch.zeros(weight_VD.shape, dtype=chunks.wide, device=x_ND.device)
        for rows in chunks:
            x_CD, logits_CV = chunks.logits(rows)
            logp_CV = torch.log_softmax(logits_CV, -1, out=chunks.other_CV[: len(logits_CV)])
            labels_C1, counted_C1 = chunks.labels_N1[rows], chunks.counted_N[rows, None]
            picked_C1 = logp_CV.gather(1, labels_C1)
            loss_N[rows] = -(picked_C1 * counted_C1)[:, 0]
            z_N[rows] = ((logits_CV.gather(1, labels_C1) - picked_C1).square() * counted_C1)[:, 0]
            if needs_grad:
                dlogits_CV = logp_CV.exp_()
                dlogits_CV.scatter_add_(1, labels_C1, dlogits_CV.new_full(labels_C1.shape, -1.0))
                # a row that does not count is taken out where that is cheap: of the D-wide tensors
                chunks.backward(rows, x_CD * counted_C1, dlogits_CV, logits_CV, dx_ND, dweight_VD)
        if needs_grad:
            dx_ND.mul_(chunks.counted_N[:, None])
            ctx.gradients = (dx_ND, dweight_VD, x_ND.dtype, weight_VD.dtype)
        count, z_sum = chunks.counted_N.sum(), z_N.sum()
        ctx.mark_non_differentiable(z_sum, count)
        return loss_N.sum(), z_sum, count

    @staticmethod
    @plain_backward
    def backward(ctx, dloss, dz, dcount):
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy: a second backward needs another forward")
        dx_ND, dweight_VD, x_dtype, weight_dtype = ctx.gradients
        ctx.gradients = None  # scaled in place: they are as large as the weight
        return (dx_ND.mul_(dloss).to(x_dtype), dweight_VD.mul_(dloss).to(weight_dtype), None, None, None, None)


class _RecomputedLoss(torch.autograd.Function):
    """As `_Loss`, with logsumexp^2 differentiable too: one more product of x and the weight."""

    @staticmethod
    def forward(ctx, x_ND, weight_VD, labels_N, ignore_index, soft_cap, dtype):
        chunks = _Chunks(x_ND, weight_VD, labels_N, ignore_index, soft_cap, dtype)
        loss_N, lse_N = (x_ND.new_empty(x_ND.shape[0], dtype=chunks.wide) for _ in range(2))
        for rows in chunks:
            _, logits_CV = chunks.logits(rows)
            lse_N[rows] = torch.logsumexp(logits_CV, -1)
            loss_N[rows] = lse_N[rows] - logits_CV.gather(1, chunks.labels_N1[rows])[:, 0]
        ctx.save_for_backward(x_ND, weight_VD, labels_N, lse_N)
        ctx.options = (ignore_index, soft_cap, dtype)
        count = chunks.counted_N.sum()
        ctx.mark_non_differentiable(count)
        return (loss_N * chunks.counted_N).sum(), (lse_N.square() * chunks.counted_N).sum(), count

    @staticmethod
    @plain_backward
    def backward(ctx, dloss, dz, dcount):
        x_ND, weight_VD, labels_N, lse_N = ctx.saved_tensors
        chunks = _Chunks(x_ND, weight_VD, labels_N, *ctx.options)
        dx_ND = torch.empty(x_ND.shape, dtype=ctx.options[2], device=x_ND.device)
        dweight_VD = torch.zeros(weight_VD.shape, dtype=chunks.wide, device=x_ND.device)
        dloss_N1 = (dloss * chunks.counted_N)[:, None].to(chunks.wide)
        dlse_N1 = dloss_N1 + ((2.0 * dz) * lse_N * chunks.counted_N)[:, None]
        for rows in chunks:
            x_CD, logits_CV = chunks.logits(rows)
            dlogits_CV = torch.sub(logits_CV, lse_N[rows, None], out=chunks.other_CV[: len(logits_CV)]).exp_()
            dlogits_CV.mul_(dlse_N1[rows]).scatter_add_(1, chunks.labels_N1[rows], -dloss_N1[rows])
            chunks.backward(rows, x_CD, dlogits_CV, logits_CV, dx_ND, dweight_VD)
        return dx_ND.to(x_ND.dtype), dweight_VD.to(weight_VD.dtype), None, None, None, None
