"""Attention to a window and compressed entries: against transformers, and against its definition written again."""

import pytest
import torch

from hybridlm.errors import ConfigError
from hybridlm.model.config import ModelConfig, ScheduleConfig
from hybridlm.model.feed_forward import MoEConfig
from hybridlm.model.layer_context import NormConfig
from hybridlm.model.mixers import CompressedAttentionConfig, EntryIndexerConfig, build_mixer
from hybridlm.model.model import build_model
from hybridlm.model.residual import MHCConfig
from hybridlm.model.rope import RopeConfig, YarnConfig
from hybridlm.model.sequence import SequenceInfo
from tests.support.kernel_compare import LargestTensor
from tests.support.layer_parity import (
    HIDDEN,
    LENGTH,
    TOLERANCE,
    causal_mask,
    context,
    ours,
    positions,
    random_weights,
    renamed,
    token_inputs,
)
from tests.support.mixer_cases import build, inputs, run
from tests.support.mixer_forms.compressed_attention import FORMS, SIZES

SHORT = 31
COMMON = "hybridlm.model.mixers.common"
NAMES = {"compressor.indexer.q_b_proj": "indexer.q_proj", "compressor.indexer.scorer.": "indexer.",
         "compressor.indexer.": "indexer.entries.", "compressor.": "entries.", "entries.kv_norm": "entries.norm",
         "o_b_proj": "output.up_proj"}


def v4_settings():
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as hf

    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32, "beta_slow": 1}
    return hf, hf.DeepseekV4Config(
        hidden_size=HIDDEN, num_hidden_layers=3, num_attention_heads=4, head_dim=32, q_lora_rank=24, sliding_window=9,
        layer_types=["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 16}, o_groups=2,
        o_lora_rank=12, index_n_heads=16, index_head_dim=16, index_topk=5, partial_rotary_factor=0.25,
        rope_parameters=yarn, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, vocab_size=32,
        mlp_layer_types=["hash_moe", "hash_moe", "moe"], max_position_embeddings=128, rms_norm_eps=1e-5,
        attn_implementation="eager")


def v4_mixer(layer_type):
    """Our config of a layer of `v4_settings`."""
    sizes = {"num_heads": 4, "head_dim": 32, "rope_head_dim": 8, "q_lora_rank": 24, "output_groups": 2,
             "output_rank": 12, "window": 9}
    yarn = YarnConfig(factor=4.0, original_max_position=32, attention_factor=1.0)
    far = RopeConfig(kind="interleaved", theta=160000.0, scaling=yarn)
    return {
        "sliding_attention": CompressedAttentionConfig(**sizes, ratio=None),
        "compressed_sparse_attention": CompressedAttentionConfig(
            **sizes, rope=far, indexer=EntryIndexerConfig(num_heads=16, head_dim=16, topk=5)),
        "heavily_compressed_attention": CompressedAttentionConfig(**sizes, rope=far, ratio=16, overlap=False),
    }[layer_type]


def v4_weights(layer):
    """Weights of their attention under our names."""
    weights = renamed(layer, NAMES)
    down = weights.pop("o_a_proj.weight")
    weights["output.down"] = down.unflatten(0, (2, -1))
    for name in [name for name in weights if name.endswith("position_bias")]:
        dim = weights[name.replace("position_bias", "norm.weight")].shape[0]
        weights[name] = torch.cat(weights[name].split(dim, 1))
    return weights


@torch.no_grad()
@pytest.mark.parametrize("layer_index", range(3))
def test_deepseek_v4(layer_index):
    hf, settings = v4_settings()
    layer, x = hf.DeepseekV4Attention(settings, layer_index).eval(), token_inputs()
    random_weights(layer)
    rotary = hf.DeepseekV4RotaryEmbedding(settings)
    tables = {kind: rotary(x, positions(), kind) for kind in ("main", "compress")}
    theirs = layer(x, tables, positions(), causal_mask(window=9))[0]
    mixer = v4_mixer(settings.layer_types[layer_index])
    torch.testing.assert_close(ours(mixer, v4_weights(layer), x), theirs, **TOLERANCE)


WHOLE = {"model.embed_tokens.": "embed.", "model.hc_head.hc_": "residual.end_coefficients.", "model.": "",
         "input_layernorm": "mixer_norm", "post_attention_layernorm": "feed_forward_norm",
         "attn_hc.": "mixer_residual.coefficients.", "ffn_hc.": "feed_forward_residual.coefficients.",
         "coefficients.fn": "coefficients.weight", "mlp.gate.tid2eid": "feed_forward.router.table",
         "mlp.gate.e_score_correction_bias": "feed_forward.router.bias", "mlp.gate.": "feed_forward.router.",
         "mlp.experts.gate_up_proj": "feed_forward.experts.gate_up", "mlp.experts.down_proj":
         "feed_forward.experts.down",
         "mlp.shared_experts.": "feed_forward.shared.", "self_attn.": "mixer."}


@torch.no_grad()
def test_a_whole_model_gives_the_logits_of_deepseek_v4():
    hf, settings = v4_settings()
    torch.manual_seed(0)
    theirs = hf.DeepseekV4ForCausalLM(settings).eval()
    random_weights(theirs)
    for name, table in theirs.named_buffers():
        if name.endswith("tid2eid"):
            table.copy_(torch.rand(len(table), 4).topk(2).indices)
    config = ModelConfig(
        vocab_size=32, hidden_size=HIDDEN, num_layers=3, max_position=128, residual=MHCConfig(eps=settings.hc_eps),
        mixers={kind: v4_mixer(kind) for kind in settings.layer_types}, norm=NormConfig(eps=1e-5),
        schedule=ScheduleConfig(pattern=list(settings.layer_types)),
        feed_forward=MoEConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, num_shared_experts=1,
                               router="sqrt_softplus", routed_scaling_factor=1.5, correction_bias=True,
                               swiglu_limit=10.0, hash_layers=[0, 1]))
    weights = renamed(theirs, WHOLE)
    for index in range(3):
        attention = theirs.model.layers[index].self_attn
        weights = {name: value for name, value in weights.items() if not name.startswith(f"layers.{index}.mixer.")}
        weights |= {f"layers.{index}.mixer.{name}": value for name, value in v4_weights(attention).items()}
    model = build_model(config).eval()
    model.load_state_dict(weights)
    ids = torch.randint(32, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, **TOLERANCE)


def turned(vector, position, mixer):
    """A head whose last dims are rotated by a position, pair by pair."""
    dim, rope = mixer.rotary_dim, mixer.config.rope
    if dim == 0:
        return vector
    angles = (position * rope.theta ** (-torch.arange(0, dim, 2) / dim)).float()
    pairs = torch.view_as_complex(vector[..., -dim:].unflatten(-1, (-1, 2)).contiguous())
    phases = torch.complex(angles.cos(), angles.sin()).to(pairs.dtype)
    return torch.cat([vector[..., :-dim], torch.view_as_real(pairs * phases).flatten(-2)], -1)


def rms(x, weight=1.0):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def entry(made, x, window, mixer):
    """The entry of the window with this number."""
    m, dim = made.ratio, made.dim
    kv, gate = made.kv_proj(x), made.gate_proj(x)
    own = slice(window * m, (window + 1) * m)
    if made.before:
        c, z = kv[own, dim:], gate[own, dim:] + made.position_bias[m:]
        if window > 0:
            last = slice((window - 1) * m, window * m)
            c = torch.cat([kv[last, :dim], c])
            z = torch.cat([gate[last, :dim] + made.position_bias[:m], z])
    else:
        c, z = kv[own], gate[own] + made.position_bias
    return turned(rms((z.softmax(0) * c).sum(0), made.norm.weight), window * m, mixer)


def index_scores(mixer, x, latent, made, t):
    """Scores of the entries that token t sees."""
    indexer = mixer.indexer
    config = indexer.config
    q = turned(indexer.q_proj(latent[t]).view(config.num_heads, config.head_dim), t, mixer)
    w = indexer.weights_proj(x[t]) / (config.head_dim * config.num_heads) ** 0.5
    return torch.stack([(w * (q @ k).relu()).sum() for k in made])


@torch.no_grad()
@pytest.mark.parametrize("name", ["csa", "hca", "v4_window"])
def test_it_equals_its_definition(name):
    mixer, x = build(name), inputs(1, SHORT)[0]
    config = mixer.config
    latent = rms(mixer.q_a_proj(x), mixer.q_a_norm.weight)
    q = rms(mixer.q_b_proj(latent).view(SHORT, 4, 8))
    k = rms(mixer.kv_proj(x), mixer.kv_norm.weight)
    m = config.ratio or SHORT + 1
    made = [entry(mixer.entries, x, i, mixer) for i in range(SHORT // m)]
    index = [] if mixer.indexer is None else [entry(mixer.indexer.entries, x, i, mixer) for i in range(SHORT // m)]
    rows = []
    for t in range(SHORT):
        read = [turned(k[s], s, mixer) for s in range(max(0, t - config.window + 1), t + 1)]
        seen = (t + 1) // m
        chosen = range(seen)
        if mixer.indexer is not None and seen > 3:
            scores = index_scores(mixer, x, latent, index[:seen], t)
            chosen = sorted(chosen, key=lambda i: (-float(scores[i]), i))[:3]
        keys = torch.stack(read + [made[i] for i in chosen])
        logits = turned(q[t], t, mixer) @ keys.T / 8**0.5
        if config.sinks:
            logits = torch.cat([mixer.sinks.to(x.dtype)[:, None], logits], 1)
        o = logits.softmax(-1)[:, -len(keys) :] @ keys
        o = turned(o, -t, mixer)
        groups = o.view(2, 16)
        rows.append(mixer.output.up_proj(torch.einsum("prx,px->pr", mixer.output.down, groups).flatten()))
    torch.testing.assert_close(run(mixer, x[None])[0], torch.stack(rows), rtol=1e-6, atol=1e-6)


def test_a_budget_that_covers_the_row_reads_all_entries():
    mixer, x, seq = build("csa"), inputs(2, SHORT), SequenceInfo.make(2, SHORT, torch.device("cpu"))
    made, windows, _ = mixer.entries(x, seq)
    latent = mixer.q_a_norm(mixer.q_a_proj(x))
    indexer = mixer.indexer
    indexer.topk = windows.number
    chosen = indexer.choose(indexer(x, latent, seq, None))
    found = []
    for listed in (chosen, None):
        q, e = inputs(2, SHORT)[..., None].expand(-1, -1, -1, 8).contiguous()[:, :, :4], made[:, :, None].detach()
        leaves = q.requires_grad_(), e.requires_grad_()
        o, lse = mixer._attend(*leaves, windows, listed)
        seen = windows.count_BT[..., None, None] > 0
        (o.square().sum() + (lse[..., None].masked_fill(~seen, 0.0) ** 2).sum()).backward()
        found.append((o, lse, *(leaf.grad for leaf in leaves)))
    for sparse, dense in zip(*found, strict=True):
        torch.testing.assert_close(sparse, dense, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_the_loss_of_the_indexer_is_a_divergence_from_attention_to_entries(mode):
    mixer, x = build("csa").train(), inputs(1, SHORT)
    mixer.set_attention(mode, {})
    seq = SequenceInfo.make(1, SHORT, x.device)
    aux = mixer(x, seq)[1]
    config = mixer.config
    with torch.no_grad():
        latent = rms(mixer.q_a_proj(x[0]), mixer.q_a_norm.weight)
        q, k = rms(mixer.q_b_proj(latent).view(SHORT, 4, 8)), rms(mixer.kv_proj(x[0]), mixer.kv_norm.weight)
        made, index = ([entry(part, x[0], i, mixer) for i in range(SHORT // 3)]
                       for part in (mixer.entries, mixer.indexer.entries))
        total, count, read = 0.0, 0, 0.0
        for t in range(SHORT):
            near = torch.stack([turned(k[s], s, mixer) for s in range(max(0, t - config.window + 1), t + 1)])
            seen = (t + 1) // 3
            if seen == 0:
                read += 1.0
                continue
            scores = index_scores(mixer, x[0], latent, index[:seen], t)
            chosen = sorted(range(seen), key=lambda i, scores=scores: (-float(scores[i]), i))[:3]
            query = turned(q[t], t, mixer) / 8**0.5
            beside = torch.cat([mixer.sinks.to(x.dtype)[:, None], query @ near.T], 1)
            everything = torch.cat([beside, query @ torch.stack(made[:seen]).T], 1).softmax(-1)[:, beside.shape[1] :]
            read += float(1 - everything.sum(-1).mean() + everything[:, chosen].sum(-1).mean())
            counted = chosen if mode == "sparse" else list(range(seen))
            p = torch.cat([beside, query @ torch.stack([made[i] for i in counted]).T], 1).softmax(-1)
            p = p[:, beside.shape[1] :].sum(0)
            p = p / p.sum()
            total += float((p * (p.log() - scores[counted].log_softmax(0))).sum())
            count += 1
    torch.testing.assert_close(aux["loss/indexer_kl"].item(), total / count, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(float(aux["layer/indexer_recall"]), read / SHORT, rtol=1e-5, atol=1e-6)
    aux["loss/indexer_kl"].backward()
    learned = {name for name, parameter in mixer.named_parameters() if parameter.grad is not None}
    assert learned == {f"indexer.{name}" for name, _ in mixer.indexer.named_parameters()}


def test_an_idle_indexer_is_frozen_and_a_stage_sets_its_mode():
    mixer = build("csa")
    mixer.set_attention("dense", {"indexer_kl": 0.0})
    mixer.freeze_idle_parameters()
    assert mixer.attention_mode == "dense"
    assert not any(p.requires_grad for p in mixer.indexer.parameters())
    config = mixer.config.with_attention_mode("dense")
    assert (config.indexer.mode, FORMS["csa"].indexer.mode) == ("dense", "sparse")
    assert build_mixer(config, context()).attention_mode == "dense"


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_memory_of_training_grows_with_the_length_not_with_its_square(mode, monkeypatch):
    mixer = build("csa", torch.float32)
    mixer.attention_mode = mode
    for name in ("hybridlm_kernels.ops.range_attention.ranges.CPU_PIECE", f"{COMMON}.block_selection.PIECE",
                 f"{COMMON}.selector_loss.PIECE"):
        monkeypatch.setattr(f"{name}_ELEMENTS", 2**13)

    def largest(length):
        seq, x = SequenceInfo.make(1, length, torch.device("cpu")), inputs(1, length, torch.float32)
        with LargestTensor() as seen:
            y, aux = mixer(x, seq)
            (y.sum() + aux["loss/indexer_kl"]).backward()
        return seen.numel

    most = largest(1024)
    assert most <= 2.2 * largest(512)
    assert most < 1024 * (1024 // 3), "a query and an entry for each number"


def test_sinks_and_places_start_at_zero():
    mixer = build_mixer(v4_mixer("compressed_sparse_attention"), context())
    random_weights(mixer)
    mixer.init_weights(0.05)
    for parameter in (mixer.sinks, mixer.entries.position_bias, mixer.indexer.entries.position_bias):
        assert not parameter.any()
    assert 0.04 < mixer.output.down.std().item() < 0.06
    assert bool((mixer.entries.norm.weight == 1).all())


@pytest.mark.parametrize(("options", "message"), [
    ({"window": 0}, "window: must be positive; got 0"),
    ({"ratio": 0}, "ratio: must be positive; got 0; null has no entries"),
    ({"output_groups": 3}, "output_groups: must divide num_heads; got 3; expected a divisor of 4"),
    ({"rope_head_dim": 5}, "rope_head_dim: must be even and fit into the heads, those of the indexer too; got 5; "
                           "expected an even number up to 8; rope.kind=none rotates nothing"),
    ({"rope": RopeConfig(kind="interleaved", scaling=YarnConfig(factor=1024.0, original_max_position=32, mscale=1.0))},
     "rope.scaling.attention_factor: would scale values, which rotate as keys do; got 1.69"),
    ({"ratio": None, "indexer": EntryIndexerConfig()},
     "indexer: needs entries to select from; got 'ratio=null'; expected a ratio, or no indexer"),
])
def test_a_wrong_option_is_one_line(options, message):
    with pytest.raises(ConfigError) as caught:
        CompressedAttentionConfig(**{**SIZES, **options})
    assert message in str(caught.value)
