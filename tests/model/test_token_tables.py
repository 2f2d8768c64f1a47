"""Layers that look tokens up in tables: per-layer embeddings and Engram, against transformers and their formulas."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from hybridlm.errors import ConfigError
from hybridlm.inspect import inspect
from hybridlm.interop.family_registry import write_hf_config
from hybridlm.model import build_model
from hybridlm.model.canonical import canonical
from hybridlm.model.config import ModelConfig, MTPConfig, ScheduleConfig
from hybridlm.model.cost import count_parameters, forward_flops
from hybridlm.model.feed_forward import DenseConfig
from hybridlm.model.generation import complete
from hybridlm.model.layer_context import LayerContext, NormConfig
from hybridlm.model.memory import training_memory
from hybridlm.model.mixers import AttentionConfig, EngramConfig, PerLayerEmbeddingConfig, build_mixer
from hybridlm.model.residual import AttentionResidualConfig, BranchConfig, MHCConfig
from hybridlm.model.sequence import SequenceInfo
from hybridlm.optimizers import AdamWConfig, MuonConfig
from hybridlm.optimizers.optimizer_set import plan_groups
from hybridlm_kernels import CuSeqlens
from tests.support.layer_parity import TOLERANCE, random_weights

VOCABULARY, HIDDEN, EOS = 40, 32, 1
IDS = torch.randint(2, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
CPU = torch.device("cpu")


def small(pattern=("full", "engram", "full", "ple"), **more) -> ModelConfig:
    return ModelConfig(**{
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_layers": len(pattern), "max_position": 64,
        "schedule": ScheduleConfig(pattern=list(pattern), alone=["engram", "ple"]),
        "mixers": {"full": AttentionConfig(num_heads=2, head_dim=8), "ple": PerLayerEmbeddingConfig(embed_dim=8),
                   "engram": EngramConfig(heads_per_ngram=2, table_rows=50)},
        "feed_forward": DenseConfig(intermediate_size=24), "init_std": 0.2} | more)


def trained_start(config: ModelConfig):
    """A model whose convolutions are not zero, as they are at the start."""
    model = build_model(config, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("conv.weight"):
                parameter.normal_(std=0.3)
    return model


def context(place: int = 0, zero_centered: bool = False) -> LayerContext:
    """A layer behind `place` layers of Engram."""
    engram = EngramConfig(heads_per_ngram=2, table_rows=50)
    return LayerContext(hidden_size=HIDDEN, layer_index=place, num_layers=4, max_position=64, vocab_size=VOCABULARY,
                        norm=NormConfig(eps=1e-6, zero_centered=zero_centered), layers=["engram"] * (place + 1),
                        mixers={"engram": engram})


@torch.no_grad()
def test_per_layer_embeddings_are_those_of_gemma4_through_a_whole_model():
    """Its other branches add nothing, their last norms being zero; in ours there are none."""
    from transformers import Gemma4TextConfig, Gemma4TextModel

    P, layers = 8, 3
    theirs = Gemma4TextModel(Gemma4TextConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=16, num_hidden_layers=layers, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, global_head_dim=8, vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=P, attn_implementation="eager")).eval()
    random_weights(theirs)
    weights = theirs.state_dict()
    for name, value in weights.items():
        if name.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")):
            value.zero_()
    model = build_model(small(["ple"] * layers, embedding_scale=HIDDEN**0.5, tie_embeddings=True))
    loaded = {"embed.weight": weights["embed_tokens.weight"], "norm.weight": weights["norm.weight"]}
    for index in range(layers):
        columns = slice(index * P, (index + 1) * P)
        ours, old = f"layers.{index}.mixer.", f"layers.{index}."
        loaded |= {
            f"{ours}table.weight": weights["embed_tokens_per_layer.weight"][:, columns],
            f"{ours}context_proj.weight": weights["per_layer_model_projection.weight"][columns],
            f"{ours}context_norm.weight": weights["per_layer_projection_norm.weight"],
            f"{ours}gate_proj.weight": weights[f"{old}per_layer_input_gate.weight"],
            f"{ours}o_proj.weight": weights[f"{old}per_layer_projection.weight"],
            f"layers.{index}.mixer_norm.weight": weights[f"{old}post_per_layer_input_norm.weight"]}
    model.load_state_dict(loaded)
    found = model.eval()(IDS, return_hidden_states="last").hidden_states[-1]
    expected = theirs(IDS, use_cache=False).last_hidden_state
    assert (expected - theirs.norm(theirs.embed_tokens(IDS))).abs().mean() > 0.1, "the tables say something"
    torch.testing.assert_close(found, expected, **TOLERANCE)


@torch.no_grad()
def test_per_layer_embeddings_are_those_of_gemma3n():
    """The inputs of a layer by its class; what a layer adds by its modules, since AltUp stands around them."""
    from transformers import Gemma3nTextConfig, Gemma3nTextModel

    P = 8
    theirs = Gemma3nTextModel(Gemma3nTextConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=16, num_hidden_layers=2, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, vocab_size_per_layer_input=VOCABULARY, num_kv_shared_layers=0,
        hidden_size_per_layer_input=P, layer_types=["sliding_attention", "full_attention"],
        activation_sparsity_pattern=[0.0, 0.0], laurel_rank=4)).eval()
    random_weights(theirs)
    embedding = theirs.embed_tokens(IDS)
    x = torch.randn(*IDS.shape, HIDDEN, generator=torch.Generator().manual_seed(2))
    inner = theirs.project_per_layer_inputs(embedding, theirs.get_per_layer_inputs(IDS))[:, :, 1]
    layer = theirs.layers[1]
    expected = layer.per_layer_projection(layer.act_fn(layer.per_layer_input_gate(x)) * inner)
    mixer = build_mixer(PerLayerEmbeddingConfig(embed_dim=P), context())
    mixer.load_state_dict({
        "table.weight": theirs.embed_tokens_per_layer.weight[:, P:],
        "context_proj.weight": theirs.per_layer_model_projection.weight[P:],
        "context_norm.weight": theirs.per_layer_projection_norm.weight,
        "gate_proj.weight": layer.per_layer_input_gate.weight, "o_proj.weight": layer.per_layer_projection.weight})
    seq = SequenceInfo.make(*IDS.shape, CPU)
    seq.token_ids_BT, seq.embedding_BTD = IDS, embedding
    torch.testing.assert_close(mixer(x, seq)[0], expected, **TOLERANCE)


def qwen_config(**more):
    return SimpleNamespace(**{
        "hidden_size": HIDDEN, "hc_count": 1, "ple_embed_dim": 24, "ple_conv_kernel_size": 4, "ngram_size": 3,
        "heads_per_ngram": 2, "ngram_vocab_size_base": 50, "make_ngram_vocab_size_divisible_by": 1, "seed": 1234,
        "vocab_size": VOCABULARY, "eos_token_id": EOS, "rms_norm_eps": 1e-6} | more)


OURS = EngramConfig(heads_per_ngram=2, table_rows=50, embed_dim=24, hash_seed=1234, pad_token=EOS)


@torch.no_grad()
@pytest.mark.parametrize("place", [0, 2])
def test_engram_is_the_layer_of_qwen4_exp_with_one_stream(place):
    from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextPLELayer

    theirs = Qwen4ExpTextPLELayer(qwen_config(), 1, place)
    random_weights(theirs)
    block = build_model(small(["engram"] * 3, norm=NormConfig(zero_centered=True),
                              mixers=small().mixers | {"engram": OURS})).layers[place]
    names = {"key_proj": "k_proj", "value_proj": "v_proj", "norm_key": "k_norm", "norm_conv": "conv_norm"}
    weights = {f"mixer.{names[name]}.weight": getattr(theirs, name).weight for name in names}
    weights |= {"mixer.table.weight": theirs.ple_embedding.ngram_embedding.weight,
                "mixer.conv.weight": theirs.conv1d.weight[:, 0], "mixer_norm.weight": theirs.norm_query.weight}
    block.load_state_dict(weights)
    x = torch.randn(*IDS.shape, HIDDEN, generator=torch.Generator().manual_seed(2))
    seq = SequenceInfo.make(*IDS.shape, CPU)
    seq.token_ids_BT = IDS
    torch.testing.assert_close(block(x, seq)[0], x + theirs(x, IDS, None), **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("place", [0, 1])
def test_documents_that_end_with_a_token_hash_as_in_qwen4_exp(place):
    from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextNGramEmbedding

    theirs = Qwen4ExpTextNGramEmbedding(qwen_config(), 24, 1, place)
    mixer = build_mixer(OURS, context(place))
    mixer.init_weights(1.0)
    mixer.table.weight.copy_(theirs.ngram_embedding.weight)
    ids = IDS.clone()
    ids[0, [0, 5, 6]] = ids[1, 20] = EOS
    seq = SequenceInfo.make(2, 24, CPU, CuSeqlens([0, 1, 6, 7, 24, 45, 48]))
    found = mixer.table(mixer.rows(ids, seq)).flatten(-2)
    assert torch.equal(found, theirs(ids, None))


def test_engram_is_its_formula_in_fp64():
    """Written once more, token by token, with hashes of whole numbers of any size (arXiv 2601.07372, section 2)."""
    config = EngramConfig(max_ngram=4, heads_per_ngram=2, table_rows=30, embed_dim=18, conv_size=3, pad_token=7)
    ctx = LayerContext(hidden_size=16, layer_index=0, num_layers=1, max_position=64, vocab_size=VOCABULARY,
                       norm=NormConfig())
    torch.manual_seed(3)
    mixer = build_mixer(config, ctx).double()
    mixer.init_weights(0.4)
    torch.nn.init.normal_(mixer.conv.weight)
    sizes, odd = config.table_sizes(ctx), config.multipliers(ctx)
    assert len(set(sizes)) == 6
    assert min(sizes) >= 30
    assert all(a % 2 == 1 and a * (VOCABULARY - 1) < 2**63 for a in odd)
    borders, ids = [0, 9, 10, 24], IDS[0].tolist()
    x = torch.randn(1, 24, 16, dtype=torch.float64)

    def norm(vector, weight):
        return vector / (vector.square().mean() + 1e-6).sqrt() * weight

    expected = []
    for start, end in itertools.pairwise(borders):
        gated = []
        for t in range(start, end):
            pieces = []
            for n in range(2, 5):
                gram = [ids[t - i] if t - i >= start else 7 for i in range(n)]
                mixed = 0
                for a, token in zip(odd, gram, strict=False):
                    mixed ^= a * token
                for head in range(2):
                    table = (n - 2) * 2 + head
                    pieces.append(mixer.table.weight[sum(sizes[:table]) + mixed % sizes[table]])
            memory = torch.cat(pieces)
            score = norm(mixer.k_proj.weight @ memory, mixer.k_norm.weight) @ x[0, t] / 4.0
            gate = 1 / (1 + torch.exp(-score.sign() * score.abs().clamp(min=1e-6).sqrt()))
            gated.append(gate * (mixer.v_proj.weight @ memory))
        for t, u in enumerate(gated):
            total = sum(mixer.conv.weight[:, 2 - tap] * norm(gated[t - 4 * tap], mixer.conv_norm.weight)
                        for tap in range(3) if t - 4 * tap >= 0)
            expected.append(u + F.silu(total))
    seq = SequenceInfo.make(1, 24, CPU, CuSeqlens(borders))
    seq.token_ids_BT = IDS[:1]
    torch.testing.assert_close(mixer(x, seq)[0][0], torch.stack(expected), rtol=1e-10, atol=1e-12)


def test_the_memory_starts_without_its_convolution_and_with_other_hashes_in_every_layer():
    model = build_model(small(["engram", "engram"]))
    first, second = (layer.mixer for layer in model.layers)
    assert not first.conv.weight.any()
    assert float(first.table.weight.detach().std()) == pytest.approx(0.2, rel=0.1)
    assert not set(first.prime.tolist()) & set(second.prime.tolist())
    assert not torch.equal(first.multiplier, second.multiplier)
    assert not any("prime" in name for name in model.state_dict()), "they follow from the config"


@pytest.mark.parametrize("residual", [{}, {"residual": MHCConfig(num_streams=2)}])
def test_checkpointing_multi_token_prediction_and_streams(residual):
    mixers = small().mixers
    if residual:  # several streams take no norm behind a branch
        mixers["ple"] = PerLayerEmbeddingConfig(embed_dim=8, residual=BranchConfig())
    config = small(mixers=mixers, mtp=MTPConfig(depth=1, mixer="engram"), **residual)
    model = trained_start(config).train()
    assert count_parameters(config).total_with_mtp == model.num_params()
    results = []
    for model.activation_checkpointing in (False, True):
        model.zero_grad()
        output = model(IDS, labels=IDS, cu_seqlens=[0, 5, 24, 48])
        output.loss.backward()
        results.append((output.loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        assert torch.equal(gradient, results[1][1][name]), name
        assert gradient.any() or name.endswith("residual"), name


def test_prompts_of_unlike_lengths_decode_as_each_alone():
    model = trained_start(small()).eval()
    prompts = [IDS[0, :9].tolist(), IDS[1, :2].tolist(), IDS[1, 3:4].tolist()]
    together = complete(model, prompts, 6, eos=VOCABULARY)
    assert model.decodes_padded_rows
    assert together == [complete(model, [prompt], 6, eos=VOCABULARY)[0] for prompt in prompts]


@pytest.mark.parametrize("optimizer", [AdamWConfig(), MuonConfig()])
def test_tables_have_a_learning_rate_of_their_own_and_do_not_decay(optimizer):
    groups = {name: group for group in plan_groups(build_model(small(), device="meta"), optimizer)
              for name in group.names}
    memory, token = (groups[f"layers.{index}.mixer.table.weight"] for index in (1, 3))
    assert (memory.lr_factor, memory.decay, memory.rule.kind) == (5.0, False, "adamw")
    assert (token.lr_factor, token.decay, token.rule.kind) == (1.0, False, "adamw")
    assert groups["layers.1.mixer.k_proj.weight"].decay


def test_tables_count_as_memory_and_cost_no_flops():
    config = small()
    larger = small(mixers=config.mixers | {"engram": EngramConfig(heads_per_ngram=2, table_rows=5000)})
    tables = [sum(p.numel() for name, p in build_model(each, device="meta").named_parameters() if "table" in name)
              for each in (config, larger)]
    counts = [inspect(each)["parameters"] for each in (config, larger)]
    assert [count["lookup_tables"] for count in counts] == tables
    assert counts[1]["total"] - counts[0]["total"] == tables[1] - tables[0] > 0
    assert counts[1]["active"] == counts[0]["active"]
    assert forward_flops(config, 64) == forward_flops(larger, 64)
    memory = [training_memory(each, batch_size=1, sequence_length=8, optimizer_bytes=0) for each in (config, larger)]
    assert memory[1].weights - memory[0].weights == 4 * (tables[1] - tables[0]), "no copy in bf16"


@pytest.mark.parametrize(("make", "message"), [
    (lambda: EngramConfig(max_ngram=1), "max_ngram: must be at least 2; got 1"),
    (lambda: EngramConfig(table_rows=0), "table_rows: must be positive; got 0"),
    (lambda: EngramConfig(table_lr_factor=0.0), "table_lr_factor: must be positive and finite; got 0"),
    (lambda: EngramConfig(pad_token=VOCABULARY).num_params(context()), "pad_token: is no token; got 40"),
    (lambda: EngramConfig(heads_per_ngram=3).num_params(context()), "heads_per_ngram: does not fit.*multiple of 6"),
    (lambda: EngramConfig(embed_dim=20).num_params(context()), "embed_dim: does not fit.*got 20.*multiple of 16"),
    (lambda: EngramConfig().check_context_parallel(4, 8), "conv_size: reaches over 10 tokens.*got 4; .*at most 3 taps"),
    (lambda: PerLayerEmbeddingConfig(embed_dim=0), "embed_dim: must be positive; got 0"),
    (lambda: small(residual=AttentionResidualConfig()), "residual.form: needs a mixer and a feed-forward"),
    (lambda: small(residual=MHCConfig(num_streams=2)), "residual: is for model.residual.form=single, not for mhc"),
    (lambda: write_hf_config(small(["full", "engram"]), "llama"), "does not fit the format; got 'engram'"),
    (lambda: write_hf_config(small(["full", "ple"]), "qwen3"), "does not fit the format; got 'per_layer_embedding'"),
])
def test_what_cannot_be_is_refused_in_one_line(make, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("pattern", "reader"), [(["full", "engram"], "Engram"), (["full", "ple"], "a per-layer")])
def test_embeddings_in_place_of_ids_are_refused(pattern, reader):
    model = build_model(small(pattern))
    with pytest.raises(ValueError, match=f"{reader}.* looks tokens up by their ids: pass input_ids"):
        model(None, inputs_embeds=torch.zeros(1, 4, HIDDEN))


def test_a_factor_of_the_learning_rate_makes_no_other_model():
    other = EngramConfig(heads_per_ngram=2, table_rows=50, table_lr_factor=1.0)
    config = small()
    assert canonical(config) == canonical(small(mixers=config.mixers | {"engram": other}))
