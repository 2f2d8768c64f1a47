"""Every probe against a solver that only reads the tokens, written without a look at how they were made."""

from itertools import pairwise, permutations

import pytest
import torch

from hybridlm.errors import ConfigError
from hybridlm.evaluation.probes import IGNORE, PROBES, Score, make_probe


def asked(targets):
    return [t for t, target in enumerate(targets) if target != IGNORE]


def recall(probe, ids, t):
    return next(ids[s + 1] for s in range(t) if ids[s] == ids[t])


def needle(probe, ids, t):
    question = len(ids) - 1 - ids[::-1].index(2)
    found = [ids[s + 2] for s in range(question) if ids[s] == 1 and ids[s + 1] == ids[question + 1]]
    return found[t - question - 1]


def tracking(probe, ids, t):
    assigned = {ids[s + 1]: ids[s + 2] for s in range(len(ids) - 2) if ids[s] == 1}
    if probe.question == "value":
        held, hops = assigned[ids[t]], 0
        while held in assigned:
            held, hops = assigned[held], hops + 1
        assert hops == probe.hops
        return held
    return next(variable for variable, source in assigned.items() if source == ids[t])


def copying(probe, ids, t):
    middle = ids.index(1)
    return [token for token in ids[:middle] if token != 0][t - middle]


def parity(probe, ids, t):
    return sum(ids[:t + 1]) % 2


def permuted(probe, ids, t):
    elements = list(permutations(range(probe.degree)))
    things = list(range(probe.degree))
    for step in ids[:t + 1]:
        things = [elements[step][thing] for thing in things]
    return elements.index(tuple(things))


def arithmetic(probe, ids, t):
    words = [str(i - 1) if i <= probe.modulus else probe.operators[i - 1 - probe.modulus] for i in ids[:t + 1] if i]
    text = "(" * len(words[::2]) + words[0] + ")"
    for operator, number in zip(words[1::2], words[2::2], strict=True):
        text += f"{operator}{number})"
    return 1 + eval(text) % probe.modulus


def ngram(probe, ids, t):
    width = probe.n - 1
    after = [ids[s + 1] for s in range(width - 1, t) if ids[s + 1 - width:s + 1] == ids[t + 1 - width:t + 1]]
    return max(set(after), key=after.count)


def updates(probe, ids, t):
    return next(ids[s + 1] for s in range(ids.index(1), -1, -1) if ids[s] == ids[t])


SOLVERS = {"mqar": recall, "needle_single": needle, "needle_multi_key": needle, "needle_multi_value": needle,
           "variable_tracking": tracking, "copy": copying, "selective_copy": copying, "parity": parity,
           "s3": permuted, "s5": permuted, "modular_arithmetic": arithmetic, "ngram": ngram,
           "key_value_updates": updates}
HARDER = [("mqar", {"num_pairs": 20, "num_queries": 5}), ("needle_multi_value", {"num_keys": 4, "num_values": 3}),
          ("variable_tracking", {"hops": 4, "num_chains": 3}), ("variable_tracking", {"hops": 0}),
          ("variable_tracking", {"question": "variables"}), ("ngram", {"n": 3, "alphabet": 4, "noise": 0.4}),
          ("modular_arithmetic", {"modulus": 7, "operators": "-"}), ("key_value_updates", {"num_writes": 30}),
          ("selective_copy", {"num_tokens": 3})]
CASES = [(name, {}) for name in PROBES] + HARDER
EVERY = pytest.mark.parametrize(("name", "parameters"), CASES, ids=[f"{n}{i}" for i, (n, _) in enumerate(CASES)])


@EVERY
def test_answers_are_what_a_reader_finds(name, parameters):
    probe = make_probe(name, parameters)
    for length in (probe.min_length, probe.min_length + 1, probe.min_length + 50):
        batch = probe.batch(length, range(6), seed=3)
        assert batch.input_ids.shape == batch.targets.shape == (6, length)
        assert 0 <= int(batch.input_ids.min()) <= int(batch.input_ids.max()) < probe.vocab_size
        found = batch.targets.clone()
        for row, (ids, targets) in enumerate(zip(batch.input_ids.tolist(), batch.targets.tolist(), strict=True)):
            assert asked(targets)
            for t in asked(targets):
                assert targets[t] in probe.answer_ids
                found[row, t] = SOLVERS[name](probe, ids, t)
        score = Score.of(found, batch.targets)
        assert (score.token, score.exact, score.examples) == (1.0, 1.0, 6)


@EVERY
def test_guessing_scores_near_chance(name, parameters):
    probe = make_probe(name, parameters)
    targets = probe.batch(probe.min_length + 20, range(100)).targets
    generator = torch.Generator().manual_seed(0)
    guesses = torch.randint(probe.answer_ids.start, probe.answer_ids.stop, targets.shape, generator=generator)
    score = Score.of(guesses, targets)
    spread = (probe.chance * (1 - probe.chance) / score.tokens) ** 0.5
    assert abs(score.token - probe.chance) < 4 * spread + 1e-9
    assert score.exact <= score.token + 4 * spread


@EVERY
def test_examples_follow_from_seed_split_and_index(name, parameters):
    probe = make_probe(name, parameters)
    length = probe.min_length + 20
    batch = probe.batch(length, range(8), seed=5)
    again = make_probe(name, parameters).batch(length, [2, 7], seed=5)
    assert torch.equal(batch.input_ids[[2, 7]], again.input_ids)
    assert torch.equal(batch.targets[[2, 7]], again.targets)
    others = [probe.batch(length, range(8), seed=6), probe.batch(length, range(8), seed=5, split="test"),
              probe.batch(length, range(8, 16), seed=5)]
    assert all(not torch.equal(batch.input_ids, other.input_ids) for other in others)
    assert len({tuple(row) for row in batch.input_ids.tolist()}) == 8


def test_score_counts_tokens_and_whole_examples():
    targets = torch.tensor([[1, IGNORE, 2], [3, 4, IGNORE], [IGNORE, IGNORE, IGNORE]])
    predicted = torch.tensor([[1, 9, 2], [3, 9, 9], [0, 0, 0]])
    score = Score.of(predicted, targets)
    assert (score.correct, score.tokens, score.perfect, score.examples) == (3, 4, 1, 2)
    assert (score + score).token == score.token == 0.75
    assert score.exact == 0.5


def test_an_update_changes_the_value_and_a_query_asks_the_latest():
    probe = make_probe("key_value_updates", {"num_keys": 1, "num_writes": 9, "value_vocab": 2})
    ids = probe.batch(probe.min_length, [0]).input_ids[0].tolist()
    values = ids[1:18:2]
    assert all(a != b for a, b in pairwise(values))


def test_queries_come_soon_after_the_pairs():
    probe = make_probe("mqar", {"num_pairs": 4})
    targets = probe.batch(208, range(50)).targets
    places = (targets != IGNORE).nonzero()[:, 1] - 8
    assert places.float().mean() < 60  # uniform places would have 100
    assert places.max() > 150


@pytest.mark.parametrize(("name", "parameters", "words"), [
    ("mqra", {}, ["mqra", "did you mean 'mqar'"]),
    ("mqar", {"pairs": 3}, ["probe.mqar", "pairs", "did you mean 'num_pairs'"]),
    ("mqar", {"num_pairs": 65}, ["num_pairs", "65", "at most 64"]),
    ("mqar", {"num_pairs": "many"}, ["num_pairs", "many"]),
    ("needle_single", {"num_values": 40}, ["num_values", "at most 32"]),
    ("variable_tracking", {"hops": -1}, ["hops", "-1"]),
    ("variable_tracking", {"hops": 31, "num_chains": 2}, ["num_chains", "at most 1"]),
    ("s5", {"degree": 9}, ["degree", "2 to 6"]),
    ("modular_arithmetic", {"operators": "/"}, ["operators", "+ - *"]),
    ("ngram", {"noise": 1.0}, ["noise"]),
    ("key_value_updates", {"num_keys": 17}, ["num_keys", "at most 16"]),
])
def test_what_a_probe_cannot_have_is_refused(name, parameters, words):
    with pytest.raises(ConfigError) as error:
        make_probe(name, parameters)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_length_that_is_too_short_is_refused():
    with pytest.raises(ConfigError, match=r"length.*too short for mqar.*23.*at least 24"):
        make_probe("mqar").batch(23, [0])
    with pytest.raises(ConfigError, match="seed"):
        make_probe("mqar").batch(24, [0], seed=-1)
