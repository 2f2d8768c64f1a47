"""Yield rules for the tensors of mixers and feed-forwards that several families store alike.

`ours` and `theirs` are the prefixes of a layer or of a mixer, with the dot: "layers.3.mixer." and
"model.layers.3.self_attn.".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from hybridlm.errors import ConfigError
from hybridlm.interop.families.common.config_fields import require_moe
from hybridlm.interop.family import LayerToMap
from hybridlm.interop.rearrangements import Chain, PackedRows, PerTensor, Reshape, StackedExperts
from hybridlm.interop.tensor_rules import KeyLayout, TensorRule, map_tensors
from hybridlm.model.config import ModelConfig
from hybridlm.model.mixers import AttentionConfig, Mamba2Config, MLAConfig
from hybridlm.model.mixers.common.recurrent import RecurrentConfig
from hybridlm.model.mixers.contract import MixerConfig

Kind = TypeVar("Kind", bound=MixerConfig)


def require_kind(mixer: MixerConfig, config: type[Kind]) -> Kind:
    """The mixer, which must be of the kind with this config class.

    Raises:
        ConfigError: it is of another kind, which the format does not have.
    """
    if not isinstance(mixer, config):
        wanted = config.kind  # type: ignore[misc]  # every kind has a default
        raise ConfigError("mixers", "have a kind that does not fit the format", got=mixer.kind, expected=wanted)
    return mixer


def rename_tensors(ours: str, theirs: str, *names: str | tuple[str, str]) -> Iterator[TensorRule]:
    """Yield rules for tensors that only change their prefix; a pair is (our name, their name)."""
    for name in names:
        our_name, their_name = (name, name) if isinstance(name, str) else name
        yield map_tensors(ours + our_name, theirs + their_name)


def map_norms(layer: LayerToMap) -> Iterator[TensorRule]:
    """Yield rules for the norms before the mixer and before the feed-forward."""
    yield from rename_tensors(layer.ours, layer.theirs, ("mixer_norm.weight", "input_layernorm.weight"),
                              ("feed_forward_norm.weight", "post_attention_layernorm.weight"))


def map_attention(attention: AttentionConfig, ours: str, theirs: str, *,
                  gate_in_q: bool = False) -> Iterator[TensorRule]:
    """Yield rules for softmax attention; `gate_in_q`: their q_proj has the rows [query | gate] of each head."""
    for kind in ("weight", "bias") if attention.qkv_bias else ("weight",):
        if gate_in_q:
            yield map_tensors((f"{ours}q_proj.{kind}", f"{ours}g_proj.{kind}"), f"{theirs}q_proj.{kind}",
                              PackedRows((attention.head_dim, attention.head_dim), attention.num_heads))
        else:
            yield from rename_tensors(ours, theirs, f"q_proj.{kind}")
        yield from rename_tensors(ours, theirs, f"k_proj.{kind}", f"v_proj.{kind}")
    yield from rename_tensors(ours, theirs, "o_proj.weight")
    if attention.o_bias:
        yield from rename_tensors(ours, theirs, "o_proj.bias")
    if attention.qk_norm != "none":
        yield from rename_tensors(ours, theirs, "q_norm.weight", "k_norm.weight")


def map_mla(mla: MLAConfig, ours: str, theirs: str, *, output: str = "o_proj") -> Iterator[TensorRule]:
    """Yield rules for multi-head latent attention with its indexer; `output` is their name of the output projection."""
    if mla.q_lora_rank is None:
        yield from rename_tensors(ours, theirs, "q_proj.weight")
    else:
        yield from rename_tensors(ours, theirs, "q_a_proj.weight", ("q_a_norm.weight", "q_a_layernorm.weight"),
                                  "q_b_proj.weight")
    yield from rename_tensors(ours, theirs, ("kv_a_proj.weight", "kv_a_proj_with_mqa.weight"),
                              ("kv_a_norm.weight", "kv_a_layernorm.weight"), "kv_b_proj.weight",
                              ("o_proj.weight", f"{output}.weight"))
    if mla.bias:
        if mla.q_lora_rank is not None:
            yield from rename_tensors(ours, theirs, "q_a_proj.bias")
        yield from rename_tensors(ours, theirs, ("kv_a_proj.bias", "kv_a_proj_with_mqa.bias"),
                                  ("o_proj.bias", f"{output}.bias"))
    if mla.output_gate != "none":
        yield from rename_tensors(ours, theirs, "g_proj.weight")
    if mla.indexer is not None and not mla.indexer.share:
        yield from rename_tensors(f"{ours}indexer.", f"{theirs}indexer.", ("q_proj.weight", "wq_b.weight"),
                                  ("k_proj.weight", "wk.weight"), "k_norm.weight", "k_norm.bias",
                                  "weights_proj.weight")


def map_convolutions(mixer: RecurrentConfig, ours: str, theirs: str, *, packed: bool = False) -> Iterator[TensorRule]:
    """Yield rules for short convolutions [C, W], which theirs hold as Conv1d weights [C, 1, W].

    Theirs are three tensors, or one over the channels of [q | k | v]; `packed`: always one.
    """
    taps = mixer.conv_size
    widths = mixer.channels
    reshapes = PerTensor(tuple(Reshape((width, taps), (width, 1, taps)) for width in widths.values()))
    names = tuple(f"{ours}{name}_conv" for name in widths)
    one_tensor = KeyLayout((f"{theirs}conv1d.weight",), Chain(PackedRows(tuple(widths.values())), reshapes))
    if packed:
        yield TensorRule(names, (one_tensor,))
        return
    three_tensors = KeyLayout(tuple(f"{theirs}{name}_conv1d.weight" for name in widths), reshapes)
    yield TensorRule(names, (three_tensors, one_tensor))


def map_joint_conv(ours: str, theirs: str, channels: int, taps: int, *, bias: bool = True) -> Iterator[TensorRule]:
    """Yield rules for one short convolution [C, W], which theirs hold as a Conv1d weight [C, 1, W]."""
    yield map_tensors(f"{ours}conv.weight", f"{theirs}conv1d.weight",
                      PerTensor((Reshape((channels, taps), (channels, 1, taps)),)))
    if bias:
        yield from rename_tensors(ours, theirs, ("conv.bias", "conv1d.bias"))


def map_mamba2(mamba2: Mamba2Config, ours: str, theirs: str) -> Iterator[TensorRule]:
    """Yield rules for a Mamba-2 block."""
    biases = ("in_proj.bias", "out_proj.bias") if mamba2.bias else ()
    norm = ("norm.weight",) if mamba2.norm == "gated" else ()
    yield from rename_tensors(ours, theirs, "in_proj.weight", "A_log", "D", "dt_bias", "out_proj.weight", *biases,
                              *norm)
    yield from map_joint_conv(ours, theirs, mamba2.conv_channels, mamba2.conv_size, bias=mamba2.conv_bias)


def map_swiglu(ours: str, theirs: str) -> Iterator[TensorRule]:
    """Yield rules for a dense SwiGLU."""
    yield from rename_tensors(ours, theirs, "gate_proj.weight", "up_proj.weight", "down_proj.weight")


def map_feed_forward(config: ModelConfig, layer: LayerToMap, *, moe_name: str = "mlp",
                     expert_names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
                     bias_name: str = "gate.e_score_correction_bias",
                     shared_name: str = "shared_experts") -> Iterator[TensorRule]:
    """Yield rules for the feed-forward of a layer: dense, or a mixture of experts.

    Experts are written one by one; fused ones [E, 2I, D] and [E, D, I] are read as well.

    Args:
        config: the model.
        layer: the layer.
        moe_name: their name of a mixture of experts.
        expert_names: their names of gate, up and down projection of an expert.
        bias_name: their name of the correction bias of the router.
        shared_name: their name of the shared experts.
    """
    ours = f"{layer.ours}feed_forward."
    if not layer.is_moe:
        yield from map_swiglu(ours, f"{layer.theirs}mlp.")
        return
    moe = require_moe(config)
    theirs = f"{layer.theirs}{moe_name}."
    yield from rename_tensors(ours, theirs, ("router.weight", "gate.weight"))
    if moe.has_bias:
        yield from rename_tensors(ours, theirs, ("router.bias", bias_name))
    gate, up, down = expert_names
    for our_name, names, fused in (("gate_up", (gate, up), "gate_up_proj"), ("down", (down,), "down_proj")):
        one_by_one = tuple(f"{theirs}experts.{expert}.{name}.weight"
                           for expert in range(moe.num_experts) for name in names)
        yield map_tensors(f"{ours}experts.{our_name}", one_by_one, StackedExperts(moe.num_experts, len(names)),
                          KeyLayout((f"{theirs}experts.{fused}",)))
    if moe.num_shared_experts:
        yield from map_swiglu(f"{ours}shared.", f"{theirs}{shared_name}.")
    if moe.shared_gate:
        yield from rename_tensors(ours, theirs, ("shared_gate.weight", f"{shared_name}_gate.weight"))
