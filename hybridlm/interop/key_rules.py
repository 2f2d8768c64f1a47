"""Pieces of key mapping that several families share.

`o` and `t` are our and their prefix of a layer or of a part of it, each with its dot: "layers.3.", "model.layers.3.".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hybridlm.interop.mapping import Chain, Each, Layout, Reshape, Rule, Split, Stack, rule
from hybridlm.model.feed_forward.contract import FeedForwardConfig
from hybridlm.model.feed_forward.moe import MoEConfig
from hybridlm.model.mixers import AttentionConfig, MLAConfig
from hybridlm.model.mixers.common.recurrent import RecurrentConfig
from hybridlm.model.mixers.contract import MixerConfig


def same(o: str, t: str, *names: str | tuple[str, str]) -> Iterator[Rule]:
    """Tensors that only change their name; a pair is (ours, theirs)."""
    for name in names:
        ours, theirs = (name, name) if isinstance(name, str) else name
        yield rule(o + ours, t + theirs)


def norms(o: str, t: str, mixer: str = "input_layernorm", feed_forward: str = "post_attention_layernorm",
          ) -> Iterator[Rule]:
    yield from same(o, t, ("mixer_norm.weight", f"{mixer}.weight"),
                    ("feed_forward_norm.weight", f"{feed_forward}.weight"))


def attention_rules(attention: AttentionConfig, o: str, t: str, gate_in_q: bool = False) -> Iterator[Rule]:
    """q, k, v, o; `gate_in_q`: rows of q_proj are [query | gate] for each head."""
    for kind in ("weight", "bias") if attention.qkv_bias else ("weight",):
        if gate_in_q:
            yield rule((f"{o}q_proj.{kind}", f"{o}g_proj.{kind}"), f"{t}q_proj.{kind}",
                       Split((attention.head_dim, attention.head_dim), attention.num_heads))
        else:
            yield from same(o, t, f"q_proj.{kind}")
        yield from same(o, t, f"k_proj.{kind}", f"v_proj.{kind}")
    yield from same(o, t, "o_proj.weight")
    if attention.o_bias:
        yield from same(o, t, "o_proj.bias")
    if attention.qk_norm != "none":
        yield from same(o, t, "q_norm.weight", "k_norm.weight")


def mla_rules(mla: MLAConfig, o: str, t: str, out: str = "o_proj") -> Iterator[Rule]:
    if mla.q_lora_rank is None:
        yield from same(o, t, "q_proj.weight")
    else:
        yield from same(o, t, "q_a_proj.weight", ("q_a_norm.weight", "q_a_layernorm.weight"), "q_b_proj.weight")
    yield from same(o, t, ("kv_a_proj.weight", "kv_a_proj_with_mqa.weight"),
                    ("kv_a_norm.weight", "kv_a_layernorm.weight"), "kv_b_proj.weight",
                    ("o_proj.weight", f"{out}.weight"))
    if mla.bias:
        q = [] if mla.q_lora_rank is None else ["q_a_proj.bias"]
        yield from same(o, t, *q, ("kv_a_proj.bias", "kv_a_proj_with_mqa.bias"), ("o_proj.bias", f"{out}.bias"))
    if mla.output_gate != "none":
        yield from same(o, t, "g_proj.weight")
    if mla.indexer is not None and not mla.indexer.share:
        yield from same(f"{o}indexer.", f"{t}indexer.", ("q_proj.weight", "wq_b.weight"),
                        ("k_proj.weight", "wk.weight"), "k_norm.weight", "k_norm.bias", "weights_proj.weight")


def conv_rules(mixer: RecurrentConfig, o: str, t: str, packed: bool = False) -> Iterator[Rule]:
    """Short convolutions [C, W] against Conv1d weights [C, 1, W]: three, or one over [q | k | v] (`packed`)."""
    taps, widths = mixer.conv_size, mixer.channels
    shapes = {name: Reshape((width, taps), (width, 1, taps)) for name, width in widths.items()}
    ours = tuple(f"{o}{name}_conv" for name in widths)
    one = Layout((f"{t}conv1d.weight",), Chain(Split(tuple(widths.values())), Each(tuple(shapes.values()))))
    if packed:
        yield Rule(ours, (one,))
        return
    three = Layout(tuple(f"{t}{name}_conv1d.weight" for name in widths), Each(tuple(shapes.values())))
    yield Rule(ours, (three, one))


def swiglu_rules(o: str, t: str) -> Iterator[Rule]:
    yield from same(o, t, "gate_proj.weight", "up_proj.weight", "down_proj.weight")


def feed_forward_rules(feed_forward: FeedForwardConfig, moe: bool, o: str, t: str, *, moe_name: str = "mlp",
                       experts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
                       bias: str = "gate.e_score_correction_bias", shared: str = "shared_experts") -> Iterator[Rule]:
    """One layer's feed-forward: dense, or experts one by one (fused [E, 2I, D] and [E, D, I] are read as well)."""
    o += "feed_forward."
    if not moe:
        yield from swiglu_rules(o, f"{t}mlp.")
        return
    assert isinstance(feed_forward, MoEConfig)
    t, count = f"{t}{moe_name}.", feed_forward.num_experts
    gate, up, down = experts
    yield from same(o, t, ("router.weight", "gate.weight"))
    if feed_forward.has_bias:
        yield from same(o, t, ("router.bias", bias))
    for ours, names, fused in (("gate_up", (gate, up), "gate_up_proj"), ("down", (down,), "down_proj")):
        single = tuple(f"{t}experts.{e}.{name}.weight" for e in range(count) for name in names)
        yield rule(f"{o}experts.{ours}", single, Stack(count, len(names)), Layout((f"{t}experts.{fused}",)))
    if feed_forward.num_shared_experts:
        yield from swiglu_rules(f"{o}shared.", f"{t}{shared}.")
    if feed_forward.shared_gate:
        yield from same(o, t, ("shared_gate.weight", f"{shared}_gate.weight"))


def mixer_of(mixer: MixerConfig, cls: type) -> Any:
    assert isinstance(mixer, cls)
    return mixer
