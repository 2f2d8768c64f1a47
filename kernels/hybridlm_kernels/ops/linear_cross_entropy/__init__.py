"""Output projection and cross entropy in one, without the logits of all tokens. Costs: README.md."""

from __future__ import annotations

from typing import Any

from torch import Tensor, float32, int64, promote_types

from hybridlm_kernels import triton_support
from hybridlm_kernels.compiling.operation import compilable
from hybridlm_kernels.ops.linear_cross_entropy import reference, torch_backend
from hybridlm_kernels.precision import product_dtype
from hybridlm_kernels.registry import Backend, Call, Operation, choose, register

LINEAR_CROSS_ENTROPY = register(Operation("linear_cross_entropy", (
    triton_support.lazy_triton_backend("hybridlm_kernels.ops.linear_cross_entropy.triton_backend",
                                       "linear_cross_entropy"),
    Backend("torch", torch_backend.linear_cross_entropy), Backend("reference", reference.linear_cross_entropy))))


def _outputs(x_ND: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    wide = promote_types(product_dtype(x_ND), float32)
    return (*(x_ND.new_empty((), dtype=wide) for _ in range(2)), x_ND.new_empty((), dtype=int64))  # type: ignore[return-value]


@compilable(_outputs, keeps=("weight_VD",))
def linear_cross_entropy(x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, *, ignore_index: int = -100,
                         z_loss: float = 0.0, soft_cap: float | None = None,
                         backend: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy of the logits x W^T against the labels, summed over the tokens that count.

    Args:
        x_ND: inputs of the output projection [N, D], activated: after the last norm.
        weight_VD: weight of the output projection [V, D].
        labels_N: int64 [N], in 0..V-1 or `ignore_index`.
        ignore_index: label of the tokens that do not count.
        z_loss: not zero makes z_sum differentiable. It changes no value: the caller adds `z_loss * z_sum` to the loss.
        soft_cap: positive; the raw logits l become soft_cap * tanh(l / soft_cap) (Gemma 2). None leaves them.
        backend: name of one backend, in place of the registry's choice.

    Returns:
        loss_sum: sum of -log p(label) in nats, fp32 (fp64 for fp64 inputs).
        z_sum: sum of logsumexp(logits)^2, without gradient when z_loss is 0.
        count: int64, the number of labels that are not `ignore_index`.

    Raises:
        ValueError: the shapes do not fit one another, or soft_cap is not positive.
        KernelUnavailable: no backend can run the call, or the named one cannot.

    Source: PaLM, Chowdhery et al. 2022, section 5 (z-loss); the products by chunks follow Liger Kernel, 2024.

    >>> import torch
    >>> loss_sum, z_sum, count = linear_cross_entropy(torch.ones(2, 1), torch.zeros(4, 1), torch.tensor([1, -100]))
    >>> f"{loss_sum:.4f}", int(count)  # ln 4: four equal logits, and one label that counts
    ('1.3863', 1)
    """
    if x_ND.dim() != 2 or weight_VD.dim() != 2 or x_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(f"linear_cross_entropy: x must be [N, D] and weight [V, D]; got {list(x_ND.shape)} "
                         f"and {list(weight_VD.shape)}")
    if labels_N.shape != x_ND.shape[:1]:
        raise ValueError(f"linear_cross_entropy: labels must be [{len(x_ND)}]; got {list(labels_N.shape)}")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"linear_cross_entropy: soft_cap must be positive; got {soft_cap}")
    call = Call.of(x_ND, weight_VD, product_dtype=product_dtype(x_ND))
    chosen = choose(LINEAR_CROSS_ENTROPY, call, backend)
    return chosen.run(x_ND, weight_VD, labels_N, ignore_index, z_loss, soft_cap)
