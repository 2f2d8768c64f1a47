"""Layers that share compressed entries, index keys and selections (CSA2): against their definition, token by token."""

import itertools

import pytest
import torch

from hybridlm.errors import ConfigError
from hybridlm.model.mixers import CompressedAttentionConfig, EntryIndexerConfig, build_mixer
from hybridlm.model.mixers.common.entry_indexer_config import CandidateConfig
from hybridlm.model.mixers.common.entry_sharing import ENTRY_SELECTION, INDEX_KEYS
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels.packing import CuSeqlens
from tests.support.mixer_cases import build_layers, context_of, inputs
from tests.support.mixer_forms.compressed_attention import FORMS, READERS, SIZES

LENGTH = 23
FULL, TOP = FORMS["csa2"], FORMS["csa2_candidates"]
REUSE, REINDEX = READERS["csa2_reuse"][0], READERS["csa2_reindex"][0]
LOWER, UPPER = [FULL, REUSE], [TOP, REUSE, REINDEX, REUSE]


def norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def turned(x, position, mixer, sign=1):
    """The last dims of x, rotated pair by pair."""
    dim = mixer.rotary_dim
    angle = sign * position * mixer.config.rope.theta ** (-torch.arange(0, dim, 2).double() / dim)
    angle = angle.float().double()
    even, odd = x[..., -dim::2], x[..., -dim + 1 :: 2]
    pairs = torch.stack([even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()], -1)
    return torch.cat([x[..., :-dim], pairs.flatten(-2)], -1)


class Definition:
    """A stack on one document, as the published inference code computes it: what is shared is whatever came last."""

    def __init__(self):
        self.entries = self.keys = self.ratio = self.lists = self.marked = None
        self.losses = []  # the loss of the indexer of each layer

    def layer(self, mixer, x):
        config, length = mixer.config, len(x)
        latent = norm(mixer.q_a_proj(x), mixer.q_a_norm.weight)
        q, near = mixer.q_b_proj(latent).view(length, 4, 8), norm(mixer.kv_proj(x), mixer.kv_norm.weight)
        if mixer.entries is not None:
            self.make(mixer, x)
        if mixer.indexer is not None:
            self.select(mixer, x.detach(), latent.detach())
        rows, total, count = [], 0.0, 0
        for t in range(length):
            query = turned(q[t], t, mixer) / 8**0.5
            window = torch.stack([turned(near[s], s, mixer) for s in range(max(0, t - config.window + 1), t + 1)])
            read = self.lists[t]
            keys = torch.cat([window, self.entries[read]])
            p = torch.cat([mixer.sinks[:, None], query @ keys.T], 1).softmax(-1)[:, 1:]
            o = turned(p @ keys, t, mixer, -1)
            low = torch.einsum("prx,px->pr", mixer.output.down, o.reshape(2, 16))
            rows.append(mixer.output.up_proj(low.flatten()))
            if read:
                target = p[:, len(window) :].detach().sum(0)
                target = target / target.sum()
                total += (target * (target.log() - self.scores[t][read].log_softmax(0))).sum()
                count += 1
        self.losses.append(total / count)
        return torch.stack(rows)

    def make(self, mixer, x):
        made, m = mixer.entries, mixer.config.ratio
        groups = range(len(x) // m)
        c = torch.stack([made.kv_proj(x[i * m : i * m + m]) for i in groups])
        if m > 1:
            z = torch.stack([made.gate_proj(x[i * m : i * m + m]) for i in groups])
            c = (z.softmax(1) * c).sum(1, keepdim=True)
        plain = norm(c[:, 0], made.norm.weight)
        keys = norm(mixer.indexer.k_proj(plain.detach()), mixer.indexer.k_norm.weight)
        self.entries = torch.stack([turned(plain[i], i * m, mixer) for i in groups])
        self.keys = torch.stack([turned(keys[i], i * m, mixer) for i in groups])
        self.ratio, self.marked = m, None

    def select(self, mixer, x, latent):
        indexer, config = mixer.indexer, mixer.indexer.config
        heads, dim = config.num_heads, config.head_dim
        self.lists, self.scores, marked = [], [], []
        for t in range(len(x)):
            q = turned(indexer.q_proj(latent[t]).view(heads, dim), t, mixer)
            seen = self.keys[: (t + 1) // self.ratio]
            score = (indexer.weights_proj(x[t]) / (dim * heads) ** 0.5) @ (q @ seen.T).relu()
            allowed = set(range(len(seen)))
            if self.marked is not None:
                allowed = {i for i in allowed if i // 3 in self.marked[t]}
            values = score.tolist()
            order = sorted(allowed, key=lambda i, values=values: (-values[i], i))
            self.lists.append(sorted(order[: config.topk]))
            self.scores.append(score)
            best = [score[b : b + 3].max().item() for b in range(0, len(seen), 3)]
            newest = (len(seen) - 1) // 3
            blocks = sorted(range(len(best)), key=lambda b, best=best, n=newest: (b != n, -best[b], b))
            marked.append(set(blocks[:2]))
        if config.candidates is not None:
            self.marked = marked


@pytest.mark.parametrize("configs", [LOWER, UPPER, [*LOWER, *UPPER]])
def test_a_stack_equals_its_definition_and_so_do_all_gradients(configs):
    """The outputs, the losses of the indexers, and the gradients of both together."""
    layers = build_layers(*configs)
    x = inputs(len(configs), LENGTH).requires_grad_()
    seq, definition = SequenceInfo.make(1, LENGTH, x.device), Definition()
    found, losses = [], []
    for layer, row in zip(layers, x, strict=True):
        y, aux = layer.train()(row[None], seq)
        found.append(y[0])
        losses.append(aux["loss/indexer_kl"])
    expected = [definition.layer(layer, row) for layer, row in zip(layers, x, strict=True)]
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.stack(losses), torch.stack(definition.losses), rtol=1e-5, atol=1e-6)
    parameters = [x, *(p for layer in layers for p in layer.parameters())]
    gradients = [torch.autograd.grad(sum(y.square().sum() for y in ys) + sum(kls), parameters)
                 for ys, kls in ((found, losses), (expected, definition.losses))]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_losses_of_readers_train_the_indexers_that_they_read_and_nothing_else():
    layers = build_layers(*UPPER)
    seq = SequenceInfo.make(1, LENGTH, torch.device("cpu"))
    losses = [layer.train()(x[None], seq)[1]["loss/indexer_kl"] for layer, x in zip(
        layers, inputs(len(UPPER), LENGTH), strict=True)]
    own = {f"0.indexer.{name}" for name, _ in layers[0].indexer.named_parameters()}
    reindex = {f"2.indexer.{name}" for name, _ in layers[2].indexer.named_parameters()}
    keys = {"0.indexer.k_proj.weight", "0.indexer.k_norm.weight"}
    for loss, expected in zip(losses, [own, own, reindex | keys, reindex | keys], strict=True):
        for layer in layers:
            layer.zero_grad()
        loss.backward(retain_graph=True)
        learned = {f"{i}.{name}" for i, layer in enumerate(layers) for name, parameter in layer.named_parameters()
                   if parameter.grad is not None}
        assert learned == expected


@torch.no_grad()
def test_packed_documents_mark_the_candidates_of_each_alone():
    """Blocks of candidates count from the first entry of a document, wherever that stands in the row."""
    borders = [0, 1, 14, 23, 27, 46]
    layers, x = build_layers(*UPPER), inputs(2, LENGTH)
    together = SequenceInfo.make(2, LENGTH, x.device, CuSeqlens(borders))
    packed = [layer.eval()(x, together)[0].flatten(0, 1) for layer in layers]
    for a, b in itertools.pairwise(borders):
        alone = SequenceInfo.make(1, b - a, x.device)
        for layer, y in zip(layers, packed, strict=True):
            torch.testing.assert_close(y[a:b], layer(x.flatten(0, 1)[None, a:b], alone)[0][0])


@torch.no_grad()
@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_a_stack_is_decoded_as_it_is_computed_and_only_sources_keep_entries(mode):
    layers, x = build_layers(*UPPER), inputs(2, LENGTH)
    for layer in layers:
        layer.eval().attention_mode = mode
    seq = SequenceInfo.make(2, LENGTH, x.device)
    expected = [layer(x, seq)[0] for layer in layers]
    states, found = [layer.new_state(2, LENGTH) for layer in layers], []
    for start, piece in zip((0, 9, 10, 11, 14), x.split([9, 1, 1, 3, 9], 1), strict=True):
        seq = SequenceInfo.make(2, piece.shape[1], x.device, offset=start)
        found.append([layer(piece, seq, state)[0] for layer, state in zip(layers, states, strict=True)])
    for parts, y in zip(zip(*found, strict=True), expected, strict=True):
        torch.testing.assert_close(torch.cat(parts, 1), y, rtol=1e-9, atol=1e-9)
    assert [state.entries is not None for state in states] == [True, False, False, False]
    for index, (layer, state) in enumerate(zip(layers, states, strict=True)):
        context = context_of(layer_index=index, layers=UPPER)
        assert 2 * layer.config.state_bytes(context, LENGTH, 8) == state.num_bytes


@torch.no_grad()
def test_a_budget_of_candidates_that_covers_the_row_filters_nothing():
    everything = [CompressedAttentionConfig(**{**vars(TOP), "indexer": EntryIndexerConfig(**{
        **vars(TOP.indexer), "candidates": candidates})}) for candidates in (None, CandidateConfig(block=3, topk=8))]
    outputs = []
    for top in everything:
        seq = SequenceInfo.make(1, LENGTH, torch.device("cpu"))
        outputs.append([layer(inputs(1, LENGTH), seq)[0] for layer in build_layers(top, REINDEX)])
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    filtered = [layer(inputs(1, LENGTH), seq)[0] for layer in build_layers(TOP, REINDEX)]
    assert torch.equal(filtered[0], outputs[0][0])
    assert not torch.equal(filtered[1], outputs[0][1])


def test_what_no_layer_reads_is_not_left():
    seq = SequenceInfo.make(1, LENGTH, torch.device("cpu"))
    for layer in build_layers(FULL, FULL, READERS["hca_with_earlier_entries"][0]):
        layer(inputs(1, LENGTH), seq)
    with pytest.raises(RuntimeError, match="layer 0 has not left index keys"):
        seq.read(INDEX_KEYS, 0)
    with pytest.raises(RuntimeError, match="layer 0 has not left the entries that an indexer selects"):
        seq.read(ENTRY_SELECTION, 0)


def test_an_indexer_is_idle_only_where_no_reader_trains_it():
    layers = build_layers(*UPPER)
    for layer in layers[:3]:
        layer.set_attention("sparse", {"indexer_kl": 0.0})
    for i, layer in enumerate(layers):
        layer.freeze_idle_parameters(layers[i + 1 :])
    assert [all(p.requires_grad for p in layers[i].indexer.parameters()) for i in (0, 2)] == [True, True]
    layers[3].set_attention("sparse", {"indexer_kl": 0.0})
    for i, layer in enumerate(layers):
        layer.freeze_idle_parameters(layers[i + 1 :])
    assert not any(p.requires_grad for i in (0, 2) for p in layers[i].indexer.parameters())


def reader(indexer=None, **options):
    return CompressedAttentionConfig(**{**SIZES, "share_entries": True, "ratio": 2, **options}, indexer=indexer)


OWN = {"num_heads": 2, "head_dim": 6, "topk": 3}


@pytest.mark.parametrize(("layers", "message"), [
    ([reader()], "share_entries: layer 0 reads compressed entries, which no earlier layer leaves; expected an "
                 "earlier layer that leaves it: none does"),
    ([FULL, reader(head_dim=16)], "head_dim: reads entries of another form, those of layer 0; got 16; expected 8"),
    ([FULL, reader(rope_head_dim=2)], "rope_head_dim: reads entries of another form, those of layer 0; got 2"),
    ([FORMS["hca"], reader(EntryIndexerConfig(**OWN), ratio=7)],
     "indexer: layer 1 reads index keys of entries, which no layer 0 leaves"),
    ([FULL, reader(EntryIndexerConfig(**OWN), ratio=4)], "ratio: selects among entries of layer 0; got 4; expected 2"),
    ([FULL, reader(EntryIndexerConfig(**OWN), ratio=None)],
     "ratio: selects among entries of layer 0; got 'null'; expected 2"),
    ([FULL, reader(source=7)], "source: layer 1 reads compressed entries, which no layer 7 leaves; expected an earlier "
                               "layer that leaves it: 0 ("),
    ([FULL, reader(EntryIndexerConfig(**{**OWN, "head_dim": 4}))],
     "indexer.head_dim: scores the index keys of layer 0; got 4; expected 6"),
    ([TOP, reader(EntryIndexerConfig(**{**OWN, "topk": 7}), ratio=1)],
     "indexer.topk: selects among the candidates of layer 0; got 7; expected at most 6"),
    ([FULL.with_attention_mode("dense"), REUSE],
     "indexer.mode: shares the selection of layer 0, which reads all entries and selects none; got 'sparse'"),
    ([FULL, FORMS["hca"], REUSE], "indexer.share: reads the selection of layer 0, which is of other entries; got "
                                  "'entries of layer 0'; expected entries of layer 1"),
])
def test_layers_that_do_not_fit_are_refused_in_one_line(layers, message):
    context = context_of(layer_index=len(layers) - 1, layers=layers)
    with pytest.raises(ConfigError) as caught:
        build_mixer(layers[-1], context).config.check_sources(context)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(("options", "message"), [
    ({"source": 0}, "source: names a layer whose entries are read; got 0; expected null, or share_entries=true"),
    ({"indexer": EntryIndexerConfig(share=True)},
     "indexer.share: needs the entries of that layer; got 'share_entries=false'; expected share_entries=true"),
    ({"share_entries": True, "indexer": EntryIndexerConfig(candidates=CandidateConfig())},
     "indexer.candidates: are marked by the layer that makes the entries; got 'share_entries=true'"),
])
def test_options_that_contradict_each_other_are_one_line(options, message):
    with pytest.raises(ConfigError) as caught:
        CompressedAttentionConfig(**SIZES, **options)
    assert str(caught.value).startswith(message)
