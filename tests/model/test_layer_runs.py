"""Layers that run several times with one set of weights: shared blocks, repeated segments, adapters of single runs."""

import dataclasses
import itertools

import pytest
import torch

import hybridlm
from hybridlm import checkpoint
from hybridlm.checkpoint.model import load_checkpoint, model_texts
from hybridlm.data.packing import Batch
from hybridlm.distributed.engine_config import ENGINES
from hybridlm.errors import ConfigError
from hybridlm.evaluation.indexer_recall import indexer_recall
from hybridlm.interop import to_hf_model, verify
from hybridlm.interop.compare import describe
from hybridlm.model.config import ModelConfig, MTPConfig, RepeatConfig, RunAdaptersConfig, ScheduleConfig
from hybridlm.model.contract_check.thread_shards import run_on_threads
from hybridlm.model.cost import count_parameters, decode_state_bytes, forward_flops
from hybridlm.model.edit import replace_mixers
from hybridlm.model.mixers import AttentionConfig, DeltaRuleConfig, IndexerConfig, MLSTMConfig
from hybridlm.model.residual import AttentionResidualConfig, BranchConfig, HyperConfig
from hybridlm.model.run_adapters import LowRankPerRun, PerRunLinear, SeparatePerRun
from hybridlm.planning.communication import ParallelPlan, step_traffic
from hybridlm.tensor_storage import unique_tensors
from hybridlm.training.distillation import _describe_stream
from hybridlm.training.sparse_attention import measuring_recall
from hybridlm_kernels.packing import CuSeqlens
from tests.support.tiny_lm import BORDERS, VOCABULARY, config, dense, model, moe

IDS = torch.randint(VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(3))
MIXERS = {"linear": DeltaRuleConfig(num_heads=2, head_dim=16),
          "full": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
          "shared": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16,
                                    residual=BranchConfig(form="aside", embedding=True))}
ADAPTERS = RunAdaptersConfig(low_rank=["mixer.[qkv]_proj", "feed_forward.gate_proj"], rank=3,
                             separate=["feed_forward_projection"])


def shared_block(adapters: RunAdaptersConfig | None = ADAPTERS, **options) -> ModelConfig:
    """A block of attention and feed-forward that runs before layers 2 and 3 of a model of linear layers."""
    schedule = ScheduleConfig(pattern=["linear"], override={1: "shared"}, alone=["linear"], reuse={1: [3]},
                              run_adapters=adapters)
    ff = dense(residual=BranchConfig(form="aside", project=True))
    return config(**{"num_layers": 4, "schedule": schedule, "mixers": MIXERS, "feed_forward": ff} | options)


def looped(times: int = 3, adapters: RunAdaptersConfig | None = None, **options) -> ModelConfig:
    """A prelude, a segment of two layers that is repeated, and a layer behind it."""
    schedule = ScheduleConfig(pattern=["linear", "full", "linear", "linear"],
                              repeat=RepeatConfig(first=1, last=2, times=times), run_adapters=adapters)
    return config(**{"num_layers": 4, "schedule": schedule, "mixers": MIXERS} | options)


FORMS = {"shared block": shared_block(), "without adapters": shared_block(None), "loop": looped(),
         "loop with adapters": looped(adapters=RunAdaptersConfig(low_rank=["mixer.*_proj"], rank=2)),
         "loop with experts": looped(2, feed_forward=moe(dense_layers=[])),
         "loop with streams": looped(residual=HyperConfig(num_streams=2))}


@pytest.fixture(scope="module", params=FORMS)
def lm(request):
    torch.manual_seed(0)
    found = hybridlm.build_model(FORMS[request.param], seed=0).double()
    for part in found.modules():
        if isinstance(part, LowRankPerRun):  # adapters of fresh models add nothing
            for up in part.up:
                torch.nn.init.normal_(up.weight, std=0.3)
    return found


def unroll(lm):
    """The same function with a layer of its own for each run, and the weights of every layer under its name."""
    layers = lm.config.layers()
    schedule = dataclasses.replace(lm.config.schedule, pattern=[layers[index] for index, _ in lm.runs], override={},
                                   reuse={}, repeat=None, run_adapters=None)
    whole = hybridlm.build_model(dataclasses.replace(lm.config, num_layers=len(lm.runs), schedule=schedule)).double()
    weights = {name: p for name, p in lm.state_dict().items() if not name.startswith("layers.")}
    for place, (index, number) in enumerate(lm.runs):
        layer = lm.layers[index]
        per_run = {name: part for name, part in layer.named_modules() if isinstance(part, PerRunLinear)}
        for name, value in layer.state_dict().items():
            owner = per_run.get(name.rpartition(".")[0])
            if isinstance(owner, LowRankPerRun):
                value = value + owner.up[number].weight @ owner.down[number].weight
            elif isinstance(owner, SeparatePerRun) and number:
                value = owner.later[number - 1].weight
            elif any(name.startswith((f"{other}.down.", f"{other}.up.", f"{other}.later.")) for other in per_run):
                continue
            weights[f"layers.{place}.{name}"] = value
    whole.load_state_dict(weights)
    return whole


def gradients(lm):
    lm.zero_grad()
    lm.train()(IDS, labels=IDS, cu_seqlens=BORDERS).loss.backward()
    return {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}


def test_runs_compute_what_layers_with_copies_of_the_weights_compute(lm):
    whole = unroll(lm)
    with torch.no_grad():
        torch.testing.assert_close(lm.eval()(IDS).logits, whole.eval()(IDS).logits, rtol=1e-9, atol=1e-9)
    found, of_copies = gradients(lm), gradients(whole)
    for index, layer in enumerate(lm.layers):
        places = [(place, number) for place, (other, number) in enumerate(lm.runs) if other == index]
        for name, _ in layer.named_parameters():
            owner = layer.get_submodule(name.rpartition(".")[0])
            if isinstance(owner, PerRunLinear) or not any(isinstance(m, PerRunLinear) and name.startswith(f"{path}.")
                                                          for path, m in layer.named_modules()):
                used = places[:1] if isinstance(owner, SeparatePerRun) else places
                total = sum(of_copies[f"layers.{place}.{name}"] for place, _ in used)
                torch.testing.assert_close(found[f"layers.{index}.{name}"], total, rtol=1e-6, atol=1e-12)
        for path, part in layer.named_modules():
            for place, number in places:
                if isinstance(part, LowRankPerRun):
                    whole_grad = of_copies[f"layers.{place}.{path}.weight"]
                    assert whole_grad.abs().max() > 0
                    torch.testing.assert_close(found[f"layers.{index}.{path}.up.{number}.weight"],
                                               whole_grad @ part.down[number].weight.T)
                    torch.testing.assert_close(found[f"layers.{index}.{path}.down.{number}.weight"],
                                               part.up[number].weight.T @ whole_grad)


@torch.no_grad()
def test_each_run_has_a_decode_state(lm):
    lm.eval()
    full, state = lm(IDS).logits, lm.new_state(2, 20)
    parts = [lm(ids, state=state).logits for ids in IDS.split([7, 1, 1, 11], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-7, atol=1e-9)
    assert len(state.layers) == len(lm.runs) > len(lm.layers)
    kept = sum(layer.num_bytes for layer in state.layers)
    assert decode_state_bytes(lm.config, 20, 8) == pytest.approx(kept / 2, rel=0.5)


@torch.no_grad()
def test_packed_documents_are_separate_and_the_future_changes_nothing(lm):
    lm.eval()
    packed = lm(IDS, cu_seqlens=BORDERS).logits.flatten(0, 1)
    for start, stop in itertools.pairwise(BORDERS):
        alone = lm(IDS.flatten()[None, start:stop]).logits[0]
        torch.testing.assert_close(packed[start:stop], alone, rtol=1e-7, atol=1e-9)
    changed = IDS.clone()
    changed[:, 11:] = (changed[:, 11:] + 1) % VOCABULARY
    torch.testing.assert_close(lm(changed).logits[:, :11], lm(IDS).logits[:, :11], rtol=0, atol=1e-12)


def test_activation_checkpointing_changes_no_bit(lm):
    results = []
    for lm.activation_checkpointing in (False, True):
        results.append(gradients(lm))
    lm.activation_checkpointing = False
    assert all(torch.equal(gradient, results[1][name]) for name, gradient in results[0].items())


def test_divided_rows_give_the_logits_of_whole_rows(lm):
    lm.eval()
    with torch.no_grad():
        whole = lm(IDS).logits

    def shard(group):
        own = hybridlm.build_model(lm.config).double().eval()
        own.load_state_dict(lm.state_dict())
        own.shard_group = group
        with torch.no_grad():
            return own(IDS).logits

    torch.testing.assert_close(torch.cat(run_on_threads(shard, 2), 1), whole, rtol=1e-7, atol=1e-9)


def test_weights_count_once_and_work_counts_in_each_run(lm):
    count = count_parameters(lm.config)
    assert count.total == lm.num_params()
    assert sum(layer.params for layer in count.layers) == sum(p.numel() for p in lm.layers.parameters())
    whole = unroll(lm)
    found, of_copies = (sum(forward_flops(m.config, 32).values()) for m in (lm, whole))
    adapters = [part for part in lm.modules() if isinstance(part, LowRankPerRun)]
    of_adapters = sum(2 * (part.down[0].weight.numel() + part.up[0].weight.numel()) * len(part.down)
                      for part in adapters)
    assert found == of_copies + of_adapters
    assert decode_state_bytes(lm.config, 32) == decode_state_bytes(whole.config, 32)


def test_checkpoints_hold_each_weight_once(lm, tmp_path):
    texts = model_texts({"model": lm.config}, lm.config, tokenizer=None)
    checkpoint.write(tmp_path, 1, texts, {"model": unique_tensors(lm.float())})
    loaded = load_checkpoint(tmp_path)
    assert loaded.config == lm.config
    assert {name: p.shape for name, p in loaded.named_parameters()} == {
        name: p.shape for name, p in lm.named_parameters()}
    with torch.no_grad():
        assert torch.equal(loaded.eval()(IDS).logits, lm.eval()(IDS).logits)
    lm.double()


def test_first_weights_do_not_depend_on_the_number_of_runs():
    once, often = (hybridlm.build_model(looped(times), seed=4) for times in (1, 4))
    assert all(torch.equal(p, q) for p, q in zip(once.parameters(), often.parameters(), strict=True))
    assert len(often.runs) == 10
    with torch.no_grad():
        assert not torch.equal(once.eval()(IDS).logits, often.eval()(IDS).logits)


def test_each_separate_run_is_drawn_by_the_rules_of_its_mixer_and_has_the_role_of_the_first():
    mixers = {**MIXERS, "linear": MLSTMConfig(num_heads=2, head_dim=16)}  # whose gates have zero weights at first
    adapters = RunAdaptersConfig(separate=["mixer.f_proj", "mixer.q_proj"])
    lm = hybridlm.build_model(looped(3, adapters, mixers=mixers), seed=0)
    gate, q = lm.layers[2].mixer.f_proj, lm.layers[2].mixer.q_proj
    assert isinstance(gate, SeparatePerRun)
    assert not any(weight.any() for weight in gate.parameters())
    values = torch.stack([q.weight, *(later.weight for later in q.later)]).flatten(1)
    torch.testing.assert_close(values.std(1), torch.full((3,), lm.config.init_std), rtol=0.15, atol=0)
    assert torch.corrcoef(values).tril(-1).abs().max() < 0.15
    roles = lm.parameter_roles()
    assert roles["layers.1.mixer.q_proj.weight"].heads == 4
    for index in (0, 1):
        assert roles[f"layers.1.mixer.q_proj.later.{index}.weight"] == roles["layers.1.mixer.q_proj.weight"]


def test_a_branch_aside_goes_to_the_next_branch_alone():
    lm = hybridlm.build_model(shared_block(), seed=0).double().eval()
    with torch.no_grad():
        hidden = lm(IDS, return_hidden_states=True).hidden_states
    assert len(hidden) == len(lm.runs) + 1
    assert torch.equal(hidden[2], hidden[1])  # behind the block the stream is what it was before
    assert not torch.equal(hidden[3], hidden[2])


def test_replaced_mixers_keep_the_runs():
    changed, _ = replace_mixers(hybridlm.build_model(looped(), seed=0), [2], AttentionConfig(num_heads=2, head_dim=16))
    assert changed.config.runs() == looped().runs()
    assert changed.config.layers()[2] == "attention"


def test_mixers_with_weights_of_single_runs_are_not_replaced():
    lm = hybridlm.build_model(looped(2, RunAdaptersConfig(low_rank=["mixer.q_proj"])), seed=0)
    with pytest.raises(ConfigError, match=r"single runs .*got \[2\]"):
        replace_mixers(lm, [2, 3], AttentionConfig(num_heads=2, head_dim=16))
    of_feed_forward = hybridlm.build_model(looped(2, RunAdaptersConfig(low_rank=["feed_forward.gate_proj"])), seed=0)
    assert replace_mixers(of_feed_forward, [2], AttentionConfig(num_heads=2, head_dim=16))[0].config.layers()[2] \
        == "attention"


@pytest.mark.parametrize("make", [looped, shared_block])
def test_a_run_that_differs_from_another_model_is_found(make):
    ours = hybridlm.build_model(make(), seed=0)
    same = verify(ours, to_hf_model(ours), rows=1, length=12)["random"]
    assert same["layers"] == [0.0] * len(ours.runs)
    assert same["first_different_run"] is None
    theirs = to_hf_model(ours)
    with torch.no_grad():
        ours.layers[3].mixer.o_proj.weight.mul_(2.0)
    found = verify(ours, theirs, rows=1, length=12)
    place = ours.runs.index((3, 0))
    assert (found["random"]["first_different_run"], found["random"]["first_different_layer"]) == (place, 3)
    assert found["random"]["mixer"] == "linear"
    assert f"layer that differs is 3 (linear), by {found['random']['layers'][place]:.1e}" in describe(found)


def test_exchanges_count_in_each_run_and_sums_of_routers_once():
    once, often = looped(1, feed_forward=moe(dense_layers=[])), looped(3, feed_forward=moe(dense_layers=[]))
    engine = ENGINES.config_class("ddp")(expert_parallel=2)
    divided = ENGINES.config_class("ddp")(context_parallel=2)
    of_once, of_often = ({one.name: one.payload for one in step_traffic(model, ParallelPlan(
        ranks=4, length=64, engine=engine))} for model in (once, often))
    assert of_often["expert rows"] == pytest.approx(2 * of_once["expert rows"])  # 8 runs of 4 layers
    assert all(of_often[name] == of_once[name] for name in of_once if name != "expert rows")
    unrolled = unroll(hybridlm.build_model(often)).config
    shards = [sum(one.payload for one in step_traffic(model, ParallelPlan(ranks=4, length=64, engine=divided))
                  if one.name == "shards of rows") for model in (once, often, unrolled)]
    assert shards[0] < shards[1] == pytest.approx(shards[2])


def test_the_kl_of_an_indexer_is_the_mean_over_its_runs():
    indexed = AttentionConfig(num_heads=2, head_dim=16, indexer=IndexerConfig(num_heads=2, head_dim=16, topk=4))
    lm = hybridlm.build_model(looped(2, mixers={**MIXERS, "full": indexed}), seed=0)
    batch = Batch(IDS, IDS[..., None], CuSeqlens([0, 20, 40]), num_bytes=0, num_tokens=IDS.numel(), sample_ids=())
    of_runs = []
    with measuring_recall(lm), torch.no_grad():
        stats = lm.eval()(IDS, logits_to_keep=1).stats
        of_runs = [float(stats[f"indexer_kl/{label}"]) for label in ("1", "1.1")]
    assert of_runs[0] != of_runs[1]
    [row] = indexer_recall(lm, [batch])["layers"]
    assert row["kl"] == pytest.approx(sum(of_runs) / 2)


def test_a_refused_teacher_says_how_often_layers_run():
    assert _describe_stream(looped(3)) == "4 layers in 8 runs, 32 wide"
    assert _describe_stream(looped(1)) == "4 layers, 32 wide"


def test_adapters_of_a_loop_that_runs_once_are_not_there():
    lm = hybridlm.build_model(looped(1, RunAdaptersConfig(low_rank=["mixer.q_proj"])), seed=0)
    assert not any(isinstance(part, PerRunLinear) for part in lm.modules())


@pytest.mark.parametrize(("make", "words"), [
    (lambda: ScheduleConfig(pattern=["a"], reuse={2: [1]}), "later layers"),
    (lambda: ScheduleConfig(pattern=["a"], reuse={0: [1, 1]}), "twice"),
    (lambda: ScheduleConfig(pattern=["a"], reuse={0: [1]}, repeat=RepeatConfig(first=0, last=1, times=2)), "reuse"),
    (lambda: ScheduleConfig(pattern=["a"], run_adapters=ADAPTERS), "several times"),
    (lambda: RepeatConfig(first=3, last=2, times=2), "first"),
    (lambda: RepeatConfig(first=0, last=2, times=0), "times"),
    (lambda: RunAdaptersConfig(), "low_rank"),
    (lambda: looped(num_layers=2), "schedule.repeat.last"),
    (lambda: shared_block(num_layers=3), "schedule.reuse.1"),
    (lambda: looped(residual=AttentionResidualConfig(block_layers=2)), "residual.form"),
    (lambda: shared_block(mtp=MTPConfig(depth=1, mixer="shared")), "multi-token prediction"),
    (lambda: config(mixers=MIXERS, schedule=ScheduleConfig(pattern=["shared"])), "unread"),
    (lambda: shared_block(feed_forward=dense(residual=BranchConfig(form="aside", embedding=True))), "mixer alone"),
    (lambda: config(mixers={"linear": DeltaRuleConfig(num_heads=2, head_dim=16, residual=BranchConfig(embedding=True))},
                    schedule=ScheduleConfig(pattern=["linear"])), "not read by this kind"),
    (lambda: shared_block(residual=HyperConfig(num_streams=2)), "single"),
    (lambda: model(**vars(looped(adapters=RunAdaptersConfig(low_rank=["mixer.w_proj"])))), "mixer.w_proj"),
    (lambda: model(**vars(looped(adapters=RunAdaptersConfig(low_rank=["mixer.q*"], separate=["mixer.*"])))),
     "low_rank names too"),
])
def test_what_cannot_be_is_refused_in_one_line(make, words):
    with pytest.raises(ConfigError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)
