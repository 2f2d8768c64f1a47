"""Rearrangements and rules: inverse of themselves, and what a checkpoint that does not fit is told."""

import pytest
import torch

from hybridlm.errors import CheckpointError
from hybridlm.interop.rearrangements import (
    Chain,
    PackedRows,
    PerTensor,
    RecutRows,
    RepeatedTensor,
    Reshape,
    StackedExperts,
    Unchanged,
    readers,
)
from hybridlm.interop.tensor_rules import KeyLayout, TensorRule, TensorSpec, map_tensors, match_rules

# rearrangement, shapes of ours, shapes of theirs
OPS = {
    "same": (Unchanged(), [(3, 4), (5,)], [(3, 4), (5,)]),
    "reshape": (Reshape((6,), (1, 1, 6, 1)), [(6,)], [(1, 1, 6, 1)]),
    "split": (PackedRows((2, 3)), [(2, 4), (3, 4)], [(5, 4)]),
    "split by head": (PackedRows((2, 2, 3), groups=4), [(8, 5), (8, 5), (12, 5)], [(28, 5)]),
    "split of a bias": (PackedRows((2, 2), groups=3), [(6,), (6,)], [(12,)]),
    "experts": (StackedExperts(3, 2), [(3, 8, 5)], [(4, 5)] * 6),
    "one tensor an expert": (StackedExperts(3), [(3, 5, 4)], [(5, 4)] * 3),
    "rows": (RecutRows((2, 2, 5), (3, 3, 3)), [(2, 4), (2, 4), (5, 4)], [(3, 4)] * 3),
    "chain": (Chain(PackedRows((2, 4)), PerTensor((Reshape((2, 3), (2, 1, 3)), Reshape((4, 3), (4, 1, 3))))),
              [(2, 3), (4, 3)], [(6, 1, 3)]),
}


@pytest.mark.parametrize("name", OPS)
def test_a_rearrangement_is_undone_by_its_other_direction(name):
    op, ours, theirs = OPS[name]
    start = [torch.randn(shape) for shape in ours]
    out = list(op.to_theirs(readers(start)))
    assert [tuple(t.shape) for t in out] == theirs
    assert sum(t.numel() for t in out) == sum(t.numel() for t in start)
    back = op.to_ours(readers(out))
    assert all(torch.equal(a, b) for a, b in zip(start, back, strict=True))
    again = list(op.to_theirs(readers(back)))
    assert all(torch.equal(a, b) for a, b in zip(out, again, strict=True))


def test_split_by_head_takes_the_rows_of_each_head():
    packed = torch.arange(12.0)[:, None]
    first, second = PackedRows((2, 1), groups=4).to_ours(readers([packed]))
    assert first.flatten().tolist() == [0, 1, 3, 4, 6, 7, 9, 10]
    assert second.flatten().tolist() == [2, 5, 8, 11]


def test_stack_puts_gate_rows_before_up_rows():
    gates, ups = torch.zeros(2, 3), torch.ones(2, 3)
    (stacked,) = StackedExperts(1, 2).to_ours(readers([gates, ups]))
    assert stacked[0, :, 0].tolist() == [0, 0, 1, 1]


def test_copies_must_be_copies():
    x = torch.randn(3)
    assert torch.equal(RepeatedTensor(2).to_ours(readers([x, x.clone()]))[0], x)
    with pytest.raises(CheckpointError, match="differ from each other"):
        RepeatedTensor(2).to_ours(readers([x, x + 1]))


F32 = torch.float32
OURS = {"a": TensorSpec(F32, (4, 2)), "b": TensorSpec(F32, (3,))}


def plan(theirs, ignored=lambda name: False):
    two_layouts = (KeyLayout(("x.0", "x.1"), RecutRows((4,), (2, 2))), KeyLayout(("x",)))
    rules = [TensorRule(("a",), two_layouts), map_tensors("b", "y")]
    specs = {name: TensorSpec(dtype, shape) for name, (dtype, shape) in theirs.items()}
    return match_rules(rules, specs, OURS, "the folder", {}, ignored)


def test_match_takes_the_layout_that_is_there():
    divided = plan({"x.0": (F32, (2, 2)), "x.1": (F32, (2, 2)), "y": (F32, (3,))})
    single = plan({"x": (F32, (4, 2)), "y": (torch.bfloat16, (3,))})
    assert [s.source for s in divided] == [("x.0", "x.1"), ("y",)]
    assert [s.source for s in single] == [("x",), ("y",)]


@pytest.mark.parametrize(("change", "message"), [
    ({"y": None}, "'y' is missing"),
    ({"x.1": None}, "'x.1' is missing"),
    ({"z": (F32, (1,))}, "'z' is not part of the model"),
    ({"y": (F32, (4,))}, r"'y' is \[4\], the config asks for \[3\]"),
    ({"y": (torch.int8, (3,))}, r"'y' is quantised \(torch.int8\)"),
    ({"y": (torch.float8_e4m3fn, (3,))}, "'y' is quantised .* has no block scales"),
])
def test_match_says_what_does_not_fit(change, message):
    theirs = {"x.0": (F32, (2, 2)), "x.1": (F32, (2, 2)), "y": (F32, (3,))} | change
    with pytest.raises(CheckpointError, match=message) as error:
        plan({name: spec for name, spec in theirs.items() if spec is not None})
    assert "the folder" in str(error.value)
    assert "\n" not in str(error.value)


def test_match_leaves_out_what_is_ignored():
    theirs = {"x": (F32, (4, 2)), "y": (F32, (3,)), "rotary": (F32, (9,))}
    assert len(plan(theirs, lambda name: name == "rotary")) == 2
