"""bfloat16 against the fp64 reference: outputs within 0.005, dq dk dv within 0.008, gradients of gates and beta 0.02.

On a CUDA device that is what Triton's kernels compute. Where they are interpreted they cannot compute in bfloat16, and
the torch backends take their place.
"""

import pytest
import torch

from hybridlm_kernels import registry
from hybridlm_kernels.tools import doctor
from hybridlm_kernels.tools.cases import check_cases
from hybridlm_kernels.triton_support import INTERPRETED
from tests.support.emulated_bf16 import BOUND_OF_GATES, BOUNDS
from tests.support.kernel_compare import error
from tests.support.recurrences import doctor_case

BACKEND = "torch" if INTERPRETED else "triton"
DIMS = (32,) if INTERPRETED else (128, 64, 256, 32)
SIZES = {"B": 2, "T": 160, "H": 1, "HV": 2}
BORDERS = [0, 1, 65, 160, 224, 320]
BOUND = 0.008  # of gradients of inputs that are not named elsewhere
LINEAR = [("delta_rule", "none", None), ("delta_rule", "scalar", "softplus"), ("delta_rule", "channel", "softplus"),
          ("delta_rule", "channel", "lower_bounded"), ("linear_attention", "none", None),
          ("linear_attention", "constant", None), ("linear_attention", "scalar", "softplus"),
          ("linear_attention", "channel", "lower_bounded")]


def assert_within_bounds(case, device):
    torch.manual_seed(0)
    inputs = {n: x.bfloat16().double() if x.is_floating_point() else x for n, x in case.inputs().items()}
    outputs, grads = doctor._evaluate(case, BACKEND, inputs, torch.bfloat16, device)
    expected_outputs, expected = doctor._evaluate(case, "reference", inputs, torch.float64, "cpu")
    found = {f"output {i}": (error(a.cpu(), b), BOUNDS["o"])
             for i, (a, b) in enumerate(zip(outputs, expected_outputs, strict=True))}
    for name, x in expected.items():
        bound = BOUND_OF_GATES if name in ("g", "beta", "A_log", "dt_bias") else BOUNDS.get(name, BOUND)
        found[f"d{name}"] = error(grads[name].cpu(), x), bound
    assert all(measured <= bound for measured, bound in found.values()), found  # NaN is not
    assert max(measured for measured, _ in found.values()) > 1e-4  # else nothing was rounded


@pytest.mark.parametrize(("D", "operation", "decay", "gate"), [
    (D, *kind) for D in DIMS for kind in LINEAR
    if D in (64, 128) or kind[1:] in (("scalar", "softplus"), ("channel", "lower_bounded"))])
def test_rows_of_the_linear_family(operation, decay, gate, D, device):
    assert_within_bounds(doctor_case(operation, decay, gate, K=D, V=D, **SIZES), device)


@pytest.mark.parametrize(("operation", "decay", "gate"), LINEAR)
def test_packed_documents_of_the_linear_family(operation, decay, gate, device):
    case = doctor_case(operation, decay, gate, borders=BORDERS, K=DIMS[0], V=DIMS[0], **SIZES)
    assert_within_bounds(case, device)


OTHERS = [case for case in check_cases() if case.operation not in ("delta_rule", "linear_attention", "attention",
                                                                    "pooled_indexer_kl", "attention_recall",
                                                                    "max_scan")]  # exact in fp32 from bf16 numbers


@pytest.mark.parametrize("case", OTHERS, ids=lambda case: f"{case.operation}, {case.label}")
def test_other_operations(case, device):
    assert_within_bounds(case, device)


@pytest.mark.skipif(not INTERPRETED, reason="a device computes in it")
def test_the_interpreter_refuses_it():
    found = [backend.supports(registry.Call("cpu", torch.bfloat16, needs_grad=False))
             for operation in registry.operations() for backend in operation.backends if backend.name == "triton"]
    assert len(found) > 10
    assert set(found) == {(False, "Triton's interpreter cannot compute in bfloat16; use float32")}
