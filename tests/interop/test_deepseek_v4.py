"""DeepSeek-V4 in files: names that transformers saves, tables of expert numbers, and what the format cannot hold."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybridlm.errors import ConfigError
from hybridlm.interop.family_registry import read_config_json, write_hf_config
from hybridlm.interop.import_export import ExportPlan, ImportPlan, import_hf
from hybridlm.interop.tensor_source import SafetensorsSource, StateDictSource
from hybridlm.run_config import load_model_config
from tests.support.hf_zoo import build


def test_files_of_transformers_give_the_model_in_memory(tmp_path):
    theirs = build("deepseek_v4")
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    with_mtp = load_file(file) | {"mtp.0.attn.wkv.weight": torch.zeros(2)}  # released files have such weights
    save_file(with_mtp, file, {"format": "pt"})
    expected, found = import_hf(theirs).state_dict(), import_hf(str(tmp_path)).state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_table_of_experts_stays_whole_numbers_in_any_dtype(tmp_path):
    theirs = build("deepseek_v4")
    theirs.save_pretrained(tmp_path)
    plan = ImportPlan(read_config_json(tmp_path), SafetensorsSource(tmp_path))
    specs = dict(plan.specs(torch.bfloat16))
    assert specs["layers.0.feed_forward.router.table"].dtype == torch.int64
    assert specs["layers.0.mixer.kv_proj.weight"].dtype == torch.bfloat16
    ours = import_hf(theirs)
    back = ExportPlan(ours.config, StateDictSource(dict(plan.tensors())))
    assert (back.family.name, dict(back.specs(torch.bfloat16))["layers.0.ffn.gate.tid2eid"].dtype) == (
        "deepseek_v4", torch.int64)


@pytest.mark.parametrize(("overrides", "message"), [
    (["model.residual.form=mhc_single_pass"], "residual.form: does not fit the format; got 'mhc_single_pass'"),
    (["model.feed_forward.swiglu_limit=null"], "feed_forward.swiglu_limit: does not fit the format"),
    (["model.mixers.csa.q_head_norm=false"], "q_head_norm"),
    (["model.schedule.pattern=[near,csa,full]"], "mixers: have a kind that does not fit the format; got 'attention'"),
])
def test_what_the_format_does_not_have_is_refused(overrides, message):
    assert write_hf_config(load_model_config("deepseek_v4_tiny", ["model.feed_forward.bias_update_rate=0.0",
                           "model.feed_forward.correction_bias=true"]), "deepseek_v4")[0].name == "deepseek_v4"
    with pytest.raises(ConfigError, match=message):
        write_hf_config(load_model_config("deepseek_v4_tiny", overrides), "deepseek_v4")
