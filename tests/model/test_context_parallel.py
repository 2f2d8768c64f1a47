"""Context parallelism beside the checks of the contract: selections, the dense mode of an indexer, refusals."""

import dataclasses

import pytest
import torch

from hybridlm.errors import ConfigError
from hybridlm.model.contract_check import Subject
from hybridlm.model.contract_check.context_parallel import check_context_parallel, check_shard_traffic, uncut_rows
from hybridlm.model.contract_check.thread_shards import run_on_threads
from hybridlm.model.mixers.contract import MixerConfig
from tests.support.mixer_cases import CASES, HIDDEN, build, context_of, subject
from tests.support.mixer_forms import collect_names

INDEXED = [name for name, config in CASES.items() if getattr(config, "indexer", None) is not None]


@pytest.mark.parametrize("mode", ["dense", "sparse"])
@pytest.mark.parametrize("name", ["attention_indexed", "glm5_next"])
def test_statistics_of_a_selection_are_means_over_shards(name, mode):
    mixer = build(name).eval()
    mixer.attention_mode, mixer.measuring = mode, True
    x = torch.randn(2, 36, HIDDEN, dtype=torch.float64)
    expected = mixer(x, uncut_rows(True))[1]

    def shard(shard_group):
        seq = uncut_rows(True).shard_rows(shard_group)
        return mixer(seq.local_tokens(x), seq)[1]

    with torch.no_grad():
        parts = run_on_threads(shard, 2)
    assert {"layer/indexer_recall", "layer/indexer_agreement", "layer/indexer_attainable"} <= expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close((parts[0][key] + parts[1][key]) / 2, value, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", INDEXED)
def test_shards_of_an_indexer_that_only_learns(name):
    """Mode dense: attention reads all keys, the loss of the indexer is computed."""
    config = CASES[name]
    dense = dataclasses.replace(config, indexer=dataclasses.replace(config.indexer, mode="dense"))
    assert check_context_parallel(Subject(dense, context_of(name)))
    assert check_shard_traffic(Subject(dense, context_of(name)))


@pytest.mark.parametrize("name", [name for name in CASES if (getattr(CASES[name], "num_heads", 0) or 0) % 4 == 0
                                  and name not in collect_names("UNDIVIDED")])
def test_four_shards_are_claimed_where_four_divides_the_heads(name):
    CASES[name].check_context_parallel(4, 9)
    assert "4 shards" in check_context_parallel(subject(name))


def test_a_mixer_that_does_not_say_how_is_refused():
    with pytest.raises(ConfigError, match="kind: cannot work on split rows; got 'attention'"):
        MixerConfig.check_context_parallel(CASES["llama"], 2, 8)


def test_rows_that_do_not_divide():
    with pytest.raises(ValueError, match="rows of 36 tokens cannot be divided into 5 equal shards"):
        run_on_threads(uncut_rows(False).shard_rows, 5)
