"""The whole model: losses, borders, causality, decoding, initialisation."""

import itertools
import time

import pytest
import torch
import torch.nn.functional as F

from hybridlm.errors import ConfigError
from hybridlm.model import ModelOutput, build_model
from hybridlm.model.config import ScheduleConfig
from hybridlm.model.feed_forward import MoEConfig
from hybridlm.model.layer_context import NormConfig
from hybridlm.model.mixers import AttentionConfig, DeltaRuleConfig, LinearAttentionConfig, MLAConfig
from hybridlm.model.model import HybridLM
from hybridlm.model.output import GlobalBatch
from hybridlm.model.residual import BranchConfig
from hybridlm.model.targets import build_targets
from hybridlm_kernels import CuSeqlens
from tests.support.tiny_lm import BORDERS, VOCABULARY, config, model, moe, with_mtp

IDS = torch.randint(VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(7))

# One model for each way of putting the parts together.
MODELS = {
    "dense": {},
    "moe": {"feed_forward": moe()},
    "softmax_moe": {"feed_forward": MoEConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
                                               balance_loss=0.1, router_z_loss=0.01, num_shared_experts=1,
                                               shared_gate=True), "norm": NormConfig(zero_centered=True)},
    "tied_capped": {"tie_embeddings": True, "logit_soft_cap": 5.0, "z_loss": 1e-2},
    "normed_lightning": {"mixers": {
        "linear": LinearAttentionConfig(num_heads=2, head_dim=16,
                                        residual=BranchConfig(form="normed", alpha=2.0, beta=0.5)),
        "full": AttentionConfig(num_heads=2, head_dim=16, residual=BranchConfig(form="post"))}},
    "mla": {"schedule": ScheduleConfig(pattern=["linear", "mla"]), "mixers": {
        "linear": DeltaRuleConfig(num_heads=2, head_dim=16, decay="scalar"),
        "mla": MLAConfig(num_heads=2, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)}},
}


@pytest.mark.parametrize("name", MODELS)
def test_loss_is_the_cross_entropy_of_the_logits(name):
    lm = model(**MODELS[name]).eval()
    labels = IDS.clone()
    labels[0, 5:9] = -100
    output = lm(IDS, labels=labels, return_logits=True)
    logits = lm(IDS).logits
    assert torch.equal(output.logits, logits)
    assert lm(IDS, labels=labels).logits is None
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.losses["lm"], expected)
    assert output.num_tokens == (labels[:, 1:] != -100).sum()
    z_loss = MODELS[name].get("z_loss", 0.0)
    if z_loss:
        counted = logits[:, :-1][labels[:, 1:] != -100]
        torch.testing.assert_close(output.losses["z"], counted.logsumexp(-1).square().mean())
        expected = expected + z_loss * output.losses["z"]
    torch.testing.assert_close(output.loss, expected)


def test_labels_and_targets_say_the_same():
    lm = with_mtp(2)
    targets = build_targets(IDS, 2, BORDERS)
    for borders in (BORDERS, torch.tensor(BORDERS), CuSeqlens(BORDERS)):
        a, b = lm(IDS, labels=IDS, cu_seqlens=BORDERS), lm(IDS, targets=targets, cu_seqlens=borders)
        assert torch.equal(a.loss, b.loss)
        assert a.losses.keys() == b.losses.keys()


def test_losses_of_the_parts_of_a_batch_add_up():
    """Rows with different numbers of labels, each its own forward, against both in one."""
    lm = with_mtp(2, feed_forward=moe(), z_loss=0.01).train()
    labels = IDS.clone()
    labels[0, :13] = -100
    targets = build_targets(labels, 2)
    both = lm(IDS, targets=targets)
    both.loss.backward()
    gradients = {n: p.grad.clone() for n, p in lm.named_parameters()}
    lm.zero_grad()
    batch = GlobalBatch(targets=tuple((targets != -100).sum((0, 1)).tolist()), tokens=IDS.numel())
    parts = [lm(IDS[i : i + 1], targets=targets[i : i + 1], global_batch=batch) for i in range(2)]
    sum(part.loss for part in parts).backward()
    for name in both.losses:
        torch.testing.assert_close(sum(part.losses[name] for part in parts), both.losses[name])
    for n, p in lm.named_parameters():
        torch.testing.assert_close(p.grad, gradients[n], rtol=1e-4, atol=1e-6, msg=lambda m, n=n: f"{n}: {m}")


def test_nothing_to_predict_is_no_nan():
    output = model()(IDS[:, :1], labels=IDS[:, :1])
    assert output.num_tokens == 0
    assert output.loss == 0


@pytest.mark.parametrize("name", MODELS)
def test_packed_equals_each_document_alone(name):
    """Logits, every loss and every gradient. Losses are means over tokens, so documents weigh by their tokens."""
    lm = model(**MODELS[name]).double().train()
    mtp = with_mtp(2, **MODELS[name]).double().train()
    flat = IDS.flatten()
    documents = [flat[a:b][None] for a, b in itertools.pairwise(BORDERS)]
    packed_logits = lm(IDS, cu_seqlens=BORDERS).logits.flatten(0, 1)
    torch.testing.assert_close(packed_logits, torch.cat([lm(d).logits[0] for d in documents]))

    packed = mtp(IDS, labels=IDS, cu_seqlens=BORDERS)
    packed.loss.backward()
    gradients = {n: p.grad.clone() for n, p in mtp.named_parameters()}
    mtp.zero_grad()
    loss = alone(mtp, documents)
    loss.backward()
    torch.testing.assert_close(packed.loss, loss)
    for n, p in mtp.named_parameters():
        torch.testing.assert_close(gradients[n], p.grad, rtol=1e-6, atol=1e-9, msg=lambda m, n=n: f"{n}: {m}")


def alone(lm, documents):
    """The loss of a batch, put together from its documents: each part weighs by its own number of tokens."""
    c = lm.config
    total, weights = {}, {}
    for d in documents:
        losses = lm(d, labels=d).losses
        n = d.shape[1]
        part = {"lm": n - 1, "z": n - 1, "balance": n, "router_z": n}
        for key, value in losses.items():
            if key != "mtp":
                total[key] = total.get(key, 0.0) + part[key] * value
                weights[key] = weights.get(key, 0) + part[key]
    mtp = torch.zeros(c.mtp.depth, dtype=torch.float64)
    count = torch.zeros(c.mtp.depth, dtype=torch.float64)
    for d in documents:
        for k in range(1, c.mtp.depth + 1):
            targets = build_targets(d, c.mtp.depth)
            targets[..., 1:k] = -100
            targets[..., k + 1 :] = -100
            n = max(d.shape[1] - 1 - k, 0)
            share = lm(d, targets=targets).losses["mtp"] * c.mtp.depth
            mtp = mtp + F.one_hot(torch.tensor(k - 1), c.mtp.depth) * share * n
            count[k - 1] += n
    means = {key: total[key] / weights[key] for key in total}
    weight = {"lm": 1.0, "z": c.z_loss, "balance": getattr(c.feed_forward, "balance_loss", 0.0),
              "router_z": getattr(c.feed_forward, "router_z_loss", 0.0)}
    return sum(weight[key] * value for key, value in means.items()) + c.mtp.loss_weight * (mtp / count).mean()


@pytest.mark.parametrize("name", MODELS)
def test_the_future_changes_no_bit_of_the_past(name):
    lm = model(**MODELS[name]).eval()
    ids = torch.randint(VOCABULARY, (1, 70), generator=torch.Generator().manual_seed(5))
    logits = lm(ids).logits
    for t in (0, 15, 16, 31, 63, 64, 68):  # among them borders of chunks
        changed = ids.clone()
        changed[:, t + 1 :] = (changed[:, t + 1 :] + 1) % VOCABULARY
        other = lm(changed).logits
        assert torch.equal(other[:, : t + 1], logits[:, : t + 1]), t
        assert not torch.equal(other[:, t + 1], logits[:, t + 1])


@pytest.mark.parametrize("name", MODELS)
def test_decoding_equals_the_full_forward(name):
    lm = model(**MODELS[name]).double().eval()
    with torch.no_grad():
        full = lm(IDS).logits
        for prompt in (1, 7, 20):
            state = lm.new_state(2, 20)
            parts = [lm(IDS[:, :prompt], state=state).logits]
            parts += [lm(IDS[:, t : t + 1], state=state).logits for t in range(prompt, 20)]
            assert state.length == 20
            torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=1e-7, atol=1e-9)


def test_decoding_in_pieces_of_any_size():
    lm = model().double().eval()
    state = lm.new_state(2, 20)
    with torch.no_grad():
        parts = [lm(piece, state=state).logits for piece in IDS.split([3, 9, 1, 5, 2], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), lm(IDS).logits, rtol=1e-7, atol=1e-9)


def test_logits_of_the_last_positions_only():
    lm = model().eval()
    torch.testing.assert_close(lm(IDS, logits_to_keep=2).logits, lm(IDS).logits[:, -2:])


def test_balance_losses_and_statistics_are_averaged_over_layers():
    lm = with_mtp(1, feed_forward=moe(balance_loss=0.5)).train()
    output = lm(IDS, labels=IDS)
    output.losses["balance"].backward(retain_graph=True)
    routers = {n: p for n, p in lm.named_parameters() if n.endswith("router.weight")}
    assert len(routers) == 3, "layers 1 and 2, and the MTP block"
    assert all(p.grad.abs().max() > 0 for p in routers.values())
    loads = lm.router_loads()
    assert sorted(loads) == ["layers.1.feed_forward", "layers.2.feed_forward", "mtp.0.block.feed_forward"]
    violation = [float(load.max() / load.float().mean() - 1) for load in loads.values()]
    assert float(output.stats["max_violation"]) == pytest.approx(sum(violation) / 3)
    assert float(output.stats["max_violation_max"]) == pytest.approx(max(violation))
    assert not output.stats["router_entropy"].requires_grad
    assert lm.eval()(IDS, labels=IDS).stats == {}


def test_bias_moves_once_a_step_over_all_micro_batches():
    lm = model(feed_forward=moe()).train()
    for row in IDS:
        lm(row[None], labels=row[None])
    load = lm.router_loads()["layers.1.feed_forward"].clone()
    assert load.sum() == IDS.numel() * 2
    lm.post_optimizer_step()
    bias = lm.layers[1].feed_forward.router.bias
    torch.testing.assert_close(bias, 0.01 * torch.sign(load.float().mean() - load))
    assert all(load.sum() == 0 for load in lm.router_loads().values())
    lm.eval()(IDS)
    assert all(load.sum() == 0 for load in lm.router_loads().values()), "validation trains no bias"


def test_tied_embeddings():
    lm = model(tie_embeddings=True)
    assert lm.lm_head is None
    assert lm.head_weight is lm.embed.weight
    assert "lm_head.weight" not in lm.state_dict()
    assert model().num_params() - lm.num_params() == VOCABULARY * 32
    x = lm.norm(torch.randn(1, 3, 32))
    torch.testing.assert_close(lm.logits(x), x @ lm.embed.weight.T)


def test_fresh_weights_do_not_depend_on_the_schedule():
    a = model(seed=5, schedule=ScheduleConfig(pattern=["linear"]))
    b = model(seed=5, schedule=ScheduleConfig(pattern=["linear", "full", "linear"]))
    common = a.state_dict().keys() & b.state_dict().keys()
    different = {n for n in common if not torch.equal(a.state_dict()[n], b.state_dict()[n])}
    assert all(n.startswith("layers.1.mixer.") for n in different)
    assert {"embed.weight", "layers.1.feed_forward.up_proj.weight", "layers.2.mixer.q_proj.weight"} <= common
    assert not torch.equal(a.layers[0].mixer.q_proj.weight, a.layers[2].mixer.q_proj.weight)
    assert not torch.equal(a.embed.weight, model(seed=6).embed.weight)


@pytest.mark.parametrize("name", MODELS)
def test_built_on_meta_equals_built_directly(name):
    """Nothing keeps what memory held before: parameters and buffers are all written by `init_weights`."""
    random = torch.get_rng_state()
    built = build_model(config(**MODELS[name]), seed=3)
    assert torch.equal(random, torch.get_rng_state()), "building leaves the caller's random state alone"
    direct = HybridLM(config(**MODELS[name]))
    with torch.no_grad():
        for tensor in [*direct.parameters(), *direct.buffers()]:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 7)
    direct.init_weights(3)
    for (n, a), (_, b) in zip(built.named_parameters(), direct.named_parameters(), strict=True):
        assert torch.equal(a, b), n
    for (n, a), (_, b) in zip(built.named_buffers(), direct.named_buffers(), strict=True):
        assert torch.equal(a, b), n


def test_plain_projections_have_the_configured_spread():
    lm = model(init_std=0.05, hidden_size=64)
    for name in ("embed.weight", "lm_head.weight", "layers.2.mixer.q_proj.weight",
                 "layers.0.feed_forward.down_proj.weight"):
        assert float(lm.get_parameter(name).detach().std()) == pytest.approx(0.05, rel=0.1)


def test_a_model_of_671_billion_builds_on_meta_at_once():
    mla = MLAConfig(num_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
                    v_head_dim=128)
    feed_forward = MoEConfig(num_experts=256, num_experts_per_tok=8, moe_intermediate_size=2048, num_shared_experts=1,
                             dense_layers=[0, 1, 2], intermediate_size=18432, router="sigmoid", num_groups=8,
                             topk_groups=4, bias_update_rate=0.001)
    big = config(vocab_size=129280, hidden_size=7168, num_layers=61, mixers={"full": mla}, feed_forward=feed_forward,
                 schedule=ScheduleConfig(full="full", ratio=0))
    start = time.perf_counter()
    lm = build_model(big, device="meta")
    assert time.perf_counter() - start < 20
    assert all(p.device.type == "meta" for p in lm.parameters())
    assert lm.num_params() == pytest.approx(671e9, rel=0.001)


def test_fp32_names_exist_and_hold_router_and_decay():
    lm = with_mtp(1, feed_forward=moe())
    names = lm.fp32_parameter_names()
    assert names <= {n for n, _ in lm.named_parameters()} | {n for n, _ in lm.named_buffers()}
    assert {"layers.1.feed_forward.router.weight", "layers.1.feed_forward.router.bias", "layers.0.mixer.A_log",
            "mtp.0.block.feed_forward.router.bias"} <= names


def test_bf16_autocast_stays_close():
    lm = with_mtp(1, feed_forward=moe()).train()
    plain = lm(IDS, labels=IDS)
    with torch.autocast("cpu", torch.bfloat16):
        half = lm(IDS, labels=IDS)
    half.loss.backward()
    assert half.loss.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in lm.parameters())
    assert half.loss.item() == pytest.approx(plain.loss.item(), rel=0.02)


@pytest.mark.parametrize(("inputs", "message"), [
    ({"input_ids": IDS[0]}, "batch, time"),
    ({"input_ids": IDS + 100_000}, "must be from 0 to .*, the model's vocabulary; got 100"),
    ({"input_ids": IDS - 100_000}, "vocabulary; got -"),
    ({"input_ids": IDS, "labels": IDS[:, :5]}, "labels must be"),
    ({"input_ids": IDS, "labels": IDS, "targets": IDS[..., None]}, "one of them"),
    ({"input_ids": IDS, "targets": IDS}, "targets must be"),
    ({"input_ids": IDS, "cu_seqlens": [0, 7]}, "cu_seqlens ends at 7"),
    ({"input_ids": IDS, "cu_seqlens": [0, 7, 40]}, "cross a row"),
])
def test_shapes_that_do_not_fit_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        model()(**inputs)


def test_a_state_that_does_not_fit_is_refused():
    lm = model().eval()
    state = lm.new_state(2, 20)
    with pytest.raises(ValueError, match="cannot be decoded"):
        lm(IDS, cu_seqlens=BORDERS, state=state)
    with pytest.raises(ValueError, match="trained through"):
        lm(IDS, labels=IDS, state=state)
    lm(IDS, state=state)
    with pytest.raises(ValueError, match="holds 20 of at most 20"):
        lm(IDS[:, :1], state=state)


def test_a_run_config_builds_with_its_seed():
    class Run:
        class training:
            seed = 9

        model = config()

    assert torch.equal(build_model(Run()).embed.weight, model(seed=9).embed.weight)
    assert isinstance(build_model(Run())(IDS), ModelOutput)


def test_a_name_is_no_config():
    with pytest.raises(ConfigError, match=r"is not a config; got 'hybrid_tiny'; expected what hybridlm.load_config"):
        build_model("hybrid_tiny")


def test_dense_layer_outside_the_model_is_the_users_mistake():
    with pytest.raises(ConfigError, match="dense_layers"):
        model(feed_forward=moe(dense_layers=[3]))
