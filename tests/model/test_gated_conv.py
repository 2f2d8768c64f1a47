"""The gated short convolution equals the layer of LFM2."""

import torch

from hybridlm.model.mixers import GatedConvConfig
from tests.support.layer_parity import HIDDEN, TOLERANCE, ours, random_weights, renamed, token_inputs
from tests.support.mixer_cases import build, inputs, run


def test_equals_the_short_convolution_of_lfm2():
    from transformers import Lfm2Config
    from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

    layer = Lfm2ShortConv(Lfm2Config(hidden_size=HIDDEN, conv_bias=True, conv_L_cache=3), 0)
    random_weights(layer)
    weights = renamed(layer, {})
    weights["conv.weight"] = weights["conv.weight"][:, 0]
    x = token_inputs()
    with torch.no_grad():
        torch.testing.assert_close(ours(GatedConvConfig(bias=True), weights, x), layer(x), **TOLERANCE)


def test_a_token_sees_two_tokens_before_it():
    mixer, x = build("lfm2"), inputs(1, 8)
    with torch.no_grad():
        before = run(mixer, x)
        x[:, 2] += 1.0
        moved = (run(mixer, x) - before)[0].abs().sum(-1) > 0
    assert moved.tolist() == [False, False, True, True, True, False, False, False]
