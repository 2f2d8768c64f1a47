"""Calls of the recurrences with their gradients, and comparisons of what they give, for tests of every backend."""

import torch

import hybridlm_kernels as ops
from hybridlm_kernels.cases import CheckCase
from hybridlm_kernels.random_inputs import recurrence_inputs, with_gate
from tests.support.kernel_compare import error

KINDS = [("delta_rule", "none"), ("delta_rule", "scalar"), ("delta_rule", "channel"), ("linear_attention", "none"),
         ("linear_attention", "constant"), ("linear_attention", "scalar"), ("linear_attention", "channel")]


def call(operation, inputs, *, gate=None, bound=-5.0, **options):
    """The outputs and last states of an operation, named, for inputs as `recurrence_inputs` makes them."""
    arguments = with_gate(inputs, gate, bound)
    q, k, v = (arguments.pop(name) for name in "qkv")
    return getattr(ops, operation)(q, k, v, **arguments, **options)


def with_gradients(operation, inputs, *, fixed=(), **options):
    """Outputs, last states and the gradients of all inputs not in `fixed`, for one fixed random upstream gradient."""
    leaves = {name: x.detach().clone().requires_grad_(name not in fixed) for name, x in inputs.items()}
    o, state = call(operation, leaves, **options)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in (o, state)]
    learnt = {name: x for name, x in leaves.items() if name not in fixed}
    grads = torch.autograd.grad([o, state], list(learnt.values()), upstream)
    return {"o": o.detach(), "state": state.detach(), **dict(zip(learnt, grads, strict=True))}


def assert_close(got, expected, tolerance, tolerances=None):
    """Each named tensor is as expected; `tolerances` holds those of some names."""
    for name, x in expected.items():
        assert got[name].shape == x.shape, name
        measured = error(got[name].cpu(), x)
        assert measured <= (tolerances or {}).get(name, tolerance), (name, measured)


def assert_triton_equals_reference(operation, inputs, device, *, tolerances=None, **options):
    """Triton in fp32 gives what the reference gives in fp64: outputs, states and gradients."""
    expected = with_gradients(operation, inputs, backend="reference", **options)
    single = {name: x.float().to(device) for name, x in inputs.items()}
    assert_close(with_gradients(operation, single, backend="triton", **options), expected, 1e-5, tolerances)


def assert_final_states_change_nothing(operation, inputs, device="cpu", *, backend="triton", **options):
    """Without final states, outputs and the gradients of a loss of them keep every bit, and no state is returned."""
    found = []
    for final_state in (True, False):
        leaves = {name: x.detach().float().to(device).requires_grad_() for name, x in inputs.items()}
        o, state = call(operation, leaves, backend=backend, final_state=final_state, **options)
        documents = leaves["initial_state"].shape[0] if final_state else 0
        assert state.shape == (documents, *leaves["initial_state"].shape[1:])
        assert state.dtype == torch.float32
        found.append([o, *torch.autograd.grad(o.square().sum(), list(leaves.values()))])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def assert_causal(run, inputs, cuts):
    """Tokens after a cut change no bit of the outputs up to it, and change the next one.

    `run(inputs)` gives the outputs [B, T, ...]; inputs with T in their second dimension are changed.
    """
    before = run(inputs)
    T = before.shape[1]
    for cut in cuts:
        changed = {name: x.clone() for name, x in inputs.items()}
        for name, x in changed.items():
            if name != "initial_state" and x.dim() > 1 and x.shape[1] == T:
                x[:, cut + 1 :] *= 0.5
        after = run(changed)
        assert torch.equal(before[:, : cut + 1], after[:, : cut + 1])
        assert not torch.equal(before[:, cut + 1], after[:, cut + 1])


def set_gates(g, kind):
    """Write gates at an extreme into g: zero, -12, -50, -inf in every fifth place, or strong ones before weak ones."""
    if kind == "mixed":  # differences of sums over the chunk would lose the weak ones
        g *= 0.01
        g[..., :1] = -0.5
        if g.dim() > 1:
            g[:, : g.shape[1] // 2] = -50.0
    elif kind == "-inf":
        g.view(-1)[::5] = -torch.inf
    else:
        g.fill_(float(kind))


def document_alone(inputs, n, start, end):
    """The inputs of document n, tokens start to end of the flattened rows, as a batch of one row."""
    alone = {}
    for name, x in inputs.items():
        if name == "initial_state":
            alone[name] = x[n : n + 1]
        elif name in ("A_log", "dt_bias") or (name == "g" and x.dim() == 1):
            alone[name] = x
        else:
            alone[name] = x.flatten(0, 1)[None, start:end]
    return alone


def doctor_case(operation, decay, gate, *, borders=None, **sizes):
    """A case of the doctor with initial states and everything that is computed inside: gates, sigmoid, norms."""
    delta = operation == "delta_rule"
    options = {"cu_seqlens": borders} | ({"beta_sigmoid": 1.0, "qk_l2norm": True} if delta else {})

    def inputs():
        documents = None if borders is None else len(borders) - 1
        made = recurrence_inputs(decay, beta=delta, raw=delta, gate=gate, documents=documents, **sizes)
        if decay != "none" and gate is None:
            made["g"] = -made["g"].abs()
        return made

    def run(**tensors):
        return call(operation, tensors, gate=gate, **options)

    return CheckCase(operation, f"{decay}, D={sizes['K']}", run, inputs, fixed=("g",) if decay == "constant" else ())
