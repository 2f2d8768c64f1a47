"""What the kernels of the recurrences read, write and multiply, counted in the interpreter, must not grow unnoticed."""

import pytest

from hybridlm_kernels.cases import Shape
from hybridlm_kernels.tools.executed_work import count_work
from hybridlm_kernels.tools.kernel_cost import triton_cases
from hybridlm_kernels.triton_support import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="counts in the interpreter")
SHAPE = Shape(B=1, T=66, H=1, D=32)  # a chunk and a part of one
# By pass: launches of Triton, bytes requested, bytes touched first, FLOPs in products, torch's operations on more than
# 256 bytes. Lower is better: put new numbers here when they fall, and think when they rise.
LIMITS = {
    ("GDN", "forward"): (2, 119_604, 67_004, 7_077_888, 0),
    ("GDN", "backward"): (3, 182_428, 126_724, 8_650_752, 0),
    ("KDA", "forward"): (3, 275_196, 117_164, 13_369_344, 0),
    ("KDA", "backward"): (5, 515_468, 261_380, 22_282_240, 0),
    ("Mamba-2 form", "forward"): (2, 29_776, 29_768, 1_572_864, 0),
    ("Mamba-2 form", "backward"): (5, 123_680, 123_656, 3_670_016, 0),
    ("GLA", "forward"): (2, 191_048, 67_912, 9_437_184, 0),
    ("GLA", "backward"): (5, 326_328, 203_448, 17_039_360, 0),
}


@pytest.fixture
def poisoned_memory():
    """Memory stays as it is: to poison it is work of torch, and would be counted."""


@pytest.mark.parametrize("label", ["GDN", "KDA", "Mamba-2 form", "GLA"])
def test_work_does_not_grow(label):
    work = count_work(triton_cases([label])[0], SHAPE)
    assert work.error < 1e-4, "what was counted is not the recurrence"
    for part in ("forward", "backward"):
        found = (sum(launch.part == part for launch in work.launches), *(work.total(part, name) for name in (
            "requested", "unique", "product_flops")), work.torch_operations[part])
        assert all(x <= limit for x, limit in zip(found, LIMITS[label, part], strict=True)), (part, found)
