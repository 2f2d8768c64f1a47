"""What others put around linear maps acts in every path: adapters, hooks, layers of their own, offloaded weights."""

import copy

import pytest
import torch
from torch import nn

from hybridlm.model import output_head
from hybridlm.model.config import MTPConfig, ScheduleConfig
from hybridlm.model.mixers import IndexerConfig, MLAConfig
from hybridlm.model.model import build_model
from hybridlm.model.readable_weights import readable_weight, weight_dtype
from hybridlm_kernels import linear_cross_entropy
from tests.support.mixer_cases import CASES, HIDDEN
from tests.support.mixer_forms.softmax_attention import INDEXER, MLA_DIMS
from tests.support.tiny_lm import VOCABULARY, config, moe

CPU = torch.device("cpu")
TOKENS = 14
IDS = torch.randint(VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(3))
SYSTEMS = {name: {"mixers": {"mixer": case}, "schedule": ScheduleConfig(full="mixer", ratio=0)}
           for name, case in CASES.items()}
SYSTEMS["shared_selection"] = {
    "mixers": {"own": MLAConfig(**MLA_DIMS, indexer=IndexerConfig(**INDEXER)),
               "shared": MLAConfig(**MLA_DIMS, indexer=IndexerConfig(share=True))},
    "schedule": ScheduleConfig(pattern=["own", "shared"]), "mtp": MTPConfig(depth=1, mixer="own")}


class Adapter(nn.Module):
    """A LoRA around a linear map, as adapter libraries build it: `weight` is that of the map inside."""

    def __init__(self, base: nn.Linear, rank: int = 2):
        super().__init__()
        self.base_layer = base
        down, up = torch.randn(rank, base.in_features), torch.randn(base.out_features, rank)
        self.down = nn.Parameter(0.1 * down.to(base.weight.dtype))
        self.up = nn.Parameter(up.to(base.weight.dtype))

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x) + x @ self.down.T @ self.up.T


def system(name, **options):
    """Two layers of one kind, with experts in the second one and one depth of multi-token prediction, in fp64."""
    fields = {"hidden_size": HIDDEN, "num_layers": 2, "mtp": MTPConfig(depth=1), "logit_soft_cap": 20.0, "z_loss": 1e-3,
              "feed_forward": moe(shared_gate=True), **SYSTEMS[name], **options}
    return build_model(config(**fields), seed=0).double()


def wrap_linears(model):
    """Put an adapter around every linear map; returns them by name."""
    torch.manual_seed(1)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name in names:
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, child, Adapter(getattr(owner, child)))
    return {name: model.get_submodule(name) for name in names}


def decode(model, ids):
    state = model.new_state(len(ids), ids.shape[1])
    with torch.no_grad():
        first = model(ids[:, :3], state=state).logits
        return torch.cat([first, *(model(ids[:, i:i + 1], state=state).logits for i in range(3, ids.shape[1]))], 1)


def losses(model):
    output = model.train()(IDS, labels=IDS)
    output.loss.backward()
    model.eval()
    return {**output.losses, "loss": output.loss}


@pytest.mark.parametrize("name", SYSTEMS)
def test_an_adapter_on_every_linear_map_is_the_model_with_these_weights(name):
    """Logits of long and short prompts, decoding, all losses, and the gradients by the chain rule of W + up @ down."""
    merged, wrapped = system(name).eval(), system(name).eval()
    adapters = wrap_linears(wrapped)
    with torch.no_grad():
        for module, adapter in adapters.items():
            merged.get_submodule(module).weight += adapter.up @ adapter.down
        for ids in (IDS, IDS[:, :2]):
            torch.testing.assert_close(wrapped(ids).logits, merged(ids).logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(decode(wrapped, IDS), decode(merged, IDS), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(losses(wrapped), losses(merged), rtol=1e-9, atol=1e-9)
    for module, adapter in adapters.items():
        whole = merged.get_submodule(module).weight.grad
        assert whole.any(), f"the loss does not reach {module}"
        for got, right in ((adapter.up.grad, whole @ adapter.down.T), (adapter.down.grad, adapter.up.T @ whole),
                           (adapter.base_layer.weight.grad, whole)):
            torch.testing.assert_close(got, right, rtol=1e-7, atol=1e-9, msg=lambda text, m=module: f"{m}: {text}")


@pytest.mark.parametrize("name", SYSTEMS)
def test_hooks_run_in_every_path(name):
    """A hook that changes outputs changes them whatever the length of the input, in decoding and in the loss."""
    model = system(name).eval()
    called = set()

    def hook(module, inputs, output):
        called.add(module)
        return output + 0.0

    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for module in linears.values():
        module.register_forward_hook(hook)
    main = {module for name, module in linears.items() if not name.startswith("mtp.")}
    short = {module for name, module in linears.items() if not name.startswith("mtp.")
             and ".indexer." not in name and ".selector." not in name}

    def run(compute, expected):
        called.clear()
        compute()
        assert expected <= called, sorted(name for name, m in linears.items() if m in expected - called)

    state = model.new_state(2, TOKENS)
    run(lambda: model(IDS), main)
    run(lambda: model(IDS[:, :2]), short)  # few keys: nothing is selected
    run(lambda: model(IDS[:, :-1], state=state), main)
    run(lambda: model(IDS[:, -1:], state=state), main)
    run(lambda: losses(model), set(linears.values()))


@pytest.mark.parametrize(("name", "tied"), [*((name, False) for name in SYSTEMS), ("llama", True)])
def test_offloaded_weights_give_the_same_numbers(name, tied):
    """Weights that are on "meta" between the calls of their modules, as accelerate leaves them."""
    accelerate = pytest.importorskip("accelerate")
    model = system(name, tie_embeddings=tied).eval()
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device=CPU)
    assert all(p.device.type == "meta" for p in offloaded.parameters())
    with torch.no_grad():
        torch.testing.assert_close(offloaded(IDS).logits, model(IDS).logits, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(offloaded(IDS, labels=IDS).loss, model(IDS, labels=IDS).loss, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(decode(offloaded, IDS), decode(model, IDS), rtol=1e-9, atol=1e-9)


class NoisyLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1.0


def test_a_weight_is_read_only_where_a_call_would_use_nothing_else():
    linear = nn.Linear(3, 2, bias=False)
    assert readable_weight(linear, CPU) is linear.weight
    refused = {
        "bias": nn.Linear(3, 2), "subclass": NoisyLinear(3, 2, bias=False), "adapter": Adapter(linear),
        "meta": nn.Linear(3, 2, bias=False, device="meta"),
        "parametrised": nn.utils.parametrizations.weight_norm(nn.Linear(3, 2, bias=False)),
    }
    for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        hooked = refused[register] = nn.Linear(3, 2, bias=False)
        handle = getattr(hooked, register)(lambda *_: None)
        assert readable_weight(hooked, CPU) is None
        handle.remove()
        assert readable_weight(hooked, CPU) is hooked.weight, "a hook that is gone hides nothing"
        getattr(hooked, register)(lambda *_: None)
    replaced = refused["replaced forward"] = nn.Linear(3, 2, bias=False)
    replaced.forward = lambda x: x
    assert {name for name, module in refused.items() if readable_weight(module, CPU) is not None} == set()
    assert weight_dtype(Adapter(linear.bfloat16())) == torch.bfloat16
    assert weight_dtype(nn.Identity()) == torch.float32


def test_noise_on_embedded_tokens_does_not_reach_a_tied_head():
    model = system("llama", tie_embeddings=True)
    x = torch.randn(1, 2, HIDDEN, dtype=torch.float64)
    right = model.logits(x)
    model.embed.register_forward_hook(lambda module, inputs, output: output + 1.0)
    torch.testing.assert_close(model.logits(x), right)


def test_an_adapter_on_a_tied_embedding_acts_in_the_head_too():
    """As after merging it: the matrix is one."""
    class EmbeddingAdapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer = base
            self.shift = nn.Parameter(torch.randn_like(base.weight))

        weight = property(lambda self: self.base_layer.weight)

        def forward(self, ids):
            return self.base_layer(ids) + self.shift[ids]

    merged, wrapped = (system("llama", tie_embeddings=True) for _ in range(2))
    wrapped.embed = EmbeddingAdapter(wrapped.embed)
    with torch.no_grad():
        merged.embed.weight += wrapped.embed.shift
    torch.testing.assert_close(losses(wrapped), losses(merged), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(wrapped.embed.shift.grad, merged.embed.weight.grad, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_the_called_head_is_computed_in_chunks(z_loss, monkeypatch):
    """Chunks give the sums of one operation, and no call sees more rows than a chunk has."""
    monkeypatch.setattr(output_head, "CHUNK_LOGITS", 4 * VOCABULARY)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False).double()
    x = torch.randn(10, HIDDEN, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(VOCABULARY, (10,))
    labels[[2, 9]] = -100
    right = linear_cross_entropy(x, head.weight, labels, z_loss=z_loss, soft_cap=5.0)
    wanted = torch.autograd.grad(right[0] + z_loss * right[1], [x, head.weight])
    rows = []
    head.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    got = output_head.head_cross_entropy(x, labels, head, nn.Embedding(1, 1), z_loss=z_loss, soft_cap=5.0)
    found = torch.autograd.grad(got[0] + z_loss * got[1], [x, head.weight])
    torch.testing.assert_close([*got, *found], [*right, *wanted])
    assert sorted(rows) == [2, 2, 4, 4, 4, 4], "each chunk forward, and once more for the backward"
