"""Adapters of PEFT around the exported class: every one acts in logits, loss and generation, and is trained."""

import copy

import pytest
import torch

from hybridlm.interop import to_hf_model
from tests.model.test_wrapped_linears import decode, system

peft = pytest.importorskip("peft")
pytest.importorskip("hybridlm.interop.auto")
IDS = torch.randint(1, 61, (2, 14), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("target", ["all-linear", ["lm_head", "kv_b_proj", "o_proj", "embed"]])
@pytest.mark.parametrize("name", ["kimi_full", "deepseek_v32", "gdn", "glm5_next"])
def test_peft_adapters_act_everywhere(name, target):
    base = to_hf_model(system(name), family="hybridlm").double().eval()
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=target, init_lora_weights=False))
    model = model.double().eval()
    own = model.get_base_model().model
    merged = copy.deepcopy(model).merge_and_unload().model.eval()
    with torch.no_grad():
        plain = system(name).eval()(IDS).logits
        assert (merged(IDS).logits - plain).abs().max() > 1e-3
        for ids in (IDS, IDS[:, :2]):
            torch.testing.assert_close(model(ids).logits, merged(ids).logits, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(model(IDS, labels=IDS).loss, merged(IDS, labels=IDS).loss, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(decode(own, IDS), decode(merged, IDS), rtol=1e-8, atol=1e-8)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    adapters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert adapters
    assert all("lora_" in n for n in adapters)
    assert [n for n, p in adapters.items() if p.grad is None or not p.grad.any()] == []
