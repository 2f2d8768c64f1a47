"""What each kernel's TTIR says: no address overflows beyond 2^31 elements, for the largest batches there may be, and
what a kernel reads again after it wrote it is not loaded ahead.
"""

from functools import lru_cache
from pathlib import Path

import pytest

import hybridlm_kernels
from hybridlm_kernels.tools.compile_check import compile_cases, configurations
from hybridlm_kernels.triton_support import INSTALLED, INTERPRETED
from tests.support.integer_ranges import Ranges

pytestmark = pytest.mark.skipif(not INSTALLED or INTERPRETED, reason="needs triton, and TRITON_INTERPRET unset")

HEADS = dict.fromkeys(("H", "G", "HV", "XY_GROUP"), (1, 2**10)) | {"J": (1, 2**8)}
PROGRAMS = (2**24, 65535, 65535)  # in each direction of a grid; of blocks of 64 tokens, 2^30 tokens
# The indexer's loss runs over blocks of one row's keys and queries: rows of up to 2^20 tokens.
OF_A_ROW = dict.fromkeys(("T", "S", "Q", "start", "low"), (0, 2**20))
BLOCKS_OF_A_ROW = (2**14, 65535, 65535)
# Lists of blocks: their number and length, parts of a query and head, key heads, keys of a block, columns of gradients.
OF_LISTS = dict.fromkeys(("U", "axes", "W"), (1, 2**10)) | dict.fromkeys(("N", "width"), (1, 2**12)) | {
    "place": (0, 2**12), "block": (1, 2**14)}


OPERATIONS = sorted(path.parent.name for path in Path(hybridlm_kernels.__file__).parent.glob("ops/*/triton_backend.py"))


# Tuned kernels that read in a loop what they write: in no configuration may the loop be pipelined.
REWRITES = {"delta_rule": {"gradients_kernel", "pair_gradients_kernel"},
            "linear_attention": {"chunk_kernel", "pair_gradients_kernel"}}
# Untuned ones. A round writes what it alone has read, which no other round reads; of `join_kernel` a round reads the
# state that it wrote before its inner loop, behind a barrier, from where that loop loads ahead.
REWRITES_UNTUNED = {"delta_rule": {"join_kernel", "value_key_gradients_kernel"}, "linear_attention": {"join_kernel"},
                    "indexer_kl": {"_kl_rows"}, "linear_cross_entropy": {"_cross_entropy"}}


@lru_cache
def kernels_of(operation):
    """The kernels of an operation and their TTIR; heads of 64 have the same code as those of 128."""
    from tests.support.triton_ir import inlined

    cases = [case for _, case in compile_cases([operation]) if case.head_dim != 64]
    configured = [configurations(case)[0] for case in cases]
    return [(case, inlined(c.source, c.options)) for case, c in zip(cases, configured, strict=True)]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_is_read_again_is_not_loaded_ahead(operation):
    """A pipelined loop would load before an earlier round has stored."""
    from tests.support.triton_ir import rewritten_tensors

    found = {case.kernel for case, text in kernels_of(operation) if rewritten_tensors(text)}
    tuned = {kernel for kernel in found if hasattr(kernel, "configs")}
    assert {kernel.fn.__name__ for kernel in tuned} == REWRITES.get(operation, set())
    assert {kernel.__name__ for kernel in found - tuned} == REWRITES_UNTUNED.get(operation, set())
    assert {config.num_stages for kernel in tuned for config in kernel.configs} <= {1}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_address_overflows(operation):
    kernels = kernels_of(operation)
    assert kernels
    for compile_case, text in kernels:
        arguments, programs = HEADS | dict.fromkeys(compile_case.divisible, (1, 2**20)), PROGRAMS
        if operation == "indexer_kl":
            arguments, programs = arguments | OF_A_ROW, BLOCKS_OF_A_ROW
        if operation == "selected_attention":
            arguments = arguments | OF_LISTS
        ranges = Ranges(text, arguments, programs)
        assert ranges.offsets > 0
        assert not ranges.overflows, (compile_case.label, ranges.overflows[:3])


TEXT = """
tt.func public @kernel(%x_ptr: !tt.ptr<f32>, %rows: i32, %stride: i32) attributes {noinline = false} {
    %c0_i32 = arith.constant 0 : i32 loc(#loc)
    %c64_i32 = arith.constant 64 : i32 loc(#loc)
    %0 = tt.get_program_id x : i32 loc(#loc)
    %1 = scf.for %i = %c0_i32 to %rows step %c64_i32 iter_args(%a = %c0_i32) -> (i32)  : i32 {
      %2 = arith.muli %i, %stride : i32 loc(#loc)
      %3 = tt.addptr %x_ptr, %2 : !tt.ptr<f32>, i32 loc(#loc)
      scf.yield %a : i32 loc(#loc)
    } loc(#loc)
    tt.return loc(#loc)
}
"""


@pytest.mark.parametrize(("rows", "overflows"), [(2**10, 0), (2**25, 1)])
def test_ranges_find_an_offset_in_32_bits(rows, overflows):
    ranges = Ranges(TEXT, {"rows": (0, rows), "stride": (0, 2**12)}, PROGRAMS)
    assert ranges.offsets >= 1
    assert len(ranges.overflows) == overflows
