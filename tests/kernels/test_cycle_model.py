"""The model of cycles: it reads machine code, finds how often loops run, and adds up what hardware would wait for."""

import pytest
import torch

from hybridlm_kernels.cases import Shape
from hybridlm_kernels.tools import cycle_model, kernel_cost
from hybridlm_kernels.tools.cycle_model import H200, KernelCost, ProgramCost, simulate
from hybridlm_kernels.tools.kernel_cost import Row, too_slow, triton_cases
from hybridlm_kernels.tools.kernel_launches import launches_of
from hybridlm_kernels.tools.sass import parse
from hybridlm_kernels.triton_support import INSTALLED, INTERPRETED, resident_blocks

compiles = pytest.mark.skipif(not INSTALLED or INTERPRETED, reason="needs triton, and TRITON_INTERPRET unset")


def code(*lines):
    """Code as nvdisasm prints it: labels, and (instruction, stall, scoreboard set, scoreboards waited for)."""
    text = []
    for line in lines:
        if isinstance(line, str):
            text.append(f"{line}:")
            continue
        name, stall, written, waits = line + (1, 7, 0)[len(line) - 1:]
        upper = stall << 41 | written << 46 | 7 << 49 | waits << 52
        text += [f"        /*{16 * len(text):04x}*/    {name} ;   /* 0x0 */", f"                 /* 0x{upper:016x} */"]
    return parse("\n".join(text))


def test_instructions_and_their_control_bits():
    load, branch = code(("@!P0 LDG.E.128 R4, [R2.64]", 2, 3, 5), ".L_x_0", ("@P1 BRA `(.L_x_0)", 5))
    assert (load.opcode, load.operands, load.predicate, load.negated) == ("LDG", ("R4", "[R2.64]"), "P0", True)
    assert (load.stall, load.write_barrier, load.waits, load.target) == (2, 3, 5, None)
    assert (branch.target, branch.predicate, branch.negated, branch.stall) == (1, "P1", False, 5)


def test_a_load_is_waited_for():
    cost = simulate(code(("LDG.E R4, [R2.64]", 2, 0), ("FADD R5, R4, R4", 4, 7, 1), ("EXIT", 5)))
    assert (cost.cycles, cost.instructions) == (350 + 4 + 5, 3)


def test_products_of_a_warp_group_queue():
    one = simulate(code(("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24", 2, 0), ("WARPGROUP.DEPBAR.LE gsb0, 0x0", 2),
                        ("EXIT", 5)))
    two = simulate(code(*[("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24", 2, 0)] * 2,
                        ("WARPGROUP.DEPBAR.LE gsb0, 0x0", 2), ("EXIT", 5)))
    assert two.tensor_cycles == 2 * one.tensor_cycles == 132
    assert two.cycles - one.cycles == pytest.approx(66, abs=2)


COUNTERS = {
    "up by one": ("IMAD.MOV.U32 R1, RZ, RZ, RZ", "VIADD R1, R1, 0x1", "ISETP.NE.U32.AND P0, PT, R1, 0x7, PT", "@P0", 7),
    "down, signed": ("IMAD.MOV.U32 R1, RZ, RZ, 0x30", "IADD3 R1, R1, -0x10, RZ", "ISETP.GT.AND P0, PT, R1, -0x10, PT",
                     "@P0", 4),
    "uniform": ("UMOV UR4, URZ", "UIADD3 UR4, UR4, 0x20, URZ", "UISETP.GE.AND UP0, UPT, UR4, 0x60, UPT", "@!UP0", 3),
    "by shifts": ("IMAD.MOV.U32 R1, RZ, RZ, 0x1", "IMAD.SHL.U32 R1, R1, 0x2, RZ",
                  "ISETP.LT.AND P0, PT, R1, 0x40, PT", "@P0", 6)}


@pytest.mark.parametrize("name", COUNTERS)
def test_counters_say_how_often_a_loop_runs(name):
    start, step, compare, condition, trips = COUNTERS[name]
    loop = code((start,), ".L_x_0", (step,), (compare,), (f"{condition} BRA `(.L_x_0)",), ("EXIT",))
    cost = simulate(loop, data_trips=50)
    assert (cost.instructions, cost.data_loops) == (1 + 3 * trips + 1, 0)


def test_counters_of_64_bits_and_loops_within_loops():
    inner = [".L_x_1", ("IADD3 R1, P1, R1, 0x40, RZ",), ("IADD3.X R2, RZ, R2, RZ, P1, !PT",),
             ("ISETP.GE.U32.AND P0, PT, R1, 0x40, PT",), ("ISETP.GE.U32.AND.EX P0, PT, R2, RZ, PT, P0",),
             ("@!P0 BRA `(.L_x_1)",)]
    cost = simulate(code(("MOV R5, RZ",), ".L_x_0", ("MOV R1, -0x80",), ("MOV R2, -0x1",), *inner,
                         ("VIADD R5, R5, 0x1",), ("ISETP.NE.AND P2, PT, R5, 0x2, PT",), ("@P2 BRA `(.L_x_0)",),
                         ("EXIT",)))
    # -128 as 64 bits, unsigned, is above 64, so the inner loop ends at once.
    assert (cost.instructions, cost.data_loops) == (1 + 2 * (2 + 5 + 3) + 1, 0)


@pytest.mark.parametrize("width", ["", ".64"])
def test_a_counter_that_is_spilled(width):
    cost = simulate(code(("MOV R5, RZ",), ".L_x_0", (f"STL{width} [R1+0x4], R{4 if width else 5}",),
                         ("LDG.E.64 R4, [R2.64]",), (f"LDL.LU R5, [R1+{'0x8' if width else '0x4'}]",),
                         ("VIADD R5, R5, 0x1",), ("ISETP.NE.AND P0, PT, R5, 0x3, PT",), ("@P0 BRA `(.L_x_0)",),
                         ("EXIT",)))
    assert (cost.instructions, cost.data_loops) == (1 + 3 * 6 + 1, 0)


def test_the_upper_half_of_an_address_is_one_register():
    """LEA.HI writes R4 alone: R5 behind it counts on. IMAD.WIDE writes both."""
    def instructions(between):
        cost = simulate(code(("MOV R5, RZ",), (between,), ".L_x_0", ("VIADD R5, R5, 0x1",),
                             ("ISETP.NE.AND P0, PT, R5, 0x3, PT",), ("@P0 BRA `(.L_x_0)",), ("EXIT",)))
        return cost.instructions, cost.data_loops

    assert instructions("LEA.HI.X R4, R77, R8, R9, 0x1, P1") == (2 + 3 * 3 + 1, 0)
    assert instructions("IMAD.WIDE R4, R7, 0x2, R8") == (2 + 3 + 1, 1)


def test_a_flag_instead_of_a_counter():
    cost = simulate(code(("PLOP3.LUT P1, PT, PT, PT, PT, 0x80, 0x0",), ".L_x_0", ("FADD R1, R1, R1",),
                         ("PLOP3.LUT P0, PT, PT, PT, P1, 0x80, 0x0",), ("PLOP3.LUT P1, PT, PT, PT, PT, 0x40, 0x0",),
                         ("@P0 BRA `(.L_x_0)",), ("EXIT",)))
    assert cost.instructions == 1 + 2 * 4 + 1


def test_a_flag_that_is_kept_in_a_register():
    cost = simulate(code(("PLOP3.LUT P1, PT, PT, PT, PT, 0x80, 0x0",), ".L_x_0", ("P2R R7, PR, RZ, 0x2",),
                         ("ISETP.NE.AND P0, PT, R7, RZ, PT",), ("PLOP3.LUT P1, PT, PT, PT, PT, 0x40, 0x0",),
                         ("@P0 BRA `(.L_x_0)",), ("EXIT",)))
    assert (cost.instructions, cost.data_loops) == (1 + 2 * 4 + 1, 0)


def test_a_loop_whose_end_is_data_runs_as_often_as_said():
    loop = code(("LDG.E R9, [R2.64]", 1, 0), ("MOV R1, RZ",), ".L_x_0", ("VIADD R1, R1, 0x1",),
                ("ISETP.LT.AND P0, PT, R1, R9, PT", 1, 7, 1), ("@P0 BRA `(.L_x_0)",), ("EXIT",))
    costs = [simulate(loop, data_trips=trips) for trips in (1, 5)]
    assert [cost.instructions for cost in costs] == [2 + 3 + 1, 2 + 15 + 1]
    assert [cost.data_loops for cost in costs] == [1, 1]


COUNT = (("ISETP.LT.AND P0, PT, R1, R9, PT",), ("VIADD R1, R1, 0x1",))


def test_each_loop_whose_end_is_data_may_have_trips_of_its_own():
    """A loop within a loop, then one with a guard in front, which skips it where it has no trips."""
    lines = code(("LDG.E R9, [R2.64]", 1, 0), ".L_x_0", ".L_x_1", *COUNT, ("@P0 BRA `(.L_x_1)",), *COUNT,
                 ("@P0 BRA `(.L_x_0)",), ("@P5 BRA `(.L_x_3)",), ".L_x_2", *COUNT, ("@P0 BRA `(.L_x_2)",), ".L_x_3",
                 ("EXIT",))
    for inner, outer, last in ((1, 1, 1), (4, 1, 2), (3, 5, 7), (2, 2, 0)):
        cost = simulate(lines, data_trips=[inner, outer, last])
        assert (cost.instructions, cost.data_loops) == (1 + outer * (3 * inner + 3) + 1 + 3 * last + 1, 2 + bool(last))
    for wrong in ([1, 1], [1, 1, 1, 1]):
        with pytest.raises(ValueError, match=f"the code has 3 loops whose end is data, not {len(wrong)}"):
            simulate(lines, data_trips=wrong)


def test_a_loop_that_is_left_in_its_middle():
    """The branch back has no condition, as in the selected attention's kernel of the keys' gradients."""
    lines = code(("LDG.E R9, [R2.64]", 1, 0), ".L_x_0", *COUNT, ("@P1 BRA `(.L_x_1)",), ("FADD R2, R2, R2",),
                 ".L_x_1", ("@!P0 BRA `(.L_x_2)",), ("FADD R2, R2, R2",), ("BRA `(.L_x_0)",), ".L_x_2", ("EXIT",),
                 ".L_x_3", ("BRA `(.L_x_3)",))
    assert cycle_model.exits_of_loops(lines) == {5}
    for trips in (1, 4):
        cost = simulate(lines, data_trips=[trips])
        assert (cost.instructions, cost.data_loops) == (1 + 7 * trips - 2 + 1, 1)


def test_programs_of_another_number_may_end_earlier():
    lines = code(("S2R R1, SR_CTAID.Z",), ("ISETP.NE.AND P0, PT, R1, 0x1, PT",), ("@P0 EXIT",),
                 ("FADD R2, R2, R2",),
                 ("EXIT",))
    assert [simulate(lines, program={"Z": z}).instructions for z in (0, 1)] == [3, 5]


def test_code_that_does_not_end_is_an_error(monkeypatch):
    monkeypatch.setattr(cycle_model, "LONGEST_RUN", 1000)
    with pytest.raises(ValueError, match="does not end"):
        simulate(code(".L_x_0", ("BRA `(.L_x_0)",)), data_trips=1)


@pytest.mark.parametrize(("registers", "shared", "warps", "blocks"), [
    (255, 0, 8, 1), (255, 0, 4, 2), (128, 0, 4, 4), (32, 0, 4, 16), (64, 113 * 1024, 4, 2), (64, 145 * 1024, 4, 1)])
def test_blocks_of_a_multiprocessor(registers, shared, warps, blocks):
    assert resident_blocks(registers, shared, warps, H200.registers, H200.shared_bytes, H200.warps) == blocks


def test_a_full_multiprocessor_is_bound_by_what_is_longest():
    def cycles(program, warps=4):
        return KernelCost(128, 0, 0, warps, 100, (program,)).multiprocessor_cycles()

    assert cycles(ProgramCost(1000.0, 10, 0.0, 0)) == 1000 / 4  # latency, hidden by four blocks
    assert cycles(ProgramCost(1000.0, 800, 0.0, 0)) == 800  # issue: four instructions per cycle, four warps
    assert cycles(ProgramCost(1000.0, 10, 900.0, 0)) == 900  # tensor cores


def test_a_launch_takes_as_long_as_what_it_requests():
    lines = code(("LDGSTS.E.BYPASS.128 [R1], [R2.64]",), ("LDG.E R4, [R2.64]",), ("STG.E.64 [R2.64], R4",),
                 ("@P3 STG.E.U16 [R2.64], R4",), ("PLOP3.LUT P1, PT, PT, PT, PT, 0x40, 0x0",),
                 ("@P1 LDG.E.128 R4, [R2.64]",), ("EXIT",))
    program = simulate(lines)
    assert program.requested == 32 * (16 + 0 + 8 + 2)  # not the numbers that threads share, nor what never runs
    many = KernelCost(128, 0, 0, 4, 100, (program,)).seconds((10**6,))
    assert many == pytest.approx(H200.launch_seconds + 1e6 * 4 * program.requested / H200.l2_bytes_per_second)


def row(name, microseconds, spilled=0):
    return Row("KDA", "forward", "chunk_kernel", name, 200, spilled, 0, 2, 100, 10.0, microseconds, 640.0)


def test_a_slow_untuned_configuration_is_found():
    assert not too_slow([row("A", 11.0), row("B", 10.0)])
    assert not too_slow([row("A", 13.0), row("B", 10.0, spilled=8)])  # tuning leaves it out
    (found,) = too_slow([row("A", 13.0), row("B", 10.0)])
    assert found == "KDA forward chunk_kernel: the untuned configuration (A) takes 1.3 times the time of B"


@compiles
def test_configurations_are_in_the_order_of_untuned_runs_with_grids_of_their_own():
    """A scan has a program per block of columns: 2 of 64 or 4 of 32. 96 heads of two such programs fill an H200."""
    (case,) = triton_cases(["GDN"])
    scan = next(launch for launch in launches_of(case, Shape(B=1, T=64, H=1, D=128)) if launch.name == "scan_kernel")

    def first(heads):
        name, launch = kernel_cost.configurations_of(scan, heads)[0]
        return name.split()[0], launch.constants["BV"], launch.programs

    assert first(16) == ("BV=32", 32, 4)
    assert first(96) == ("BV=64", 64, 2)
    assert len(kernel_cost.configurations_of(scan, 96)) == len(kernel_cost.configurations_of(scan, 16))


def test_counting_takes_the_tiles_of_the_modelled_launches():
    assert kernel_cost.tiles_of([row("", 1.0)]) == "{}"  # a kernel without tuning
    assert kernel_cost.tiles_of([row("BK=64 BV=32 num_warps=8", 1.0)]) == '{"chunk_kernel": {"BK": 64, "BV": 32}}'


def test_measured_launches_stand_beside_the_modelled_ones():
    (timed,) = kernel_cost.with_times([row("A", 10.0)], [("chunk_kernel", 15e-6)])
    assert timed.measured == pytest.approx(15.0)
    assert kernel_cost.table([timed]).splitlines()[-1].split()[-2:] == ["15", "1.50"]
    with pytest.raises(RuntimeError, match="launches scan_kernel where the model has chunk_kernel; take"):
        kernel_cost.with_times([row("A", 10.0)], [("scan_kernel", 1.0)])


def test_launches_of_a_pass_are_added_up():
    rows = kernel_cost.with_work([row("A", 10.0), row("B", 20.0, spilled=8)], [
        {"requested": 800, "unique": 400, "product_flops": 4000},
        {"requested": 2400, "unique": 1200, "product_flops": 8000}], elements=4)
    (cost,) = kernel_cost.pass_costs(rows, {"forward": 50.0}, {"forward": 1}, elements=1_000_000)
    assert (cost.requested, cost.unique, cost.torch_bytes, cost.kiloflops, cost.chunk_cycles) == (800, 400, 50, 3, 1280)
    # 2 x 10^8 and 6 x 10^8 bytes at 6 TB/s take longer than the cycles; each launch and operation takes 3.5 us more.
    assert cost.milliseconds == pytest.approx(1e3 * (8e8 / 6e12 + 5e7 / 4.3e12 + 3 * 3.5e-6))
    (cost,) = kernel_cost.pass_costs(rows, {"forward": 0.0}, {"forward": 0}, elements=1)
    assert cost.milliseconds == pytest.approx(0.03)
    assert kernel_cost.pass_table([cost]).splitlines()[-1] == (
        "| KDA forward | 2 | 800 | 400 | 3 | 200, 200 (8 B spilled) | 2, 2 | 1,280 | 0.03 |")


@compiles
def test_launches_of_a_case_and_the_cycles_of_one():
    shape = Shape(1, 64, 1, 32)
    launches = launches_of(triton_cases(["Lightning"])[0], shape)
    assert [launch.part for launch in launches] == ["forward"] + ["backward"] * 3
    scan = launches[0]
    assert scan.name == "scan_kernel"
    assert scan.grid == (1,)
    assert str(scan.dtypes["x_ptr"]) == "torch.bfloat16"
    short, long = (kernel_cost.compile_launch(scan, trips).programs[0] for trips in (1, 10))
    assert short.data_loops == 1
    assert 5 < long.instructions / short.instructions < 10
    assert long.cycles > 5 * short.cycles


def test_trips_of_attention_by_hand():
    """320 tokens: tiles of 128 queries go over 2, 4 and 5 tiles of 64 keys, of 128 keys over 10, 6 and 2 of 32."""
    trips, busy = triton_cases(["FoX"])[0].loop_trips(Shape(1, 320, 1, 16), "forward_kernel",
                                                      {"BLOCK_T": 128, "BLOCK_S": 64})
    assert [x * 3 for x in trips] == [0 + 2 + 4, 2 + 2 + 1]
    assert busy == 1
    trips, _ = triton_cases(["FoX"])[0].loop_trips(Shape(1, 320, 1, 16), "key_gradients_kernel",
                                                   {"BLOCK_T": 32, "BLOCK_S": 128})
    assert [x * 3 for x in trips] == [4 + 4 + 2, 6 + 2 + 0]


def test_trips_of_listed_blocks_by_hand():
    """Of 1024 tokens two blocks each, but one in the first block: 1984 pairs in 16 blocks."""
    def loops(kernel, **constants):
        return triton_cases(["listed blocks"])[0].loop_trips(Shape(1, 1024, 1, 16), kernel, constants)

    sizes = {"ROW_HEADS": 1, "BLOCK_C": 64}
    trips, busy = loops("key_gradients_kernel", BLOCK_M=32, **sizes)
    assert 1984 / 16 / 32 <= trips[0] <= 1984 / 16 / 32 + 1
    assert busy == 16 / (2 + 16)
    assert loops("forward_kernel", BLOCK_M=64, **sizes).trips == [1]
    assert 31 <= loops("forward_kernel", BLOCK_M=64, **sizes).busy * (2048 // 64 + 16) <= 31 + 16
    assert loops("join_kernel").trips == [0, 2, 2]
    assert loops("add_segments_kernel").trips == [0, 1]


@compiles
def test_programs_of_attention_are_those_at_the_length():
    """A row of 256 tokens and 3 heads: two tiles of 128 queries, or of 128 keys, per head."""
    (case,) = triton_cases(["FoX"])
    rows = {row.kernel: row for row in kernel_cost.rows_of(case, Shape(1, 256, 3, 64))}
    for name in ("forward_kernel", "query_gradients_kernel", "key_gradients_kernel"):
        row = rows[name]
        assert row.chunk_cycles == pytest.approx(row.cycles * 2 * 3 / (256 * 3 / 64))
        assert row.cycles > 1000


@compiles
def test_a_wrong_label_or_shape_is_one_line(capsys):
    assert kernel_cost.main(["KDB"]) == 2
    assert "no case 'KDB' with Triton kernels; there are DeltaNet, GDN, KDA" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert kernel_cost.main(["--measure"]) == 2
        assert capsys.readouterr().err == "kernel cost: --measure needs a CUDA device\n"
    assert kernel_cost.main(["--grid", "T5"]) == 2
    assert capsys.readouterr().err.startswith("kernel cost: 'T5' is no shape")
