"""Gates inside the operations: the same as the gate in front of them, in values and all gradients."""

import math

import pytest
import torch

import hybridlm_kernels as ops
from hybridlm_kernels import Gate
from tests.support.kernel_compare import error, tensors

B, T, H, HV, K, V = 1, 20, 1, 2, 3, 4
FORMS = {  # the logarithm of the decay, in plain numbers
    "softplus": lambda u, A: -math.exp(A) * math.log1p(math.exp(u)),
    "lower_bounded": lambda u, A: -5.0 / (1 + math.exp(-math.exp(A) * u)),
    "logsigmoid": lambda u, A: -math.log1p(math.exp(-u)) / 16,
}
kinds = pytest.mark.parametrize("kind", FORMS)


def make_gate(kind, A_log, dt_bias):
    return Gate(kind, None if kind == "logsigmoid" else A_log, dt_bias, lower_bound=-5.0, normalizer=16.0)


@kinds
@pytest.mark.parametrize("shape", [(B, T, HV), (B, T, HV, K)])
def test_forms(kind, shape):
    u, A_log, dt_bias = (x.detach() for x in tensors(shape, (HV,), shape[2:]))
    g = make_gate(kind, A_log, dt_bias).log_decay(u)
    for at in ((0, 0, 0), (0, 7, 1)):
        at = at + (2,) * (len(shape) - 3)
        expected = FORMS[kind]((u[at] + dt_bias[at[2:]]).item(), A_log[at[2]].item())
        assert g[at].item() == pytest.approx(expected, rel=1e-12)
    assert make_gate(kind, A_log, None).log_decay(u.bfloat16()).dtype == torch.float32


@kinds
@pytest.mark.parametrize("shape", [(B, T, HV), (B, T, HV, K)])
@pytest.mark.parametrize("operation", ["delta_rule", "linear_attention"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_inside_equals_in_front(kind, shape, operation, backend):
    q, k, v, u, A_log, dt_bias, beta = leaves = tensors(
        (B, T, H, K), (B, T, H, K), (B, T, HV, V), shape, (HV,), shape[2:], (B, T, HV))
    gate, run = make_gate(kind, A_log, dt_bias), getattr(ops, operation)
    inside = {"g": u, "gate": gate}
    in_front = {"g": gate.log_decay(u)}
    if operation == "delta_rule":
        inside |= {"beta": beta, "beta_sigmoid": 2.0, "qk_l2norm": True}
        in_front |= {"beta": 2 * beta.sigmoid(), "qk_l2norm": True}
    got = run(q, k, v, **inside, backend=backend)
    expected = run(q, k, v, **in_front, backend=backend)
    upstream = [torch.randn_like(x) for x in expected]
    grads = torch.autograd.grad(got, leaves, upstream, allow_unused=True)
    expected_grads = torch.autograd.grad(expected, leaves, upstream, allow_unused=True)
    assert all(error(a, b) < 1e-14 for a, b in zip(got, expected, strict=True))
    for a, b in zip(grads, expected_grads, strict=True):
        assert (a is None) == (b is None)
        assert a is None or error(a, b) < 1e-13
    assert (grads[4] is None) == (kind == "logsigmoid")
    assert grads[5].abs().max() > 0


@kinds
def test_gradcheck(kind):
    q, k, v, u, A_log, dt_bias, beta = tensors((1, 5, 1, 2), (1, 5, 1, 2), (1, 5, 2, 2), (1, 5, 2, 2), (2,), (2, 2),
                                               (1, 5, 2))

    def run(q, k, v, u, A_log, dt_bias, beta):
        return ops.delta_rule(q, k, v, g=u, gate=make_gate(kind, A_log, dt_bias), beta=beta, beta_sigmoid=2.0,
                              qk_l2norm=True)

    inputs = (q, k, v, u, A_log.detach() if kind == "logsigmoid" else A_log, dt_bias, beta)
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize(("arguments", "message"), [
    (("tanh",), "kind must be softplus, lower_bounded or logsigmoid; got 'tanh'"),
    (("softplus",), "softplus needs A_log"),
    (("logsigmoid", torch.zeros(HV)), "logsigmoid has no A_log"),
    (("lower_bounded", torch.zeros(HV), None, 1.0), "lower_bound must be below 0"),
])
def test_gates_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        Gate(*arguments)


@pytest.mark.parametrize(("g", "gate", "message"), [
    (None, Gate("logsigmoid"), "a gate needs g"),
    (torch.zeros(HV), Gate("logsigmoid"), "a gate needs g for every token"),
    (torch.zeros(B, T, HV), Gate("softplus", torch.zeros(3)), r"A_log must be \[2\]; got \[3\]"),
    (torch.zeros(B, T, HV, K), Gate("logsigmoid", dt_bias=torch.zeros(HV)), r"dt_bias must be \[2, 3\]; got \[2\]"),
])
def test_gates_that_do_not_fit(g, gate, message):
    q, v = torch.zeros(B, T, H, K), torch.zeros(B, T, HV, V)
    with pytest.raises(ValueError, match=message):
        ops.linear_attention(q, q, v, g=g, gate=gate)
