"""Native sparse attention against its definition, written again query by query."""

import pytest
import torch

from hybridlm.errors import ConfigError
from hybridlm.model.mixers import NSAConfig
from hybridlm.model.mixers.common.overlap import overlap_counts
from hybridlm.model.rope import rotate
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels.ops.range_attention import ranges
from tests.support.kernel_compare import LargestTensor
from tests.support.mixer_cases import build, inputs, run
from tests.support.mixer_forms.nsa import FORMS, SIZES

LENGTH = 31


def rotated(x_LHD, mixer, positions):
    seq = SequenceInfo(torch.as_tensor(positions).view(1, -1))
    return rotate(x_LHD[None], mixer.config.rope, mixer.rotary_dim, seq)[0]


def entry(mixer, k, v, start):
    """Key, rotated, and value of the window that starts at a token: [G, K] each."""
    config, compressor = mixer.config, mixer.compressor
    window = slice(start, start + config.length)
    if config.compression == "mean":
        key, value = k[window].mean(0), v[window].mean(0)
    elif config.compression == "weighted":
        weight = compressor.weight.softmax(1)[..., None]
        key, value = (weight[0] * k[window]).sum(0), (weight[1] * v[window]).sum(0)
    else:
        key = torch.stack([(k[window] + compressor.places)[:, g].flatten() @ compressor.k_weight[g] for g in range(2)])
        value = torch.stack([v[window][:, g].flatten() @ compressor.v_weight[g] for g in range(2)])
    return rotated(key[None], mixer, [start])[0], value


@torch.no_grad()
@pytest.mark.parametrize("name", FORMS)
def test_it_equals_its_definition(name):
    mixer, x = build(name), inputs(1, LENGTH)
    config = mixer.config
    q = rotated(mixer.q_proj(x)[0].view(LENGTH, 4, 8), mixer, range(LENGTH))
    sets = [(weights @ x[0].T).T.view(LENGTH, -1, 2, 8).unbind(1) for weights in (mixer.k_proj.weight,
                                                                                 mixer.v_proj.weight)]
    made = {start: entry(mixer, sets[0][0], sets[1][0], start)
            for start in range(0, LENGTH - config.length + 1, config.stride)}
    keys_of = [rotated(k, mixer, range(LENGTH)) for k in sets[0]]
    gates = mixer.gate_proj(x[0]).sigmoid().view(LENGTH, 4, 3)
    o = torch.zeros(LENGTH, 4, 8, dtype=x.dtype)
    for t in range(LENGTH):
        starts = [start for start in made if start + config.length <= t + 1]
        own = t // config.block
        for g in range(2):
            p = torch.zeros(2, len(starts), dtype=x.dtype)
            for r in range(2):
                h = 2 * g + r
                if starts:
                    p[r] = torch.stack([made[start][0][g] @ q[t, h] / 8**0.5 for start in starts]).softmax(0)
                    o[t, h] += gates[t, h, 0] * p[r] @ torch.stack([made[start][1][g] for start in starts])
            score = {}
            for j in range(own):  # each pair of a stride of the block and a stride of a window that are the same tokens
                strides = range(j * config.block, (j + 1) * config.block, config.stride)
                score[j] = sum(float(p[:, i].sum()) for i, start in enumerate(starts) for s in strides
                               if s in range(start, start + config.length, config.stride))
            forced = {j for j in range(own + 1) if j < config.first or j > own - config.local}
            others = sorted(score.keys() - forced, key=lambda j: (-score[j], j))
            blocks = sorted(forced) + others[: config.topk - len(forced)]
            listed = [s for j in blocks for s in range(j * config.block, min((j + 1) * config.block, t + 1))]
            near = list(range(max(0, t - config.near + 1), t + 1))
            for branch, keys in ((1, listed), (2, near)):
                k, v = (found[branch % len(sets[0])] for found in (keys_of, sets[1]))
                for h in (2 * g, 2 * g + 1):
                    o[t, h] += gates[t, h, branch] * (k[keys, g] @ q[t, h] / 8**0.5).softmax(0) @ v[keys, g]
    torch.testing.assert_close(run(mixer, x)[0], mixer.o_proj(o.flatten(1)), rtol=1e-9, atol=1e-9)


def test_windows_overlap_blocks_as_published():
    assert overlap_counts(64, 32, 16) == (1, [1, 2, 2, 2, 1])


def test_memory_of_training_grows_with_the_length_not_with_its_square(monkeypatch):
    mixer = build("nsa", torch.float32)
    monkeypatch.setattr(ranges, "CPU_PIECE_ELEMENTS", 2**13)
    monkeypatch.setattr("hybridlm.model.mixers.common.block_selection.PIECE_ELEMENTS", 2**13)

    def largest(length):
        with LargestTensor() as seen:
            run(mixer, inputs(1, length, torch.float32)).sum().backward()
        return seen.numel

    assert largest(1600) <= 2.2 * largest(800) < 800 * 800


@pytest.mark.parametrize(("options", "message"), [
    ({"length": 5}, "length: must be a multiple of stride; got 5; expected a multiple of 2"),
    ({"block": 5}, "stride: must divide the block; got 2; expected a divisor of 5"),
    ({"topk": 2}, "topk: must hold the blocks that are always read; got 2; expected at least 3"),
    ({"near": 0}, "near: must be positive; got 0"),
])
def test_a_wrong_option_is_one_line(options, message):
    with pytest.raises(ConfigError) as caught:
        NSAConfig(**{**SIZES, **options})
    assert str(caught.value) == message
