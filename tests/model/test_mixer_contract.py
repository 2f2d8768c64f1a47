"""What every mixer must hold, whatever its mathematics: causality, borders, decoding, costs."""

from __future__ import annotations

import itertools

import pytest
import torch

from hybridlm.model.mixers import MIXERS, build_mixer
from hybridlm_kernels import CuSeqlens
from tests.support.mixer_cases import CASES, build, context_of, inputs, run

every_mixer = pytest.mark.parametrize("name", CASES)


@every_mixer
def test_changing_a_token_leaves_all_earlier_outputs_bitwise_equal(name):
    mixer, x = build(name, torch.float32), inputs(1, 131, torch.float32)
    with torch.no_grad():
        y = run(mixer, x)
        for t in (1, 15, 16, 63, 64, 127, 128):
            changed = x.clone()
            changed[:, t] += 1.0
            y_changed = run(mixer, changed)
            assert torch.equal(y_changed[:, :t], y[:, :t])
            assert not torch.equal(y_changed[:, t], y[:, t])


@every_mixer
def test_packed_documents_equal_separate_ones_forward_and_gradients(name):
    mixer, x = build(name), inputs(2, 75).requires_grad_()
    borders = [0, 1, 6, 70, 75, 140, 143, 150]
    weights = torch.randn(150, x.shape[-1], dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    packed = run(mixer, x, CuSeqlens(borders)).flatten(0, 1)
    (packed * weights).sum().backward()
    packed_grads = {n: p.grad.clone() for n, p in mixer.named_parameters() if p.grad is not None}
    packed_x_grad = x.grad.clone()
    x.grad = None
    mixer.zero_grad()

    rows = x.flatten(0, 1)
    pieces = [run(mixer, rows[None, a:b])[0] for a, b in itertools.pairwise(borders)]
    separate = torch.cat(pieces)
    (separate * weights).sum().backward()
    torch.testing.assert_close(packed, separate, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(packed_x_grad, x.grad, rtol=1e-8, atol=1e-9)
    assert packed_grads
    for parameter, grad in packed_grads.items():
        torch.testing.assert_close(grad, mixer.get_parameter(parameter).grad, rtol=1e-8, atol=1e-9)


@every_mixer
def test_every_parameter_but_the_indexers_gets_a_gradient(name):
    mixer = build(name)
    run(mixer, inputs(1, 20)).square().sum().backward()
    without = {n for n, p in mixer.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert without == {n for n, _ in mixer.named_parameters() if n.startswith("indexer.")}


@every_mixer
@pytest.mark.parametrize("pieces", [[1] * 23, [7, 1, 12, 3], [20, 1, 1, 1]], ids=["tokens", "chunks", "prompt"])
@torch.no_grad()
def test_decoding_in_pieces_equals_the_full_forward(name, pieces):
    mixer, x = build(name), inputs(2, 23)
    state, done, out = mixer.new_state(2, 23), 0, []
    for length in pieces:
        out.append(run(mixer, x[:, done : done + length], state=state, offset=done))
        done += length
    torch.testing.assert_close(torch.cat(out, 1), run(mixer, x), rtol=1e-8, atol=1e-9)


@every_mixer
@torch.no_grad()
def test_state_bytes_are_those_of_the_state(name):
    mixer, config = build(name, torch.float32), CASES[name]
    state = mixer.new_state(1, 40)
    run(mixer, inputs(1, 31, torch.float32), state=state)
    assert state.num_bytes == config.state_bytes(context_of(name), 31, element_bytes=4)
    grows = config.state_bytes(context_of(name), 100_000) > config.state_bytes(context_of(name), 50_000)
    assert grows == (not config.is_linear and getattr(config, "window", None) is None)


@every_mixer
def test_parameter_count_is_that_of_the_module(name):
    with torch.device("meta"):
        mixer = build_mixer(CASES[name], context_of(name))
    assert CASES[name].num_params(context_of(name)) == sum(p.numel() for p in mixer.parameters())


@every_mixer
def test_norms_decay_parameters_sinks_and_index_weights_are_kept_in_fp32(name):
    mixer = build(name)
    expected = {n for n, _ in mixer.named_parameters()
                if "norm" in n or n in ("A_log", "dt_bias", "sinks", "indexer.weights_proj.weight")}
    assert {n for n, _ in mixer.named_parameters() if kept_in_fp32(mixer, n)} == expected


def kept_in_fp32(mixer, name: str) -> bool:
    return any(name == last or name.endswith(f".{last}") for last in mixer.fp32_parameters)


@every_mixer
def test_a_mixer_built_on_meta_computes_what_one_built_at_once_does(name):
    with torch.device("meta"):
        late = build_mixer(CASES[name], context_of(name))
    at_once = build(name)
    late = late.to(torch.float64).to_empty(device="cpu")
    late.init_weights(0.02)
    late.load_state_dict(at_once.state_dict())
    x = inputs(1, 17)
    assert torch.equal(run(late, x), run(at_once, x))


@every_mixer
def test_initial_values_are_finite_and_of_the_asked_size(name):
    torch.manual_seed(0)
    mixer = build_mixer(CASES[name], context_of(name, hidden_size=96))
    mixer.init_weights(0.02)
    for parameter_name, parameter in mixer.named_parameters():
        assert torch.isfinite(parameter).all(), parameter_name
        if parameter_name.endswith("_proj.weight") and parameter.numel() > 500:
            assert 0.018 < parameter.std() < 0.022, parameter_name


@every_mixer
def test_training_goes_on_after_inference(name):
    mixer, x = build(name), inputs(1, 9)
    with torch.inference_mode():
        first = run(mixer, x)
    second = run(mixer, x)
    second.sum().backward()
    assert torch.equal(first, second.detach())


@every_mixer
def test_flops_are_positive_and_follow_the_context(name):
    config, context = CASES[name], context_of(name)
    short, long = (sum(config.flops_per_token(context, n).values()) for n in (1000, 2000))
    assert short > 2 * config.num_params(context) * 0.5
    window = getattr(config, "window", None)
    assert (long == short) == config.is_linear or window is not None


@every_mixer
def test_half_precision_stays_near_full_precision(name):
    mixer, x = build(name, torch.float32), inputs(1, 24, torch.float32)
    if getattr(mixer, "indexer_config", None) is not None:
        mixer.attention_mode = "dense"  # a rounded score selects another key, and outputs jump
    y = run(mixer, x)
    keep = {n: p.detach().clone() for n, p in mixer.named_parameters() if kept_in_fp32(mixer, n)}
    mixer.bfloat16()
    for parameter_name, value in keep.items():
        mixer.get_parameter(parameter_name).data = value
    y_half = run(mixer, x.bfloat16())
    assert y_half.dtype == torch.bfloat16
    assert (y_half.float() - y).square().mean().sqrt() < 0.03 * y.square().mean().sqrt()


@every_mixer
def test_autocast_gives_half_precision_near_full_precision(name):
    mixer, x = build(name, torch.float32), inputs(1, 24, torch.float32)
    if getattr(mixer, "indexer_config", None) is not None:
        mixer.attention_mode = "dense"
    y = run(mixer, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_half = run(mixer, x)
    assert (y_half.float() - y).square().mean().sqrt() < 0.03 * y.square().mean().sqrt()
    y_half.float().sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in mixer.parameters())


def test_every_registered_kind_is_tested():
    assert {config.kind for config in CASES.values()} == set(MIXERS)
