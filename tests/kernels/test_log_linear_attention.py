"""Log-linear attention: calls per level equal the definition, gradients too, for every packing and cut of a row."""

import pytest
import torch
from torch.nn.functional import normalize

from hybridlm_kernels import delta_rule, linear_attention, log_linear_attention


def make(T, levels, delta, decay="scalar", B=2, H=1, HV=2, K=3, V=2, seen=0):
    """Inputs in fp64 by name, and the states of an earlier call on `seen` tokens."""
    generator = torch.Generator().manual_seed(T + levels)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def tokens(T):
        g = -randn(B, T, HV, *([K] if decay == "channel" else [])).square()
        found = {"q_BTHK": randn(B, T, H, K), "k_BTHK": normalize(randn(B, T, H, K), dim=-1),
                 "v_BTHvV": randn(B, T, HV, V), "lambda_BTHvL": randn(B, T, HV, levels), "g": 0.3 * g}
        return found | {"beta": 2 * randn(B, T, HV).sigmoid()} if delta else found

    inputs = tokens(T)
    if seen:
        inputs["initial_state"] = log_linear_attention(**tokens(seen), final_state=True, backend="reference")[1]
    return inputs


def results_and_gradients(inputs, **options):
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    o, final = log_linear_attention(**leaves, final_state=True, **options)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in (o, final)]
    grads = dict(zip(leaves, torch.autograd.grad([o, final], list(leaves.values()), upstream, materialize_grads=True),
                     strict=True))
    if "initial_state" in grads:  # levels without a block are zero, whatever would follow from other numbers
        grads["initial_state"] = grads["initial_state"] * (inputs["initial_state"] != 0)
    return [o, final, *grads.values()]


# Tokens, levels, borders, tokens seen: tiles of 32, blocks of 1 to 64 tokens, and what is older than the largest block.
SHAPES = [
    (1, 4, None, 0), (32, 7, None, 0), (70, 8, None, 0), (150, 7, None, 0), (128, 7, None, 0), (100, 3, None, 0),
    (75, 9, [0, 1, 3, 36, 36, 75, 150], 0), (140, 7, [0, 140, 141, 145, 280], 0),
    (3, 8, None, 5), (1, 4, None, 8), (40, 8, None, 29), (70, 8, None, 95), (100, 7, None, 96), (1, 7, None, 127)]


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize(("length", "levels", "borders", "seen"), SHAPES)
def test_equals_the_definition(delta, length, levels, borders, seen):
    inputs = make(length, levels, delta, "channel" if length % 4 == 2 else "scalar", seen=seen)
    options = {"cu_seqlens": borders, "tokens_seen": seen}
    expected = results_and_gradients(inputs, backend="reference", **options)
    for got, wanted in zip(results_and_gradients(inputs, backend="torch", **options), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)
    with torch.no_grad():
        o, nothing = log_linear_attention(**inputs, final_state=False, **options)
    torch.testing.assert_close(o, expected[0], rtol=1e-9, atol=1e-10)
    assert nothing.shape[1] == 0


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_equal_scales_make_it_the_recurrence_itself(delta, backend):
    inputs = make(75, 7, delta)
    inputs["lambda_BTHvL"] = torch.ones_like(inputs["lambda_BTHvL"])
    o, state = log_linear_attention(**inputs, final_state=True, backend=backend)
    inputs.pop("lambda_BTHvL")
    expected, final = (delta_rule if delta else linear_attention)(**inputs)
    torch.testing.assert_close(o, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(state.sum(1), final, rtol=1e-9, atol=1e-10)


def test_blocks_are_those_of_a_fenwick_tree():
    """Published form: from token t on, go back by the lowest set bit of what is left; block i has the i-th such bit."""
    T, levels = 45, 7
    inputs = make(T, levels, delta=False, B=1, HV=1)
    q, k, v, scales, g = (x[0, :, 0] for x in inputs.values())
    expected = []
    for t in range(T):
        blocks, end = [(0, t, t + 1)], t
        while end:
            size = end & -end
            blocks.append((size.bit_length(), end - size, end))
            end -= size
        expected.append(sum(scales[t, level] * g[s + 1 : t + 1].sum().exp() * (q[t] @ k[s]) * v[s]
                            for level, start, stop in blocks for s in range(start, stop)))
    o, _ = log_linear_attention(**inputs, scale=1.0)
    torch.testing.assert_close(o[0, :, 0], torch.stack(expected), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("delta", [False, True])
def test_decoding_equals_one_call(delta):
    inputs = make(75, 6, delta)
    one_call, last = log_linear_attention(**inputs, final_state=True)
    outputs, state, seen = [], None, 0
    for length in (2, 1, 1, 29, 1, 7, 34):
        part = {name: x[:, seen : seen + length] for name, x in inputs.items()}
        o, state = log_linear_attention(**part, initial_state=state, tokens_seen=seen, final_state=True)
        outputs.append(o)
        seen += length
    torch.testing.assert_close(torch.cat(outputs, 1), one_call)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("levels", [7, 9])
def test_causal_to_the_last_bit(levels):
    inputs = {name: x.float() for name, x in make(150, levels, delta=True).items()}
    before, _ = log_linear_attention(**inputs)
    for t in (0, 31, 64, 148):
        changed = {name: x.clone() for name, x in inputs.items()}
        for name in ("q_BTHK", "k_BTHK", "v_BTHvV", "lambda_BTHvL"):
            changed[name][:, t + 1 :] *= 0.5
        after, _ = log_linear_attention(**changed)
        assert torch.equal(before[:, : t + 1], after[:, : t + 1])
        assert not torch.equal(before[:, t + 1], after[:, t + 1])


@pytest.mark.parametrize(("options", "message"), [
    ({"lambda_BTHvL": torch.ones(2, 5, 2, 1)}, "lambda must have shape"),
    ({"initial_state": torch.ones(2, 3, 2, 3, 2), "tokens_seen": 1, "cu_seqlens": [0, 5, 10]}, "without borders"),
    ({"initial_state": torch.ones(2, 2, 2, 3, 2), "tokens_seen": 1}, "initial_state must be"),
    ({"tokens_seen": 1}, "tokens_seen must be above 0 with an initial state and 0 without; got 1"),
    ({"beta": torch.ones(2, 5)}, "beta must have shape"),
])
def test_arguments_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        log_linear_attention(**make(5, 4, delta=False) | options)
