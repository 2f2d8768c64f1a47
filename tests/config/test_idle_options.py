"""Options without an effect because others share a value of an earlier layer: a kind names them all."""

import pytest

from hybridlm.config import from_dict
from hybridlm.errors import ConfigError
from hybridlm.model.layer_context import NormConfig
from hybridlm.model.mixers import (
    CompressedAttentionConfig,
    DifferentialAttentionConfig,
    IndexerConfig,
    MLAConfig,
    ParallelConfig,
    SharedAttentionConfig,
)
from hybridlm.model.mixers.common.entry_indexer_config import EntryIndexerConfig
from hybridlm.model.mixers.contract import MixerConfig
from hybridlm.plain_data import to_dict
from hybridlm.run_config import load_config
from tests.support.mixer_forms import collect_readers
from tests.support.mixer_forms.compressed_attention import SIZES
from tests.support.mixer_forms.readers import MLA_DIMS

SHARING = {
    "selection": SharedAttentionConfig(indexer=IndexerConfig(share=True)),
    "selection_of_mla": MLAConfig(**MLA_DIMS, indexer=IndexerConfig(share=True)),
    "paired_keys": DifferentialAttentionConfig(num_heads=8, head_dim=4, share_keys=True),
    "entries": CompressedAttentionConfig(**SIZES, share_entries=True),
    "entries_and_list": CompressedAttentionConfig(**SIZES, share_entries=True, indexer=EntryIndexerConfig(share=True)),
    "entries_with_indexer": CompressedAttentionConfig(**SIZES, share_entries=True, ratio=3,
                                                      indexer=EntryIndexerConfig()),
} | {name: pair[0] for name, pair in collect_readers().items()}
# Options that say how weights start or train, or how the branch joins the residual, which `canonical` leaves out too.
ELSEWHERE = ("residual", "lambda_std", "loss_weight", "share", "source", "kind")

# Without a norm or a rotation; an indexer needs the ratio of the entries that are read, which is compared with theirs.
OTHER_CAUSES = ("q_norm_eps", "norm_eps", "indexer.rope_dim", "ratio")


def leaves(data, path=()):
    """Dotted path -> value of all options that are no sections."""
    for key, value in data.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield ".".join((*path, key)), value


def changed(config, path):
    """The config with another value at a path; None where no other one that we try is possible."""
    options = to_dict(config)
    *sections, last = path.split(".")
    section = options
    for part in sections:
        section = section[part]
    old = section[last]
    if isinstance(old, bool):
        tried = [not old]
    elif isinstance(old, int | float):
        tried = [2 * old, old + 1, 4 * old, old / 2 if isinstance(old, float) else old // 2]
    else:
        tried = [*("tokens", "entries", "half", "interleaved", "none", "relu", "dot"), 2, 4, 16]
    for value in tried:
        section[last] = value
        try:
            if value != old:
                return from_dict(MixerConfig, options)
        except ConfigError:
            continue
    return None


@pytest.mark.parametrize("name", SHARING)
def test_idle_options_are_those_without_an_effect(name):
    config, norm = SHARING[name], NormConfig()
    idle, tried, wrong = config.idle_options(to_dict(config)), 0, []
    for path, _ in leaves(to_dict(config)):
        other = None if path.split(".")[0] in ELSEWHERE or path.split(".")[-1] in ELSEWHERE else changed(config, path)
        if other is None:
            continue
        tried += 1
        same = other.canonical(norm) == config.canonical(norm)
        if same != (path in idle) and not (same and path in OTHER_CAUSES):
            wrong.append(f"{path} has {'no' if same else 'an'} effect")
    assert not wrong
    assert tried
    assert idle.keys() <= {path for path, _ in leaves(to_dict(config))}


@pytest.mark.parametrize("name", SHARING)
def test_a_branch_of_several_names_those_of_its_kind(name):
    options = to_dict(SHARING[name])
    branches = {"kind": "parallel", "branches": {"one": options}}
    assert ParallelConfig.idle_options(branches) == {
        f"branches.one.{path}": cause for path, cause in SHARING[name].idle_options(options).items()}


MODEL = ["model=kimi_linear_tiny", "model.schedule.pattern=[phi4_flash_full, phi4_flash_shared, kda]"]


@pytest.mark.parametrize(("overrides", "message"), [
    ([*MODEL, "model.mixers.phi4_flash_shared.num_kv_heads=2"],
     "model.mixers.phi4_flash_shared.num_kv_heads: has no effect beside share_keys=true; got 2; expected no value; "
     "it is that of the layer that is read"),
    (["model=deepseek_v41_tiny", "model.mixers.reuse.ratio=2"],
     "model.mixers.reuse.ratio: has no effect beside share_entries=true; got 2; expected no value; it is that of "
     "the layer that is read"),
    ([*MODEL[:1], "model.schedule.pattern=[phi4_flash_full, both, kda]", "model.mixers.both={kind: parallel, branches: "
      "{a: {kind: differential_attention, num_heads: 4, head_dim: 8, share_keys: true, num_kv_heads: 4}, "
      "b: {kind: none}}}"],
     "model.mixers.both.branches.a.num_kv_heads: has no effect beside share_keys=true; got 4; expected no value; it is "
     "that of the layer that is read"),
    (["model=mistral_large4_tiny", "model.mixers.rope_reuse.indexer.topk=32"],
     "model.mixers.rope_reuse.indexer.topk: has no effect beside indexer.share=true; got 32; expected no value; it is "
     "that of the layer that is read"),
])
def test_a_person_may_not_give_one(overrides, message):
    with pytest.raises(ConfigError) as caught:
        load_config("train", overrides)
    assert str(caught.value) == message


def test_rotations_that_differ_are_named_by_their_options_alone():
    with pytest.raises(ConfigError) as caught:
        load_config("train", [*MODEL, "model.mixers.phi4_flash_shared.rope={kind: half, theta: 5e5}",
                              "model.mixers.phi4_flash_full.rope={kind: half}"])
    assert str(caught.value).endswith(
        "rope: reads keys of another form, those of layer 0; got 'theta=500000.0'; expected theta=10000.0")
