"""A layer that starts from attention: what it takes over, what calibration sets, and how near it then is."""

import math

import pytest
import torch

from hybridlm.errors import ConfigError
from hybridlm.interop.surgery import convert_attention
from hybridlm.model.calibration import calibrate, fit_head_scales, mixer_of, recorded_calls, relative_error
from hybridlm.model.layer_context import NormConfig
from hybridlm.model.mixers import AttentionConfig, DeltaRuleConfig, Mamba2Config, build_mixer
from hybridlm.model.mixers.common.first_tokens import mean_look_back, window_and_first_attention
from hybridlm.model.mixers.common.recurrent import RecurrentConfig
from hybridlm.model.mixers.linear_attention import compute_decay_slopes
from hybridlm.model.model import build_model
from hybridlm.model.sequence import SequenceInfo
from hybridlm.tensor_storage import unique_tensors
from hybridlm_kernels import CuSeqlens, short_conv
from tests.support import tiny_lm

PRESETS = ["kda", "gdn", "gla", "lightning", "mamba2", "rwkv7", "swa", "lolcats", "liger", "ssd", "retnet", "hedgehog"]


def attention_model(**options):
    """Three layers of grouped attention with norms of queries and keys whose weights are not 1."""
    attention = AttentionConfig(**{"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "qk_norm": "head", **options})
    model = tiny_lm.model(mixers={"full": attention, "linear": attention}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_norm." in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    return model


def text(rows=2, length=48, seed=0):
    return torch.randint(0, tiny_lm.VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_that_starts_from_attention_computes_and_can_be_calibrated(preset):
    model = attention_model()
    student, transfer = convert_attention(model, [0, 2], preset, calibrated=True)
    assert student.config.layers() == [preset, "linear", preset]
    weights = mixer_of(student, 0).config.attention_weights
    assert {f"layers.{i}.mixer.{name}" for i in (0, 2) for name in weights} <= set(transfer.kept)
    assert all(value.isfinite().all() for value in unique_tensors(student).values())
    fits = calibrate(model, student, [0, 2], [(text(), None)])
    assert [fit.layer for fit in fits] == [0, 2]
    for fit in fits:
        assert fit.error <= 1 + 1e-6  # the scales of zero are among those that least squares chooses from
        assert len(fit.look_back) == 4
    # Decoding gives what the whole forward gives.
    ids = text(1, 12, seed=1)
    with torch.no_grad():
        whole = student.eval()(ids).logits
        state = student.new_state(1, 12)
        steps = [student(ids[:, i : i + 1], state=state).logits for i in range(12)]
    assert (torch.cat(steps, 1) - whole).abs().max() < 2e-5


@pytest.mark.parametrize("preset", ["mamba", "rwkv6", "ttt_linear", "griffin", "mla", "slstm"])
def test_other_mixers_cannot_start_from_attention(preset):
    with pytest.raises(ConfigError, match=f"cannot start from the weights of attention; got '{preset}'"):
        convert_attention(attention_model(), [0], preset)


def test_layers_without_attention_cannot_be_converted():
    with pytest.raises(ConfigError, match=r"layer 0: has no softmax attention.*got 'linear \(delta_rule\)'"):
        convert_attention(tiny_lm.model(), [0], "kda")


def test_expanded_heads_are_grouped_attention():
    """Keys and values repeated per head compute what their groups do; repeating rows of the matrix would not."""
    model = attention_model()
    full, _ = convert_attention(model, [0, 1, 2], {"kind": "attention", "num_heads": 4, "num_kv_heads": 4,
                                                   "head_dim": 8})
    assert full.config.mixers[full.config.layers()[0]].kv_heads == 2  # attention takes the heads that it replaces
    wide = AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=8, qk_norm="none")
    old = model.config.mixers["full"]
    plain = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, qk_norm="none")
    mixer = mixer_of(model, 0)
    tensors = {name: value for name, value in mixer.named_parameters() if "_norm" not in name}
    found = wide.initial_weights_from(plain, tensors, NormConfig())
    context = model.config.layer_context(0)
    grouped, expanded = build_mixer(plain, context).double(), build_mixer(wide, context).double()
    grouped.load_state_dict(tensors)
    expanded.load_state_dict(found)
    x, seq = torch.randn(2, 20, 32, dtype=torch.float64), SequenceInfo.make(2, 20, torch.device("cpu"))
    assert torch.allclose(grouped(x, seq)[0], expanded(x, seq)[0], atol=1e-12)
    assert old.kv_heads == 2


@pytest.mark.parametrize("zero_centered", [False, True])
def test_norms_of_queries_and_keys_become_part_of_the_projections(zero_centered):
    old = AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=4, qk_norm="head")
    tensors = {"q_proj.weight": torch.randn(8, 6), "k_proj.weight": torch.randn(4, 6), "v_proj.weight":
               torch.randn(4, 6), "o_proj.weight": torch.randn(6, 8), "q_norm.weight": torch.rand(4),
               "k_norm.weight": torch.rand(4)}
    new = DeltaRuleConfig(num_heads=2, head_dim=4)
    found = new.initial_weights_from(old, tensors, NormConfig(zero_centered=zero_centered))
    x_D = torch.randn(6)
    for name, heads in (("q", 2), ("k", 1)):
        weight = tensors[f"{name}_norm.weight"] + zero_centered
        was = (tensors[f"{name}_proj.weight"] @ x_D).view(heads, 4) * weight
        now = (found[f"{name}_proj.weight"] @ x_D).view(2, 4)
        assert torch.allclose(torch.nn.functional.normalize(now, dim=-1),
                              torch.nn.functional.normalize(was, dim=-1).expand(2, 4), atol=1e-6)


def test_the_convolution_is_the_identity_and_decays_have_the_half_life_asked_for():
    half_life_H = torch.tensor([2.0, 5.0, 64.0, 900.0])
    for preset in ("kda", "gdn", "gla", "ssd", "mamba2", "rwkv7"):
        student, _ = convert_attention(attention_model(), [1], preset, calibrated=True)
        mixer = mixer_of(student, 1)
        mixer.calibrate(half_life_H)
        x_BTD = torch.randn(1, 3, 32)
        if isinstance(mixer.config, RecurrentConfig):
            log_decay = mixer.build_forget_gate().log_decay(mixer.project_forget_gate(x_BTD))
            log_decay = log_decay.view(1, 3, 4, -1)
        elif preset == "mamba2":
            log_decay = -(torch.nn.functional.softplus(mixer.dt_bias) * mixer.A_log.exp()).view(1, 1, 4, 1)
        else:
            log_decay = (-math.exp(-0.5) * mixer.decay.sigmoid()).view(1, 1, 4, -1)
        wanted = (-math.log(2) / half_life_H)[:, None].expand_as(log_decay)
        assert torch.allclose(log_decay, wanted, rtol=2e-5), preset
    y, _ = short_conv(x_BTD[..., :8], torch.nn.functional.pad(torch.ones(8, 1), (3, 0)))
    student, _ = convert_attention(attention_model(), [1], "kda", calibrated=True)
    mixer_of(student, 1).calibrate(half_life_H)
    assert torch.equal(mixer_of(student, 1).q_conv[:8], torch.nn.functional.pad(torch.ones(8, 1), (3, 0)))
    assert torch.equal(y, x_BTD[..., :8])


def test_slopes_that_are_fixed_become_stored_ones_with_the_half_life_asked_for():
    half_life_H = torch.tensor([2.0, 5.0, 64.0, 900.0])
    for preset in ("lightning", "retnet"):
        student, _ = convert_attention(attention_model(), [0, 1], preset, calibrated=True)
        copied, _ = convert_attention(attention_model(), [0, 1], preset)
        assert "layers.0.mixer.slopes" not in copied.state_dict()
        mixer = mixer_of(student, 1)
        lightning = compute_decay_slopes("lightning", 4, 1, 3)
        assert mixer.slopes.tolist() == pytest.approx(lightning)
        mixer.calibrate(half_life_H)
        assert torch.allclose(mixer.slopes, math.log(2) / half_life_H)
        assert mixer_of(student, 0).slopes.tolist() == pytest.approx(compute_decay_slopes("lightning", 4, 0, 3))
        # A token that was written n steps ago counts 2^(-n / half-life) as much: read by the recurrence itself.
        g_H = mixer._constant_decay(torch.zeros(1, 1, 32))
        assert torch.allclose((g_H * half_life_H).exp(), torch.full((4,), 0.5))
        again = build_model(student.config)
        again.load_state_dict(student.state_dict())
        ids = text(1, 12)
        with torch.no_grad():
            assert torch.equal(again.eval()(ids).logits, student.eval()(ids).logits)
            half = student.to(torch.bfloat16)
        assert mixer_of(half, 1).slopes.dtype == torch.float32


def test_calibration_of_mamba2_leaves_the_scales_of_the_levels():
    config = Mamba2Config(num_heads=4, head_dim=8, state_size=8, bias=True, levels=5)
    mixer = build_mixer(config, tiny_lm.model().config.layer_context(0))
    with torch.no_grad():
        for parameter in mixer.in_proj.parameters():
            parameter.fill_(1.0)
        mixer.calibrate(torch.full((4,), 8.0))
    steps = config.inner_size + config.conv_channels
    for parameter in mixer.in_proj.parameters():
        rows = parameter.view(len(parameter), -1)
        assert len(rows) == steps + 4 + 4 * 5
        assert (rows[steps : steps + 4] == 0).all()
        assert (rows[:steps] == 1).all()
        assert (rows[steps + 4 :] == 1).all()


def test_head_scales_are_the_least_squares_solution():
    model = attention_model()
    student, _ = convert_attention(model, [1], "kda", calibrated=True)
    with recorded_calls(model, [1]) as calls, torch.no_grad():
        model(text())
    mixer, weight = mixer_of(student, 1), mixer_of(student, 1).o_proj.weight.detach().clone()
    seen = []
    hook = mixer.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    call = calls[1][0]
    mixer(call.input, call.seq)
    hook.remove()
    columns = [(seen[0][..., h * 8 : h * 8 + 8] @ weight[:, h * 8 : h * 8 + 8].T).flatten() for h in range(4)]
    wanted = torch.linalg.lstsq(torch.stack(columns, 1).double(), call.output.flatten().double()[:, None]).solution
    found = fit_head_scales(mixer, calls[1])
    assert torch.allclose(found, wanted[:, 0], rtol=1e-5)
    assert torch.allclose(mixer.o_proj.weight[:, 8:16], weight[:, 8:16] * found[1].float(), atol=1e-7)
    scaled = relative_error(mixer, calls[1])
    for factor in (0.9, 1.1):  # no scale nearby is better
        with torch.no_grad():
            mixer.o_proj.weight[:, :8] *= factor
        assert relative_error(mixer, calls[1]) > scaled
        with torch.no_grad():
            mixer.o_proj.weight[:, :8] /= factor


def test_look_back_is_the_mean_distance_without_the_first_token():
    q, k = (torch.randn(1, 30, h, 4, dtype=torch.float64) for h in (4, 2))
    borders = CuSeqlens([0, 11, 30])
    positions = borders.positions().view(1, -1)
    found = mean_look_back(q, k, positions, window=9, chunk=7)
    for head in range(4):
        distances = []
        for t in range(30):
            first = 0 if t < 11 else 11
            keys = list(range(max(first + 1, t - 8), t + 1))
            if keys:
                p = torch.softmax(torch.stack([q[0, t, head] @ k[0, s, head // 2] for s in keys]) / 2, 0)
                distances.append(sum(float(w) * (t - s) for w, s in zip(p, keys, strict=True)))
        assert float(found[head]) == pytest.approx(sum(distances) / len(distances), rel=1e-12)


def test_a_window_with_first_tokens_reads_these_keys_and_no_others():
    q, k, v = (torch.randn(2, 23, h, 6, dtype=torch.float64) for h in (4, 2, 2))
    borders = CuSeqlens([0, 5, 23, 46])
    seq = SequenceInfo.make(2, 23, torch.device("cpu"), borders)
    found = window_and_first_attention(q, k, v, seq, window=4, first_tokens=2)
    for row in range(2):
        for t in range(23):
            start = t - int(seq.positions_BT[row, t])
            keys = sorted({*range(max(start, t - 3), t + 1), *range(start, min(start + 2, t + 1))})
            for head in range(4):
                p = torch.softmax(k[row, keys, head // 2] @ q[row, t, head] / 6**0.5, 0)
                assert torch.allclose(found[row, t, head], p @ v[row, keys, head // 2], atol=1e-12)


def test_the_linear_branch_can_be_cut_from_a_mixer_with_a_window():
    """What is left of lolcats and liger is the softmax window; with a window of everything it is the attention."""
    model = attention_model(qk_norm="none")
    x, seq = torch.randn(1, 20, 32), SequenceInfo.make(1, 20, torch.device("cpu"))
    for preset in ("lolcats", "liger"):
        student, _ = convert_attention(model, [1], preset)
        assert torch.allclose(mixer_of(student, 1).without_linear_branch(x, seq), mixer_of(model, 1)(x, seq)[0],
                              atol=1e-5)
    student, _ = convert_attention(model, [1], "kda")
    assert not mixer_of(student, 1).without_linear_branch(x, seq).any()
