"""ReSA: sparse decoding with rectified keys and values, against a decoder that overwrites its cache token by token."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from hybridlm.errors import ConfigError
from hybridlm.evaluation.sparse import make_sparse_method, sparse_softmax
from hybridlm.model.config import ScheduleConfig
from hybridlm.model.feed_forward import DenseConfig
from hybridlm.model.mixers import AttentionConfig, DeltaRuleConfig
from hybridlm.model.rope import RopeConfig
from hybridlm_kernels.packing import CuSeqlens
from tests.support import tiny_lm
from tests.support.tiny_lm import VOCABULARY

LENGTH, PAGE, EVERY = 41, 3, 6
OPTIONS = {"every": EVERY, "share": 0.3, "least": 2, "page": PAGE}
IDS = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def model(**options):
    attention = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, rope=RopeConfig(kind="none"))
    lm = tiny_lm.model(**{"mixers": {"full": attention}, "num_layers": 3, "schedule": ScheduleConfig(pattern=["full"]),
                          "feed_forward": DenseConfig(intermediate_size=32)} | options).double().eval()
    for name, parameter in lm.named_parameters():  # attention that prefers some keys
        parameter.data *= 6.0 if "q_proj" in name or "k_proj" in name else 1.0
    return lm


class Decoder:
    """Decodes one row: keys and values of each layer in lists, which a dense pass overwrites."""

    def __init__(self, lm):
        self.lm = lm
        self.keys, self.values = ([[] for _ in lm.layers] for _ in range(2))
        self.read = []

    def run(self, token, position, dense):
        x = self.lm.embed.weight[token]
        for keys, values, layer in zip(self.keys, self.values, self.lm.layers, strict=True):
            mixer, normed = layer.mixer, layer.mixer_norm(x)
            q, k, v = (proj(normed).view(-1, 8) for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
            keys[position:position + 1], values[position:position + 1] = [k], [v]
            heads = []
            for group in range(2):
                past = torch.stack([key[group] for key in keys[: position + 1]])
                own = q[2 * group : 2 * group + 2]
                chosen = list(range(position + 1)) if dense else self.pages(own.mean(0), past)
                if not dense:
                    self.read += [len(chosen)] * 2
                v_past = torch.stack([value[group] for value in values[: position + 1]])[chosen]
                heads.append((own @ past[chosen].T / 8**0.5).softmax(-1) @ v_past)
            x = x + mixer.o_proj(torch.cat(heads).flatten())
            forward, normed = layer.feed_forward, layer.feed_forward_norm(x)
            x = x + forward.down_proj(F.silu(forward.gate_proj(normed)) * forward.up_proj(normed))
        return self.lm.logits(self.lm.norm(x)[None, None])[0, 0]

    def pages(self, query, past):
        pages = [past[start : start + PAGE] for start in range(0, len(past), PAGE)]
        bounds = [torch.maximum(query * page.amax(0), query * page.amin(0)).sum().item() for page in pages]
        bounds[-1] = math.inf
        count = max(math.ceil(len(pages) * 0.3), min(len(pages), 2))
        best = sorted(range(len(pages)), key=lambda i: (-bounds[i], i))[:count]
        return [s for page in sorted(best) for s in range(page * PAGE, min(len(past), (page + 1) * PAGE))]


def decode(lm, ids):
    """Logits of every token of a row, decoded sparsely, with a dense pass over the last tokens every so often."""
    decoder, logits = Decoder(lm), []
    for position, token in enumerate(ids):
        logits.append(decoder.run(token, position, dense=False))
        if (position + 1) % EVERY == 0:
            for again in range(position + 1 - EVERY, position + 1):
                decoder.run(ids[again], again, dense=True)
    return torch.stack(logits), decoder.read


@torch.no_grad()
def test_a_row_at_once_equals_a_decoder_that_overwrites_its_cache():
    lm = model()
    with sparse_softmax(lm, make_sparse_method("resa", OPTIONS)) as tally:
        found = lm(IDS).logits
    decoded = [decode(lm, ids.tolist()) for ids in IDS]
    torch.testing.assert_close(found, torch.stack([logits for logits, _ in decoded]), rtol=1e-9, atol=1e-9)
    read = [count for _, counts in decoded for count in counts]
    assert (tally.read, tally.queries) == (sum(read), len(read))
    with sparse_softmax(lm, make_sparse_method("resa", OPTIONS | {"every": 0})):
        never = lm(IDS).logits
    torch.testing.assert_close(found[:, :EVERY], never[:, :EVERY], rtol=1e-9, atol=1e-9)
    assert (found - never)[:, EVERY:].abs().amax() > 0.1, "the passes change what is read"


@torch.no_grad()
def test_documents_are_rectified_from_their_own_start():
    lm, borders = model(), [0, 1, 20, 41, 48, 82]
    method = make_sparse_method("resa", OPTIONS)
    with sparse_softmax(lm, method):
        packed = lm(IDS, cu_seqlens=CuSeqlens(borders)).logits.flatten(0, 1)
        for a, b in itertools.pairwise(borders):
            alone = lm(IDS.flatten()[None, a:b]).logits[0]
            torch.testing.assert_close(packed[a:b], alone, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_what_covers_the_row_or_stays_dense_is_dense_attention():
    lm = model()
    dense = lm(IDS).logits
    for options in ({"share": 1.0}, {"least": 99}, {"dense_layers": 3}):
        with sparse_softmax(lm, make_sparse_method("resa", OPTIONS | options)) as tally:
            torch.testing.assert_close(lm(IDS).logits, dense, rtol=1e-9, atol=1e-9)
        assert tally.layers == (0 if "dense_layers" in options else 3, 3)
    assert torch.equal(lm(IDS).logits, dense), "outside of the context nothing is doubled or replaced"


def test_a_model_with_a_state_that_no_pass_can_replace_is_refused():
    mixers = {"full": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
              "gdn": DeltaRuleConfig(num_heads=2, head_dim=8)}
    lm = model(mixers=mixers, schedule=ScheduleConfig(pattern=["full", "gdn", "full"]))
    with pytest.raises(ConfigError, match=r"keeps other states of earlier tokens; got 'mixers full, gdn'"), \
            sparse_softmax(lm, make_sparse_method("resa", {})):
        pass
    windows = {"near": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, window=4, sinks=True)}
    lm = model(mixers=windows, schedule=ScheduleConfig(pattern=["near"]))
    with torch.no_grad(), sparse_softmax(lm, make_sparse_method("resa", OPTIONS)) as tally:
        assert lm(IDS).logits.isfinite().all()
    assert tally.layers == (3, 3)
