"""Comparisons every operation's test makes: outputs and all gradients, and what must not change at all."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def tensors(*shapes, dtype=torch.float64, seed=0):
    """Random tensors that need gradients."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def error(a, b):
    """RMS of the difference over RMS of b (of 1e-3, where b is smaller than that)."""
    a, b = (torch.view_as_real(x) if x.is_complex() else x for x in (a, b))
    b = b.double()
    return ((a.double() - b).norm() / b.norm().clamp_min(max(1e-30, 1e-3 * b.numel() ** 0.5))).item()


def assert_same_function(run, inputs, tolerance):
    """run("torch") equals run("reference"): values, dtypes, and the gradient of every input."""
    out, expected = run("torch"), run("reference")
    assert out.dtype == expected.dtype
    assert out.shape == expected.shape
    assert error(out, expected) <= tolerance
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9)).to(expected.dtype)
    grads = torch.autograd.grad(out, inputs, upstream)
    expected_grads = torch.autograd.grad(expected, inputs, upstream)
    for x, grad, expected_grad in zip(inputs, grads, expected_grads, strict=True):
        assert grad.dtype == x.dtype
        assert error(grad, expected_grad) <= tolerance


class LargestTensor(TorchDispatchMode):
    """Within it, `numel` is the size of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


class NoWait(TorchDispatchMode):
    """Within it, what makes a host wait for its device is an error: numbers and sizes that are read from a tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique_dim", "_unique2",
                    "repeat_interleave", "is_nonzero", "equal"):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))
