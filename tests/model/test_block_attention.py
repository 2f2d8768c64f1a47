"""Attention to selected blocks against its definition, written again query by query."""

import pytest
import torch

from hybridlm.errors import ConfigError
from hybridlm.model.contract_check import Subject
from hybridlm.model.mixers import AttentionConfig, BlockAttentionConfig
from hybridlm.model.mixers import block_attention as room
from hybridlm.model.mixers.selectors import CompressedSelectorConfig, IndexHeadsSelectorConfig
from hybridlm.model.rope import rotate
from hybridlm.model.sequence import SequenceInfo
from tests.support.kernel_compare import LargestTensor
from tests.support.mixer_cases import CASES, build, inputs, run, subject
from tests.support.mixer_forms.block_attention import FORMS, HEADS

LENGTH = 33


def rotated(x_LHD, mixer, positions):
    """Vectors [L, H, D] rotated to the given positions."""
    seq = SequenceInfo(torch.as_tensor(positions).view(1, -1))
    return rotate(x_LHD[None], mixer.config.rope, mixer.config.rope.rotary_dim(x_LHD.shape[-1]), seq)[0]


def raw_heads(mixer, x):
    """Queries and keys before their rotation, each [L, heads, 8]."""
    pairs = (mixer.q_proj, mixer.q_norm), (mixer.k_proj, mixer.k_norm)
    return [mixer._heads(projection(x), norm)[0] for projection, norm in pairs]


def means(t, q, k, raw, x, mixer):
    """MoBA: product with the mean key of each complete block, per query head."""
    b = mixer.config.block
    return torch.stack([torch.stack([q[t, h] @ k[j * b : (j + 1) * b, h // 2].mean(0) for h in range(4)])
                        for j in range((t + 1) // b)], 1)


def group_means(t, q, k, raw, x, mixer):
    return means(t, q, k, raw, x, mixer).view(2, 2, -1).sum(1)


def bounds(t, q, k, raw, x, mixer):
    """Quest: the largest product that any key within the block's bounds could have."""
    b, found = mixer.config.block, []
    for j in range((t + 1) // b):
        keys = k[j * b : (j + 1) * b]
        most, least = keys.amax(0), keys.amin(0)
        found.append(torch.stack([torch.maximum(q[t, h] * most[h // 2], q[t, h] * least[h // 2]).sum()
                                  for h in range(4)]))
    return torch.stack(found, 1)


def compressed(t, q, k, raw, x, mixer):
    """InfLLM-v2: windows of 4 tokens every 2, divided by the sum over windows of 16 every 8 where there is one."""
    def product(h, start, length):
        return q[t, h] @ k[start : start + length, h // 2].mean(0) / 8**0.5

    starts = [s for s in range(0, t, 2) if s + 4 <= t + 1]
    coarse = [s for s in range(0, t, 8) if s + 16 <= t + 1]
    p = torch.zeros(4, len(starts), dtype=q.dtype)
    for h in range(4):
        fine = torch.stack([product(h, s, 4) for s in starts])
        rest = torch.stack([product(h, s, 16) for s in coarse]) if coarse else fine
        p[h] = (fine - rest.logsumexp(0)).exp()
    p = p.view(2, 2, -1).sum(1)
    blocks = []
    for j in range((t + 1) // 4):
        over = [i for i, s in enumerate(starts) if s < 4 * j + 4 and s + 4 > 4 * j]
        blocks.append(p[:, over].amax(1))
    return torch.stack(blocks, 1)


def gate(t, q, k, raw, x, mixer):
    """SeerAttention-R: pooled keys before their rotation."""
    selector, b, found = mixer.selector, mixer.config.block, []
    query = torch.stack([raw[0][t, 2 * g : 2 * g + 2].flatten() @ selector.q_weight[g] for g in range(2)])
    query = rotated(query[None], mixer, [t])[0]
    for j in range((t + 1) // b):
        keys = raw[1][j * b : (j + 1) * b]
        pooled = torch.cat([keys.amax(0), keys.amin(0), keys.mean(0)], -1)
        key = torch.stack([pooled[g] @ selector.k_weight[g] for g in range(2)])
        found.append((query * rotated(key[None], mixer, [j * b])[0]).sum(-1))
    return torch.stack(found, 1)


def index_heads(t, q, k, raw, x, mixer):
    """MSA: the best token of a block, per group. QSA: one key per block, heads summed by relu."""
    selector, config, b = mixer.selector, mixer.config.selector, mixer.config.block
    dim = selector.k_norm.weight.shape[0]
    query = rotated(selector.q_norm(selector.q_proj(x[t]).view(1, -1, dim)), mixer, [t])[0]
    found = []
    for j in range((t + 1) // b):
        place = list(range(j * b, (j + 1) * b))
        tokens = selector.k_proj(x[place])
        if config.reduce == "max":
            keys = rotated(selector.k_norm(tokens)[:, None], mixer, place)[:, 0]
            found.append((keys @ query.T).amax(0))
        else:
            key = rotated(selector.k_norm(tokens.mean(0))[None, None], mixer, place[:1])[0, 0]
            found.append((query @ key).relu().sum()[None])
    return torch.stack(found, 1)


SCORES = {"moba": means, "group_means": group_means, "quest": bounds, "infllm_v2": compressed, "seer_r": gate,
          "msa": index_heads, "qsa": index_heads}


def chosen_keys(t, scores_UP, config):
    """The keys that each list reads, by the rules of `first`, `local` and `local_window`."""
    own, window = t // config.block, config.local_window or 0
    lists = []
    for score in scores_UP:
        compete = [j for j in range(len(score)) if (j < own or not config.local) and j * config.block <= t - window]
        forced = [j for j in compete if j < config.first or j > own - config.local]
        others = sorted((j for j in compete if j not in forced), key=lambda j: (-float(score[j]), j))
        taken = (forced + others)[: config.topk - (config.local > 0)]
        if config.local or (t + 1) % config.block:
            taken.append(own)
        blocks = {s for j in taken for s in range(j * config.block, min((j + 1) * config.block, t + 1))}
        lists.append(sorted(blocks | set(range(max(0, t - window + 1), t + 1))))
    return lists


@torch.no_grad()
@pytest.mark.parametrize("name", SCORES)
def test_it_equals_its_definition(name):
    mixer, x = build(name), inputs(1, LENGTH)
    config = mixer.config
    raw = raw_heads(mixer, x)
    q, k = (rotated(vectors, mixer, range(LENGTH)) for vectors in raw)
    v = mixer.v_proj(x).view(LENGTH, 2, 8)
    o = torch.zeros(LENGTH, 4, 8, dtype=x.dtype)
    for t in range(LENGTH):
        lists = [list(range(t + 1))] * 4
        if t + 1 > config.block:
            lists = chosen_keys(t, SCORES[name](t, q, k, raw, x[0], mixer), config)
        for h in range(4):
            keys = lists[h * len(lists) // 4]
            scores = k[keys, h // 2] @ q[t, h] / 8**0.5
            sink = [] if mixer.sinks is None else [mixer.sinks[h][None]]
            p = torch.cat([scores, *sink]).softmax(0)[: len(keys)]
            o[t, h] = p @ v[keys, h // 2]
    expected = mixer.o_proj(o.flatten(1) if mixer.g_proj is None else o.flatten(1) * mixer.g_proj(x[0]).sigmoid())
    torch.testing.assert_close(run(mixer, x)[0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in FORMS if not FORMS[name].selector.weighs])
def test_a_budget_that_covers_the_row_is_dense_attention(name, monkeypatch):
    mixer = build(name)
    mixer.set_topk(99 * mixer.config.block)
    found = []
    for mode in ("sparse", "dense"):
        mixer.attention_mode = mode
        monkeypatch.setattr(room, "longest_document", lambda keys, seq, mode=mode: 10**6 if mode == "sparse" else keys)
        mixer.zero_grad()
        x = inputs(2, 40).requires_grad_()
        y = run(mixer, x)
        y.square().sum().backward()
        grads = [p.grad for n, p in mixer.named_parameters() if not n.startswith("selector.")]
        found.append([y, x.grad, *(g.clone() for g in grads)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", ["dense", "sparse"])
@pytest.mark.parametrize("name", ["seer_r", "msa", "qsa"])
def test_the_loss_of_a_selector_is_the_divergence_of_attention_over_blocks_and_reaches_the_selector_alone(name, mode):
    mixer, x = build(name), inputs(1, LENGTH).requires_grad_()
    mixer.attention_mode = mode
    config = mixer.config
    _, aux = subject(name).run(mixer, x)
    aux["loss/selector_kl"].backward()
    assert x.grad is None
    reached = {n for n, p in mixer.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == {n for n, _ in mixer.named_parameters() if n.startswith("selector.")}
    with torch.no_grad():
        raw = raw_heads(mixer, x)
        q, k = (rotated(vectors, mixer, range(LENGTH)) for vectors in raw)
        terms, read = [], []
        for t in range(LENGTH):
            p = torch.stack([(k[: t + 1, h // 2] @ q[t, h] / 8**0.5).softmax(0) for h in range(4)])
            scores = torch.zeros(mixer.selector.lists, 0, dtype=x.dtype)
            if t + 1 >= config.block:
                scores = SCORES[name](t, q, k, raw, x[0], mixer)
            lists = chosen_keys(t, scores, config)
            for u, keys in enumerate(lists):
                heads = range(4 // len(lists) * u, 4 // len(lists) * (u + 1))
                read += [p[h, keys].sum() for h in heads]
                compete = [j for j in range(scores.shape[1]) if j < t // config.block or not config.local]
                if mode == "sparse":
                    compete = [j for j in compete if j * config.block in keys]
                if not compete:
                    continue
                pooled = torch.stack([torch.stack([p[h, j * config.block : (j + 1) * config.block] for h in heads])
                                      for j in compete], 1)
                target = (pooled.amax(2) if config.target == "max" else pooled.sum(2)).mean(0)
                target = target / target.sum()
                scale = mixer.selector.k_weight.shape[-1] if name == "seer_r" else mixer.selector.k_norm.weight.shape[0]
                log_p = (scores[u, compete] * scale**-0.5).log_softmax(0)
                terms.append((target * (target.log() - log_p)).sum())
    torch.testing.assert_close(aux["layer/selector_kl"], torch.stack(terms).mean(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(aux["layer/selector_recall"], torch.stack(read).mean(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["infllm_v2", "msa"])
def test_memory_of_training_grows_with_the_length_not_with_its_square(name, monkeypatch):
    mixer = build(name, torch.float32)
    monkeypatch.setattr("hybridlm.model.mixers.common.block_selection.PIECE_ELEMENTS", 2**12)
    monkeypatch.setattr("hybridlm.model.mixers.common.selector_loss.PIECE_ELEMENTS", 2**15)

    def largest(length):
        with LargestTensor() as seen:
            y, aux = subject(name).run(mixer, inputs(1, length, torch.float32))
            (y.sum() + sum(value for key, value in aux.items() if key.startswith("loss/"))).backward()
        return seen.numel

    assert largest(1600) <= 2.2 * largest(800) < 800 * 800


def selection(name, length):
    """Blocks [L, U, N] that a mixer chooses for each token of a random row, and the mixer."""
    mixer, x = build(name), inputs(1, length)
    seq = SequenceInfo.make(1, length, x.device)
    raw = [mixer._heads(projection(x), norm) for projection, norm in ((mixer.q_proj, mixer.q_norm),
                                                                      (mixer.k_proj, mixer.k_norm))]
    turned = [rotate(heads, mixer.config.rope, mixer.rotary_dim, seq) for heads in raw]
    index = mixer.selector(room.SelectorInputs(x, *turned, *raw, raw[0]), seq)
    with LargestTensor() as seen:
        chosen = room.choose_blocks(mixer.selector, index, mixer.config.budget)
    return chosen[0], mixer, seen.numel


@pytest.mark.parametrize("name", sorted(FORMS))
def test_scores_of_a_piece_of_queries_keep_to_their_bound(name, monkeypatch):
    monkeypatch.setattr("hybridlm.model.mixers.common.block_selection.PIECE_ELEMENTS", 2**14)
    with torch.no_grad():
        largest = selection(name, 400)[2]
    assert 2**11 < largest <= 2**14


@pytest.mark.parametrize("name", sorted(set(FORMS) - {"infllm_v2", "hils", "dash"}))
# of infllm_v2 the window overlaps the blocks; dash reads fewer where few have mass; the choice of hils needs the keys
def test_the_number_of_keys_read_is_that_of_the_chosen_blocks(name):
    length = 61
    with torch.no_grad():
        chosen_LUN, mixer, _ = selection(name, length)
    block = mixer.config.block
    read_LUN = (torch.arange(1, length + 1)[:, None, None] - chosen_LUN * block).clamp(max=block)
    keys = read_LUN.masked_fill(chosen_LUN < 0, 0).sum(-1).double().mean()
    assert mixer.config.read_keys(length) == pytest.approx(float(keys))


def test_equal_scores_go_to_the_earlier_block():
    mixer = build("moba")
    torch.nn.init.zeros_(mixer.k_proj.weight)
    x = inputs(1, LENGTH)
    index = mixer.selector(room.SelectorInputs(x, *(mixer._heads(p(x), None) for p in (
        mixer.q_proj, mixer.k_proj, mixer.q_proj, mixer.k_proj, mixer.q_proj))), SequenceInfo.make(1, LENGTH, x.device))
    chosen = room.choose_blocks(mixer.selector, index, mixer.config.budget)
    assert chosen[0, :, 0].tolist() == [[0 if t >= 5 else -1, t // 5] for t in range(LENGTH)]


@pytest.mark.parametrize(("options", "message"), [
    ({"topk": 0}, "topk: must be positive"),
    ({"topk": 2, "first": 1, "local": 2}, "topk: must hold the blocks that are always read; got 2; expected at least"),
    ({"local": -1}, "local: must not be negative"),
    ({"qk_norm": "full"}, "qk_norm: is per head or none"),
    ({"block": 6, "selector": CompressedSelectorConfig(stride=4)}, "selector.stride: must divide the block"),
    ({"selector": CompressedSelectorConfig(length=5, stride=2)}, "selector.length: must be a multiple of the stride"),
    ({"selector": IndexHeadsSelectorConfig(num_heads=3)}, "selector.num_heads: must be a multiple of the lists"),
])
def test_a_wrong_option_is_one_line(options, message):
    with pytest.raises(ConfigError) as caught:
        BlockAttentionConfig(**HEADS, **{"block": 4, **options})
    assert str(caught.value).startswith(message)


def test_it_takes_all_weights_of_the_attention_that_it_replaces():
    old, new = CASES["qwen3_next_full"], BlockAttentionConfig(**HEADS)
    new = new.adapted_to(old)
    tensors = dict(build("qwen3_next_full").named_parameters())
    assert (new.rope, new.qk_norm, new.output_gate) == (old.rope, "head", "element")
    taken = new.initial_weights_from(old, tensors, subject("qwen3_next_full").context.norm)
    assert taken.keys() == tensors.keys()
    assert new.can_start_from(old)


@pytest.mark.parametrize("qk_norm", ["none", "head"])
def test_a_fixed_factor_of_keys_goes_into_the_projection(qk_norm):
    context = subject("qwen3_next_full").context
    old = AttentionConfig(**HEADS, qk_norm=qk_norm, qkv_bias=True, key_scale=0.25)
    module = Subject(old, context).build(torch.float64, 0)
    tensors = dict(module.named_parameters())
    new = BlockAttentionConfig(**HEADS, block=4, topk=2, mode="dense").adapted_to(old)
    converted = Subject(new, context).build(torch.float64, 1)
    converted.load_state_dict(new.initial_weights_from(old, tensors, context.norm))
    x = inputs(1, LENGTH)
    torch.testing.assert_close(run(converted, x), run(module, x))
    moved = AttentionConfig(**HEADS, qk_norm=qk_norm, key_scale=2.0)
    taken = moved.initial_weights_from(old, dict(tensors), context.norm)["k_proj.weight"]
    by_norm = 1.0 if module.k_norm is None else (module.k_norm.weight + context.norm.zero_centered).repeat(2)[:, None]
    torch.testing.assert_close(2.0 * taken, 0.25 * tensors["k_proj.weight"] * by_norm)
