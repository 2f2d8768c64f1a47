"""Generation: greedy and sampled, streamed, ended."""

from itertools import islice

import pytest
import torch

from hybridlm.errors import ConfigError
from hybridlm.model.generation import Sampling, complete, generate, sample
from hybridlm.model.mixers import AttentionConfig, DeltaRuleConfig, MLAConfig
from tests.support.tiny_lm import VOCABULARY, model, moe

PROMPT = torch.randint(VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def lm():
    return model(feed_forward=moe(), init_std=0.3)


def greedy(lm, prompt, steps):
    """Without a state: the whole text again for every token."""
    text = prompt
    with torch.no_grad():
        for _ in range(steps):
            text = torch.cat([text, lm.eval()(text).logits[:, -1:].argmax(-1)], dim=1)
    return text[:, prompt.shape[1] :]


def test_greedy_equals_the_full_forward_each_time(lm):
    tokens = torch.stack(list(generate(lm, PROMPT, 8, temperature=0)), dim=1)
    assert torch.equal(tokens, greedy(lm, PROMPT, 8))


def test_tokens_come_one_by_one_and_the_mode_is_put_back(lm):
    lm.train()
    stream = generate(lm, [1, 2, 3], 50, temperature=0)
    first = list(islice(stream, 3))
    assert [t.shape for t in first] == [(1,)] * 3
    stream.close()
    assert lm.training
    assert all(load.sum() == 0 for load in lm.router_loads().values())
    lm.eval()
    list(generate(lm, [1, 2, 3], 2, temperature=0))
    assert not lm.training


def test_a_seed_decides_and_the_callers_random_state_is_kept(lm):
    before = torch.get_rng_state()
    a, b, c = (torch.cat(list(generate(lm, PROMPT[0], 12, seed=s))).tolist() for s in (4, 4, 5))
    assert a == b != c
    assert torch.equal(before, torch.get_rng_state())


def test_ends_when_every_row_has_ended(lm):
    free = torch.stack(list(generate(lm, PROMPT, 12, temperature=0)), dim=1)
    end = int(free[0, 2])
    tokens = torch.stack(list(generate(lm, PROMPT[:1], 12, temperature=0, eos=end)), dim=1)
    assert tokens[0].tolist() == free[0, : free[0].tolist().index(end) + 1].tolist()
    rows = torch.stack(list(generate(lm, PROMPT, 12, temperature=0, eos={end})), dim=1)
    first = free[0].tolist().index(end)
    assert (rows[0, first:] == end).all()
    assert torch.equal(rows[1, : first + 1], free[1, : first + 1]), "a row that ended disturbs no other"


def test_top_p_and_temperature():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(4000, 4)
    generator = torch.Generator().manual_seed(0)
    assert set(sample(logits, Sampling(1.0, top_p=0.79), generator).tolist()) == {0, 1}
    assert set(sample(logits, Sampling(1.0, top_p=0.5), generator).tolist()) == {0}
    assert set(sample(logits, Sampling(1.0, top_p=0.81), generator).tolist()) == {0, 1, 2}
    share = (sample(logits, Sampling(1.0, top_p=1.0), generator) == 0).float().mean()
    assert float(share) == pytest.approx(0.5, abs=0.04)
    sharp = (sample(logits, Sampling(0.5), generator) == 0).float().mean()  # 0.25 / (0.25 + 0.09 + 0.0225 + 0.0025)
    assert float(sharp) == pytest.approx(0.685, abs=0.04)
    assert set(sample(logits, Sampling(0.0, top_p=1.0), generator).tolist()) == {0}


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5},
                                     {"max_new_tokens": 0}, {"top_k": 0}, {"min_p": -0.1}])
def test_values_out_of_range_are_refused_at_once(lm, options):
    with pytest.raises(ConfigError) as caught:
        generate(lm, PROMPT, **options)
    assert caught.value.key == next(iter(options))


def test_an_empty_prompt_is_refused(lm):
    with pytest.raises(ConfigError, match="no token"):
        generate(lm, [])


def test_only_the_tokenizers_ids_are_sampled(lm):
    free = torch.cat(list(generate(lm, PROMPT[0], 30, temperature=2.0, seed=1)))
    kept = torch.cat(list(generate(lm, PROMPT[0], 30, temperature=2.0, seed=1, vocab_size=10)))
    assert free.max() >= 10 > kept.max()


def test_top_k_and_min_p():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(4000, 4)
    generator = torch.Generator().manual_seed(0)
    assert set(sample(logits, Sampling(top_k=2), generator).tolist()) == {0, 1}
    assert set(sample(logits, Sampling(top_k=9), generator).tolist()) == {0, 1, 2, 3}
    assert set(sample(logits, Sampling(min_p=0.31), generator).tolist()) == {0, 1}, "0.15 is less than 0.31 of 0.5"
    share = (sample(logits, Sampling(top_k=2, top_p=0.7), generator) == 0).float().mean()
    assert float(share) == pytest.approx(0.625, abs=0.04), "0.5 of 0.8 is less than 0.7, so the second token is kept"
    assert set(sample(logits, Sampling(top_k=2, top_p=0.6), generator).tolist()) == {0}, "top-p of what top-k keeps"


RAGGED = [[5, 6, 7], [1], [9, 8, 7, 6, 5, 4, 3], [2, 3, 4], [11, 12, 13, 14, 15]]
MIXERS = {"attention": {}, "window": {"full": AttentionConfig(num_heads=4, head_dim=8, window=4)},
          "latent": {"full": MLAConfig(num_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4,
                                       v_head_dim=8)}}


@pytest.mark.parametrize("full", MIXERS)
def test_prompts_of_unlike_lengths_are_decoded_together(full):
    lm = model(init_std=0.3, mixers={"linear": DeltaRuleConfig(num_heads=2, head_dim=16),
                                     "full": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8), **MIXERS[full]})
    lm.double()
    alone = [torch.cat(list(generate(lm, prompt, 9, temperature=0))).tolist() for prompt in RAGGED]
    together = torch.stack(list(generate(lm, RAGGED, 9, temperature=0)), 1).tolist()
    assert together == alone
    end = alone[2][3]
    cut = [tokens[: tokens.index(end) + 1] if end in tokens else tokens for tokens in alone]
    for batch_size in (1, 2, 5):
        assert complete(lm, RAGGED, 9, batch_size=batch_size, eos=end) == cut
    ended = complete(lm, RAGGED, 9, eos=-1, ends=lambda index, token: index == 1)
    assert ended == [alone[0], alone[1][:1], *alone[2:]]


def test_rows_that_ended_are_not_computed(lm, monkeypatch):
    rows = []
    forward = lm.forward
    monkeypatch.setattr(lm, "forward", lambda ids, **options: rows.append(len(ids)) or forward(ids, **options))
    stream = generate(lm, PROMPT, 5, temperature=0)
    first = next(stream)
    stream.end_row(1)
    assert all(int(tokens[1]) == int(first[1]) for tokens in stream)
    assert rows == [2, 1, 1, 1, 1]


def test_a_mixer_that_decodes_no_padded_rows_is_given_prompts_of_one_length():
    sinks = AttentionConfig(num_heads=4, head_dim=8, sinks=True)
    lm = model(init_std=0.3, mixers={"linear": DeltaRuleConfig(num_heads=2, head_dim=16), "full": sinks})
    with pytest.raises(ConfigError, match="must have one length"):
        generate(lm, RAGGED)
    alone = [torch.cat(list(generate(lm, prompt, 4, temperature=0))).tolist() for prompt in RAGGED]
    assert complete(lm, RAGGED, 4, eos=-1) == alone
