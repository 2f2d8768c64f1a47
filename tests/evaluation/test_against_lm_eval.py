"""Scores and texts are those of lm-eval's own model of transformers, for the same weights and tokenizer."""

import pytest
import tokenizers
import torch

pytest.importorskip("lm_eval", reason="lm-eval is not installed (hybridlm[eval])")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hybridlm.checkpoint import load_checkpoint
from hybridlm.data.chat import TextConventions
from hybridlm.data.tokenizer import train_bpe
from hybridlm.evaluation.harness import HarnessLM
from hybridlm.interop import import_checkpoint

TEXT = "one two three four five six seven. the quick brown fox, and the lazy dog: an answer to the question? "
PAIRS = [("one two", " three"), ("", "seven"), ("", "<s>seven"), ("the quick brown fox, and the", " lazy dog"),
         ("<s>one two", " three four"), ("a question? ", "answer"), ("user<|im_end|>", "the dog"), ("one", " two"),
         ("the lazy dog: " * 12, "an answer to the question")]  # the last is longer than the model's positions
TEXTS = ["one two three", "<s>the lazy dog", "the quick brown fox. " * 9, "six"]
SETTINGS = [{"until": ["o", "\n\n"], "max_gen_toks": 12}, {"until": [], "max_gen_toks": 20}, {"max_new_tokens": 7},
            {"until": "e", "max_gen_toks": 30}, {"max_tokens": 4, "do_sample": False, "temperature": 0.8}]


@pytest.fixture(scope="module", params=["begins with <s>", "has no token to begin with"])
def models(request, tmp_path_factory):
    """Our adapter and lm-eval's, of one tiny model whose tokenizer puts a token in front of every text, or does not."""
    folder = tmp_path_factory.mktemp("model")
    begins = request.param == "begins with <s>"
    backend = train_bpe([TEXT], 300).backend
    backend.add_special_tokens(["<s>", "<|im_end|>"])
    if begins:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>",
                            **{"bos_token": "<s>"} if begins else {}).save_pretrained(folder / "theirs")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=backend.get_vocab_size(), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                         initializer_range=0.3, bos_token_id=backend.token_to_id("<s>"), eos_token_id=0)
    theirs = LlamaForCausalLM(config).eval()
    theirs.save_pretrained(folder / "theirs")
    import_checkpoint(folder / "theirs", folder / "ours")
    model = load_checkpoint(folder / "ours")
    tokenizer = AutoTokenizer.from_pretrained(folder / "theirs")
    return (HarnessLM(model, model.tokenizer, TextConventions.of_folder(folder / "ours"), rows=3),
            HFLM(pretrained=theirs, tokenizer=tokenizer, batch_size=1, max_length=64))


def ask(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=args, idx=0) for args in arguments]


def test_log_likelihoods(models):
    ours, theirs = (lm.loglikelihood(ask("loglikelihood", PAIRS), disable_tqdm=True) for lm in models)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert [log_p for log_p, _ in ours] == pytest.approx([log_p for log_p, _ in theirs], rel=1e-4)


def test_log_likelihoods_of_whole_texts(models):
    ours, theirs = (lm.loglikelihood_rolling(ask("loglikelihood_rolling", [(text,) for text in TEXTS]),
                                             disable_tqdm=True) for lm in models)
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_texts(models, settings):
    requests = [(text, settings) for text in TEXTS]
    ours, theirs = (lm.generate_until(ask("generate_until", requests), disable_tqdm=True) for lm in models)
    assert ours == theirs
    assert any(ours)
