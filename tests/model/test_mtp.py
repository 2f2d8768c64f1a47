"""Multi-token prediction against its definition, inside documents and at their ends."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from hybridlm.model.config import MTPConfig
from hybridlm.model.sequence import SequenceInfo
from hybridlm.model.targets import IGNORE, build_targets
from tests.support.tiny_lm import BORDERS, VOCABULARY, model, moe, with_mtp

IDS = torch.randint(VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(3))


def by_definition(lm, ids, next_tokens, depth):
    """Losses (sums) of one document, depth after depth. `next_tokens` continue the document after the batch."""
    text = torch.cat([ids, next_tokens])
    seq = SequenceInfo.make(1, len(ids), torch.device("cpu"))
    h = lm.embed(ids[None])
    for layer in lm.layers:
        h, _ = layer(h, seq)
    h, sums, counts = lm.norm(h), [], []
    for k in range(1, depth + 1):
        module = lm.mtp[k - 1]
        told = text[k : k + len(ids)]
        told = torch.cat([told, told.new_zeros(len(ids) - len(told))])
        joined = torch.cat([module.enorm(lm.embed(told)[None]), module.hnorm(h)], dim=-1)
        h, _ = module.block(joined @ module.eh_proj.weight.T, seq)
        h = module.norm(h)
        wanted = text[k + 1 : k + 1 + len(ids)]
        logits = lm.logits(h)[0, : len(wanted)]
        sums.append(F.cross_entropy(logits, wanted, reduction="sum") if len(wanted) else torch.zeros(()))
        counts.append(len(wanted))
    return sums, counts


def expected_loss(lm, documents, depth):
    sums, counts = torch.zeros(depth), torch.zeros(depth)
    for ids, continuation in documents:
        s, c = by_definition(lm, ids, continuation, depth)
        sums, counts = sums + torch.stack(s), counts + torch.tensor(c)
    return (sums / counts).mean()


@pytest.mark.parametrize("depth", [1, 3])
def test_equals_its_definition_document_by_document(depth):
    lm = with_mtp(depth)
    flat, none = IDS.flatten(), IDS.new_zeros(0)
    documents = [(flat[a:b], none) for a, b in itertools.pairwise(BORDERS)]
    output = lm(IDS, labels=IDS, cu_seqlens=BORDERS)
    torch.testing.assert_close(output.losses["mtp"], expected_loss(lm, documents, depth))
    total = output.losses["lm"] + 0.3 * output.losses["mtp"]
    torch.testing.assert_close(output.loss, total)


def test_a_document_that_goes_on_after_the_window():
    """Targets know the tokens after the window: the last positions are told them and predict those after."""
    lm = with_mtp(2)
    text = torch.randint(VOCABULARY, (23,), generator=torch.Generator().manual_seed(4))
    ids = text[None, :20]
    targets = torch.stack([text[1:21], text[2:22], text[3:23]], dim=-1)[None]
    output = lm(ids, targets=targets)
    torch.testing.assert_close(output.losses["mtp"], expected_loss(lm, [(ids[0], text[20:])], 2))


def test_no_document_reaches_another():
    lm = with_mtp(2)
    start = BORDERS[2]
    targets = build_targets(IDS, 2, BORDERS)
    only_first = targets.clone()
    only_first.view(-1, 3)[start:] = IGNORE
    changed = IDS.clone()
    changed.view(-1)[start:] = (changed.view(-1)[start:] + 1) % VOCABULARY
    before = lm(IDS, targets=only_first, cu_seqlens=BORDERS)
    after = lm(changed, targets=only_first, cu_seqlens=BORDERS)
    assert torch.equal(before.losses["mtp"], after.losses["mtp"])
    with torch.no_grad():
        lm.embed.weight.grad = None
    embedding = lm.embed.weight
    lm(IDS, targets=only_first, cu_seqlens=BORDERS).losses["mtp"].backward()
    untouched = set(range(VOCABULARY)) - set(IDS.view(-1)[:start].tolist())
    assert embedding.grad[sorted(untouched)].abs().max() == 0


def test_every_mtp_parameter_learns_and_the_weight_counts():
    lm = model(mtp=MTPConfig(depth=2, loss_weight=0.1, mixer="linear"), feed_forward=moe()).train()
    assert [type(m.block.mixer).__name__ for m in lm.mtp] == ["DeltaRule"] * 2
    output = lm(IDS, labels=IDS)
    output.loss.backward()
    for name, parameter in lm.mtp.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    expected = output.losses["lm"] + 0.1 * output.losses["mtp"] + 0.01 * output.losses["balance"]
    torch.testing.assert_close(output.loss, expected)


def test_mtp_changes_neither_logits_nor_the_language_model_loss():
    lm = with_mtp(1)
    plain = model()
    plain.load_state_dict({k: v for k, v in lm.state_dict().items() if not k.startswith("mtp.")})
    assert torch.equal(lm(IDS).logits, plain(IDS).logits)
    assert torch.equal(lm(IDS, labels=IDS).losses["lm"], plain(IDS, labels=IDS).losses["lm"])
