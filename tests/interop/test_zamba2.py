"""Zamba2's shared blocks: files that hold them once, copies that differ, and what the format cannot hold."""

import pytest
import torch

from hybridlm.errors import CheckpointError, ConfigError
from hybridlm.interop.import_export import import_hf, to_hf_model
from tests.support.hf_zoo import build, tokens


def test_files_hold_a_block_once_and_both_forms_give_one_model(tmp_path):
    theirs = build("zamba2-blocks")
    theirs.save_pretrained(tmp_path)
    in_memory, from_files = import_hf(theirs), import_hf(str(tmp_path))
    expected, found = in_memory.state_dict(), from_files.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert from_files.config.runs() == [0, 1, 2, 3, 4, 0, 5, 6, 3, 7, 0, 8, 9, 3, 10]
    ids = tokens(1, 40)
    with torch.no_grad():
        torch.testing.assert_close(from_files(ids).logits, theirs(ids, use_cache=False).logits, rtol=0, atol=2e-5)


def test_copies_of_a_block_that_differ_are_refused():
    theirs = build("zamba2")
    with torch.no_grad():
        later = theirs.model.layers[3].shared_transformer.self_attn.q_proj
        later.weight = torch.nn.Parameter(later.weight + 1)
    with pytest.raises(CheckpointError, match="should be copies of one tensor, but differ"):
        import_hf(theirs)


def test_adapters_that_were_trained_apart_are_refused():
    ours = import_hf(build("zamba2"))
    with torch.no_grad():
        next(p for name, p in ours.named_parameters() if name.endswith("up_proj.down.1.weight")).add_(1.0)
    with pytest.raises(CheckpointError, match="copies of one tensor, which is what the format holds, but differ"):
        to_hf_model(ours)


@pytest.mark.parametrize(("changes", "message"), [
    ({"tie_word_embeddings": False}, "tie_word_embeddings: asks for what hybridlm does not have"),
    ({"num_mem_blocks": 2}, "layers_block_type: has blocks that run once, with adapters, which hybridlm has for layers "
                            "that run several times; got '3 hybrid layers'; expected at least 4, twice num_mem_blocks"),
    ({"hidden_act": "relu"}, "hidden_act: asks for what hybridlm does not have; got 'relu'; expected 'gelu' or"),
    ({"add_bias_linear": True}, "add_bias_linear: asks for what hybridlm does not have"),
])
def test_what_hybridlm_does_not_have_is_refused(changes, message):
    with pytest.raises(ConfigError) as caught:
        import_hf(build("zamba2", **changes))
    assert message in str(caught.value)
