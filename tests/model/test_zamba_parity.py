"""Shared blocks against transformers' Zamba2 and Zamba, with their weights under our names."""

import pytest
import torch
from transformers import Zamba2Config, Zamba2ForCausalLM, ZambaConfig, ZambaForCausalLM

import hybridlm
from hybridlm.model.config import ModelConfig, RunAdaptersConfig, ScheduleConfig
from hybridlm.model.feed_forward import DenseConfig
from hybridlm.model.layer_context import NormConfig
from hybridlm.model.mixers import AttentionConfig, MambaConfig
from hybridlm.model.residual import BranchConfig
from hybridlm.model.rope import RopeConfig
from hybridlm.run_config import load_model_config
from tests.support.layer_parity import TOLERANCE, random_weights

IDS = torch.randint(512, (2, 40), generator=torch.Generator().manual_seed(3))
SIZES = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "hidden_act": "gelu",
         "mamba_d_conv": 4, "mamba_expand": 2, "attn_implementation": "eager", "pad_token_id": None}


def carry(theirs, config: ModelConfig, mamba_layers: list[int], transformer: str) -> dict:
    """Weights of a transformers model under our names: `mamba_layers` are our indices of their layers."""
    of = dict(theirs.state_dict())
    found = {"embed.weight": of["model.embed_tokens.weight"], "norm.weight": of["model.final_layernorm.weight"]}
    first_runs: dict[int, int] = {}
    runs = config.runs()
    for index, ours in enumerate(mamba_layers):
        prefix = f"model.layers.{index}."
        hybrid = f"{prefix}linear.weight" in of
        decoder = f"{prefix}mamba_decoder." if hybrid else prefix
        found[f"layers.{ours}.mixer_norm.weight"] = of[f"{decoder}input_layernorm.weight"]
        for name, value in of.items():
            if name.startswith(f"{decoder}mamba."):
                own, value = carry_mamba(name.removeprefix(f"{decoder}mamba."), value)
                found[f"layers.{ours}.mixer.{own}"] = value
        if not hybrid:
            continue
        block = runs[runs.index(ours) - 1]
        number = first_runs[block] = first_runs.get(block, -1) + 1
        to = f"layers.{block}."
        own = "weight" if number == 0 else f"later.{number - 1}.weight"
        found[f"{to}feed_forward_projection.{own}"] = of[f"{prefix}linear.weight"]
        shared = f"{prefix}{transformer}."
        found[f"{to}mixer_norm.weight"] = of[f"{shared}input_layernorm.weight"]
        found[f"{to}feed_forward_norm.weight"] = of[f"{shared}pre_ff_layernorm.weight"]
        for name in "qkvo":
            found[f"{to}mixer.{name}_proj.weight"] = of[f"{shared}self_attn.{name}_proj.weight"]
        found |= carry_feed_forward(of, f"{shared}feed_forward.", f"{to}feed_forward.")
    return found


def carry_mamba(name: str, value: torch.Tensor) -> tuple[str, torch.Tensor]:
    """Our name and shape of a tensor of Mamba-2, or of the one head of Zamba's Mamba."""
    if name == "conv1d.weight":
        return "conv.weight", value.squeeze(1)
    if name == "in_proj.weight" and len(value) == 256:  # Zamba stores inputs and gates in turn
        return name, torch.cat([value[0::2], value[1::2]])
    renamed = {"conv1d.bias": "conv.bias", "x_proj_weight": "x_proj.weight", "dt_proj_weight": "dt_proj.weight",
               "dt_proj_bias": "dt_bias"}
    one_head = "proj_" in name or value.dim() == 3 or (name in ("D", "A_log") and value.dim() == 2)
    return renamed.get(name, name), value.squeeze(0) if one_head else value


def carry_feed_forward(of: dict, theirs: str, ours: str) -> dict:
    found = {f"{ours}down_proj.weight": of[f"{theirs}down_proj.weight"]}
    if f"{theirs}gate_up_proj.weight" in of:
        halves = of[f"{theirs}gate_up_proj.weight"].chunk(2)
    else:
        halves = [of[f"{theirs}{name}_proj.weight"] for name in ("gate", "up")]
    return found | {f"{ours}{name}_proj.weight": half for name, half in zip(("gate", "up"), halves, strict=True)}


def carry_adapters(of: dict, block: int, shared: str, slots: list[int]) -> dict:
    """Zamba2's adapters of one block, whose slots in their lists are those of all hybrid layers."""
    found = {}
    for number, slot in enumerate(slots):
        for name in "qkv":
            down, up = (of[f"{shared}self_attn.linear_{name}_adapter_list.{slot}.{part}.weight"] for part in (0, 1))
            prefix = f"layers.{block}.mixer.{name}_proj."
            found |= {f"{prefix}down.{number}.weight": down, f"{prefix}up.{number}.weight": up}
        down, up = (of[f"{shared}feed_forward.gate_up_proj_adapter_list.{slot}.{part}.weight"] for part in (0, 1))
        for name, half in zip(("gate", "up"), up.chunk(2), strict=True):
            prefix = f"layers.{block}.feed_forward.{name}_proj."
            found |= {f"{prefix}down.{number}.weight": down, f"{prefix}up.{number}.weight": half}
    return found


def assert_logits_equal(theirs, config: ModelConfig, weights: dict) -> None:
    ours = hybridlm.build_model(config).eval()
    missing = ours.load_state_dict(weights, strict=False)
    assert not missing.missing_keys
    assert not missing.unexpected_keys
    with torch.no_grad():
        expected = theirs(IDS, use_cache=False).logits
        found = ours(IDS).logits
        state = ours.new_state(2, 40)
        decoded = torch.cat([ours(ids, state=state).logits for ids in IDS.split([30, 1, 1, 8], dim=1)], 1)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, **TOLERANCE)
    torch.testing.assert_close(decoded, expected, **TOLERANCE)


def draw_weights(theirs) -> None:
    """Random weights whose layers do not enlarge the rounding of fp32."""
    random_weights(theirs)
    for name, parameter in theirs.named_parameters():
        if parameter.dim() > 1 and "embed" not in name and "A_log" not in name:
            parameter.data *= 0.4


@pytest.mark.parametrize("rope", [True, False])
def test_zamba2(rope):
    types = ["linear_attention", "hybrid"] * 4
    theirs = Zamba2ForCausalLM(Zamba2Config(
        **SIZES, num_hidden_layers=8, layers_block_type=types, mamba_d_state=32, mamba_ngroups=1, n_mamba_heads=8,
        num_mem_blocks=2, use_shared_attention_adapter=True, adapter_rank=8, use_mem_rope=rope)).eval()
    draw_weights(theirs)
    config = load_model_config("zamba2_tiny", [] if rope else ["model.mixers.shared.rope.kind=none"])
    assert config.runs() == [0, 1, 2, 3, 4, 5, 6, 1, 7, 8, 4, 9]
    weights = carry(theirs, config, [0, 2, 3, 5, 6, 7, 8, 9], "shared_transformer")
    of = dict(theirs.state_dict())
    for block, layer, slots in ((1, 1, [0, 2]), (4, 3, [1, 3])):
        weights |= carry_adapters(of, block, f"model.layers.{layer}.shared_transformer.", slots)
    assert_logits_equal(theirs, config, weights)


def test_zamba():
    types = ["linear_attention", "hybrid"] * 3
    theirs = ZambaForCausalLM(ZambaConfig(
        **SIZES, num_hidden_layers=6, layers_block_type=types, mamba_d_state=16, mamba_dt_rank=4, n_mamba_heads=1,
        num_key_value_heads=4)).eval()
    draw_weights(theirs)
    attention = AttentionConfig(num_heads=4, head_dim=32, rope=RopeConfig(kind="none"), key_scale=2**0.5,
                                residual=BranchConfig(form="aside", embedding=True))
    config = ModelConfig(
        vocab_size=512, hidden_size=64, num_layers=7, tie_embeddings=True, norm=NormConfig(eps=1e-5),
        schedule=ScheduleConfig(pattern=["mamba"], override={1: "shared"}, alone=["mamba"], reuse={1: [4, 6]},
                                run_adapters=RunAdaptersConfig(separate=["feed_forward_projection"])),
        mixers={"mamba": MambaConfig(), "shared": attention},
        feed_forward=DenseConfig(intermediate_size=128, activation="geglu",
                                 residual=BranchConfig(form="aside", project=True)))
    assert_logits_equal(theirs, config, carry(theirs, config, [0, 2, 3, 4, 5, 6], "shared_transf"))
