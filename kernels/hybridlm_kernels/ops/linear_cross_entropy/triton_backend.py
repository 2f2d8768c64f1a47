"""Loss and gradient of a chunk's logits in one Triton kernel: a program reads a row twice and overwrites it.

N tokens, C tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridlm_kernels.ops.linear_cross_entropy.chunked_loss import LossChunks, chunked_linear_cross_entropy
from hybridlm_kernels.triton_support import CompileCase


def linear_cross_entropy(x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, ignore_index: int = -100,
                         z_loss: float = 0.0, soft_cap: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The Triton backend; arguments as in the public function, already checked."""
    return chunked_linear_cross_entropy(_TritonLossChunks, x_ND, weight_VD, labels_N, ignore_index, z_loss, soft_cap)


@triton.jit
def _tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))
    return tl.where(x < 0, e - 1.0, 1.0 - e) / (1.0 + e)


@triton.jit
def _cross_entropy(logits_ptr, labels_ptr, loss_ptr, lse_ptr, dloss_ptr, dz_ptr, V, row_stride, ignore_index, cap,
                   CAPPED: tl.constexpr, LOSS: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """LOSS: write loss and logsumexp of the row. GRADIENT: replace the row by the gradient of dloss * loss +
    dz * logsumexp^2; with LOSS, dloss is 1 and dz is 0, without it logsumexp is read."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    logits_ptr += row * row_stride
    columns = tl.arange(0, BLOCK)
    if label == ignore_index:
        if LOSS:
            tl.store(loss_ptr + row, 0.0)
            tl.store(lse_ptr + row, 0.0)
        if GRADIENT:
            for start in range(0, V, BLOCK):
                zeros = tl.zeros([BLOCK], logits_ptr.dtype.element_ty)
                tl.store(logits_ptr + start + columns, zeros, mask=start + columns < V)
    else:
        if LOSS:
            largest, total = -float("inf"), 0.0
            picked = tl.zeros([BLOCK], tl.float32)
            for start in range(0, V, BLOCK):
                l = tl.load(logits_ptr + start + columns, mask=start + columns < V, other=-float("inf")).to(tl.float32)
                if CAPPED:
                    l = tl.where(start + columns < V, cap * _tanh(l / cap), -float("inf"))
                before = largest
                largest = tl.maximum(before, tl.max(l, axis=0))
                total = total * tl.exp(before - largest) + tl.sum(tl.exp(l - largest), axis=0)
                picked += tl.where(start + columns == label, l, 0.0)
            lse = largest + tl.log(total)
            known = (label >= 0) & (label < V)  # a label outside of the vocabulary must not go unseen
            tl.store(loss_ptr + row, tl.where(known, lse - tl.sum(picked, axis=0), float("nan")))
            tl.store(lse_ptr + row, lse)
            dloss, dlse = 1.0, 1.0
        else:
            lse = tl.load(lse_ptr + row)
            dloss = tl.load(dloss_ptr)
            dlse = dloss + 2.0 * tl.load(dz_ptr) * lse
        if GRADIENT:
            for start in range(0, V, BLOCK):
                inside = start + columns < V
                l = tl.load(logits_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
                slope = 1.0
                if CAPPED:
                    tanh = _tanh(l / cap)
                    l, slope = cap * tanh, 1.0 - tanh * tanh
                d = (tl.exp(l - lse) * dlse - tl.where(start + columns == label, dloss, 0.0)) * slope
                tl.store(logits_ptr + start + columns, d.to(logits_ptr.dtype.element_ty), mask=inside)


class _TritonLossChunks(LossChunks):
    """Loss and gradient of a chunk's logits by one kernel, in place."""

    gpu_chunk_logits = 2**28  # elements; one buffer, so a larger chunk than with the several of torch

    def _launch(self, rows: slice, logits_CV: Tensor, loss_C: Tensor | None, lse_C: Tensor, dloss: Tensor | None,
                dz: Tensor | None, gradient: bool) -> None:
        C, V = logits_CV.shape
        _cross_entropy[(C,)](
            logits_ptr=logits_CV, labels_ptr=self.labels_N[rows], loss_ptr=loss_C, lse_ptr=lse_C, dloss_ptr=dloss,
            dz_ptr=dz, V=V, row_stride=logits_CV.stride(0), ignore_index=self.ignore_index, cap=self.soft_cap or 1.0,
            CAPPED=self.soft_cap is not None, LOSS=loss_C is not None, GRADIENT=gradient,
            BLOCK=min(4096, triton.next_power_of_2(V)), num_warps=8)

    def loss(self, rows, logits_CV, gradient):
        loss_C, lse_C = (torch.empty(len(logits_CV), device=logits_CV.device) for _ in range(2))
        self._launch(rows, logits_CV, loss_C, lse_C, None, None, gradient)
        return loss_C, lse_C, logits_CV if gradient else None

    def gradient(self, rows, logits_CV, lse_C, dloss, dz):
        self._launch(rows, logits_CV, None, lse_C, dloss.float(), dz.float(), True)
        return logits_CV


def _compile_case(label: str, **flags: bool) -> CompileCase:
    types = {"logits_ptr": "*bf16", "labels_ptr": "*i64", "lse_ptr": "*fp32", "V": "i32", "row_stride": "i32",
             "ignore_index": "i32", "cap": "fp32"}
    written, read = ("loss_ptr",), ("dloss_ptr", "dz_ptr")
    used, unused = (written, read) if flags["LOSS"] else (read, written)
    return CompileCase(label, _cross_entropy, types | dict.fromkeys(used, "*fp32"),
                    {**flags, **dict.fromkeys(unused), "BLOCK": 4096}, ("V", "row_stride"), 8)


COMPILE_CASES = [_compile_case("loss", CAPPED=False, LOSS=True, GRADIENT=False),
             _compile_case("loss and gradient", CAPPED=False, LOSS=True, GRADIENT=True),
             _compile_case("loss and gradient, capped", CAPPED=True, LOSS=True, GRADIENT=True),
             _compile_case("gradient, capped", CAPPED=True, LOSS=False, GRADIENT=True)]
