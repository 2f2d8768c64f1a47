"""Operations in graphs of torch.compile: whole graphs, the values and gradients of eager, and nothing left behind."""

import gc
import inspect

import pytest
import torch
from torch.utils._pytree import tree_leaves

import hybridlm_kernels as ops
from hybridlm_kernels import CuSeqlens
from hybridlm_kernels.cases import by_parameter
from hybridlm_kernels.compiling.arguments import Arguments
from hybridlm_kernels.compiling.gradients import backward_of, record_call, recorded_calls
from hybridlm_kernels.compiling.operation import fused_operations
from hybridlm_kernels.registry import configure, operations
from hybridlm_kernels.tools.cases import check_cases
from tests.support.kernel_compare import error

CASES = {f"{case.operation}, {case.label}": case for case in check_cases()}
IDENTICAL = 0.0
FUSED = 1e-6  # formulas sum in another order


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def values_and_gradients(run, case):
    """The outputs of a case in fp32 and the gradients of its inputs."""
    torch.manual_seed(0)
    tensors = {name: x.float() if x.is_floating_point() else x for name, x in case.inputs().items()}
    learnt = [x.requires_grad_() for name, x in tensors.items() if x.is_floating_point() and name not in case.fixed]
    outputs = [x for x in tree_leaves(run(tensors)) if isinstance(x, torch.Tensor)]
    trained = [x for x in outputs if x.requires_grad]
    upstream = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape) for x in trained]
    grads = torch.autograd.grad(trained, learnt, upstream) if trained else []
    return [x.detach() for x in outputs], list(grads)


@pytest.mark.parametrize("name", list(CASES))
def test_a_whole_graph_with_the_values_and_gradients_of_eager(name):
    case = CASES[name]
    options = {key: CuSeqlens(value) if key == "cu_seqlens" else value for key, value in case.options.items()}

    def run(tensors):
        private = case.run.__name__.startswith("_")  # a function of the case, with the names of its inputs
        return case.run(**tensors if private else by_parameter(case.run, tensors), **options)

    expected, expected_grads = values_and_gradients(run, case)
    found, grads = values_and_gradients(torch.compile(run, backend="aot_eager", fullgraph=True), case)
    tolerance = FUSED if case.operation in fused_operations() else IDENTICAL
    for x, y in zip([*found, *grads], [*expected, *expected_grads], strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert error(x, y) <= tolerance
    del found, grads
    gc.collect()
    assert recorded_calls() == 0


def test_every_operation_is_a_node_or_a_formula():
    for operation in operations():
        assert hasattr(torch.ops.hybridlm, operation.name), operation.name
        assert inspect.signature(getattr(ops, operation.name)).parameters["backend"], operation.name


def test_a_formula_gives_way_to_a_configured_backend():
    graphs = []

    def remember(graph, _):
        graphs.append({str(node.target) for node in graph.graph.nodes if node.op == "call_function"})
        return graph

    x, weight = torch.randn(4, 8), torch.ones(8)
    run = torch.compile(lambda x: ops.rms_norm(x, weight, 1e-6), backend=remember)
    run(x)
    configure({"rms_norm": "reference"})
    try:
        run(x)
    finally:
        configure({"rms_norm": "auto"})
    assert not any("hybridlm" in node for node in graphs[0])
    assert any("hybridlm.rms_norm" in node for node in graphs[1])


def test_two_graphs_serve_every_packing():
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    x = torch.randn(2, 40, 2, 8)
    run = torch.compile(lambda x, borders: ops.attention(x, x, x, cu_seqlens=borders), backend=count, fullgraph=True)
    for borders in ([0, 7, 40, 80], [0, 9, 40, 80], [0, 1, 2, 40, 80], [0, 40, 50, 60, 70, 80], [0, 0, 40, 80, 80, 80]):
        expected = ops.attention(x, x, x, cu_seqlens=borders)
        assert torch.equal(run(x, CuSeqlens(borders)), expected)
        assert torch.equal(run(x, torch.tensor(borders)), expected)
    assert len(graphs) <= 4  # two for each of the two spellings: of a fixed number of documents, and of any


@pytest.mark.parametrize("table", [[0, 7, 80], [0, 40, 79]])
def test_borders_that_do_not_fit_are_refused_when_the_graph_runs(table):
    x = torch.randn(2, 40, 2, 8)
    run = torch.compile(lambda x, borders: ops.attention(x, x, x, cu_seqlens=borders), backend="aot_eager")
    with pytest.raises(ValueError, match="cu_seqlens"):
        run(x, torch.tensor(table))


def test_autocast_around_the_call_is_that_inside_the_graph():
    x, weight, labels = torch.randn(6, 8), torch.randn(11, 8), torch.arange(6)

    def run(x):
        with torch.autocast("cpu", torch.bfloat16):
            return ops.linear_cross_entropy(x, weight, labels)[0]

    expected = run(x)
    assert not torch.equal(expected, ops.linear_cross_entropy(x, weight, labels)[0])
    assert torch.equal(torch.compile(run, backend="aot_eager", fullgraph=True)(x), expected)


def test_without_gradients_nothing_is_recorded():
    x = torch.randn(1, 6, 2, 8, requires_grad=True)
    run = torch.compile(lambda x: ops.attention(x, x, x), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        run(x)
    assert recorded_calls() == 0
    kept = run(x)
    assert recorded_calls() == 1
    del kept
    gc.collect()
    assert recorded_calls() == 0


# Recorded calls by themselves: what the compiler may do with memory that it thinks nobody needs

def recorded(declared, declared_outputs):
    """A call that keeps its input and its output for the backward: y = x * exp(x), and exp(x)."""
    x = torch.linspace(-1, 1, 6).view(2, 3)

    def run(flat):
        exponential = flat[0].exp()
        return [flat[0] * exponential, exponential]

    y, exponential, handle = record_call(run, [x], [0], declared, declared_outputs)
    return x, y, exponential, handle


def test_memory_that_was_not_declared_may_be_written_over():
    x, y, exponential, handle = recorded([], [])
    expected = x.exp() * (1 + x)
    for tensor in (x, y, exponential):
        tensor.fill_(torch.nan)
    torch.testing.assert_close(backward_of(handle, [torch.ones(2, 3), None], [])[0], expected)


def test_declared_tensors_are_those_of_the_graph():
    x, _, exponential, handle = recorded([0], [1])
    expected = x.exp() * (1 + x)
    given = [x.clone().t().contiguous().t(), exponential.clone()]  # one computed again, in another layout
    x.fill_(torch.nan)
    exponential.fill_(torch.nan)
    torch.testing.assert_close(backward_of(handle, [torch.ones(2, 3), None], given)[0], expected)


def test_a_call_lives_as_long_as_its_handle():
    *_, handle = recorded([], [])
    assert recorded_calls() == 1
    copied = handle.clone()
    alias = handle.detach()
    del handle, _
    assert recorded_calls() == 1
    del alias
    assert recorded_calls() == 0
    with pytest.raises(RuntimeError, match="is gone: its handle was copied"):
        backward_of(copied, [None, None], [])


def test_a_parameter_that_no_graph_can_hold_is_refused():
    def operation(x: torch.Tensor, table: dict[str, int], *, backend: str | None = None) -> torch.Tensor:
        return x

    with pytest.raises(TypeError, match="table: an operation takes tensors, sequences of them, numbers"):
        Arguments(operation)
