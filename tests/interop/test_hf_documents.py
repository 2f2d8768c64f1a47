"""Packed documents and padding in the exported class, in every spelling that transformers' users have."""

import pytest
import torch

from hybridlm import build_model, load_config
from hybridlm.interop import to_hf_model
from hybridlm.interop.hf_documents import read_layout
from tests.support.hf_zoo import perturb, tokens

LENGTHS = (5, 7)  # two documents in a row


@pytest.fixture(scope="module")
def model():
    ours = build_model(load_config("train", ["model=hybrid_tiny", "model.schedule.pattern=[kda, full]",
                                             "model.num_layers=2"]))
    perturb(ours)
    return to_hf_model(ours.eval(), family="hybridlm")


def positions(*lengths):
    return torch.cat([torch.arange(n) for n in lengths])[None]


BORDERS = torch.tensor([0, 5, 12], dtype=torch.int32)
SPELLINGS = {
    "position_ids": {"position_ids": positions(*LENGTHS)},
    "flash attention": {"cu_seq_lens_q": BORDERS, "cu_seq_lens_k": BORDERS, "max_length_q": 7, "max_length_k": 7},
    "one row of the table": {"cu_seq_lens_q": BORDERS[None]},
    "table of a fixed size": {"cu_seqlens": torch.tensor([0, 5, 5, 12, 12])},
    "seq_idx": {"seq_idx": torch.tensor([[0] * 5 + [1] * 7])},
    "mask with sample numbers": {"attention_mask": torch.tensor([[1] * 5 + [2] * 7])},
    "the collator's": {"position_ids": positions(*LENGTHS), "cu_seq_lens_q": BORDERS, "cu_seq_lens_k": BORDERS,
                       "seq_idx": torch.tensor([[0] * 5 + [1] * 7]), "attention_mask": torch.ones(1, 12)},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_packed_document_is_computed_as_if_alone(model, spelling):
    ids = tokens(1, 12)
    packed = model(ids, labels=ids, **SPELLINGS[spelling])
    alone = [model(ids[:, :5], labels=ids[:, :5]), model(ids[:, 5:], labels=ids[:, 5:])]
    assert (packed.logits - torch.cat([one.logits for one in alone], 1)).abs().max() < 2e-5
    assert abs(packed.loss - (4 * alone[0].loss + 6 * alone[1].loss) / 10) < 1e-5


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_on_either_side_changes_nothing(model, side):
    ids, text = tokens(2, 9), slice({"left": 3, "right": 0, "both": 2}[side], {"left": 9, "right": 6, "both": 8}[side])
    mask = torch.zeros(2, 9, dtype=torch.int64)
    mask[0], mask[1, text] = 1, 1
    given = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)}
    for options in ({"attention_mask": mask}, {"attention_mask": mask.bool()}, given):
        padded = model(ids, labels=ids, **options)
        alone = model(ids[1:, text], labels=ids[1:, text])
        assert (padded.logits[1, text] - alone.logits[0]).abs().max() < 2e-5
        first = model(ids[:1], labels=ids[:1])
        counted = mask[1].sum() - 1
        assert abs(padded.loss - (8 * first.loss + counted * alone.loss) / (8 + counted)) < 1e-5  # padding has no loss


def test_packed_samples_and_padding_in_one_mask(model):
    ids = tokens(1, 10)
    packed = model(ids, attention_mask=torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0, 0, 0]])).logits
    assert (packed[:, 3:7] - model(ids[:, 3:7]).logits).abs().max() < 2e-5


@pytest.mark.parametrize(("options", "message"), [
    ({"attention_mask": torch.tensor([[1, 1, 0, 1]])}, "padding inside the text of row 0"),
    ({"attention_mask": torch.tensor([[1, 2, 1, 2]])}, "padding inside the text of row 0.*number of its own"),
    ({"attention_mask": torch.ones(1, 1, 4, 4)}, r"must be \[batch, time\].*got \[1, 1, 4, 4\].*cu_seq_lens_q"),
    ({"attention_mask": torch.tensor([[0.0, -1e9, 0, 0]])}, "scores that are added"),
    ({"attention_mask": torch.tensor([[1, 1, -1, 1]])}, "must not be negative"),
    ({"position_ids": torch.tensor([[3, 4, 5, 6]])}, "count from 0.*got 3 at row 0, token 0"),
    ({"position_ids": torch.tensor([[0, 1, 5, 6]])}, "got 5 at row 0, token 2 after 1"),
    ({"position_ids": torch.zeros(3, 1, 4, dtype=torch.int64)}, r"position_ids must be.*\[3, 1, 4\]"),
    ({"cu_seq_lens_q": torch.tensor([0, 2, 4]), "cu_seq_lens_k": torch.tensor([0, 1, 4])},
     "cu_seq_lens_q and cu_seq_lens_k describe different documents"),
    ({"cu_seq_lens_q": torch.tensor([0, 2, 4]), "position_ids": torch.arange(4)[None]},
     "position_ids and cu_seq_lens_q describe different documents"),
    ({"cu_seq_lens_q": torch.tensor([0, 9])}, "ends at 9, but the batch holds 1 x 4"),
    ({"cu_seq_lens_q": torch.tensor([0, 2, 4]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}, "ambiguous"),
])
def test_what_cannot_be_honoured_is_refused_by_name(model, options, message):
    with pytest.raises(ValueError, match=message):
        model(tokens(1, 4), **options)


def test_a_document_must_not_cross_rows():
    with pytest.raises(ValueError, match="cross from one row of 4 tokens"):
        read_layout(2, 4, tables={"cu_seqlens": torch.tensor([0, 3, 8])})


def test_rows_without_padding_or_documents_stay_plain_rows():
    layout = read_layout(2, 4, attention_mask=torch.ones(2, 4), position_ids=torch.arange(4)[None])
    assert (layout.borders, layout.is_text_BT) == (None, None)


def test_an_unknown_argument_is_refused(model):
    ids = tokens(1, 4)
    model(ids, token_type_ids=torch.zeros_like(ids), max_length_q=4)  # tokenizers and collators write these
    for name, value in {"atention_mask": torch.ones(1, 4), "token_type_ids": torch.ones(1, 4),
                        "output_router_logits": True}.items():
        with pytest.raises(TypeError, match=name):
            model(ids, **{name: value})
