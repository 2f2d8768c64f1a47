"""The tiny form of every published system, as a user builds it from its config."""

import itertools

import pytest
import torch

import hybridlm
from hybridlm.model import generate

SYSTEMS = ["kimi_linear_tiny", "minimax_01_tiny", "qwen3_next_tiny", "deepseek_v32_tiny", "hybrid_tiny", "sambay_tiny",
           "jamba_tiny", "griffin_tiny", "rwkv6_tiny", "deepseek_v4_tiny", "nemotron_h_tiny", "gemma4_tiny",
           "engram_tiny", "hysparse_tiny", "hysparse2_tiny", "clsa_tiny", "hymba_tiny", "glm53_flash_tiny",
           "deepseek_v41_tiny", "zamba2_tiny"]
LENGTH = 96  # more than the 64 keys that sparse attention keeps
IDS = torch.randint(512, (2, LENGTH), generator=torch.Generator().manual_seed(0))
BORDERS = [0, 1, 65, 96, 100, 192]


@pytest.fixture(scope="module", params=SYSTEMS)
def system(request):
    config = hybridlm.load_config("train", [f"model={request.param}", "model.init_std=0.1"])
    return hybridlm.build_model(config)


def assert_same(found, expected):
    """Equal but for fp32 rounding, which a norm of a nearly empty state may enlarge at single tokens."""
    assert (found - expected).norm() < 2e-5 * expected.norm()
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


def test_decoding_token_by_token_equals_the_full_forward(system):
    system.eval()
    with torch.no_grad():
        full = system(IDS).logits
        state = system.new_state(2, LENGTH)
        parts = [system(IDS[:, t : t + 1], state=state).logits for t in range(LENGTH)]
    assert_same(torch.cat(parts, dim=1), full)


def test_a_prompt_at_once_then_tokens(system):
    system.eval()
    with torch.no_grad():
        full = system(IDS).logits
        state = system.new_state(2, LENGTH)
        parts = [system(piece, state=state).logits for piece in IDS.split([70, 3, 23], dim=1)]
    assert_same(torch.cat(parts, dim=1), full)


def test_the_future_changes_no_bit_of_the_past(system):
    system.eval()
    with torch.no_grad():
        logits = system(IDS).logits
        for t in (0, 15, 31, 63, 64, 94):
            changed = IDS.clone()
            changed[:, t + 1 :] = (changed[:, t + 1 :] + 1) % 512
            assert torch.equal(system(changed).logits[:, : t + 1], logits[:, : t + 1]), t


def test_documents_without_tokens_change_no_bit(system):
    """They stand in tables padded to a fixed size, and at requests without tokens."""
    system.train()
    expected = system(IDS, labels=IDS, cu_seqlens=BORDERS)
    table = torch.tensor([[0, 0, 1, 65, 65, 96, 96, 100, 192, 192, 192]])  # with a row of its own, as collators add it
    found = system(IDS, labels=IDS, cu_seqlens=table)
    for name, loss in expected.losses.items():
        assert torch.equal(found.losses[name], loss), name
    assert found.num_tokens == expected.num_tokens


def test_packed_equals_each_document_alone(system):
    """The language model's loss and its gradients."""
    system.train()
    flat = IDS.flatten()
    packed = system(IDS, labels=IDS, cu_seqlens=BORDERS)
    packed.losses["lm"].backward()
    gradients = {n: p.grad.clone() for n, p in system.named_parameters() if p.grad is not None}
    system.zero_grad()
    loss, count = 0.0, 0
    for a, b in itertools.pairwise(BORDERS):
        alone = system(flat[None, a:b], labels=flat[None, a:b])
        loss, count = loss + alone.losses["lm"] * alone.num_tokens, count + alone.num_tokens
    (loss / count).backward()
    torch.testing.assert_close(packed.losses["lm"], loss / count, rtol=1e-5, atol=1e-5)
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    for n, p in system.named_parameters():
        if n in gradients:
            assert (p.grad - gradients[n]).norm() < 1e-3 * gradients[n].norm() + 1e-5 * norm, n
    system.zero_grad()


def test_steps_of_training_lower_the_loss_and_generation_runs(system):
    system.train()
    optimizer = torch.optim.AdamW(system.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        output = system(IDS, labels=IDS)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        system.post_optimizer_step()
        losses.append(output.losses["lm"].item())
    assert losses[-1] < losses[0] - 0.5
    tokens = torch.cat(list(generate(system, IDS[0, :5], 4, temperature=0.8, top_p=0.9, seed=1)))
    assert tokens.shape == (4,)
    assert ((tokens >= 0) & (tokens < 512)).all()


@pytest.mark.parametrize("name", ["kimi_linear_48b", "minimax_01_456b", "qwen3_next_80b", "deepseek_v32_671b"])
def test_full_size_builds_on_meta(name):
    config = hybridlm.load_config("train", [f"model={name}"])
    lm = hybridlm.build_model(config, device="meta")
    assert all(t.device.type == "meta" for t in [*lm.parameters(), *lm.buffers()])
    assert lm.num_params() == pytest.approx(config.model.published.total, rel=0.03)


@pytest.mark.parametrize("name", SYSTEMS)
def test_nothing_keeps_what_memory_held_before(name):
    """`init_weights` writes every parameter and buffer: a model made on meta is whole."""
    config = hybridlm.load_config("train", [f"model={name}"])
    built = hybridlm.build_model(config, seed=3)
    poisoned = hybridlm.build_model(config, seed=4)
    with torch.no_grad():
        for tensor in [*poisoned.parameters(), *poisoned.buffers()]:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 7)
    poisoned.init_weights(3)
    for values in ("named_parameters", "named_buffers"):
        for (n, a), (_, b) in zip(getattr(built, values)(), getattr(poisoned, values)(), strict=True):
            assert torch.equal(a, b), n
