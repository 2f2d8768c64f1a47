"""Zamba2: Mamba-2 in every layer, and a few blocks of attention and feed-forward that run in turn before some of them.

A hybrid layer of theirs is two runs of ours: the shared block, and the layer of Mamba-2 that reads what it writes. The
blocks stand in the schedule where they run first. Their adapter of gate and up projection is one, with one matrix A for
both; ours has an adapter of each, so an export needs both A equal, as an import makes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hybridlm.errors import ConfigError, require
from hybridlm.interop.families.common.config_fields import (
    read_attention,
    read_base,
    read_rope,
    read_steps,
    require_dense,
    require_mixer,
    write_base,
    write_rope,
)
from hybridlm.interop.families.common.key_rules import map_attention, map_mamba2, rename_tensors, require_kind
from hybridlm.interop.family import Family, HFConfig, LayerToMap, register_family
from hybridlm.interop.rearrangements import Chain, CopiedTensor, PackedRows, RepeatedTensor
from hybridlm.interop.tensor_rules import KeyLayout, TensorRule, map_tensors
from hybridlm.model.config import ModelConfig
from hybridlm.model.mixers import AttentionConfig, Mamba2Config

GATED_NORM_EPS = 1e-5  # of Mamba-2's norm, whatever rms_norm_eps says
KEY_SCALE = 2**0.5  # scores are divided by the root of half a head
ACTIVATIONS = {"gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh", "silu": "swiglu"}
FEED_FORWARD_ADAPTERS = ["feed_forward.gate_proj", "feed_forward.up_proj"]
ATTENTION_ADAPTERS = ["mixer.q_proj", "mixer.k_proj", "mixer.v_proj"]
OUTPUT_MAP = "feed_forward_projection"


@dataclass(frozen=True)
class SharedBlocks:
    """The places of the shared blocks in a model.

    Args:
        mamba: our layers of Mamba-2, in the order of their layers.
        before: the shared block that runs before each of them; None where none does.
    """

    mamba: list[int]
    before: list[int | None]

    @classmethod
    def of(cls, config: ModelConfig) -> SharedBlocks:
        """Read them from the runs of a model."""
        layers, mamba, before = config.layers(), [], []
        waiting: int | None = None
        for index in config.runs():
            if isinstance(config.mixers[layers[index]], AttentionConfig):
                waiting = index
            else:
                mamba.append(index)
                before.append(waiting)
                waiting = None
        return cls(mamba, before)

    def slots(self, block: int) -> list[tuple[int, int]]:
        """The runs of a block: the number of each among hybrid layers, and its hybrid layer."""
        hybrid = [layer for layer, found in enumerate(self.before) if found is not None]
        return [(number, layer) for number, layer in enumerate(hybrid) if self.before[layer] == block]


def read_config(hf: HFConfig) -> dict[str, Any]:
    """Convert a transformers config to plain data of a `ModelConfig`."""
    for name in ("add_bias_linear", "use_long_context"):
        hf.require_value(name, False)
    hf.require_value("hidden_act", *ACTIVATIONS)
    hf.require_value("tie_word_embeddings", True)  # else transformers does not tie the shared blocks either
    types, blocks = list(hf.layers_block_type), hf.num_mem_blocks
    runs = types.count("hybrid")
    require(runs >= 2 * blocks, "config.json: layers_block_type", "has blocks that run once, with adapters, which "
            "hybridlm has for layers that run several times", got=f"{runs} hybrid layers",
            expected=f"at least {2 * blocks}, twice num_mem_blocks")
    layers: list[str] = []
    first: list[int] = []
    reuse: dict[int, list[int]] = {}
    hybrid = 0
    for kind in types:
        if kind == "hybrid":
            if hybrid < blocks:
                first.append(len(layers))
                layers.append("shared")
            else:
                reuse.setdefault(first[hybrid % blocks], []).append(len(layers))
            hybrid += 1
        layers.append("mamba2")
    attention = read_attention(hf, read_rope(hf) if hf.use_mem_rope else {"kind": "none"}, qk_norm="none",
                               key_scale=KEY_SCALE, residual={"form": "aside", "embedding": True})
    mamba2 = {"kind": "mamba2", "num_heads": hf.n_mamba_heads, "head_dim": hf.mamba_headdim,
              "state_size": hf.mamba_d_state, "num_groups": hf.mamba_ngroups, "conv_size": hf.mamba_d_conv,
              "conv_bias": True, "norm_eps": GATED_NORM_EPS, **read_steps(hf.time_step_min, None)}
    feed_forward = {"kind": "dense", "intermediate_size": hf.intermediate_size,
                    "activation": ACTIVATIONS[hf.hidden_act], "residual": {"form": "aside", "project": True}}
    data = read_base(hf, layers, {"mamba2": mamba2, "shared": attention}, feed_forward, num_layers=len(layers),
                     activations=tuple(ACTIVATIONS))
    attention_adapters = ATTENTION_ADAPTERS if hf.use_shared_attention_adapter else []
    data["schedule"] |= {"alone": ["mamba2"], "reuse": reuse, "run_adapters": {
        "rank": hf.adapter_rank, "low_rank": [*attention_adapters, *FEED_FORWARD_ADAPTERS], "separate": [OUTPUT_MAP]}}
    return data


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Make the config.json of a model in the format of this family."""
    attention, mamba2 = require_mixer(config, AttentionConfig), require_mixer(config, Mamba2Config)
    dense, adapters = require_dense(config), config.schedule.run_adapters
    if adapters is None:
        raise ConfigError("schedule.run_adapters", "is missing, and the format has adapters of each run", got=None,
                          expected=f"low_rank: {FEED_FORWARD_ADAPTERS}, separate: [{OUTPUT_MAP}]")
    names = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    if dense.activation not in names:
        raise ConfigError("feed_forward.activation", "does not fit the format", got=dense.activation,
                          expected=" or ".join(names))
    found = SharedBlocks.of(config)
    types = ["linear_attention" if block is None else "hybrid" for block in found.before]
    fields = write_base(config) | write_rope(attention.rope)
    return fields | {
        "model_type": "zamba2", "num_hidden_layers": len(types), "layers_block_type": types,
        "num_mem_blocks": len({block for block in found.before if block is not None}),
        "hidden_act": names[dense.activation], "intermediate_size": dense.intermediate_size, "add_bias_linear": False,
        "num_attention_heads": attention.num_heads, "num_key_value_heads": attention.kv_heads,
        "attention_dropout": 0.0, "use_mem_rope": attention.rope.kind != "none", "use_long_context": False,
        "use_shared_attention_adapter": set(ATTENTION_ADAPTERS) <= set(adapters.low_rank),
        "adapter_rank": adapters.rank, "n_mamba_heads": mamba2.num_heads, "mamba_d_state": mamba2.state_size,
        "mamba_ngroups": mamba2.num_groups, "mamba_d_conv": mamba2.conv_size, "use_conv_bias": True,
        "mamba_expand": mamba2.inner_size // config.hidden_size, "time_step_min": mamba2.dt_min,
    }


def map_layer(config: ModelConfig, layer: LayerToMap) -> Iterator[TensorRule]:
    """Yield the rules for the tensors of one layer: a shared block, or one of Mamba-2."""
    index, found = int(layer.ours.split(".")[1]), SharedBlocks.of(config)
    if isinstance(layer.mixer, AttentionConfig):
        yield from _map_block(config, layer.ours, layer.mixer, found.slots(index))
        return
    mamba2, number = require_kind(layer.mixer, Mamba2Config), found.mamba.index(index)
    theirs = f"model.layers.{number}." + ("" if found.before[number] is None else "mamba_decoder.")
    yield from rename_tensors(layer.ours, theirs, ("mixer_norm.weight", "input_layernorm.weight"))
    yield from map_mamba2(mamba2, f"{layer.ours}mixer.", f"{theirs}mamba.")


def _map_block(config: ModelConfig, ours: str, attention: AttentionConfig,
               runs: list[tuple[int, int]]) -> Iterator[TensorRule]:
    """Yield the rules of a shared block: transformers saves it once, in the first hybrid layer that runs it."""
    for rule in _map_tensors_of_block(config, ours, attention, [slot for slot, _ in runs]):
        (layout,) = rule.layouts
        first, *others = ([f"model.layers.{hybrid}.shared_transformer.{name}" for name in layout.names]
                          for _, hybrid in runs)
        copies = Chain(RepeatedTensor(len(runs)), layout.rearrangement)
        yield TensorRule(rule.ours, (KeyLayout(tuple(first), layout.rearrangement),
                                     KeyLayout((*first, *(name for names in others for name in names)), copies)))
    for run, (_, hybrid) in enumerate(runs):
        own = "weight" if run == 0 else f"later.{run - 1}.weight"
        yield map_tensors(f"{ours}{OUTPUT_MAP}.{own}", f"model.layers.{hybrid}.linear.weight")


def _map_tensors_of_block(config: ModelConfig, ours: str, attention: AttentionConfig,
                          slots: list[int]) -> Iterator[TensorRule]:
    """Yield the rules of one copy of a shared block, their names without its prefix; `slots` are those of its runs."""
    yield from rename_tensors(ours, "", ("mixer_norm.weight", "input_layernorm.weight"),
                              ("feed_forward_norm.weight", "pre_ff_layernorm.weight"))
    yield from map_attention(attention, f"{ours}mixer.", "self_attn.")
    gate, up = f"{ours}feed_forward.gate_proj.", f"{ours}feed_forward.up_proj."
    halves = PackedRows((require_dense(config).intermediate_size,) * 2)
    yield map_tensors((f"{gate}weight", f"{up}weight"), "feed_forward.gate_up_proj.weight", halves)
    yield from rename_tensors(f"{ours}feed_forward.", "feed_forward.", "down_proj.weight")
    adapters = config.schedule.run_adapters
    adapted = set(ATTENTION_ADAPTERS) & set([] if adapters is None else adapters.low_rank)
    for run, slot in enumerate(slots):
        for name in "qkv" if adapted else "":
            yield from rename_tensors(f"{ours}mixer.{name}_proj.", f"self_attn.linear_{name}_adapter_list.{slot}.",
                                      (f"down.{run}.weight", "0.weight"), (f"up.{run}.weight", "1.weight"))
        theirs = f"feed_forward.gate_up_proj_adapter_list.{slot}."
        yield map_tensors((f"{gate}down.{run}.weight", f"{up}down.{run}.weight"), f"{theirs}0.weight", CopiedTensor(2))
        yield map_tensors((f"{gate}up.{run}.weight", f"{up}up.{run}.weight"), f"{theirs}1.weight", halves)


FAMILY = register_family(Family(
    name="zamba2", architecture="Zamba2ForCausalLM", read_config=read_config, write_config=write_config,
    map_layer=map_layer, norm_key="model.final_layernorm.weight",
))
