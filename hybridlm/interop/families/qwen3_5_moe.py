"""Qwen3.5 MoE, the text model: Qwen3-Next with unpacked projections and renormalised experts.

Released checkpoints are of the vision-language model; its text model is read, what belongs to images is left out.
Positions are the three-axis ones of the vision-language model, which for text are ordinary positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hybridlm.interop import key_rules
from hybridlm.interop.families import qwen3_next
from hybridlm.interop.family import Family, HFConfig
from hybridlm.interop.mapping import Rule, Split, rule
from hybridlm.model.config import MixerConfig, ModelConfig
from hybridlm.model.mixers import AttentionConfig, DeltaRuleConfig


def to_model(hf: HFConfig) -> dict[str, Any]:
    return qwen3_next.qwen_model(hf, [], norm_topk_prob=True)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    return qwen3_next.qwen_hf(config) | {"model_type": "qwen3_5_moe_text"}


def layer(config: ModelConfig, mixer: MixerConfig, moe: bool, o: str, t: str) -> Iterator[Rule]:
    yield from key_rules.norms(o, t)
    if isinstance(mixer, AttentionConfig):
        yield from key_rules.attention_rules(mixer, f"{o}mixer.", f"{t}self_attn.", gate_in_q=True)
    else:
        gdn = key_rules.mixer_of(mixer, DeltaRuleConfig)
        ours, theirs = f"{o}mixer.", f"{t}linear_attn."
        yield rule(tuple(f"{ours}{name}_proj.weight" for name in "qkv"), f"{theirs}in_proj_qkv.weight",
                   Split(tuple(gdn.channels.values())))
        yield from key_rules.same(ours, theirs, ("g_proj.weight", "in_proj_z.weight"),
                                  ("b_proj.weight", "in_proj_b.weight"), ("a_proj.weight", "in_proj_a.weight"))
        yield from qwen3_next.gdn_rules(gdn, ours, theirs)
    yield from key_rules.feed_forward_rules(config.feed_forward, moe, o, t, shared="shared_expert")


FAMILY = Family(name="qwen3_5_moe_text", architecture="Qwen3_5MoeForCausalLM", to_model=to_model, to_hf=to_hf,
                layer=layer, text_of=("qwen3_5_moe",), mtp="mtp",
                renames=((r"^model\.language_model\.", "model."),), ignored=(r"^(model\.)?visual\.",))
