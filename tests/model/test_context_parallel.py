"""Every mixer computes on shards of rows what it computes on the rows: outputs, losses, all gradients."""

import collections
import copy
import dataclasses

import pytest
import torch

from hybridlm.errors import ConfigError
from hybridlm.model.mixers.contract import MixerConfig
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import CuSeqlens
from tests.support.mixer_cases import CASES, HIDDEN, build, context_of
from tests.support.shard_threads import run_on_threads

B, T = 2, 36
PACKED = [0, 1, 17, 18, 30, 36, 36 + 9, 36 + 12, 72]  # cuts at 9, 12, 18, 24, 27: inside documents and on borders


def whole(packed):
    return SequenceInfo.make(B, T, torch.device("cpu"), CuSeqlens(PACKED) if packed else None)


def losses(aux):
    return [value for name, value in aux.items() if name.startswith("loss/")]


def backward(mixer, x, w, seq, share=1.0):
    """Outputs, gradients of the inputs and of the parameters, and the aux."""
    x = x.clone().requires_grad_()
    o, aux = mixer(x, seq)
    ((o * w).sum() + sum(losses(aux)) * share).backward()
    return o.detach(), x.grad, {n: p.grad for n, p in mixer.named_parameters()}, {n: v.detach() for n, v in aux.items()}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("name", "shards"), [(name, shards) for name, config in CASES.items() for shards in (2, 3, 4)
                                              if config.is_linear or config.num_heads % shards == 0])
def test_pieces_are_the_whole(name, shards, packed):
    torch.manual_seed(0)
    mixer = build(name).double().train()
    x, w = torch.randn(2, B, T, HIDDEN, dtype=torch.float64)
    o, dx, grads, aux = backward(mixer, x, w, whole(packed))

    def shard(shard_group):
        seq = whole(packed).shard_rows(shard_group)
        return backward(copy.deepcopy(mixer), seq.local_tokens(x), seq.local_tokens(w), seq, 1 / shards)

    for p in mixer.parameters():
        p.grad = None
    parts = run_on_threads(shard, shards)
    torch.testing.assert_close(torch.cat([p[0] for p in parts], 1), o)
    torch.testing.assert_close(torch.cat([p[1] for p in parts], 1), dx)
    for key, expected in grads.items():
        found = [p[2][key] for p in parts if p[2][key] is not None]
        if expected is None:
            assert not found
        else:
            torch.testing.assert_close(sum(found), expected, msg=lambda m, key=key: f"{key}: {m}")
    for key, expected in aux.items():
        mean = sum(p[3][key] for p in parts) / shards
        torch.testing.assert_close(mean, expected, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("mode", ["dense", "sparse"])
@pytest.mark.parametrize("name", ["attention_indexed", "glm5_next"])
def test_what_is_measured_of_a_selection(name, mode):
    mixer = build(name).double().eval()
    mixer.attention_mode, mixer.measuring = mode, True
    x = torch.randn(B, T, HIDDEN, dtype=torch.float64)
    expected = mixer(x, whole(True))[1]

    def shard(shard_group):
        seq = whole(True).shard_rows(shard_group)
        return mixer(seq.local_tokens(x), seq)[1]

    with torch.no_grad():
        parts = run_on_threads(shard, 2)
    assert {"layer/indexer_recall", "layer/indexer_agreement", "layer/indexer_attainable"} <= expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close((parts[0][key] + parts[1][key]) / 2, value, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", CASES)
def test_pieces_exchange_what_the_config_says(name):
    """Bytes that a process hands over in a forward and a backward; the loss of a dense layer's indexer included."""
    config, mixer, shards = CASES[name], build(name).double().train(), 2
    for mode in ("dense", "sparse") if mixer_has_indexer(config) else (None,):
        if mode:
            mixer.attention_mode = mode
            config = dataclasses.replace(config, indexer=dataclasses.replace(config.indexer, mode=mode))

        def shard(shard_group, config=config):
            x = torch.randn(B, T // shards, HIDDEN, dtype=torch.float64)
            backward(copy.deepcopy(mixer), x, torch.ones_like(x), whole(False).shard_rows(shard_group))
            return shard_group.handed

        found, expected = run_on_threads(shard, shards)[1], collections.Counter()
        for one in config.shard_traffic(context_of(name), B, T // shards, shards, 8):
            forward, back = {"gather": ("all_gather", "reduce_scatter"), "exchange": ("all_to_all",) * 2,
                             "from_previous": ("shift",) * 2}[one.kind]
            expected.update({forward: one.forward})
            expected.update({back: one.backward})
        if config.is_linear:  # states are of four bytes in any model but this one
            expected["all_gather"] *= 2
            expected["reduce_scatter"] *= 2
        assert found == expected, mode


def mixer_has_indexer(config):
    return getattr(config, "indexer", None) is not None


def test_a_mixer_that_does_not_say_how_is_refused():
    with pytest.raises(ConfigError, match="kind: cannot work on split rows; got 'new'"):
        MixerConfig(kind="new").check_context_parallel(2, 8)


def test_rows_that_do_not_divide():
    with pytest.raises(ValueError, match="rows of 36 tokens cannot be cut into 5 equal shards"):
        run_on_threads(whole(False).shard_rows, 5)
