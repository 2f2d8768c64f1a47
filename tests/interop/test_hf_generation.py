"""`generate` and the cache of the exported class: the kinds of transformers' own generation tests."""

import copy

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache, StaticCache

from hybridlm import build_model, load_config
from hybridlm.interop import to_hf_model
from hybridlm.interop.hf_cache import CACHE_NAME
from tests.support.hf_zoo import perturb, tokens

SYSTEMS = ["kimi_linear_tiny", "minimax_01_tiny", "qwen3_next_tiny", "deepseek_v32_tiny"]
GREEDY = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module", params=SYSTEMS)
def model(request):
    ours = build_model(load_config("train", [f"model={request.param}"]))
    perturb(ours)
    return to_hf_model(ours.eval(), family="hybridlm")


def cache_of(output):
    return getattr(output, CACHE_NAME)


def test_prompts_of_different_lengths_are_padded_on_the_left(model):
    """Every row continues as if it were alone, with its own number of tokens of padding, and with beams."""
    lengths = [3, 9, 3, 7]
    ids, mask = tokens(4, 9), torch.zeros(4, 9, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, 9 - length :] = 1
    for options in ({}, {"use_cache": False}, {"num_beams": 2, "max_new_tokens": 5}):
        together = model.generate(ids, attention_mask=mask, **GREEDY | options)
        for row, length in enumerate(lengths):
            alone = model.generate(ids[row : row + 1, 9 - length :], **GREEDY | options)
            assert torch.equal(together[row, 9:], alone[0, length:]), (row, options)
    with pytest.raises(ValueError, match="padding_side='left'"):
        model.generate(ids, attention_mask=mask.flip(1), **GREEDY)


def test_a_second_turn_goes_on_from_the_cache_of_the_first(model):
    ids, more = tokens(2, 11), tokens(2, 6, seed=3)
    first = model.generate(ids, return_dict_in_generate=True, **GREEDY)
    conversation = torch.cat([first.sequences, more], 1)
    expected = model.generate(conversation, **GREEDY)
    kept = copy.deepcopy(cache_of(first))
    assert torch.equal(model.generate(conversation, **{CACHE_NAME: cache_of(first)}, **GREEDY), expected)
    if Version(transformers.__version__) >= Version("5.24"):  # earlier ones feed the old tokens once more
        chunked = model.generate(conversation, prefill_chunk_size=4, **{CACHE_NAME: kept}, **GREEDY)
        assert torch.equal(chunked, expected)
    else:
        with pytest.raises(ValueError, match="go on from the 18 tokens"):
            model.generate(conversation, prefill_chunk_size=4, **{CACHE_NAME: kept}, **GREEDY)
    with pytest.raises(ValueError, match="cannot be cropped"):
        kept.crop(-1)


def test_chunked_prefill_of_padded_prompts(model):
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[1, :5] = 0  # the first chunk of this row has no token
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(model.generate(ids, attention_mask=mask, prefill_chunk_size=4, **GREEDY), expected)


def test_the_callers_empty_dynamic_cache_holds_the_state(model):
    ids = tokens(1, 12)
    expected = model(ids).logits
    cache = DynamicCache()
    parts = [model(ids[:, part], **{CACHE_NAME: cache}).logits for part in (slice(0, 7), slice(7, 8), slice(8, 12))]
    assert (torch.cat(parts, 1) - expected).abs().max() < 2e-5
    assert cache.get_seq_length() == 12
    cache.reset()
    assert (model(ids, **{CACHE_NAME: cache}).logits - expected).abs().max() < 2e-5
    with pytest.raises(ValueError, match="StaticCache"):
        model(ids, **{CACHE_NAME: StaticCache(model.config, max_cache_len=20)})


def test_rows_of_a_cache_are_chosen_and_repeated(model):
    ids, mask = tokens(3, 8), torch.ones(3, 8, dtype=torch.int64)
    mask[1, :3] = 0
    step = tokens(6, 1, seed=4)
    cache = cache_of(model(ids, attention_mask=mask, use_cache=True))
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([4, 2, 0, 5, 3, 1]))
    sources = [2, 1, 0, 2, 1, 0]
    got = model(step, **{CACHE_NAME: cache}).logits
    for row, source in enumerate(sources):
        alone = torch.cat([ids[source, mask[source].bool()], step[row]])[None]
        assert (got[row, 0] - model(alone).logits[0, -1]).abs().max() < 2e-5
    cache.batch_select_indices(torch.tensor([1]))
    assert (cache.rows, cache.get_seq_length()) == (1, 9)


def test_what_contradicts_the_cache_is_refused(model):
    ids = tokens(2, 6)
    cache = cache_of(model(ids, use_cache=True, position_ids=torch.arange(6)[None]))
    step = {"input_ids": ids[:, :1], CACHE_NAME: cache}
    for options, message in {
        "positions": ({"position_ids": torch.tensor([[0]])}, "go on from the 6 tokens"),
        "mask": ({"attention_mask": torch.tensor([[0] + [1] * 6] * 2)}, "what it said when they came"),
        "short mask": ({"attention_mask": torch.ones(2, 1)}, r"\[2, 7\].*got \[2, 1\]"),
        "packed": ({"seq_idx": torch.zeros(2, 1)}, "packed documents cannot be decoded"),
        "labels": ({"labels": ids[:, :1]}, "cannot be trained through"),
    }.values():
        with pytest.raises(ValueError, match=message):
            model(**step, **options)
    with pytest.raises(ValueError, match="holds 2 rows; got 1"):
        model(ids[:1, :1], **{CACHE_NAME: cache})
    assert cache.get_seq_length() == 6  # a refused call changes nothing


def test_hidden_states_scores_and_embeddings_in_generate(model):
    ids = tokens(2, 7)
    out = model.generate(ids, output_hidden_states=True, output_scores=True, output_logits=True,
                         return_dict_in_generate=True, **GREEDY)
    layers = model.config.num_hidden_layers
    assert [len(step) for step in out.hidden_states] == [layers + 1] * 8
    assert [step[-1].shape[1] for step in out.hidden_states] == [7] + [1] * 7
    full = model(out.sequences[:, :-1], output_hidden_states=True)
    for layer in range(layers + 1):
        decoded = torch.cat([step[layer] for step in out.hidden_states], 1)
        assert (decoded - full.hidden_states[layer]).abs().max() < 1e-4
    assert (torch.stack(out.logits, 1) - full.logits[:, 6:]).abs().max() < 2e-5
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeds, **GREEDY), out.sequences[:, 7:])
