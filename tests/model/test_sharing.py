"""What layers leave for later layers: gradients, recomputation, decoding, divided rows, and checks of the config."""

import copy

import pytest
import torch

from hybridlm.errors import ConfigError
from hybridlm.model.config import MTPConfig, ScheduleConfig
from hybridlm.model.contract_check.thread_shards import run_on_threads
from hybridlm.model.cost import decode_state_bytes
from hybridlm.model.mixers import AttentionConfig, IndexerConfig, build_mixer
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import CuSeqlens
from tests.support import sharing_kinds
from tests.support.mixer_cases import HIDDEN, context_of
from tests.support.sharing_kinds import FIXED, ReaderConfig, SourceConfig
from tests.support.tiny_lm import BORDERS, VOCABULARY, config, model

CPU = torch.device("cpu")
IDS = torch.randint(VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(3))
PATTERN = ["source", "reader", "source", "reader", "first"]


@pytest.fixture(autouse=True, scope="module")
def _kinds():
    with sharing_kinds.registered():
        yield


def options(pattern=PATTERN):
    return {"num_layers": len(pattern), "schedule": ScheduleConfig(pattern=list(pattern)),
            "mixers": {"source": SourceConfig(), "reader": ReaderConfig(), "first": ReaderConfig(source=0)}}


def stack():
    """A source and two layers that read from it, in fp64."""
    configs = [SourceConfig(), ReaderConfig(), ReaderConfig(source=0)]
    torch.manual_seed(0)
    layers = [build_mixer(c, context_of(layer_index=i, layers=configs)) for i, c in enumerate(configs)]
    for layer in layers:
        layer.init_weights(0.3)
    return torch.nn.ModuleList(layers).double()


def outputs(layers, x, seq):
    """The output of each layer, whose inputs differ."""
    return [layer(x * (i + 1), seq)[0] for i, layer in enumerate(layers)]


def test_a_reader_reads_the_nearest_source_or_the_layer_it_names():
    layers = model(**options()).layers
    assert [layers[i].mixer.source for i in (1, 3, 4)] == [0, 2, 0]


def test_gradients_of_all_readers_reach_the_source():
    layers, x = stack(), torch.randn(2, 9, HIDDEN, dtype=torch.float64)
    _, one, two = outputs(layers, x, SequenceInfo.make(2, 9, CPU))
    weight = layers[0].proj.weight
    losses = [one.square().sum(), two.square().sum()]
    first, second, both = (torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in (*losses, sum(losses)))
    assert first.abs().max() > 0
    assert second.abs().max() > 0
    torch.testing.assert_close(first + second, both)


def test_a_kind_without_gradient_passes_none():
    seq, x = SequenceInfo.make(1, 3, CPU), torch.randn(1, 3, 2, requires_grad=True)
    seq.leave(FIXED, 0, {"a": [x * 2, (x,)]})
    left = seq.read(FIXED, 0)["a"]
    assert torch.equal(left[0], x * 2)
    assert not left[0].requires_grad
    assert not left[1][0].requires_grad


def test_what_no_layer_reads_is_not_left():
    lm = model(**options(["source", "source", "reader"]))
    assert [layer.mixer.is_read for layer in lm.layers[:2]] == [False, True]
    assert not model(**options(["source"])).layers[0].mixer.is_read


def test_activation_checkpointing_changes_no_bit():
    lm = model(**options(), mtp=MTPConfig(depth=1, mixer="reader")).train()
    results = []
    for lm.activation_checkpointing in (False, True):
        lm.zero_grad()
        loss = lm(IDS, labels=IDS, cu_seqlens=BORDERS).loss
        loss.backward()
        results.append((loss, {name: p.grad.clone() for name, p in lm.named_parameters()}))
    (loss, gradients), (loss_again, gradients_again) = results
    assert torch.equal(loss, loss_again)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, gradients_again[name]), name


@torch.no_grad()
def test_decoding_equals_the_full_forward_and_only_sources_keep_a_state():
    lm = model(**options()).double().eval()
    full, state = lm(IDS).logits, lm.new_state(2, 20)
    parts = [lm(ids, state=state).logits for ids in IDS.split([7, 1, 1, 11], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-7, atol=1e-9)
    assert [layer.mixer is None for layer in state.layers] == [False, True, False, True, True]
    assert decode_state_bytes(lm.config, 20, 8) == 2 * 20 * 32 * 8


@pytest.mark.parametrize("borders", [None, [0, 5, 6, 20, 29, 40]])
def test_divided_rows_give_what_the_rows_give(borders):
    layers, x, w = stack(), *torch.randn(2, 2, 20, HIDDEN, dtype=torch.float64)
    seq = SequenceInfo.make(2, 20, CPU, None if borders is None else CuSeqlens(borders))

    def run(layers, x, w, seq):
        x = x.clone().requires_grad_()
        results = outputs(layers, x, seq)
        sum((y * w).sum() * (i + 1) for i, y in enumerate(results)).backward()
        return [y.detach() for y in results], x.grad, {name: p.grad for name, p in layers.named_parameters()}

    expected, x_grad, gradients = run(copy.deepcopy(layers), x, w, seq)

    def shard(group):
        local = seq.shard_rows(group)
        return run(copy.deepcopy(layers), local.local_tokens(x), local.local_tokens(w), local)

    shards = run_on_threads(shard, 4)
    for i, y in enumerate(expected):
        torch.testing.assert_close(torch.cat([found[0][i] for found in shards], 1), y)
    torch.testing.assert_close(torch.cat([found[1] for found in shards], 1), x_grad)
    for name, gradient in gradients.items():
        torch.testing.assert_close(sum(found[2][name] for found in shards), gradient)


@pytest.mark.parametrize(("pattern", "message"), [
    (["reader", "source"], r"mixers\.reader\.source: layer 0 reads the keys .*, which no earlier layer leaves"),
    (["source", "reader", "first", "plain"], None),
    (["plain", "source", "first"], r"mixers\.first\.source: layer 2 reads .*, which no layer 0 leaves"),
])
def test_a_reader_without_a_source_is_refused_when_the_config_is_made(pattern, message):
    wanted = options(pattern)
    wanted["mixers"]["plain"] = AttentionConfig(num_heads=4, head_dim=8)
    if message is None:
        config(**wanted)
    else:
        with pytest.raises(ConfigError, match=message):
            config(**wanted)


def test_a_shared_indexer_without_a_source_is_refused_when_the_config_is_made():
    shared = AttentionConfig(num_heads=4, head_dim=8, indexer=IndexerConfig(share=True))
    with pytest.raises(ConfigError, match=r"^mixers\.full\.indexer\.share: layer 2 reads the keys that an indexer sel"):
        config(mixers={**config().mixers, "full": shared})
    with pytest.raises(ConfigError, match=r"^mixers\.shared\.indexer\.share: layer 2 reads"):
        config(mixers={**config().mixers, "shared": shared}, mtp=MTPConfig(depth=1, mixer="shared"))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_rows_without_tokens_are_refused_in_one_line(shape):
    with pytest.raises(ValueError, match="layers need at least one row and one token; got"):
        SequenceInfo.make(*shape, CPU)
