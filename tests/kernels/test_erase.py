"""The delta rule with erase keys and vectors of its own: the papers' recurrences; chunks against the recurrence."""

import importlib
from itertools import pairwise

import pytest
import torch

from hybridlm_kernels import delta_rule, registry
from hybridlm_kernels.random_inputs import recurrence_inputs, select_tokens
from hybridlm_kernels.recurrence import chunk_layout
from tests.support.erase_forms import FORMS, make_inputs
from tests.support.kernel_compare import error
from tests.support.recurrences import assert_causal, assert_close, call, document_alone, set_gates, with_gradients

DECAYS = ("none", "scalar", "channel")
forms = pytest.mark.parametrize("form", FORMS)
decays = pytest.mark.parametrize("decay", DECAYS)


def grads(form_inputs, **more):
    inputs, options = form_inputs
    return with_gradients("delta_rule", inputs, **options, **more)


def small_chunks(monkeypatch, elements=None):
    """Chunks of 16 tokens; `elements` limits a group of steps."""
    backend = importlib.import_module("hybridlm_kernels.ops.delta_rule.torch_erase")
    monkeypatch.setattr(backend, "chunk_size", lambda *_: 16)
    if elements is not None:
        monkeypatch.setitem(chunk_layout.STEP_GROUP_MAX_ELEMENTS, "cpu", elements)
        chunk_layout._layout_of_plain_rows.cache_clear()


def test_the_reference_is_the_recurrence_of_rwkv_7():
    """y_t = S_t^T r_t, S_t = (Diag(w) - k^ (a * k^)^T)^T S + k v^T, with states [V, K] as in the paper, eq. 17."""
    inputs, _ = make_inputs("free vector, before", "channel", T=7, H=1, HV=1)
    a = torch.rand(7, 6, dtype=torch.float64)
    removal = inputs["erase_key"][0, :, 0]
    inputs["erase_vector"] = -(a * removal)[None, :, None]
    o, state = call("delta_rule", inputs, scale=1.0, erase_before_decay=True, backend="reference")
    S = inputs["initial_state"][0, 0].T.clone()
    for t in range(7):
        w, k, v = (inputs[name][0, t, 0] for name in ("g", "k", "v"))
        transition = torch.diag(w.exp()) - torch.outer(removal[t], a[t] * removal[t])
        S = S @ transition + torch.outer(v, k)
        torch.testing.assert_close(o[0, t, 0], S @ inputs["q"][0, t, 0])
    torch.testing.assert_close(state[0, 0], S.T)


def test_the_reference_is_the_recurrence_of_comba():
    """S_t = S_{t-1} (alpha_t - beta_t p_t k_t^T) + beta_t v_t k_t^T, with states [V, K] as in the paper."""
    inputs, _ = make_inputs("own key, before", "scalar", T=7, H=1, HV=1)
    o, _ = call("delta_rule", inputs, scale=1.0, erase_before_decay=True, backend="reference")
    S = inputs["initial_state"][0, 0].T.clone()
    for t in range(7):
        p, k, v, beta = (inputs[name][0, t, 0] for name in ("erase_key", "k", "v", "beta"))
        alpha = inputs["g"][0, t, 0].exp() * torch.eye(6, dtype=torch.float64)
        S = S @ (alpha - beta * torch.outer(p, k)) + beta * torch.outer(v, k)
        torch.testing.assert_close(o[0, t, 0], S @ inputs["q"][0, t, 0])


@decays
@forms
@pytest.mark.parametrize("T", [9, 33, 65])
def test_equals_the_recurrence(form, decay, T):
    made = make_inputs(form, decay, T=T, B=2, HV=4)
    expected = grads(made, backend="reference")
    assert_close(grads(made, backend="torch"), expected, 1e-12)
    single = {name: x.float() for name, x in made[0].items()}
    assert_close(grads((single, made[1]), backend="torch"), expected, 2e-5)


@pytest.mark.parametrize("decay", DECAYS[1:])
@forms
@pytest.mark.parametrize("gates", ["0", "-12", "-50", "mixed", "-inf"])
def test_any_gate(form, decay, gates):
    inputs, options = make_inputs(form, decay, T=70)
    set_gates(inputs["g"], gates)
    expected = grads((inputs, options), backend="reference")
    assert_close(grads((inputs, options), backend="torch"), expected, 1e-11)
    single = {name: x.float() for name, x in inputs.items()}
    assert_close(grads((single, options), backend="torch"), expected, 2e-5)


@decays
@pytest.mark.parametrize("form", ["own key, before", "free vector, before"])
def test_options(form, decay):
    inputs, options = make_inputs(form, decay, HV=4)
    inputs["k"] = inputs["k"] * 3.0
    inputs = {name: x for name, x in inputs.items() if name not in ("initial_state", "beta")}
    options |= {"qk_l2norm": True, "scale": 0.3}
    expected = grads((inputs, options), backend="reference")
    assert_close(grads((inputs, options), backend="torch"), expected, 1e-12)


@decays
@forms
def test_gradcheck_of_packed_rows(form, decay, monkeypatch):
    small_chunks(monkeypatch)
    inputs, options = make_inputs(form, decay, B=2, T=18, H=1, HV=1, K=2, V=2, documents=4)
    names = list(inputs)

    def run(*values):
        made = dict(zip(names, values, strict=True))
        return call("delta_rule", made, cu_seqlens=[0, 9, 10, 18, 36], backend="torch", **options)

    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in inputs.values()], fast_mode=True)


@pytest.mark.parametrize("decay", DECAYS[1:])
@forms
@pytest.mark.parametrize("elements", [None, 1])
def test_packed_documents_equal_documents_alone(form, decay, elements, monkeypatch):
    small_chunks(monkeypatch, elements)
    borders = [0, 1, 17, 22, 55, 58, 74, 76, 93, 110]
    inputs, options = make_inputs(form, decay, B=2, T=55, HV=4, documents=len(borders) - 1)
    packed = grads((inputs, options), cu_seqlens=borders, backend="torch")
    assert_close(packed, grads((inputs, options), cu_seqlens=borders, backend="reference"), 1e-12)
    for n, (start, end) in enumerate(pairwise(borders)):
        o, state = call("delta_rule", document_alone(inputs, n, start, end), backend="torch", **options)
        assert error(packed["o"].flatten(0, 1)[start:end], o[0]) < 1e-12
        assert error(packed["state"][n], state[0]) < 1e-12
    chunk_layout._layout_of_plain_rows.cache_clear()


@decays
@forms
@pytest.mark.parametrize(("T", "cuts"), [(7, (0, 5)), (66, (0, 5, 15, 16, 31, 32, 64))])
def test_causal_to_the_last_bit(form, decay, T, cuts):
    inputs, options = make_inputs(form, decay, T=T, dtype=torch.float32)
    assert_causal(lambda inputs: call("delta_rule", inputs, backend="torch", **options)[0], inputs, cuts)


@forms
@pytest.mark.parametrize("cut", [1, 37])
def test_two_calls_equal_one(form, cut):
    inputs, options = make_inputs(form, "channel", T=70)
    erase = {name: inputs.pop(name) for name in ("erase_key", "erase_vector") if name in inputs}

    def run(tokens, state):
        part = select_tokens(inputs, tokens) | {name: x[:, tokens] for name, x in erase.items()}
        return call("delta_rule", part | {"initial_state": state}, backend="torch", **options)

    one, last = run(slice(None), inputs["initial_state"])
    first, middle = run(slice(0, cut), inputs["initial_state"])
    second, end = run(slice(cut, None), middle)
    assert error(torch.cat([first, second], 1), one) < 1e-12
    assert error(end, last) < 1e-12


@forms
def test_half_precision_and_memory(form):
    """Half inputs are computed in float32, and nothing is read before it is written: torch.empty gives NaN here."""
    inputs, options = make_inputs(form, "channel", T=75, B=2, documents=6)
    inputs = {name: x.bfloat16() for name, x in inputs.items()}
    borders = [0, 1, 34, 75, 80, 140, 150]
    torch.use_deterministic_algorithms(True)
    try:
        half = grads((inputs, options), cu_seqlens=borders, backend="torch")
    finally:
        torch.use_deterministic_algorithms(False)
    wide = grads(({name: x.float() for name, x in inputs.items()}, options), cu_seqlens=borders, backend="torch")
    assert half["o"].dtype == torch.bfloat16
    for name, x in inputs.items():
        assert half[name].dtype == x.dtype
        assert error(half[name], wide[name]) < 0.01, name


def test_the_plain_rule_is_a_special_case():
    inputs = recurrence_inputs("channel", T=40, beta=True)
    plain = call("delta_rule", inputs, backend="torch")
    same = call("delta_rule", inputs | {"erase_key": inputs["k"]}, backend="torch")
    free = {name: x for name, x in inputs.items() if name != "beta"}
    free |= {"k": inputs["beta"][..., None] * inputs["k"], "erase_key": inputs["k"]}
    for other in (same, call("delta_rule", free | {"erase_vector": -free["k"]}, backend="torch")):
        for a, b in zip(plain, other, strict=True):
            assert error(b, a) < 1e-13


@decays
def test_steps_are_writes_of_one_token(decay):
    """S <- e^g S, then n writes; packed and with a raw gate as well."""
    n, inputs = 3, recurrence_inputs(decay, B=1, T=30, H=2, HV=4, K=6, V=5, beta=True, documents=2)
    inputs["q"] = inputs["q"][:, :10]
    if decay != "none":
        inputs["g"] = inputs["g"][:, :10]
    borders = [0, 4, 10]
    for backend in ("reference", "torch"):
        o, state = call("delta_rule", inputs, steps=n, cu_seqlens=borders, scale=1.0, backend=backend)
        assert o.shape == (1, 10, 4, 5)
        for document, (start, end) in enumerate(pairwise(borders)):
            S = inputs["initial_state"][document].clone()
            for t in range(start, end):
                if decay != "none":
                    g = inputs["g"][0, t].exp()
                    S = S * (g[:, None, None] if g.dim() == 1 else g[..., None])
                for j in range(n * t, n * t + n):
                    k = inputs["k"][0, j].repeat_interleave(2, 0)
                    correction = inputs["v"][0, j] - torch.einsum("hk,hkv->hv", k, S)
                    S = S + inputs["beta"][0, j][:, None, None] * k[..., None] * correction[:, None]
                read = torch.einsum("hk,hkv->hv", inputs["q"][0, t].repeat_interleave(2, 0), S)
                torch.testing.assert_close(o[0, t], read)
            torch.testing.assert_close(state[document], S)
    with pytest.raises(ValueError, match="steps must be 1 or more"):
        call("delta_rule", inputs, steps=0)
    with pytest.raises(ValueError, match="q and k must have the same shape"):
        call("delta_rule", inputs, steps=2)


def test_two_writes_per_token_compose_any_permutations():
    """With beta = 2 a write along e_i - e_j swaps two rows of the state, so two writes are any permutation of three.

    This follows words of S3 of any length (Siems et al. 2025, DeltaProduct, section 4); one write per token cannot.
    """
    e = torch.eye(3, dtype=torch.float64)
    swaps = [e[0] - e[1], e[1] - e[2], e[0] - e[2]]
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, (200, 2), generator=generator)
    k = torch.stack([swaps[i] / 2**0.5 for i in words.flatten()])[None, :, None]
    queries, values = e[0].expand(1, 200, 1, 3), torch.zeros(1, 400, 1, 3, dtype=torch.float64)
    o, state = delta_rule(queries, k, values, beta=torch.full((1, 400, 1), 2.0).double(), steps=2, scale=1.0,
                          initial_state=e[None, None])
    rows = [0, 1, 2]
    for t, pair in enumerate(words.tolist()):
        for i in pair:
            a, b = ((0, 1), (1, 2), (0, 2))[i]
            rows[a], rows[b] = rows[b], rows[a]
        torch.testing.assert_close(o[0, t, 0], e[rows[0]])
    torch.testing.assert_close(state[0, 0], e[rows])


def test_mistakes_and_refusals():
    inputs, _ = make_inputs("free vector", "channel", T=9)
    with pytest.raises(ValueError, match=r"erase_key must have shape \[1, 9, 2, 6\] .*got \[1, 9, 2, 5\]"):
        call("delta_rule", inputs | {"erase_key": torch.zeros(1, 9, 2, 5)})
    with pytest.raises(ValueError, match="beta has no place beside erase_vector"):
        call("delta_rule", inputs | {"beta": torch.zeros(1, 9, 2)})
    q, k, v = (inputs[name].float() for name in "qkv")
    with pytest.raises(registry.KernelUnavailable, match="triton"):
        delta_rule(q, k, v, erase_before_decay=True, backend="triton")
    assert delta_rule(q, k, v, erase_before_decay=True)[0].isfinite().all()
