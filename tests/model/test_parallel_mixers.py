"""Several mixers on one norm: their sum or mean, sizes from the model, and bad options."""

import pytest
import torch

from hybridlm.errors import ConfigError
from hybridlm.model.mixers import GatedConvConfig, ParallelConfig, build_mixer
from hybridlm.model.sequence import SequenceInfo
from hybridlm.run_config import load_config
from tests.support.mixer_cases import CASES, build, context_of, inputs, run

CONV = GatedConvConfig()


def test_outputs_are_added_with_their_factors():
    mixer, x = build("falcon_h1"), inputs(1, 9)
    seq = SequenceInfo.make(1, 9, x.device)
    with torch.no_grad():
        attention, ssm = (branch(x * scale, seq)[0] for branch, scale in zip(
            mixer.branches.values(), (1.0, 0.5), strict=True))
        torch.testing.assert_close(run(mixer, x), 0.25 * attention + 2.0 * ssm)


def test_the_mean_of_normed_outputs():
    mixer, x = build("hymba"), inputs(1, 9)
    seq = SequenceInfo.make(1, 9, x.device)
    with torch.no_grad():
        outputs = [mixer.norms[name](branch(x, seq)[0]) for name, branch in mixer.branches.items()]
        torch.testing.assert_close(run(mixer, x), (outputs[0] + outputs[1]) / 2)


def test_the_layer_of_falcon_h1_is_the_sum_of_its_two_mixers_with_their_multipliers():
    """Each branch alone, with the other one's factor at zero, adds up to the layer."""
    config = CASES["falcon_h1"]
    mixer, x = build("falcon_h1"), inputs(1, 9)
    alone = []
    for name in config.branches:
        scales = {other: config.output_scale[other] if other == name else 0.0 for other in config.branches}
        single = build_mixer(ParallelConfig(branches=config.branches, input_scale=config.input_scale,
                                            output_scale=scales), context_of()).double()
        single.load_state_dict(mixer.state_dict())
        alone.append(run(single, x))
    torch.testing.assert_close(alone[0] + alone[1], run(mixer, x))


@pytest.mark.parametrize(("preset", "kinds"), [
    ("falcon_h1", {"attention", "mamba2", "linear_attention"}), ("hymba", {"attention", "mamba"})])
def test_branches_of_a_preset_take_their_sizes_from_the_model(preset, kinds):
    model = load_config("train", ["model=hybrid_tiny", f"model.schedule.linear={preset}"]).model
    branches = model.mixers[preset].branches
    assert {branch.kind for branch in branches.values()} <= kinds
    assert branches["attention"].num_heads == 4
    assert branches["attention"].num_kv_heads == 2


@pytest.mark.parametrize(("options", "message"), [
    ({"branches": {"a": CONV}}, "branches: must be two mixers or more; got"),
    ({"branches": {"conv": CONV, "b": CONV}, "input_scale": {"cov": 2.0}},
     "input_scale.cov: is no branch; got 'cov'.*did you mean 'conv'"),
])
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ParallelConfig(**options)


def test_a_branch_that_cannot_work_on_divided_rows_is_named():
    config = ParallelConfig(branches={"conv": GatedConvConfig(conv_size=9), "other": CONV})
    with pytest.raises(ConfigError, match=r"branches\.conv\.conv_size: reaches over more than one shard"):
        config.check_context_parallel(2, 4)


def test_a_branch_with_a_selector_follows_the_attention_mode():
    config = ParallelConfig(branches={"blocks": CASES["moba"], "other": CONV})
    assert config.has_selector()
    assert not ParallelConfig(branches={"one": CONV, "other": CONV}).has_selector()
    assert config.with_attention_mode("dense").branches["blocks"] == CASES["moba"].with_attention_mode("dense")
