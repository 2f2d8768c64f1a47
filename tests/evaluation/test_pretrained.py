"""A checkpoint's own weights on a probe: which weights they are, what is asked, and that training goes on from them."""

import pytest
import torch

from hybridlm.data.tokenizer import Tokenizer, byte_tokenizer
from hybridlm.errors import ConfigError
from hybridlm.evaluation.pretrained import check_zero_shot, draw_tokens, model_with_pretrained_weights
from hybridlm.evaluation.probe_training import model_for_probe, score_on_probe, train_on_probe
from hybridlm.evaluation.probes import PROBES, make_probe
from hybridlm.model.model import build_model
from hybridlm.run_config import load_config

SMALL = {"num_pairs": 2, "key_vocab": 4, "value_vocab": 4}


def make(*words):
    config = load_config("train", ["model=hybrid_tiny", "model.num_layers=2", "model.hidden_size=32",
                                   "model.feed_forward={kind: dense, intermediate_size: 64}",
                                   "model.schedule.linear=gdn", "model.schedule.ratio=1", "model.vocab_size=300",
                                   *words]).model
    model = build_model(config, seed=3).eval()
    model.tokenizer = Tokenizer(byte_tokenizer(), "<|endoftext|>", "bytes")
    return model


@pytest.mark.parametrize("words", [["model.tie_embeddings=true"], ["model.tie_embeddings=false", "model.mtp.depth=1"]])
def test_the_model_says_of_drawn_tokens_what_it_said_before(words):
    model, probe = make(*words), make_probe("mqar", SMALL)
    made = model_with_pretrained_weights(model, probe, 64, seed=1)
    ids_V = draw_tokens(model, probe.vocab_size, 1)
    batch = probe.batch(16, range(3))
    with torch.no_grad():
        expected = model(ids_V[batch.input_ids]).logits[..., ids_V]
        torch.testing.assert_close(made(batch.input_ids).logits, expected)
    assert made.config.vocab_size == probe.vocab_size


def test_drawn_tokens_are_different_and_stand_for_text():
    model = make()
    ids = draw_tokens(model, 256, 0)
    assert sorted(ids.tolist()) == list(range(256))  # never 256, the end of a text, nor ids without a token
    assert not torch.equal(ids, draw_tokens(model, 256, 1))
    with pytest.raises(ConfigError, match="has 257 ids, more than the checkpoint has tokens; got 256"):
        draw_tokens(model, 257, 0)


def test_without_steps_the_score_is_that_of_the_weights_as_they_are():
    model, probe = make(), make_probe("mqar", SMALL)
    start = model_with_pretrained_weights(model, probe, 64)
    before = {name: value.clone() for name, value in start.state_dict().items()}
    result = train_on_probe(model.config, probe, 0, length=12, examples=16, start=start)
    assert (result.loss, result.steps, list(result.accuracy)) == (None, 0, [12, 24, 48])
    assert result.accuracy[12] == score_on_probe(start, probe, 12, examples=16)
    assert all(torch.equal(value, before[name]) for name, value in start.state_dict().items())


def test_training_goes_on_from_the_weights():
    model, probe = make(), make_probe("mqar", SMALL)
    learned = build_model(model_for_probe(model.config, probe, 64), seed=0)
    few = {"length": 12, "eval_lengths": [12], "examples": 8}
    first = train_on_probe(model.config, probe, 15, 3e-3, start=learned, **few)
    again = train_on_probe(model.config, probe, 1, 1e-6, start=learned, **few)
    fresh = train_on_probe(model.config, probe, 1, 1e-6, **few)
    assert again.loss < 0.9 * fresh.loss
    assert again.loss == pytest.approx(first.loss, rel=0.2)
    with pytest.raises(ConfigError, match="steps: must be positive"):
        train_on_probe(model.config, probe, 0, length=12)


def test_only_tasks_that_show_their_rule_are_asked_zero_shot():
    asked = {name for name in PROBES if make_probe(name).in_context}
    assert asked == {"mqar", "needle_single", "needle_multi_key", "needle_multi_value", "copy", "ngram",
                     "key_value_updates"}
    for name in asked:
        check_zero_shot(make_probe(name))
    with pytest.raises(ConfigError, match=r"the rule of parity does not show.*--fine-tune"):
        check_zero_shot(make_probe("parity"))
