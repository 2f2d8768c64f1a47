"""Generation: greedy and sampled, streamed, ended."""

from itertools import islice

import pytest
import torch

from hybridlm.errors import ConfigError
from hybridlm.model.generation import generate, sample
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
    assert set(sample(logits, 1.0, 0.79, generator).tolist()) == {0, 1}
    assert set(sample(logits, 1.0, 0.5, generator).tolist()) == {0}
    assert set(sample(logits, 1.0, 0.81, generator).tolist()) == {0, 1, 2}
    share = (sample(logits, 1.0, 1.0, generator) == 0).float().mean()
    assert float(share) == pytest.approx(0.5, abs=0.04)
    sharp = (sample(logits, 0.5, 1.0, generator) == 0).float().mean()  # 0.25 / (0.25 + 0.09 + 0.0225 + 0.0025)
    assert float(sharp) == pytest.approx(0.685, abs=0.04)
    assert set(sample(logits, 0.0, 1.0, generator).tolist()) == {0}


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"max_new_tokens": 0}])
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
