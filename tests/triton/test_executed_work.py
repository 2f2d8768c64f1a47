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
    ("FoX", "forward"): (3, 49_588, 27_468, 2_097_152, 2),
    ("FoX", "backward"): (5, 91_480, 55_984, 6_291_456, 0),
}


@pytest.fixture
def poisoned_memory():
    """Memory stays as it is: to poison it is work of torch, and would be counted."""


@pytest.mark.parametrize("label", ["GDN", "KDA", "Mamba-2 form", "GLA", "FoX"])
def test_work_does_not_grow(label):
    work = count_work(triton_cases([label])[0], SHAPE)
    assert work.error < 1e-4, "what was counted is not the recurrence"
    for part in ("forward", "backward"):
        found = (sum(launch.part == part for launch in work.launches), *(work.total(part, name) for name in (
            "requested", "unique", "product_flops")), work.torch_operations[part])
        assert all(x <= limit for x, limit in zip(found, LIMITS[label, part], strict=True)), (part, found)


def test_attention_is_counted_in_the_types_and_tiles_of_a_gpu():
    """By hand for 256 tokens, heads of 32: numbers of q, k, v, o and their gradients have 2 bytes, others 4.

    Two programs of 128 queries go over 2 and 4 tiles of 64 keys; two of 128 keys go over 8 and 4 tiles of 32 queries.
    """
    launches = {launch.kernel: launch for launch in count_work(triton_cases(["FoX"])[0], Shape(1, 256, 1, 32)).launches}
    key_tiles, query_tiles, row = 2 + 4, 8 + 4, 32 * 2
    per_key_tile = key_tiles * 64 * (2 * row + 8)  # k, v, both parts of the sums of gates
    bounds_and_b = 2 * (4 + 8)
    found = [(launches[name].requested_loads, launches[name].requested_stores) for name in (
        "forward_kernel", "query_gradients_kernel", "key_gradients_kernel")]
    assert found == [
        (256 * (row + 8) + bounds_and_b + per_key_tile, 256 * (row + 4)),
        (256 * (3 * row + 12) + bounds_and_b + per_key_tile, 256 * (row + 16)),
        (256 * (2 * row + 8) + bounds_and_b + query_tiles * 32 * (2 * row + 12), 256 * (2 * row + 4))]
    assert launches["forward_kernel"].product_flops == key_tiles * 2 * (2 * 128 * 64 * 32)


def test_listed_blocks_are_counted_in_the_types_and_tiles_of_a_gpu():
    """By hand for 1024 tokens, heads of 32: 1984 pairs of a query and a block of 64 keys, a segment for each of 16."""
    work = count_work(triton_cases(["listed blocks"])[0], Shape(1, 1024, 1, 32))
    launches = {launch.kernel: launch for launch in work.launches}
    assert work.error < 1e-5
    gradients, row = launches["key_gradients_kernel"], 32 * 2
    table = 3 * 4 + 4 + 2 * 8  # of a segment: block and pairs, its first pair, and the block's keys
    skipped = 2 * (3 * 4 + 4)
    pairs = 1984 * (4 + 2 * row + 4 + 4)  # its number, q, do, the log sum, do . o
    assert gradients.requested_loads - pairs - 16 * 64 * 2 * row in range(16 * table, 16 * table + 4 * skipped + 1)
    assert gradients.requested_stores == 16 * 64 * 2 * 32 * 4
    assert launches["join_kernel"].requested_stores == 1024 * (row + 4)
