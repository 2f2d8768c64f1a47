"""The dense feed-forward with gelu: against Gemma's class in transformers, gradients, and what it refuses."""

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP, Gemma3TextConfig

from hybridlm.errors import ConfigError
from hybridlm.model.feed_forward import DenseConfig, build_feed_forward
from hybridlm.model.feed_forward.activation import geglu
from hybridlm.model.sequence import SequenceInfo
from tests.support.layer_parity import TOLERANCE
from tests.support.mixer_cases import HIDDEN, context_of

CPU = torch.device("cpu")


@pytest.mark.parametrize(("activation", "theirs"), [("geglu_tanh", "gelu_pytorch_tanh"), ("geglu", "gelu"),
                                                    ("swiglu", "silu")])
def test_it_is_gemmas_feed_forward(activation, theirs):
    config = DenseConfig(intermediate_size=40, activation=activation)
    module = build_feed_forward(config, context_of())
    torch.manual_seed(0)
    module.init_weights(0.5)
    reference = Gemma3MLP(Gemma3TextConfig(hidden_size=HIDDEN, intermediate_size=40, hidden_activation=theirs))
    reference.load_state_dict(module.state_dict())
    inputs = [torch.randn(2, 7, HIDDEN, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    outputs = [module(inputs[0], SequenceInfo.make(2, 7, CPU))[0], reference(inputs[1])]
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(*outputs, **TOLERANCE)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-4)
    for ours, hf in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, hf.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tanh", [True, False])
def test_gradients_of_geglu_agree_with_finite_differences(tanh):
    gate, up = (torch.randn(11, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda g, u: geglu(g, u, tanh=tanh), (gate, up))


def test_it_refuses_the_options_of_other_activations():
    with pytest.raises(ConfigError, match=r"swiglu_limit: is not used by geglu; got 7.0; expected null, or activa"):
        DenseConfig(intermediate_size=8, activation="geglu", swiglu_limit=7.0)
    with pytest.raises(ConfigError, match="situ_caps: are not used by geglu_tanh"):
        DenseConfig(intermediate_size=8, activation="geglu_tanh", situ_caps=[1.0, 2.0])
