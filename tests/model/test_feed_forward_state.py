"""A feed-forward that looks at the token before: packed, decoded and divided as a mixer is."""

import copy
import itertools

import pytest
import torch

from hybridlm.errors import ConfigError
from hybridlm.model.contract_check.thread_shards import run_on_threads
from hybridlm.model.cost import count_parameters, decode_state_bytes
from hybridlm.model.decode_state import LayerState, reorder_rows
from hybridlm.model.feed_forward import DenseConfig, build_feed_forward
from hybridlm.model.feed_forward.contract import FeedForwardConfig
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import CuSeqlens
from tests.support import sharing_kinds
from tests.support.mixer_cases import HIDDEN, context_of
from tests.support.sharing_kinds import LastToken, TokenShiftConfig
from tests.support.tiny_lm import BORDERS, VOCABULARY, model

IDS = torch.randint(VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True, scope="module")
def _kinds():
    with sharing_kinds.registered():
        yield


def token_shift_lm():
    return model(feed_forward=TokenShiftConfig()).double().eval()


@torch.no_grad()
def test_packed_documents_equal_separate_ones():
    lm, flat = token_shift_lm(), IDS.flatten()
    packed = lm(IDS, cu_seqlens=BORDERS).logits.flatten(0, 1)
    separate = torch.cat([lm(flat[None, a:b]).logits[0] for a, b in itertools.pairwise(BORDERS)])
    torch.testing.assert_close(packed, separate)
    assert not torch.allclose(packed, lm(IDS).logits.flatten(0, 1))


@torch.no_grad()
def test_decoding_equals_the_full_forward():
    lm, parts = token_shift_lm(), []
    state = lm.new_state(2, 20)
    for ids in IDS.split([7, 1, 1, 11], dim=1):
        parts.append(lm(ids, state=state).logits)
    torch.testing.assert_close(torch.cat(parts, 1), lm(IDS).logits, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("borders", [None, BORDERS])
def test_divided_rows_give_what_the_rows_give(borders):
    module = build_feed_forward(TokenShiftConfig(), context_of())
    module.init_weights(0.3)
    module.double()
    x, w = torch.randn(2, 2, 20, HIDDEN, dtype=torch.float64)
    seq = SequenceInfo.make(2, 20, torch.device("cpu"), None if borders is None else CuSeqlens(borders))

    def run(module, x, w, seq):
        x = x.clone().requires_grad_()
        y = module(x, seq)[0]
        (y * w).sum().backward()
        return y.detach(), x.grad, {name: p.grad for name, p in module.named_parameters()}

    def shard(group):
        local = seq.shard_rows(group)
        return run(copy.deepcopy(module), local.local_tokens(x), local.local_tokens(w), local)

    y, x_grad, gradients = run(copy.deepcopy(module), x, w, seq)
    shards = run_on_threads(shard, 4)
    torch.testing.assert_close(torch.cat([found[0] for found in shards], 1), y)
    torch.testing.assert_close(torch.cat([found[1] for found in shards], 1), x_grad)
    for name, gradient in gradients.items():
        torch.testing.assert_close(sum(found[2][name] for found in shards), gradient)


@torch.no_grad()
def test_costs_count_its_state_and_parameters():
    lm = token_shift_lm().float()
    state = lm.new_state(1, 20)
    lm(IDS[:1], state=state)
    assert sum(layer.num_bytes for layer in state.layers) == decode_state_bytes(lm.config, 20, 4)
    assert sum(layer.feed_forward.num_bytes for layer in state.layers) == 3 * 32 * 4
    assert count_parameters(lm.config).total == lm.num_params()


def test_rows_of_a_state_follow_a_beam_search():
    last = LastToken()
    last.x_B1D = torch.arange(3.0).view(3, 1, 1)
    layer = LayerState({"a": torch.arange(3)}, last)
    reorder_rows(layer, torch.tensor([2, 0, 0]))
    assert layer.mixer["a"].tolist() == [2, 0, 0]
    assert last.x_B1D.flatten().tolist() == [2.0, 0.0, 0.0]
    assert reorder_rows(None, torch.tensor([0])) is None


def test_a_kind_with_state_has_to_say_how_rows_are_divided_and_one_without_need_not():
    class Forgetful(TokenShiftConfig):
        check_context_parallel = FeedForwardConfig.check_context_parallel

    with pytest.raises(ConfigError, match="kind: cannot work on split rows; got 'test_token_shift'"):
        Forgetful().check_context_parallel(2, 8)
    plain = DenseConfig(intermediate_size=8)
    plain.check_context_parallel(2, 8)
    assert plain.shard_traffic(context_of(), 1, 8, 2) == []
    assert plain.state_bytes(context_of(), 8) == 0
