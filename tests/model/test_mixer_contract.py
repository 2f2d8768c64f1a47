"""Every mixer keeps the contract: the checks of `hybridlm check`, on one small mixer for each published form."""

from __future__ import annotations

import pytest
import torch

from hybridlm.model.contract_check import CHECKS, NotClaimed, Subject
from hybridlm.model.contract_check.subject import is_kept_in_fp32
from hybridlm.model.mixers import MIXERS, AttentionConfig, IndexerConfig, MLAConfig, build_mixer
from tests.support import sharing_kinds
from tests.support.mixer_cases import CASES, INDEXER, MLA_DIMS, build, context_of, subject
from tests.support.mixer_forms import collect_names, collect_readers, own_name

every_mixer = pytest.mark.parametrize("name", CASES)


@every_mixer
@pytest.mark.parametrize("check", CHECKS)
def test_contract(name, check):
    if name in collect_names("UNDIVIDED") and check in ("context parallel", "shard traffic"):
        with pytest.raises(NotClaimed, match="refuses shards"):
            CHECKS[check](subject(name))
        return
    assert CHECKS[check](subject(name))  # the reason; a check that fails, or that a form does not claim, raises


SHARED = IndexerConfig(**INDEXER, share=True)
READERS = {
    "shared_selection": (AttentionConfig(num_heads=4, head_dim=8, indexer=SHARED), CASES["deepseek_v32"]),
    "shared_selection_mla": (MLAConfig(**MLA_DIMS, indexer=SHARED), CASES["deepseek_v32"]),
    "values_of_a_test": (sharing_kinds.ReaderConfig(), sharing_kinds.SourceConfig()),
    **collect_readers(),
}


# The kind of the test counts its projection alone, and exchanges of two layers cannot be told apart.
UNCOUNTED = {("values_of_a_test", "flops"), ("values_of_a_test", "activation bytes")}


@pytest.mark.parametrize(("name", "check"), [(name, check) for name in READERS for check in CHECKS
                                             if check != "shard traffic" and (name, check) not in UNCOUNTED])
def test_contract_of_mixers_that_read_from_another_layer(name, check):
    reader, source = READERS[name]
    with sharing_kinds.registered():
        context = context_of(layer_index=1, layers=[source, reader])
        assert CHECKS[check](Subject(reader, context))


def test_every_registered_kind_is_tested():
    ours = {kind for kind, (config, mixer) in MIXERS.items()
            if mixer.__module__.startswith("hybridlm.") and config.is_branch}
    assert {config.kind for config in [*CASES.values(), *(pair[0] for pair in collect_readers().values())]} == ours


@every_mixer
def test_the_indexer_learns_from_its_own_loss_alone(name):
    tested = subject(name)
    mixer = tested.build()
    tested.run(mixer, tested.inputs(1, 20))[0].square().sum().backward()
    without = {n for n, p in mixer.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    names = [n for n, _ in mixer.named_parameters() if n.startswith(("indexer.", "selector."))]
    weighs = getattr(getattr(CASES[name], "selector", None), "weighs", False)
    assert without == (set() if weighs else set(names))


@every_mixer
def test_norms_decay_parameters_sinks_and_index_weights_are_kept_in_fp32(name):
    mixer = build(name)
    expected = {n for n, _ in mixer.named_parameters() if "norm" in n or own_name(n) in collect_names("FP32")}
    assert {n for n, _ in mixer.named_parameters() if is_kept_in_fp32(mixer, n)} == expected


@every_mixer
def test_state_and_flops_grow_with_the_context_for_softmax_attention_without_a_window(name):
    config, context = CASES[name], context_of(name)
    mixers = getattr(config, "branches", {"": config}).values()
    windows = [getattr(mixer, "seen_window", getattr(mixer, "window", None)) for mixer in mixers if not mixer.is_linear]
    unbounded = None in windows
    assert (config.state_bytes(context, 100_000) > config.state_bytes(context, 50_000)) == unbounded
    short, long = (sum(config.flops_per_token(context, length).values()) for length in (1000, 2000))
    assert (long > short) == (not config.is_linear and name not in collect_names("SIGNS"))


@every_mixer
def test_projections_start_with_the_asked_standard_deviation(name):
    torch.manual_seed(0)
    mixer = build_mixer(CASES[name], context_of(name, hidden_size=96))
    mixer.init_weights(0.02)
    for parameter_name, parameter in mixer.named_parameters():
        if (parameter_name.endswith("_proj.weight") and parameter.numel() > 500
                and not {own_name(parameter_name), f"{name}/{parameter_name}"} & collect_names("OTHER_STARTS")):
            assert 0.018 < parameter.std() < 0.022, parameter_name
