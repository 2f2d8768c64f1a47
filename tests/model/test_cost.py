"""Costs from the config against the built model; published counts; memory against what autograd keeps."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hybridlm.config.paths import options
from hybridlm.model.config import ScheduleConfig
from hybridlm.model.cost import all_blocks, count_parameters, decode_state_bytes, forward_flops, training_flops
from hybridlm.model.memory import activation_bytes_per_token, training_memory
from hybridlm.model.mixers import IndexerConfig, MLAConfig, build_mixer
from hybridlm.model.mixers.common.cost import count_block_keys, count_open_tail, count_visible_pools
from hybridlm.model.model import HybridLM
from hybridlm.model.sequence import SequenceInfo
from hybridlm.run_config import load_model_config
from hybridlm_kernels.ops.indexer_kl import torch_backend as kl_blocks
from hybridlm_kernels.ops.sparse_attention import torch_backend as sparse_blocks
from tests.support.mixer_forms import PRESET_SOURCES

TINY = ("kimi_linear_tiny", "minimax_01_tiny", "qwen3_next_tiny", "deepseek_v32_tiny", "hybrid_tiny", "quickstart")


def build(config) -> HybridLM:
    with torch.device("meta"):
        return HybridLM(config)


@pytest.mark.parametrize("name", options("model"))
def test_parameters_are_those_of_the_built_model(name):
    config = load_model_config(name)
    count, model = count_parameters(config), build(config)
    assert count.total_with_mtp == model.num_params()
    assert count.mtp == sum(p.numel() for p in model.mtp.parameters())
    for layer, block in zip(count.layers, model.layers, strict=True):
        assert layer.params == sum(p.numel() for p in block.parameters()), layer
        assert layer.mixer_params == sum(p.numel() for p in block.mixer.parameters()), layer
    kept = sum(config.feed_forward_after(mixer).step_sum_numbers(index) for index, mixer in all_blocks(config))
    assert kept == sum(total.numel() for total in model.step_sums())


@pytest.mark.parametrize("name", options("mixer"))
def test_parameters_of_every_mixer_of_the_group(name):
    pattern = [*PRESET_SOURCES.get(name, []), name]
    config = load_model_config("quickstart", [f"model.num_layers={max(2, len(pattern))}",
                                              f"model.schedule.pattern={pattern}"])
    assert count_parameters(config).total == build(config).num_params()


def test_active_parameters_leave_out_idle_experts():
    config = load_model_config("kimi_linear_tiny")
    count = count_parameters(config)
    expert = 3 * 64 * 32
    idle = sum(6 * expert for layer in count.layers if layer.feed_forward == "moe")
    assert count.active_with_embeddings == count.total - idle
    assert count.active == count.active_with_embeddings - 2 * 512 * 64
    assert count.active_with_head == count.active + 512 * 64
    assert [layer.feed_forward for layer in count.layers] == ["dense"] + ["moe"] * 6


def test_tied_embeddings_are_counted_once():
    config = load_model_config("hybrid_tiny", ["model.tie_embeddings=true"])
    count = count_parameters(config)
    assert count.total == build(config).num_params()
    assert count.head == 0
    assert count.active_with_head == count.active_with_embeddings == count.active + 512 * 64


# The active counts that systems publish are rounded to a billion, and some count the head, some do not.
@pytest.mark.parametrize(("name", "total", "active", "how", "tolerance"), [
    ("kimi_linear_48b", 48e9, 3e9, "active_with_head", 0.04),
    ("minimax_01_456b", 456e9, 45.9e9, "active", 0.03),
    ("qwen3_next_80b", 80e9, 3e9, "active", 0.09),
    ("deepseek_v32_671b", 671e9, 37e9, "active", 0.03),
])
def test_published_counts(name, total, active, how, tolerance):
    config = load_model_config(name)
    count = count_parameters(config)
    assert count.total == pytest.approx(total, rel=0.03)
    assert getattr(count, how) == pytest.approx(active, rel=tolerance)
    assert round(getattr(count, how) / 1e9) == round(active / 1e9), "the same once rounded to a billion"
    assert (config.published.total, config.published.active) == (total, active)


@pytest.mark.parametrize("name", TINY)
def test_flops_of_the_products_are_twice_their_active_weights(name):
    config = load_model_config(name)
    count, parts = count_parameters(config), forward_flops(config, 256)
    products = sum(flops for part, flops in parts.items()
                   if part.split(".")[-1] in ("projections", "dense", "router", "experts", "shared_experts", "conv"))
    vectors = {"norms": 2 * config.hidden_size * config.num_layers}
    # Everything active multiplies once a token, but norms, biases and the indexer, which counts itself.
    assert products <= 2 * count.active
    assert products >= 2 * (count.active - vectors["norms"]) * (0.75 if "deepseek" in name else 0.97)
    assert parts["head"] == 2 * config.hidden_size * config.vocab_size


@pytest.mark.parametrize("mixer", ["full", "swa", "mla"])
def test_flops_of_products_against_torchs_counter(mixer):
    """Torch counts the matrix products of a dense model exactly; it does not see into fused attention on a CPU."""
    config = load_model_config("hybrid_tiny", [
        f"model.schedule.full={mixer}", "model.schedule.ratio=0", "model.num_layers=2",
        "model.feed_forward={kind: dense, intermediate_size: 128}"])
    model, length = HybridLM(config).eval(), 128
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.long))
    parts = forward_flops(config, length)
    attention = parts.pop(f"{mixer}.attention")
    counted = counter.get_total_flops() / length
    whole = attention * 2 * length / (length + 1)  # of the whole square, where it is not fused
    assert counted in (pytest.approx(sum(parts.values())), pytest.approx(sum(parts.values()) + whole))


def test_training_costs_three_forwards_and_counts_mtp():
    dense = load_model_config("qwen3_next_tiny")
    assert training_flops(dense, 512) == 3 * sum(forward_flops(dense, 512).values())
    config = load_model_config("deepseek_v32_tiny")
    parts = forward_flops(config, 512)
    assert "mtp" not in forward_flops(config, 512, mtp=False)
    block = sum(v for k, v in forward_flops(load_model_config("deepseek_v32_tiny", [
        "model.num_layers=1", "model.feed_forward.dense_layers=[]"]), 512, mtp=False).items())
    assert parts["mtp"] == block + 4 * config.hidden_size**2


@pytest.mark.parametrize("pool", [None, 16])
@pytest.mark.parametrize("mode", ["dense", "sparse"])
@pytest.mark.parametrize("core", ["full", "mla"])
def test_flops_of_the_indexers_loss_against_torchs_counter(core, mode, pool, monkeypatch):
    """Selection, loss and their gradients. Blocks of 8 queries, so that little is computed that no query sees."""
    monkeypatch.setattr(kl_blocks, "CPU_BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(sparse_blocks, "CPU_INDEX_ELEMENTS", 1)
    length, topk = 256, 64
    config = load_model_config("hybrid_tiny", [f"model.schedule.pattern=[{core}]", "model.num_layers=1"])
    option = IndexerConfig(num_heads=4, head_dim=16, topk=topk, pool=pool, mode=mode, rope_kind="none")
    indexed = replace(config.mixers[core], indexer=option)
    context = config.layer_context(0)
    mixer = build_mixer(indexed, context)
    mixer.init_weights(0.02)
    x = torch.randn(1, length, config.hidden_size)
    seq = SequenceInfo.make(1, length, x.device)
    q, k = (torch.randn(1, length, heads, dim) for heads, dim in main_shapes(indexed))
    with FlopCounterMode(display=False) as counter:
        width = mixer.indexer.q_proj.in_features
        selection = mixer.select(x, torch.randn(1, length, width), seq, None)
        mixer.observe(selection, q, k, seq)["loss/indexer_kl"].backward()
    expected = indexed.flops_per_token(context, length)["indexer"] + indexed.loss_flops_per_token(context, length)
    padded = 0.1 if pool is None else 0.2  # lists have room for a whole tail
    assert counter.get_total_flops() / length == pytest.approx(expected, rel=padded)


@pytest.mark.parametrize("core", ["full", "mla"])
def test_a_layer_that_shares_a_selection_costs_what_that_selection_says(core):
    """Its attention reads as many keys, and its loss scores as many, but it projects and selects nothing."""
    config = load_model_config("hybrid_tiny", [f"model.schedule.pattern=[{core}]", "model.num_layers=2"])
    option = IndexerConfig(num_heads=4, head_dim=16, topk=64, rope_kind="none")
    first = replace(config.mixers[core], indexer=option)
    second = replace(first, indexer=IndexerConfig(share=True))
    shared = replace(config, mixers={"first": first, "second": second},
                     schedule=ScheduleConfig(pattern=["first", "second"]))
    source, reader = shared.layer_context(0), shared.layer_context(1)
    costs, own = second.flops_per_token(reader, 512), first.flops_per_token(source, 512)
    dense = config.mixers[core].flops_per_token(config.layer_context(0), 512)
    assert costs["indexer"] == 0
    assert costs["attention"] == own["attention"] < dense["attention"]
    width = build_mixer(first, source).indexer.q_proj.in_features
    projections = option.num_params(source, width) - 2 * option.head_dim  # without its norm
    assert second.loss_flops_per_token(reader, 512) == first.loss_flops_per_token(source, 512) - 2 * projections
    assert second.shard_traffic(reader, 1, 256, 2)[0].kind == "gather"


def main_shapes(mixer):
    """Heads and dims of the queries and keys that the loss sees, expanded."""
    if isinstance(mixer, MLAConfig):
        return [(mixer.num_heads, mixer.qk_head_dim)] * 2
    return [(mixer.num_heads, mixer.head_dim), (mixer.kv_heads, mixer.head_dim)]


@pytest.mark.parametrize("length", [1, 15, 16, 63, 64, 80, 200])
def test_mean_numbers_of_pools_and_tail_tokens_by_counting(length):
    complete = [t // 16 for t in range(1, length + 1)]
    for limit in (None, 1, 3):
        counted = sum(min(c, limit or c) for c in complete) / length
        assert count_visible_pools(length, 16, limit) == pytest.approx(counted)
    assert count_open_tail(length, 16) == pytest.approx(sum(t % 16 for t in range(1, length + 1)) / length)


@pytest.mark.parametrize("length", [1, 2, 5, 12, 63, 64, 80])
def test_mean_number_of_keys_in_blocks_by_counting(length):
    for block, topk in ((1, 2), (4, 1), (4, 3), (16, 2)):
        own = [block * min(t // block, topk - 1) + t % block + 1 for t in range(length)]
        assert count_block_keys(length, block, topk, own_counts=True) == pytest.approx(sum(own) / length)
        beside = [block * min(t // block, topk) + t % block for t in range(1, length + 1)]
        assert count_block_keys(length, block, topk, own_counts=False) == pytest.approx(sum(beside) / length)


def test_only_attention_grows_with_the_context():
    config = load_model_config("kimi_linear_tiny")
    short, long = forward_flops(config, 1024), forward_flops(config, 4096)
    grown = {part for part in short if long[part] > short[part]}
    assert grown == {"full.attention"}
    linear = load_model_config("kimi_linear_tiny", ["model.schedule.ratio=inf", "model.schedule.override={-1: kda}"])
    assert decode_state_bytes(linear, 1 << 10) == decode_state_bytes(linear, 1 << 20)
    assert decode_state_bytes(config, 1 << 20) > 100 * decode_state_bytes(config, 1 << 10) / 2


@pytest.mark.parametrize("name", TINY)
def test_decode_state_is_what_the_model_keeps(name):
    config = load_model_config(name)
    model, length = HybridLM(config).eval(), 96
    state = model.new_state(1, length)
    with torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.long), state=state)
    assert decode_state_bytes(config, length, element_bytes=4) == sum(layer.num_bytes for layer in state.layers)


def test_memory_of_weights_and_optimizer():
    config = load_model_config("qwen3_next_tiny")
    params = count_parameters(config).total_with_mtp
    fp32, bf16 = (training_memory(config, batch_size=2, sequence_length=64, precision=precision, optimizer_bytes=7)
                  for precision in ("fp32", "bf16"))
    assert (fp32.weights, fp32.gradients, fp32.optimizer) == (4 * params, 4 * params, 7)
    assert bf16.weights == 6 * params
    assert fp32.total == sum((fp32.weights, fp32.gradients, fp32.optimizer, fp32.activations))


def test_checkpointing_and_bf16_save_activations():
    config = load_model_config("kimi_linear_48b")
    plain, half = activation_bytes_per_token(config, 4), activation_bytes_per_token(config, 2)
    assert half < plain < 2 * half
    kept = activation_bytes_per_token(config, 2, checkpointing=True)
    assert config.num_layers * config.hidden_size * 4 < kept < half / 5


MID = ["model.hidden_size=256", "model.schedule.ratio=0", "model.feed_forward={kind: dense, intermediate_size: 16}",
       *(f"model.mixers.{name}={{num_heads: 4, head_dim: 64}}"
         for name in ("kda", "gdn", "deltanet", "lightning", "full")),
       "model.mixers.mla={q_lora_rank: 128, kv_lora_rank: 64}",
       "model.mixers.mla={qk_nope_head_dim: 64, qk_rope_head_dim: 32, v_head_dim: 64}"]
MOE = "num_experts: 8, num_experts_per_tok: 2, moe_intermediate_size: 128, num_shared_experts: 1"


def kept_bytes(model: HybridLM, batch: int, length: int) -> int:
    """What autograd keeps for the backward pass, each storage once, without parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    ids = torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        output = model(ids, labels=ids)
    assert output.loss is not None
    return sum(t.untyped_storage().nbytes() for t in kept.values())


@pytest.mark.parametrize("change", [
    *(f"model.schedule.full={name}" for name in ("kda", "gdn", "deltanet", "lightning", "full", "mla")),
    "model.feed_forward={kind: dense, intermediate_size: 512}",
    f"model.feed_forward={{kind: moe, router: sigmoid, {MOE}}}",
    f"model.feed_forward={{kind: moe, router: softmax, shared_gate: true, {MOE}}}",
])
def test_activations_of_a_layer_are_near_what_autograd_keeps(change):
    def both(layers: int) -> tuple[float, float]:
        config = load_model_config("hybrid_tiny", [*MID, change, "model.num_layers=3"])
        config = replace(config, num_layers=layers)
        return kept_bytes(HybridLM(config), 2, 256) / 512, activation_bytes_per_token(config, 4)

    (kept, estimate), (kept_less, estimate_less) = both(3), both(2)
    assert estimate - estimate_less == pytest.approx(kept - kept_less, rel=0.3)
