"""Layers that read the blocks an earlier layer's attention chooses (HySparse), against the definition, by query."""

import pytest
import torch

from hybridlm.errors import ConfigError
from hybridlm.model.mixers import AttentionConfig, SharedAttentionConfig, build_mixer
from hybridlm.model.mixers.common.chosen_blocks import CHOSEN_BLOCKS, ChosenBlocksConfig
from hybridlm.model.mixers.common.key_sharing import rotated_heads
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels.packing import CuSeqlens
from tests.support.kernel_compare import LargestTensor
from tests.support.mixer_cases import context_of, inputs
from tests.support.mixer_forms.readers import READERS

LENGTH = 31
CASES = ("hysparse", "hysparse2")


def layers(name, dtype=torch.float64, **changed):
    """The choosing layer and the reader, with weights away from neutral values; `changed`: options of the choice."""
    reader, source = READERS[name]
    for key, value in changed.items():
        choice = ChosenBlocksConfig(**{**vars(source.choose_blocks), key: value})
        source = AttentionConfig(**{**vars(source), "choose_blocks": choice})
    torch.manual_seed(0)
    found = []
    for index, config in enumerate((source, reader)):
        mixer = build_mixer(config, context_of(layer_index=index, layers=(source, reader)))
        mixer.init_weights(0.5)
        for parameter in mixer.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        found.append(mixer.to(dtype))
    return found


def run(source, reader, x_source, x, borders=None):
    """Outputs of the reader, and the lists that it read."""
    seq = SequenceInfo.make(x.shape[0], x.shape[1], x.device, None if borders is None else CuSeqlens(borders))
    source(x_source, seq)
    return reader(x, seq)[0], seq.read(CHOSEN_BLOCKS, 0)


def softmax_with_sink(scores, sink):
    """Softmax over the scores and a logit without value."""
    return torch.cat([scores, *([] if sink is None else [sink[None]])]).softmax(0)[: len(scores)]


def chosen_keys(t, q_HK, k_SGK, config, sinks_H):
    """The keys that each key/value head's list holds for token t, from the whole attention of the source."""
    choice, heads, groups = config.choose_blocks, config.num_heads, config.kv_heads
    block, own = choice.block, t // choice.block
    pool = {"max": torch.amax, "sum": torch.sum}
    lists = []
    for g in range(groups):
        mass = []
        for h in range(g * heads // groups, (g + 1) * heads // groups):
            scores = k_SGK[: t + 1, g] @ q_HK[h] / config.head_dim**0.5
            p = softmax_with_sink(scores, None if sinks_H is None else sinks_H[h])
            mass.append(torch.stack([pool[choice.pooling](p[j * block : (j + 1) * block], 0) for j in range(own + 1)]))
        mass = pool[choice.heads](torch.stack(mass), 0)
        forced = [j for j in range(own + 1) if j < choice.first or j > own - choice.local]
        others = sorted((j for j in range(own + 1) if j not in forced), key=lambda j: (-float(mass[j]), j))
        blocks = (forced + others)[: choice.topk]
        lists.append(sorted(s for j in blocks for s in range(j * block, min((j + 1) * block, t + 1))))
    return lists


@torch.no_grad()
@pytest.mark.parametrize(("name", "changed"), [("hysparse", {}), ("hysparse2", {}), ("hysparse2", {"heads": "max"}),
                                               ("hysparse", {"pooling": "sum", "first": 1})])
def test_it_equals_its_definition(name, changed):
    source, reader = layers(name, **changed)
    x_source, x = inputs(1, LENGTH), inputs(1, LENGTH, seed=7)
    seq = SequenceInfo.make(1, LENGTH, x.device)
    q_source, k = (source._heads(projection(x_source), norm, seq)[0] for projection, norm in (
        (source.q_proj, source.q_norm), (source.k_proj, source.k_norm)))
    v = source.v_proj(x_source).view(LENGTH, -1, 8)

    def rotated(projected, norm):
        return rotated_heads(projected, norm, reader.config.q_norm, 8, reader.layout.rope, seq)[0]

    q = rotated(reader.q_proj(x), reader.q_norm)
    heads, near = q.shape[1], reader.near_branch
    far_o, near_o = torch.zeros(LENGTH, heads, 8, dtype=x.dtype), torch.zeros(LENGTH, heads, 8, dtype=x.dtype)
    for t in range(LENGTH):
        lists = chosen_keys(t, q_source[t], k, source.config, source.sinks)
        for h in range(heads):
            g = h * k.shape[1] // heads
            p = softmax_with_sink(k[lists[g], g] @ q[t, h] / 8**0.5, None if reader.sinks is None else reader.sinks[h])
            far_o[t, h] = p @ v[lists[g], g]
            if near is not None:
                own_k, own_v = rotated(near.k_proj(x), near.k_norm), near.v_proj(x).view(LENGTH, -1, 8)
                keys = list(range(max(0, t - near.window + 1), t + 1))
                near_o[t, h] = softmax_with_sink(own_k[keys, g] @ q[t, h] / 8**0.5, near.sinks[h]) @ own_v[keys, g]
    o = far_o.flatten(1)
    if near is not None:
        o = o * reader.g_proj(x[0]).sigmoid() + near_o.flatten(1) * near.g_proj(x[0]).sigmoid()
    torch.testing.assert_close(run(source, reader, x_source, x)[0][0], reader.o_proj(o), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_a_budget_that_covers_the_row_reads_all_keys(name, monkeypatch):
    found = []
    for selects in (True, False):
        source, reader = layers(name, topk=40)
        monkeypatch.setattr(ChosenBlocksConfig, "selects", lambda config, length, selects=selects: selects)
        x_source, x = inputs(2, LENGTH).requires_grad_(), inputs(2, LENGTH, seed=7).requires_grad_()
        y, chosen = run(source, reader, x_source, x, [0, 5, 31, 40, 62])
        assert (chosen is not None) == selects
        y.square().sum().backward()
        found.append([y, x.grad, x_source.grad, *(p.grad for p in reader.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_gradients_reach_the_keys_and_values_of_the_source_alone(name):
    source, reader = layers(name)
    y, chosen = run(source, reader, inputs(1, LENGTH), inputs(1, LENGTH, seed=7))
    assert chosen is not None
    y.square().sum().backward()
    reached = {n for n, p in source.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == {"k_proj.weight", "v_proj.weight", *(["k_norm.weight"] if source.k_norm is not None else [])}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in reader.parameters())


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_the_number_of_keys_read_is_that_of_the_chosen_blocks(name):
    length = 61
    chosen_LGN = run(*layers(name), inputs(1, length), inputs(1, length))[1][0]
    choice = READERS[name][1].choose_blocks
    read_LGN = (torch.arange(1, length + 1)[:, None, None] - chosen_LGN * choice.block).clamp(max=choice.block)
    keys = read_LGN.masked_fill(chosen_LGN < 0, 0).sum(-1).double().mean()
    assert choice.read_keys(length) == pytest.approx(float(keys))


def test_equal_masses_go_to_the_earlier_block():
    source, reader = layers("hysparse")
    torch.nn.init.zeros_(source.q_proj.weight)
    chosen = run(source, reader, inputs(1, LENGTH), inputs(1, LENGTH))[1]
    expected = [sorted({0, min(1, t // 4), t // 4}) for t in range(LENGTH)]
    assert [sorted(set(row) - {-1}) for row in chosen[0, :, 0].tolist()] == expected


@pytest.mark.parametrize("name", CASES)
def test_memory_of_training_grows_with_the_length_not_with_its_square(name, monkeypatch):
    source, reader = layers(name, torch.float32)
    monkeypatch.setattr("hybridlm.model.mixers.common.block_selection.PIECE_ELEMENTS", 2**12)

    def largest(length):
        x = inputs(1, length, torch.float32)
        with LargestTensor() as seen:
            run(source, reader, x, x)[0].sum().backward()
        return seen.numel

    assert largest(1600) <= 2.2 * largest(800)
    assert largest(800) < 800 * 800


def test_readers_take_the_layer_that_chooses_and_no_other():
    source, plain = READERS["hysparse"][1], AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=8)
    reader = SharedAttentionConfig(blocks=True)
    mixer = build_mixer(reader, context_of(layer_index=3, layers=[source, source, plain, reader]))
    assert (mixer.source, mixer.layout.num_kv_heads) == (1, 2)
    first = build_mixer(source, context_of(layer_index=0, layers=[source, source, plain, reader]))
    second = build_mixer(source, context_of(layer_index=1, layers=[source, source, plain, reader]))
    assert (first.blocks_are_read, second.blocks_are_read) == (False, True)
    with pytest.raises(ConfigError, match="blocks: layer 1 reads the blocks that attention chooses, which no earlier"):
        build_mixer(reader, context_of(layer_index=1, layers=[plain, reader]))


@pytest.mark.parametrize(("make", "message"), [
    (lambda: ChosenBlocksConfig(topk=2, first=2), "topk: must hold the blocks that are always read; got 2; expected"),
    (lambda: ChosenBlocksConfig(local=0), "local: must hold the token's own block; got 0; expected at least 1"),
    (lambda: AttentionConfig(num_heads=2, head_dim=8, window=4, choose_blocks=ChosenBlocksConfig()),
     "window: cannot stand beside choose_blocks, which chooses among all keys; got 4; expected null"),
    (lambda: SharedAttentionConfig(blocks=True, window=4), "window: cannot stand beside blocks; got 4"),
    (lambda: SharedAttentionConfig(near=4), "output_gate: must join the two parts where `near` adds a window"),
])
def test_a_wrong_option_is_one_line(make, message):
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value).startswith(message)
