"""Factors of initial values, learning rates, weight decay, logits and branches, parameter by parameter."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from hybridlm import build_model, load_config
from hybridlm.config.serialization import from_dict, to_dict
from hybridlm.errors import ConfigError
from hybridlm.model.canonical import canonical, differences
from hybridlm.model.config import ModelConfig, RepeatConfig
from hybridlm.model.parametrization import ParametrizationConfig
from hybridlm.optimizers import AdafactorConfig, AdamWConfig, LionConfig, MuonConfig, build_optimizer
from hybridlm.optimizers.optimizer_set import plan_groups

M = 4  # hidden size relative to the base

# Parameter of layer 0 to 3 (or of the model), factor of the initial std, of AdamW's and of Muon's learning rate; m = 4.
# Rows of docs/ladder.md; a learning rate's inverse is the factor of the weight decay. Muon's None: AdamW updates it.
TABLE = {
    "layers.0.mixer.q_proj.weight": (1 / 2, 1 / 4, 1 / 2),
    "layers.0.mixer.o_proj.weight": (1 / 2, 1 / 4, 1 / 2),
    "layers.0.mixer.b_proj.weight": (1 / 2, 1 / 4, 1 / 2),
    "layers.0.mixer.f_a_proj.weight": (1 / 2, 1 / 4, 1 / 4),
    "layers.0.mixer.f_b_proj.weight": (1, 1, 1),
    "layers.0.mixer.g_a_proj.weight": (1 / 2, 1 / 4, 1 / 4),
    "layers.0.mixer.g_b_proj.weight": (1, 1, 1),
    "layers.0.mixer.q_conv": (1, 1, None),
    "layers.0.mixer.A_log": (1, 1, None),
    "layers.0.mixer.dt_bias": (1, 1, None),
    "layers.0.mixer_norm.weight": (1, 1, None),
    "layers.1.mixer.a_proj.weight": (1 / 2, 1 / 4, 1 / 2),
    "layers.1.mixer.g_proj.weight": (1 / 2, 1 / 4, 1 / 2),
    "layers.2.mixer.q_a_proj.weight": (1 / 2, 1 / 4, 1 / 4),
    "layers.2.mixer.q_b_proj.weight": (1, 1, 1),
    "layers.2.mixer.kv_b_proj.weight": (1, 1, 1),
    "layers.2.mixer.indexer.q_proj.weight": (1, 1, 1),
    "layers.2.mixer.indexer.k_proj.weight": (1 / 2, 1 / 4, 1 / 4),
    "layers.2.mixer.indexer.weights_proj.weight": (1 / 2, 1 / 4, None),
    "layers.3.mixer.k_proj.weight": (1 / 2, 1 / 4, 1 / 2),
    "layers.3.feed_forward.router.weight": (1 / 2, 1 / 4, None),
    "layers.3.feed_forward.experts.gate_up": (1 / 2, 1 / 4, 1 / 2),
    "layers.3.feed_forward.experts.down": (1 / 2, 1 / 4, 1 / 2),
    "layers.3.feed_forward.shared.down_proj.weight": (1 / 2, 1 / 4, 1 / 2),
    "embed.weight": (1, 1, None),
    "lm_head.weight": (1, 1, None),
    "norm.weight": (1, 1, None),
}
# Factor of the learning rate by optimizer, of a square matrix and of a low-rank down projection.
OPTIMIZER_FACTORS = {AdamWConfig: (1 / M, 1 / M), LionConfig: (1 / M, 1 / M), MuonConfig: (M**-0.5, 1 / M),
                     AdafactorConfig: (M**-0.5, M**-0.5)}


@pytest.fixture(scope="module")
def base() -> ModelConfig:
    words = ["model=hybrid_tiny", "model.schedule.linear=null", "model.schedule.full=null", "model.schedule.ratio=null",
             "model.schedule.pattern=[kda, gdn, dsa, full]"]
    return load_config("train", words).model.resize(32)


@pytest.fixture(scope="module")
def wide(base: ModelConfig) -> ModelConfig:
    return replace(base.resize(32 * M), parametrization=ParametrizationConfig(kind="mup", base_hidden_size=32))


def _plain(config: ModelConfig) -> ModelConfig:
    return replace(config, parametrization=ParametrizationConfig())


def test_initial_values_have_the_factors_of_the_table(wide):
    scaled = dict(build_model(wide, seed=3).named_parameters())
    plain = dict(build_model(_plain(wide), seed=3).named_parameters())
    for name, (std, _, _) in TABLE.items():
        torch.testing.assert_close(scaled[name], plain[name] * std, rtol=0, atol=0, msg=name)
    # What a kind gives values of its own, which do not follow init_std, keeps them.
    changed = {name for name in scaled if not torch.equal(scaled[name], plain[name])}
    assert all(scaled[name].dim() > 1 for name in changed)


@pytest.mark.parametrize(("make", "column"), [(AdamWConfig, 1), (MuonConfig, 2)])
def test_learning_rate_and_decay_have_the_factors_of_the_table(wide, make, column):
    config = make(lr=1e-2, weight_decay=0.1)
    model = build_model(wide)
    optimizers = build_optimizer(model, config)
    found = {}
    for member in optimizers.members:
        for group in member.param_groups:
            for parameter in group["params"]:
                found[optimizers.names[id(parameter)]] = (group["lr"] / 1e-2, group["weight_decay"], group["rule"])
    for name, factors in TABLE.items():
        factor = factors[column] if factors[column] is not None else factors[1]
        lr, decay, rule = found[name]
        assert lr == pytest.approx(factor, rel=1e-12), name
        undecayed = ("conv", "A_log", "dt_bias", "norm.weight", "embed.weight")
        assert decay == pytest.approx(0.0 if name.endswith(undecayed) else 0.1 / factor), name
        if make is MuonConfig:
            assert (rule == "muon") == (factors[2] is not None), name
    optimizers.set_lr(1e-3)  # a schedule keeps the factors
    for member in optimizers.members:
        for group in member.param_groups:
            name = optimizers.names[id(group["params"][0])]
            assert group["lr"] == pytest.approx(found[name][0] * 1e-3)


@pytest.mark.parametrize("make", OPTIMIZER_FACTORS)
def test_every_optimizer_states_its_factor(wide, make):
    scales = build_model(wide, device="meta").parameter_scales()
    square, down = (scales[f"layers.0.mixer.{name}_proj.weight"] for name in ("q", "f_a"))
    assert (make().lr_factor(square), make().lr_factor(down)) == pytest.approx(OPTIMIZER_FACTORS[make])


def test_the_base_is_unchanged_bit_for_bit(base):
    rule = ParametrizationConfig(kind="completep", base_hidden_size=32, base_num_layers=4)
    torch.manual_seed(0)
    ids = torch.randint(base.vocab_size, (2, 16))
    results = []
    for config in (base, replace(base, parametrization=rule)):
        model = build_model(config, seed=1)
        optimizers = build_optimizer(model, MuonConfig(lr=1e-2))
        losses = []
        for _ in range(3):
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizers.step()
            optimizers.zero_grad()
            losses.append(loss.item())
        groups = [(group.rule, group.decay, group.names, dict(group.options)) for group in
                  plan_groups(model, MuonConfig())]
        results.append((losses, groups, {name: value.clone() for name, value in model.named_parameters()}))
    (losses, groups, weights), (scaled_losses, scaled_groups, scaled_weights) = results
    assert losses == scaled_losses
    assert groups == scaled_groups
    assert all(torch.equal(value, scaled_weights[name]) for name, value in weights.items())


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_divided_by_the_width_in_every_way_to_compute_them(wide, tied):
    config = replace(wide, tie_embeddings=tied)
    model, plain = build_model(config), build_model(_plain(config))
    plain.load_state_dict(model.state_dict())
    ids = torch.randint(config.vocab_size, (1, 12))
    logits = model(ids).logits
    torch.testing.assert_close(logits, plain(ids).logits / M)
    loss = model(ids, labels=ids).losses["lm"]
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
    torch.testing.assert_close(loss, expected)
    state = model.eval().new_state(1, 12)
    with torch.no_grad():
        decoded = torch.cat([model(ids[:, t:t + 1], state=state).logits for t in range(12)], 1)
    torch.testing.assert_close(decoded, logits.detach(), rtol=1e-4, atol=1e-5)


def test_completep_scales_branches_and_eps(base):
    rule = ParametrizationConfig(kind="completep", base_hidden_size=32, base_num_layers=4)
    deep = replace(base.resize(64, 8), parametrization=rule)
    model = build_model(deep, device="meta")
    assert {layer.mixer_residual.beta for layer in model.layers} == {0.5}
    assert {layer.feed_forward_residual.beta for layer in model.layers} == {0.5}
    groups = plan_groups(model, AdamWConfig(eps=1e-8))
    of = {name: group for group in groups for name in group.names}
    assert of["layers.0.mixer.q_proj.weight"].options == {"eps": pytest.approx(1e-8 / 4)}  # width 2, depth 2
    assert of["layers.0.mixer.q_proj.weight"].lr_factor == 0.5  # that of the width: depth leaves it
    assert of["embed.weight"].options == {}
    assert all(not group.options for group in plan_groups(model, MuonConfig()) if group.rule.kind == "muon")
    wider = replace(base.resize(64, 4), parametrization=rule)  # as deep as the base: eps follows the width all the same
    of = {name: group for group in plan_groups(build_model(wider, device="meta"), AdamWConfig(eps=1e-8))
          for name in group.names}
    assert of["layers.0.mixer.q_proj.weight"].options == {"eps": pytest.approx(1e-8 / 2)}
    without_depth = replace(deep, parametrization=replace(rule, kind="mup"))
    assert without_depth.branches("kda")[0].beta == 1.0
    assert not any(group.options for group in plan_groups(build_model(without_depth, device="meta"), AdamWConfig()))


def test_depth_counts_runs_of_layers(base):
    rule = ParametrizationConfig(kind="completep", base_hidden_size=32, base_num_layers=4)
    looped = replace(base.schedule, repeat=RepeatConfig(first=1, last=2, times=5))
    deep = replace(base.resize(64, 6), parametrization=rule, schedule=looped)  # 14 runs; the base has 12
    assert deep.depth_ratio == 14 / 12
    model = build_model(deep, device="meta")
    assert {layer.mixer_residual.beta for layer in model.layers} == {12 / 14}
    group = next(group for group in plan_groups(model, AdamWConfig(eps=1e-8)) if "layers.0.mixer.q_proj.weight"
                 in group.names)
    assert group.options == {"eps": pytest.approx(1e-8 / 2 * 12 / 14)}
    longer = replace(looped, repeat=RepeatConfig(first=1, last=4, times=2))
    with pytest.raises(ConfigError, match="base_num_layers: is a base without all layers that the schedule runs again"):
        replace(deep, schedule=longer)


def test_what_is_carried_changes_the_function_and_is_saved(wide):
    assert [path for path, *_ in differences(canonical(wide), canonical(_plain(wide)))] == ["logit_multiplier"]
    assert from_dict(ModelConfig, to_dict(wide)) == wide
    deep = replace(wide, num_layers=8,
                   parametrization=ParametrizationConfig(kind="completep", base_hidden_size=128, base_num_layers=4))
    changed = {path.rsplit(".", 2)[-2:][0] + "." + path.rsplit(".", 1)[-1]
               for path, *_ in differences(canonical(deep), canonical(_plain(deep)))}
    assert changed == {"residual.beta"}


@pytest.mark.parametrize(("options", "said"), [
    ({"kind": "mup"}, "base_hidden_size"), ({"kind": "completep", "base_hidden_size": 32}, "base_num_layers"),
    ({"kind": "mup", "base_hidden_size": 0}, "must be positive")])
def test_a_rule_without_its_base_is_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        ParametrizationConfig(**options)


def test_heads_follow_the_width_and_dims_per_head_stay(base):
    wide = base.resize(96, 6)
    kda, full, dsa = (wide.mixers[name] for name in ("kda", "full", "dsa"))
    assert (kda.num_heads, kda.head_dim, kda.gate_rank) == (6, 16, 16)
    assert (full.num_heads, full.num_kv_heads) == (6, 3)
    assert (dsa.num_heads, dsa.kv_lora_rank, dsa.indexer.num_heads) == (6, 32, 16)
    assert wide.feed_forward.moe_intermediate_size == 48
    assert wide.feed_forward.num_experts == 8
    assert wide.num_layers == 6
    assert set(wide.mixers) == {"kda", "gdn", "dsa", "full"}
    assert base.resize(32) == replace(base, mixers=base.resize(32).mixers)
    with pytest.raises(ConfigError, match=r"hidden_size.*num_heads of a mixer 'delta_rule' would not be whole"):
        base.resize(40)
    assert base.mixers["full"].at_width(Fraction(5, 2)).num_kv_heads == 1  # 2.5 does not divide 5 heads


def test_kinds_say_what_nobody_has_checked(base):
    gaps = {name: mixer.transfer_gaps() for name, mixer in base.mixers.items()}
    assert gaps["gdn"] == gaps["full"] == []
    assert "low-rank gates" in gaps["kda"][0]
    assert [words.split()[0] for words in gaps["dsa"]] == ["MLA's", "indexers,"]
