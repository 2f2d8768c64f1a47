"""Padding counts nowhere: losses, gradients, loads, router biases and statistics are those of the text alone."""

import pytest
import torch
import torch.nn.functional as F

from hybridlm.model.contract_check.thread_shards import run_on_threads
from hybridlm.model.mixers.contract import SequenceMixer
from hybridlm.model.output import GlobalBatch
from hybridlm.model.padding import TextTokens, text_before_last_label
from hybridlm.training.losses import COMPUTED_FROM_LOADS
from hybridlm_kernels import CuSeqlens
from tests.model.test_wrapped_linears import decode, system
from tests.support.tiny_lm import VOCABULARY

LENGTHS = (14, 9)
ROW = max(LENGTHS)


def rows(right, left=0):
    """Ids and mask of two texts in rows that are padded by `right` and `left` tokens."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCABULARY, (2, left + ROW + right), generator=generator)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    texts = [torch.randint(VOCABULARY, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
    for row, text in enumerate(texts):
        ids[row, left:left + len(text)] = text
        mask[row, left:left + len(text)] = True
    return ids, mask


def measure(model, ids, mask, **options):
    """Losses, statistics, loads and gradients of one training forward."""
    model.train().zero_grad()
    model.post_optimizer_step(update=False)
    output = model(ids, labels=ids, text_mask=mask, **options)
    output.loss.backward()
    gradients = {f"grad {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    loads = {f"load {name}": load.clone() for name, load in model.router_loads().items()}
    return {"loss": output.loss, **output.losses, **output.stats, **loads, **gradients, "tokens": output.num_tokens}


def close(found, right):
    torch.testing.assert_close(found, right, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["llama", "deepseek_v32", "glm5_next", "kda", "mamba2", "shared_selection"])
def test_a_training_forward_does_not_depend_on_padding(name):
    model = system(name)
    right = measure(model, *rows(0))
    assert sum(right[name].sum() for name in right if name.startswith("load layers.1")) == 2 * sum(LENGTHS)
    for amount in ({"right": 3}, {"right": 40}, {"right": 0, "left": 5}, {"right": 2, "left": 2}):
        close(measure(model, *rows(**amount)), right)


def test_rows_of_text_alone_are_the_same_as_their_texts_one_by_one():
    """What is compared above is right: the mean over the texts, each alone in its row."""
    model = system("kda")
    ids, mask = rows(0)
    both = measure(model, ids, mask)
    alone = [measure(model, ids[row:row + 1, :n], None) for row, n in enumerate(LENGTHS)]
    targets = [n - 1 for n in LENGTHS]
    for loss, weights in (("lm", targets), ("balance", LENGTHS)):
        mean = sum(a[loss] * w for a, w in zip(alone, weights, strict=True)) / sum(weights)
        close(both[loss], mean)
    for load in (key for key in both if key.startswith("load")):
        close(both[load], alone[0][load] + alone[1][load])


def test_without_a_mask_the_tail_behind_the_last_label_is_padding():
    model = system("kda")
    ids, mask = rows(7)
    labels = ids.masked_fill(~mask, -100)
    right = measure(model, *rows(0))
    model.zero_grad()
    model.post_optimizer_step(update=False)
    output = model(ids, labels=labels)
    close({name: output.losses[name] for name in output.losses}, {name: right[name] for name in output.losses})
    close(model.router_loads()["layers.1.feed_forward"], right["load layers.1.feed_forward"])
    assert text_before_last_label(torch.full((1, 3), -100)) is None
    nothing = model(ids, labels=torch.full_like(ids, -100))
    assert nothing.num_tokens == 0


def test_logits_of_text_are_in_their_places_and_those_of_padding_are_zero():
    model = system("deepseek_v32").eval()
    ids, mask = rows(3, left=2)
    with torch.no_grad():
        logits = model(ids, text_mask=mask).logits
        last = model(ids, text_mask=mask, logits_to_keep=5).logits
        for row, n in enumerate(LENGTHS):
            close(logits[row, 2:2 + n], model(ids[row:row + 1, 2:2 + n]).logits[0])
    assert not logits[~mask].any()
    assert torch.equal(last, logits[:, -5:])


def test_packed_documents_lose_their_padding_alone():
    """A document of padding behind others, as the loader makes it, and targets that the loader has made."""
    model = system("kda")
    ids = torch.randint(VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(5))
    targets = torch.stack([F.pad(ids[:, 1 + d:], (0, 1 + d), value=-100) for d in range(2)], -1)
    targets[0, [2, 3]] = targets[0, 7:] = -100
    whole = model.train()(ids[:, :8], cu_seqlens=[0, 4, 8], targets=targets[:, :8])
    padded = model(ids, cu_seqlens=[0, 4, 8, 12], targets=targets, text_mask=torch.arange(12)[None] < 8)
    close(dict(padded.losses), dict(whole.losses))
    close(padded.stats, whole.stats)


def test_parts_of_a_global_batch_are_weighted_by_their_text():
    model = system("kda").train()
    ids, mask = rows(6)
    whole = model(ids, labels=ids, text_mask=mask)
    counts = [int((mask[:, 1 + d:]).sum()) for d in range(2)]
    batch = GlobalBatch(tuple(counts), int(mask.sum()))
    parts = [model(ids[r:r + 1], labels=ids[r:r + 1], text_mask=mask[r:r + 1], global_batch=batch) for r in range(2)]
    assert sum(float(part.batch_fraction) for part in parts) == pytest.approx(1)
    for name in ("lm", "mtp", "balance"):
        close(parts[0].losses[name] + parts[1].losses[name], whole.losses[name])


SELECTORS = ["deepseek_v32", "attention_pooled", "shared_selection", "seer_r", "csa"]  # of keys, pools, blocks, entries


@pytest.mark.parametrize(("name", "mode"), [("llama", None), *((name, mode) for name in SELECTORS
                                                              for mode in ("dense", "sparse"))])
@pytest.mark.parametrize("text", [17, 10])  # of 24 tokens: padding in the second of two shards, or nothing else there
def test_padding_counts_nowhere_where_rows_are_divided(name, mode, text):
    ids = torch.randint(VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(5))
    mask = torch.arange(24)[None] < text
    targets = torch.stack([F.pad(ids[:, 1 + d:], (0, 1 + d), value=-100) for d in range(2)], -1)
    targets[0, text - 1:, 0] = targets[0, text - 2:, 1] = -100
    options = {"cu_seqlens": [0, 8, text, 24], "targets": targets, "text_mask": mask,
               "global_batch": GlobalBatch(tuple(int((targets[..., d] != -100).sum()) for d in range(2)), text)}

    def ready():
        model = system(name).train()
        for mixer in (module for module in model.modules() if isinstance(module, SequenceMixer)):
            mixer.set_attention(mode, {})
            mixer.measure_selection(True)
        return model

    def measured(model):
        output = model(ids, **options)
        output.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        stats = {name: value * output.batch_fraction for name, value in output.stats.items()
                 if not name.startswith(COMPUTED_FROM_LOADS) and not name.endswith(("_min", "_max"))}
        return (dict(output.losses), {name: load.clone() for name, load in model.router_loads().items()}, gradients,
                stats)

    copies = [ready() for _ in range(2)]

    def shard(group):
        copies[group.rank].shard_group = group
        return measured(copies[group.rank])

    losses, loads, gradients, stats = measured(ready())
    parts = run_on_threads(shard, 2)
    assert sum(int(load.sum()) for load in loads.values()) == 4 * text  # two layers of experts, two experts per token
    for layer, load in loads.items():
        assert torch.equal(sum(part[1][layer] for part in parts), load)
    assert mode is None or {"kl", "recall"} <= {stat.partition("_")[2] for stat in stats}
    rounding = {"rtol": 1e-6, "atol": 1e-8}  # the fraction of the batch is a number in fp32
    for which, whole in ((0, losses), (2, gradients), (3, stats)):
        for key, value in whole.items():
            found = sum(part[which].get(key, torch.zeros_like(value)) for part in parts)
            torch.testing.assert_close(found, value, **rounding, msg=lambda m, key=key: f"{key}: {m}")


def test_what_cannot_be_is_refused():
    model = system("kda").eval()
    ids, mask = rows(2)
    with pytest.raises(ValueError, match="every token of the batch is padding"):
        model(ids, text_mask=torch.zeros_like(mask))
    with pytest.raises(ValueError, match="padding cannot be decoded"):
        model(ids, text_mask=mask, state=model.new_state(2, 40))
    with pytest.raises(ValueError, match=r"text_mask must be \[2, 16\]; got \[2, 3\]"):
        model(ids, text_mask=mask[:, :3])
    assert decode(model, ids[:, :5]).shape[1] == 5


def test_borders_of_the_text_are_those_of_its_documents():
    mask = torch.tensor([[True, False, True, True], [False, False, True, False]])
    text = TextTokens.of(mask, CuSeqlens([0, 2, 4, 6, 8]))
    assert text.borders.host == (0, 1, 3, 4)
    x = torch.arange(8.0).view(2, 4, 1)
    assert text.pack(x)[0, :, 0].tolist() == [0, 2, 3, 6]
    assert torch.equal(text.unpack(text.pack(x)), x * mask[..., None])
    assert TextTokens.of(torch.ones_like(mask)) is None


def test_systems_have_losses_of_experts_and_indexers():
    """The cases above would show padding in either of them."""
    found = measure(system("deepseek_v32"), *rows(0))
    assert {"balance", "indexer_kl", "mtp", "router_entropy", "indexer_entropy"} <= found.keys()
