"""Every parameter has a role, said by the module that owns it."""

import pytest
import torch
from torch import nn

from hybridlm.model.mixers import build_mixer
from hybridlm.model.model import HybridLM
from hybridlm.model.parameter_roles import ParameterRole, find_roles
from hybridlm.run_config import load_config
from tests.support.mixer_cases import CASES, context_of
from tests.support.mixer_forms import collect_names, own_name


@pytest.mark.parametrize("name", CASES)
def test_a_mixer_says_the_role_of_each_of_its_parameters(name):
    with torch.device("meta"):
        mixer = build_mixer(CASES[name], context_of(name))
    roles = mixer.parameter_roles()
    shapes = {key: parameter.shape for key, parameter in mixer.named_parameters()}
    assert set(roles) == set(shapes)
    for key, role in roles.items():
        assert (role.kind in ("vector", "convolution")) == (len(shapes[key]) < 2 or 1 in shapes[key]
                                                            or own_name(key) in collect_names("NO_MATRICES")), key
        assert role.heads == 1 or shapes[key][0] % role.heads == 0, key


@pytest.mark.parametrize("model", ["deepseek_v32_tiny", "qwen3_next_tiny", "hybrid_tiny"])
def test_a_model_says_the_role_of_each_of_its_parameters(model):
    with torch.device("meta"):
        built = HybridLM(load_config("train", [f"model={model}"]).model)
    roles = built.parameter_roles()
    assert set(roles) == {name for name, _ in built.named_parameters()}
    kinds = {role.kind for role in roles.values()}
    assert {"matrix", "head_matrix", "expert_stack", "router", "vector", "embedding", "output_head"} <= kinds
    assert {name for name, role in roles.items() if role.kind == "router"} <= built.fp32_parameter_names()
    assert roles["embed.weight"].kind == "embedding"
    assert roles["lm_head.weight"].kind == "output_head"


def test_a_parameter_without_a_role_is_named():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.zeros(3, 4))

    with pytest.raises(TypeError, match=r"Scale\.table has 2 dims and no role"):
        find_roles(Scale())
    assert find_roles(Scale(), {"table": ParameterRole("matrix")}) == {"table": ParameterRole("matrix")}
    with pytest.raises(ValueError, match="no 3 blocks"):
        ParameterRole("vector", heads=3)
