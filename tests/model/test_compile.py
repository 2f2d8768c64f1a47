"""Layers under torch.compile: whole graphs, few of them, and the losses and gradients of eager."""

import copy
import pickle

import pytest
import torch

from hybridlm.model import block, generate
from hybridlm.model.contract_check.thread_shards import run_on_threads
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import CuSeqlens
from hybridlm_kernels.compiling.gradients import recorded_calls
from tests.support import tiny_lm
from tests.support.mixer_cases import CASES, build, inputs, subject

IDS = torch.randint(tiny_lm.VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
PACKINGS = [[0, 5, 20, 29, 40], [0, 20, 21, 22, 23, 40], [0, 20, 40], [0, 1, 20, 20, 39, 40, 40]]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Graphs:
    """A backend of torch.compile that runs the graphs as they are and counts them."""

    def __init__(self, inner="eager"):
        self.count = 0
        self.inner = torch._dynamo.lookup_backend(inner)

    def __call__(self, graph, examples):
        self.count += 1
        return self.inner(graph, examples)


def values_and_gradients(module, run, *arguments):
    """Outputs, losses and gradients by name of a mixer, or of a model."""
    module.zero_grad()
    output = run(*arguments)
    if isinstance(output, tuple):
        y, aux = output
        losses = {name: x for name, x in aux.items() if name.startswith("loss/")}
        # In fp64: a sum of terms of both signs rounds by more than what is allowed.
        loss = (y.double() * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)).sum()
        loss = loss + sum(losses.values())
    else:
        loss, losses = output.loss, output.losses
    loss.backward()
    grads = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return {name: x.detach() for name, x in losses.items()} | {"loss": loss.detach()}, grads


def assert_same(found, expected):
    """Losses within 1e-5; gradients within 1e-4 of their norm, or of a millionth of the largest."""
    (losses, grads), (expected_losses, expected_grads) = found, expected
    assert losses.keys() == expected_losses.keys()
    for name, x in expected_losses.items():
        torch.testing.assert_close(losses[name], x, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    assert grads.keys() == expected_grads.keys()
    largest = max(x.norm() for x in expected_grads.values())
    for name, x in expected_grads.items():
        assert (grads[name] - x).norm() <= 1e-4 * x.norm() + 1e-6 * largest, name


@pytest.mark.parametrize("name", list(CASES))
def test_a_mixer_is_one_graph(name):
    """Trained on packed documents; other packings take no other graph."""
    mixer = build(name, torch.float32).train()
    graphs = Graphs()
    compiled = torch.compile(mixer, backend=graphs, fullgraph=True)
    x = inputs(2, 20, torch.float32)
    for borders in PACKINGS[:2]:
        seq, same = (SequenceInfo.make(2, 20, x.device, CuSeqlens(borders)) for _ in range(2))
        for each in (seq, same):
            subject(name).run_sources(x, each)
        torch._dynamo.maybe_mark_dynamic(seq.cu_seqlens.table, 0)  # as a model with compiled layers does
        found = values_and_gradients(mixer, compiled, x, seq)
        assert_same(found, values_and_gradients(mixer, mixer, x, same))
    assert graphs.count == 1
    assert recorded_calls() == 0


def lm():
    """Linear and full layers with experts, balance loss and multi-token prediction."""
    return tiny_lm.with_mtp(depth=1, feed_forward=tiny_lm.moe()).train()


@pytest.mark.parametrize(("spelling", "packings"), [(CuSeqlens, PACKINGS), (torch.tensor, PACKINGS[:1]),
                                                    (list, PACKINGS[:1])])
def test_the_whole_model_by_hand(spelling, packings):
    """A second graph takes any number of documents; a list has a graph per length."""
    model = lm()
    graphs = Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    for borders in packings:
        expected = values_and_gradients(model, lambda b: model(IDS, labels=IDS, cu_seqlens=b), borders)
        found = values_and_gradients(model, lambda b: compiled(IDS, labels=IDS, cu_seqlens=spelling(b)), borders)
        assert_same(found, expected)
    assert graphs.count <= 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers(checkpointing, monkeypatch):
    graphs = Graphs("aot_eager")
    monkeypatch.setattr(block, "COMPILER", graphs)
    model = lm()
    model.activation_checkpointing = checkpointing
    expected = [values_and_gradients(model, lambda b: model(IDS, labels=IDS, cu_seqlens=b), b) for b in PACKINGS]
    model.compile_layers()
    for borders, wanted in zip(PACKINGS, expected, strict=True):
        found = values_and_gradients(model, lambda b: model(IDS, labels=IDS, cu_seqlens=b), borders)
        assert_same(found, wanted)
    kinds = 3  # dense linear layer, linear layer with experts, full layer with experts
    assert graphs.count <= kinds + 1  # and the block of multi-token prediction
    assert recorded_calls() == 0


def test_compiled_layers_decode_copy_and_pickle_as_others(monkeypatch):
    monkeypatch.setattr(block, "COMPILER", Graphs())
    model = lm().eval()
    prompt = IDS[:, :7]
    expected = torch.stack(list(generate(model, prompt, max_new_tokens=5, temperature=0.0)))
    model.compile_layers()
    assert torch.equal(torch.stack(list(generate(model, prompt, max_new_tokens=5, temperature=0.0))), expected)
    with torch.no_grad():
        logits = model(IDS).logits
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(copied(IDS).logits, logits, rtol=1e-5, atol=1e-5)
            assert all(layer._compiled is None for layer in copied.layers)


def test_rows_in_shards_are_refused():
    model = lm()
    model.compile_layers()

    def run(shard_group):
        model.shard_group = shard_group
        return model(IDS, labels=IDS)

    with pytest.raises(ValueError, match=r"cannot be compiled.*context_parallel=1"):
        run_on_threads(run, 2)


def test_inductor_gives_the_losses_and_gradients_of_eager(monkeypatch):
    """The compiler that training uses; its kernels may write over memory that a graph needs no longer."""
    model = tiny_lm.model(feed_forward=tiny_lm.moe(dense_layers=[]), num_layers=1).train()
    expected = [values_and_gradients(model, lambda b: model(IDS, labels=IDS, cu_seqlens=b), b) for b in PACKINGS]
    model.compile_layers()
    for borders, wanted in zip(PACKINGS, expected, strict=True):
        assert_same(values_and_gradients(model, lambda b: model(IDS, labels=IDS, cu_seqlens=b), borders), wanted)
