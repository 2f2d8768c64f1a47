"""bfloat16 in Triton's interpreter, which cannot compute in it: float32 numbers, rounded where bf16 kernels round.

Operands of products are rounded, unless kernels have them in float16, and what is stored, except in memory that kernels
want in float32. Products of masks and decays keep 16 bits, and the solver's products 11, as their kernels say.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def rounded(x, bits):
    """float32 numbers to so many significant bits, ties to even."""
    cut = np.uint32(24 - bits)
    x = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((x + (np.uint32(1) << (cut - 1)) - 1 + ((x >> cut) & 1)) >> cut << cut).view(np.float32)


def half(x):
    """A tensor with bfloat16's values."""
    return x.bfloat16().to(x.dtype)


class Emulation:
    """Kernels launched while it is installed compute as with bf16 tensors. `wide` notes tensors that stay float32."""

    def __init__(self):
        self.single, self.bits = [], 8

    def wide(self, x):
        self.single.append((x.data_ptr(), x.data_ptr() + x.numel() * x.element_size(), x))  # kept, for its address
        return x

    def install(self, monkeypatch):
        builder = interpreter.InterpreterBuilder
        dot, store = builder.create_dot, builder.create_masked_store

        def handle(x, data):
            return interpreter.TensorHandle(data, x.dtype.scalar)

        def operand(x):
            return x if x.dtype.scalar == tl.float16 else handle(x, rounded(x.data, self.bits))

        def create_dot(this, a, b, *rest):
            return dot(this, operand(a), operand(b), *rest)

        def create_masked_store(this, ptrs, value, mask, *rest):
            inside = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape).astype(bool)]
            first = int(inside.flat[0]) if inside.size else 0
            if value.data.dtype == np.float32 and not any(low <= first < high for low, high, _ in self.single):
                value = handle(value, rounded(value.data, 8))
            return store(this, ptrs, value, mask, *rest)

        monkeypatch.setattr(builder, "create_dot", create_dot)
        monkeypatch.setattr(builder, "create_masked_store", create_masked_store)

    def with_bits(self, function, bits):
        """`function`, whose products take operands of so many bits."""
        def run(*args):
            before, self.bits = self.bits, bits
            try:
                return function(*args)
            finally:
                self.bits = before
        return run


def times(x, factor):
    """`triton_tiles.times` as it rounds in bf16."""
    product = x * factor
    return tl.tensor(interpreter.TensorHandle(rounded(product.handle.data, 8), product.handle.dtype), product.type)


def sum_over(emulation):
    """`triton_tiles.sum_over` as it sums in bf16: the rows of x, in two parts of 8 bits."""
    def run(members, x, EXACT):
        return tl.dot(members.to(tl.float32), x, input_precision="ieee")
    return emulation.with_bits(run, 16)


def launches_in_half(monkeypatch, launches, emulation, narrow):
    """The `_Launches` of a module take the kernels of 16-bit inputs; `narrow` sets the flag that says so."""
    start, wide = launches.__init__, launches.wide

    def init(self, *args):
        start(self, *args)
        narrow(self)

    monkeypatch.setattr(launches, "__init__", init)
    monkeypatch.setattr(launches, "wide", lambda self, *shape, **dtype: emulation.wide(wide(self, *shape, **dtype)))


BOUNDS = {"o": 0.005, "state": 0.005, "q": 0.008, "k": 0.008, "v": 0.008, "initial_state": 0.008}
BOUND_OF_GATES = 0.02


def assert_within_bounds(got, expected, error, summands):
    """A single number is a sum over all tokens, which may cancel: its error is measured against the root of the sum of
    the squares of what it sums, `summands`, as independent errors of so many parts would add up."""
    found = {name: error(got[name], x) if x.numel() > 1 else float((got[name] - x).norm() / summands[name].norm())
             for name, x in expected.items()}
    assert max(found.values()) > 1e-4  # else nothing was rounded
    assert all(x <= BOUNDS.get(name, BOUND_OF_GATES) for name, x in found.items()), found
    assert all(torch.isfinite(x).all() for x in got.values())
