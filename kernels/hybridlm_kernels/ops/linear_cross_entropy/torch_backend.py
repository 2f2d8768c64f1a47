"""Loss and gradient of a chunk's logits in torch operations. C tokens of a chunk, D features, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm_kernels.ops.linear_cross_entropy.chunked_loss import LossChunks, chunked_linear_cross_entropy


def linear_cross_entropy(x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, ignore_index: int = -100,
                         z_loss: float = 0.0, soft_cap: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The torch backend; arguments as in the public function, already checked."""
    return chunked_linear_cross_entropy(_TorchLossChunks, x_ND, weight_VD, labels_N, ignore_index, z_loss, soft_cap)


class _TorchLossChunks(LossChunks):
    """Loss and gradient of a chunk's logits in torch operations."""

    def __init__(self, *args):
        super().__init__(*args)
        self._labels_N1 = self.labels_N.where(self.counted_N, 0)[:, None]
        self._buffer_CV = self.x_ND.new_empty(self.size, self.weight_VD.shape[0], dtype=self.wide)

    def _capped(self, logits_CV: Tensor) -> Tensor:
        """The logits after the soft cap, in fp32 or better."""
        logits_CV = logits_CV.to(self.wide)
        if self.soft_cap is not None:
            logits_CV = logits_CV.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        return logits_CV

    def _uncapped(self, dlogits_CV: Tensor, logits_CV: Tensor) -> Tensor:
        """Gradient by the logits before the cap, in the dtype of the product: d cap*tanh(l/cap)/dl = 1 - tanh^2."""
        if self.soft_cap is not None:
            dlogits_CV = dlogits_CV.mul_(logits_CV.div_(self.soft_cap).square_().neg_().add_(1.0))
        return dlogits_CV.to(self.weight_VD.dtype)

    def loss(self, rows, logits_CV, gradient):
        logits_CV, labels_C1 = self._capped(logits_CV), self._labels_N1[rows]
        logp_CV = torch.log_softmax(logits_CV, -1, out=self._buffer_CV[: len(logits_CV)])
        picked_C1 = logp_CV.gather(1, labels_C1)
        loss_C = -(picked_C1[:, 0] * self.counted_N[rows])
        lse_C = (logits_CV.gather(1, labels_C1) - picked_C1)[:, 0]
        if not gradient:
            return loss_C, lse_C, None
        dlogits_CV = logp_CV.exp_().scatter_add_(1, labels_C1, logp_CV.new_full(labels_C1.shape, -1.0))
        return loss_C, lse_C, self._uncapped(dlogits_CV, logits_CV)

    def gradient(self, rows, logits_CV, lse_C, dloss, dz):
        logits_CV = self._capped(logits_CV)
        dlogits_CV = torch.sub(logits_CV, lse_C[:, None], out=self._buffer_CV[: len(logits_CV)]).exp_()
        dlogits_CV.mul_((dloss + 2.0 * dz * lse_C)[:, None])
        dlogits_CV.scatter_add_(1, self._labels_N1[rows], -dloss.to(self.wide).expand(len(logits_CV), 1))
        return self._uncapped(dlogits_CV, logits_CV)

    def product_gradients(self, rows, x_CD, dlogits_CV, dx_ND, dweight_VD):
        # a row that does not count is taken out where that is cheap: of the D-wide tensors
        counted_C1 = self.counted_N[rows, None]
        super().product_gradients(rows, x_CD * counted_C1, dlogits_CV, dx_ND, dweight_VD)
        dx_ND[rows].mul_(counted_C1)
