"""The list of what must stay in fp32 holds on every road through transformers, PEFT and accelerate, and on imports."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import hybridlm.interop.auto  # noqa: F401  (registers the model type)
from hybridlm.interop import export_hf, import_checkpoint, import_hf, to_hf_model
from tests.model.test_wrapped_linears import system
from tests.support import hf_zoo

HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An export of a model with experts, an indexer and decays."""
    path = tmp_path_factory.mktemp("fp32") / "out"
    export_hf(system("glm5_next").float(), path, family="hybridlm")
    return path


def check(model, dtype=torch.bfloat16):
    """`model` is ours, perhaps in wrappers whose parts have other names."""
    kept = model.fp32_parameter_names()
    assert {"norm.weight", "layers.1.feed_forward.router.weight", "layers.1.feed_forward.router.bias"} <= kept
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            assert tensor.dtype == (torch.float32 if name in kept or "lora_" in name else dtype), name


@pytest.mark.parametrize("dtype", HALF)
def test_from_pretrained_and_from_config(folder, dtype):
    check(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).model, dtype)
    check(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype).model, dtype)


def test_casts_of_the_exported_class(folder):
    check(AutoModelForCausalLM.from_pretrained(folder).to(torch.bfloat16).model)
    check(AutoModelForCausalLM.from_pretrained(folder).bfloat16().model)
    check(AutoModelForCausalLM.from_pretrained(folder).half().model, torch.float16)


def test_accelerate_offloads_and_dispatches_without_casts(folder):
    accelerate = pytest.importorskip("accelerate")
    dtypes = {name: p.dtype for name, p in AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16).named_parameters()}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": "cpu"})
    check(accelerate.dispatch_model(model, {"": "cpu"}).model)
    offloaded = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert {name: p.dtype for name, p in offloaded.named_parameters()} == dtypes
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # that of other tests of this process
    prepared = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(
        AutoModelForCausalLM.from_pretrained(folder))
    assert {p.dtype for p in prepared.parameters()} == {torch.float32}


def test_accelerate_cannot_cast_past_the_modules_unseen(folder, caplog):
    accelerate = pytest.importorskip("accelerate")
    config = AutoConfig.from_pretrained(folder)
    with accelerate.init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    accelerate.load_checkpoint_and_dispatch(model, folder, {"": "cpu"}, dtype=torch.bfloat16).eval()
    assert "must stay in fp32 were cast" in caplog.text


def test_peft_casts_adapters_alone(folder):
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules="all-linear"))
    check(model.get_base_model().model)
    model.bfloat16()
    own = model.get_base_model().model
    assert own.layers[1].feed_forward.router.weight.dtype == torch.float32
    assert own.layers[1].mixer.indexer.weights_proj.base_layer.weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", ["deepseek_v3", "kimi_linear", "qwen3_next"])
def test_import_with_a_dtype(case, dtype, tmp_path):
    theirs = hf_zoo.build(case)
    theirs.save_pretrained(tmp_path / "theirs")
    exact = import_hf(tmp_path / "theirs")
    kept = exact.fp32_parameter_names()
    import_checkpoint(tmp_path / "theirs", tmp_path / "ours", dtype=dtype)
    stored = load_file(tmp_path / "ours" / "model.safetensors")
    in_memory = import_hf(tmp_path / "theirs", dtype=dtype).state_dict()
    for name, tensor in exact.state_dict().items():
        for found in (stored, in_memory):
            if name in found:
                assert torch.equal(found[name], tensor if name in kept else tensor.to(dtype)), name
    narrow = to_hf_model(exact, family="hybridlm").to(dtype)
    assert narrow.model.layers[0].mixer_norm.weight.dtype == torch.float32
