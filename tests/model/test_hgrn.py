"""HGRN and HGRN-2: the papers' recurrences token by token, and lower bounds that all layers of a model share."""

from __future__ import annotations

import pytest
import torch

from hybridlm.errors import ConfigError
from hybridlm.model.config import ScheduleConfig
from hybridlm.model.mixers import AttentionConfig, HGRN2Config, HGRNConfig, build_mixer
from hybridlm.model.sequence import SequenceInfo
from tests.support.mixer_cases import HIDDEN, build, context_of, inputs, run
from tests.support.tiny_lm import VOCABULARY, model

FULL = AttentionConfig(num_heads=4, head_dim=8)
PATTERN = ["full", "hgrn", "hgrn2", "hgrn", "hgrn2", "hgrn"]
IDS = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(3))


def silu(x):
    return x / (1 + (-x).exp())


def rms(x, norm):
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def bound(mixer):
    """b of layer 1 of 4: the share of that layer in a softmax over layers."""
    share = mixer.lower_bounds.exp() / mixer.lower_bounds.exp().sum(0)
    return share[1]


@pytest.mark.parametrize("name", ["hgrn", "hgrn_complex"])
def test_hgrn_is_the_recurrence_of_the_paper(name):
    mixer, x = build(name), inputs(1, 7)[0]
    with torch.no_grad():
        b, i = bound(mixer), silu(mixer.i_proj(x))
        f = b + (1 - b) / (1 + (-mixer.f_proj(x)).exp())
        C = f.shape[1]
        h, outputs = torch.zeros(2, C, dtype=x.dtype), []
        angle = torch.zeros(C) if mixer.theta is None else mixer.theta
        for t in range(7):
            turned = torch.stack([h[0] * angle.cos() - h[1] * angle.sin(), h[0] * angle.sin() + h[1] * angle.cos()])
            new = torch.stack([i[t, :C], i[t, C:] if mixer.theta is not None else torch.zeros(C)])
            h = f[t] * turned + (1 - f[t]) * new
            outputs.append(h.flatten() if mixer.theta is not None else h[0])
        expected = mixer.o_proj(rms(torch.stack(outputs), mixer.o_norm) * silu(mixer.g_proj(x)))
        torch.testing.assert_close(run(mixer, x[None])[0], expected)


@pytest.mark.parametrize("options", [{}, {"query_map": "sigmoid", "value_map": "silu"}, {"lower_bound": False}])
def test_hgrn2_is_the_recurrence_of_the_paper(options):
    torch.manual_seed(0)
    mixer = build_mixer(HGRN2Config(num_heads=2, head_dim=8, value_head_dim=6, **options), context_of()).double()
    mixer.init_weights(0.5)
    x = inputs(1, 7)[0]
    with torch.no_grad():
        b = bound(mixer) if mixer.lower_bounds is not None else 0.0
        f = b + (1 - b) / (1 + (-mixer.f_proj(x)).exp())
        q, v = mixer.q_proj(x), mixer.v_proj(x)
        q = q.sigmoid() if options.get("query_map") == "sigmoid" else silu(q)
        v = silu(v) if options.get("value_map") == "silu" else v
        o = torch.zeros(7, 12, dtype=x.dtype)
        for h in range(2):
            S = torch.zeros(8, 6, dtype=x.dtype)
            keys, values = slice(8 * h, 8 * h + 8), slice(6 * h, 6 * h + 6)
            for t in range(7):
                S = f[t, keys, None] * S + torch.outer(1 - f[t, keys], v[t, values])
                o[t, values] = q[t, keys] @ S
        torch.testing.assert_close(run(mixer, x[None])[0], mixer.o_proj(rms(o, mixer.o_norm)))


def hybrid():
    return model(num_layers=6, schedule=ScheduleConfig(pattern=PATTERN),
                 mixers={"full": FULL, "hgrn": HGRNConfig(), "hgrn2": HGRN2Config(num_heads=2, head_dim=8)})


def test_layers_of_a_kind_share_one_parameter_of_the_first():
    layers = hybrid().layers
    owners = {index: tuple(layer.mixer.lower_bounds.shape) for index, layer in enumerate(layers)
              if getattr(layer.mixer, "lower_bounds", None) is not None}
    assert owners == {1: (3, layers[1].mixer.f_proj.out_features), 2: (2, 16)}
    seq = SequenceInfo.make(1, 4, torch.device("cpu"))
    x = torch.randn(1, 4, layers[1].mixer.f_proj.in_features, dtype=layers[1].mixer.f_proj.weight.dtype)
    with torch.no_grad():
        layers[1].mixer.lower_bounds.zero_()
        for index in (1, 3, 5):
            layers[index].mixer(x, seq)
        bounds = [layers[index].mixer.read_lower_bound(seq) for index in (1, 3, 5)]
    assert bounds[0] is None
    assert bounds[1].mean().item() == pytest.approx(1 / 3)
    assert bounds[2].mean().item() == pytest.approx(2 / 3)


def test_later_layers_teach_the_bounds_and_decoding_reads_them():
    lm = hybrid()
    lm(IDS, labels=IDS).loss.backward()
    for index in (1, 2):
        assert lm.layers[index].mixer.lower_bounds.grad.abs().min() > 0, index
    lm.eval()
    with torch.no_grad():
        whole, state = lm(IDS).logits, lm.new_state(2, 12)
        steps = [lm(IDS[:, t : t + 1], state=state).logits for t in range(12)]
    torch.testing.assert_close(torch.cat(steps, 1), whole)


def test_a_single_layer_has_no_bound():
    lm = model(num_layers=2, schedule=ScheduleConfig(pattern=["hgrn", "full"]),
               mixers={"full": FULL, "hgrn": HGRNConfig()})
    assert lm.layers[0].mixer.lower_bounds is None


def test_the_start_is_the_published_one():
    mixer = build_mixer(HGRNConfig(state="complex"), context_of(layer_index=3))
    mixer.init_weights(0.02)
    bound = mixer.read_lower_bound(SequenceInfo.make(1, 1, torch.device("cpu")))
    torch.testing.assert_close(bound, torch.full((HIDDEN,), 0.75))
    assert mixer.theta[0] == 1.0
    assert mixer.theta[HIDDEN // 2].item() == pytest.approx(1e-4)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: HGRNConfig(width=0), "width: must be positive"),
    (lambda: HGRN2Config(num_heads=2, head_dim=-1), "head_dim: must be positive"),
])
def test_bad_options_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
