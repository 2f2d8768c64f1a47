"""Multi-head latent attention: keys and values of all heads come from one small latent, which is all the cache holds.

    c_t = norm(W_kva x_t)[:C],  r_t = rope(W_kva x_t)[C:]           (latent, and one rotated key part for all heads)
    k_th = [W_uk,h c_t | r_t],  v_th = W_uv,h c_t                   (W_kvb holds W_uk and W_uv)
    o_th = sum_s softmax_s(q_th . k_sh * scale) v_sh

Absorbed form, the same numbers without ever expanding the latents: q' = [W_uk^T q_nope | q_rope], k' = [c | r],
o = W_uv (sum_s p_s c_s).
Sources: DeepSeek-V2 (section 2.1), DeepSeek-V3; without RoPE: Kimi Linear; gate per head: Ling 3.0; indexer:
DeepSeek-V3.2.
B rows, T tokens, S keys, D hidden size, H heads, N/R unrotated/rotated key dims, K = N + R, V value dim, C latent dim,
L = C + R, Q width of the queries' input, k selected keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.decode_state import LatentState
from hybridlm.model.decode_step import DecodeStep, attend_one, linear_step, norm_step
from hybridlm.model.layer_context import LayerContext, NormConfig, ShardTraffic
from hybridlm.model.mixers.common.cost import count_visible_keys
from hybridlm.model.mixers.common.dense_attention import check_heads
from hybridlm.model.mixers.common.indexed_attention import IndexedMixer, IndexedMixerConfig, Selection
from hybridlm.model.mixers.common.indexer import IndexerConfig
from hybridlm.model.mixers.common.output_gate import OutputGate, apply_output_gate, build_output_gate, gate_width
from hybridlm.model.mixers.contract import Aux, register_mixer
from hybridlm.model.mixers.sizing import HeadSizes, ModelSizes
from hybridlm.model.norm import RMSNorm
from hybridlm.model.readable_weights import readable_weight
from hybridlm.model.rope import RopeConfig, rotate, rotate_step
from hybridlm.model.sequence import SequenceInfo
from hybridlm.model.sharing import SharedKind, SharedRead

INT32_BYTES = 4
# Normed latents and rotated key parts: of all tokens that are kept in one tensor [B, S, L] (None without a decode
# state), and of the tokens held here, [B, T, C] and [B, T, R].
LATENTS = SharedKind("the latents of MLA", gradient=True)
SIZE_OPTIONS = ("num_heads", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


@dataclass(frozen=True)
class LatentLayout:
    """Facts about latents that a layer which reads them from another one has to share."""

    kv_lora_rank: int
    qk_rope_head_dim: int
    rope: RopeConfig


@dataclass(kw_only=True)
class MLAConfig(IndexedMixerConfig):
    """Configuration of multi-head latent attention.

    Args:
        num_heads: H.
        kv_lora_rank: dims of the latent C.
        qk_nope_head_dim: unrotated key dims per head N.
        qk_rope_head_dim: rotated key dims R, which all heads share.
        v_head_dim: value dims per head V.
        q_lora_rank: rank of the queries; null projects them straight from x by `q_proj`.
        rope: its kind `none` keeps the R shared key dims and does not rotate them (Kimi Linear).
        norm_eps: of the norms of both latents; null takes the model's.
        bias: biases of q_a_proj, kv_a_proj and o_proj.
        output_gate: a sigmoid gate per element or per head of the output.
        indexer: reads only the keys that it selects (DeepSeek sparse attention).
        latent_source: layer whose latents are read in place of own ones, which are then not made (Mistral Large 4): its
            index, or the name of a mixer, whose nearest earlier layer is read.
    """

    kind: str = "mla"
    num_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    rope: RopeConfig = field(default_factory=lambda: RopeConfig(kind="interleaved"))
    norm_eps: float | None = None
    bias: bool = False
    output_gate: OutputGate = "none"
    indexer: IndexerConfig | None = None
    latent_source: int | str | None = None
    uses_mscale: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for key in ("num_heads", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"):
            require(getattr(self, key) > 0, key, "must be positive", got=getattr(self, key))
        require(self.q_lora_rank is None or self.q_lora_rank > 0, "q_lora_rank", "must be positive",
                got=self.q_lora_rank, hint="null projects queries straight from the input")
        require(self.qk_rope_head_dim >= 0, "qk_rope_head_dim", "must not be negative", got=self.qk_rope_head_dim)
        require(self.rope.kind == "none" or (self.qk_rope_head_dim > 0 and self.qk_rope_head_dim % 2 == 0),
                "qk_rope_head_dim", "must be even to be rotated", got=self.qk_rope_head_dim,
                hint="rope.kind=none rotates nothing")
        require(self.rope.partial_rotary_factor == 1, "rope.partial_rotary_factor", "is not used by mla",
                got=self.rope.partial_rotary_factor, expected="1", hint="qk_rope_head_dim says how many dims rotate")
        require(self.norm_eps is None or self.norm_eps > 0, "norm_eps", "must be positive", got=self.norm_eps)
        if self.indexer is not None:
            self.indexer.check_rope(self.qk_rope_head_dim)

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def _widths(self, context: LayerContext) -> tuple[int, int, int]:
        """Input width of the indexer's queries, weights of the projections, outputs of the gate."""
        D, H, C, Q = context.hidden_size, self.num_heads, self.kv_lora_rank, self.q_lora_rank
        gate = gate_width(self.output_gate, H, self.v_head_dim)
        queries = D * H * self.qk_head_dim if Q is None else Q * (D + H * self.qk_head_dim)
        latents = C * H * (self.qk_nope_head_dim + self.v_head_dim)
        if self.latent_source is None:
            latents += D * (C + self.qk_rope_head_dim)
        return D if Q is None else Q, queries + latents + D * (H * self.v_head_dim + gate), gate

    def leaves(self, context: LayerContext) -> Sequence[SharedKind]:
        return (*super().leaves(context), *([LATENTS] if self.latent_source is None else []))

    def reads(self, context: LayerContext) -> Sequence[SharedRead]:
        return (*super().reads(context), *([] if self.latent_source is None else [self.latent_read()]))

    def latent_read(self) -> SharedRead:
        """The latents of the earlier layer that is asked for."""
        return SharedRead(LATENTS, self.latent_source, "latent_source")

    def shared_layout(self, kind: SharedKind, context: LayerContext) -> Any:
        if kind != LATENTS:
            return super().shared_layout(kind, context)
        return LatentLayout(self.kv_lora_rank, self.qk_rope_head_dim, self.rope)

    def check_latents(self, context: LayerContext) -> None:
        """Refuse latents of another layer that are not as wide, or rotated in another way.

        Raises:
            ConfigError: no earlier layer leaves latents, or they do not fit.
        """
        if self.latent_source is not None:
            own, read = self.shared_layout(LATENTS, context), context.shared_layout(self.latent_read())
            require(own == read, "latent_source", "reads latents of another form", got=own, expected=read,
                    hint="kv_lora_rank, qk_rope_head_dim and rope must be those of the layer that is read")

    def transfer_gaps(self) -> list[str]:
        return ["MLA's latents, whose rank stays", *self.indexer_gaps()]

    def num_params(self, context: LayerContext) -> int:
        self.check_latents(context)
        query_dim, weights, _ = self._widths(context)
        Q = self.q_lora_rank or 0
        C, R = (self.kv_lora_rank, self.qk_rope_head_dim) if self.latent_source is None else (0, 0)
        norms = Q + C
        biases = (Q + C + R + context.hidden_size) * self.bias
        index = 0 if self.indexer is None else self.indexer.num_params(context, query_dim)
        return weights + norms + biases + index

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        query_dim, weights, _ = self._widths(context)
        indexer = self.reading_indexer(context)
        keys = count_visible_keys(context_length) if indexer is None else indexer.read_keys(context_length)
        parts = {"projections": 2.0 * weights,
                 "attention": 2.0 * self.num_heads * (self.qk_head_dim + self.v_head_dim) * keys}
        if indexer is not None:
            parts["indexer"] = indexer.flops_per_token(context, query_dim, context_length)
        return parts

    def loss_flops_per_token(self, context: LayerContext, context_length: int) -> float:
        indexer, width = self.reading_indexer(context), self.num_heads * self.qk_head_dim
        return 0.0 if indexer is None else indexer.kl_flops_per_token(
            context, self._widths(context)[0], context_length, width)

    def check_context_parallel(self, shards: int, length: int) -> None:
        check_heads(self.num_heads, shards)

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        tokens = rows * length * element_bytes
        dense = tokens * 2 * self.num_heads * (self.qk_head_dim + self.v_head_dim)
        indexer = self.reading_indexer(context)
        if indexer is None:
            return [ShardTraffic("exchange", dense, dense)]
        latent = self.kv_lora_rank + self.qk_rope_head_dim
        return indexer.shard_traffic(tokens, length * shards, dense, self.num_heads * self.qk_head_dim, latent)

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        index = 0 if self.indexer is None else self.indexer.state_bytes(context_length, element_bytes)
        if self.latent_source is not None:
            return index  # the layer that leaves the latents keeps them
        return context_length * (self.kv_lora_rank + self.qk_rope_head_dim) * element_bytes + index

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        queries, values = self.num_heads * self.qk_head_dim, self.num_heads * self.v_head_dim
        latents = 2 * (self.q_lora_rank or 0)
        if self.latent_source is None:
            latents += 2 * self.kv_lora_rank + self.qk_rope_head_dim
        keys_and_values = self.num_heads * (self.qk_nope_head_dim + self.v_head_dim)
        indexer = self.indexer
        own = indexer is not None and indexer.mode == "sparse" and not indexer.share
        indices = INT32_BYTES * indexer.topk if indexer is not None and own else 0
        return element_bytes * (latents + keys_and_values + 2 * queries + values) + indices

    @property
    def index_rope_dim(self) -> int:
        return self.qk_rope_head_dim

    def head_sizes(self) -> HeadSizes:
        return HeadSizes(self.num_heads, self.v_head_dim)

    @classmethod
    def sizes_from(cls, options: Mapping[str, Any], model: ModelSizes) -> dict[str, Any]:
        """Sizes of the model's MLA where it has one, else in the proportions of DeepSeek-V3 and Kimi Linear.

        Rotated key dims are half of a head; the latent has 4 heads' dims (512 for heads of 128), in a narrow model a
        quarter of its width, but at least 2 heads' dims.
        """
        other = model.nearest_mixer(cls)
        heads = model.heads_for(cls)
        if isinstance(other, cls):
            return {key: getattr(other, key) for key in SIZE_OPTIONS}
        dim = heads.head_dim
        return {"num_heads": heads.num_heads, "v_head_dim": dim, "qk_nope_head_dim": dim,
                "qk_rope_head_dim": max(2, dim // 4 * 2),
                "kv_lora_rank": min(4 * dim, max(2 * dim, model.hidden_size // 4))}

    def projection_heads(self) -> dict[str, tuple[int, int]]:
        queries = {"q_proj": (self.num_heads, self.qk_head_dim)} if self.q_lora_rank is None else {}
        return queries | {"o_proj": (self.num_heads, self.v_head_dim)}


@register_mixer("mla", MLAConfig)
class MLA(IndexedMixer):
    """The module: q_proj, or q_a_proj, q_a_norm and q_b_proj; kv_a_proj, kv_a_norm, kv_b_proj, o_proj; g_proj, indexer.

    Rows of q_proj and q_b_proj: heads of [N unrotated | R rotated]. Rows of kv_a_proj: [C latent | R rotated]. Rows
    of kv_b_proj: heads of [N keys | V values].
    """

    fp32_parameters: ClassVar[tuple[str, ...]] = (*IndexedMixer.fp32_parameters, "q_a_norm.weight", "kv_a_norm.weight")

    def __init__(self, config: MLAConfig, context: LayerContext):
        super().__init__(config.indexer, context)
        self.config = config
        D, H, C, Q = context.hidden_size, config.num_heads, config.kv_lora_rank, config.q_lora_rank
        N, R, V = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        latent_norm = NormConfig(eps=config.norm_eps or context.norm.eps, zero_centered=context.norm.zero_centered)
        if Q is None:
            self.q_proj = nn.Linear(D, H * (N + R), bias=False)
        else:
            self.q_a_proj = nn.Linear(D, Q, bias=config.bias)
            self.q_a_norm = RMSNorm.of(latent_norm, Q)
            self.q_b_proj = nn.Linear(Q, H * (N + R), bias=False)
        self.latent_layer: int | None = None
        if config.latent_source is None:
            self.kv_a_proj = nn.Linear(D, C + R, bias=config.bias)
            self.kv_a_norm = RMSNorm.of(latent_norm, C)
        else:
            config.check_latents(context)
            self.latent_layer = context.source_of(config.latent_read())
        self.latents_are_read = context.is_read(LATENTS)
        self.kv_b_proj = nn.Linear(C, H * (N + V), bias=False)
        self.g_proj = build_output_gate(config.output_gate, D, H, V, bias=False)
        self.o_proj = nn.Linear(H * V, D, bias=config.bias)
        yarn = config.rope.scaling if config.rope.kind != "none" else None
        self.scale = (N + R) ** -0.5 * (1.0 if yarn is None else yarn.softmax_scale())
        self.build_indexer(context, D if Q is None else Q, config.rope, R)

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: LatentState | None = None) -> tuple[Tensor, Aux]:
        config = self.config
        input_BTQ = x_BTD if config.q_lora_rank is None else self.q_a_norm(self.q_a_proj(x_BTD))
        q_BTHK = (self.q_proj if config.q_lora_rank is None else self.q_b_proj)(input_BTQ)
        q_BTHK = q_BTHK.unflatten(-1, (config.num_heads, config.qk_head_dim))
        latent_BSL, c_BTC, r_BTR = self._latents(x_BTD, seq, state)
        selection = self.select(x_BTD, input_BTQ, seq, None if state is None else state.index_keys)
        sparse = selection.indices is not None
        up_XC = readable_weight(self.kv_b_proj, x_BTD.device)  # with an adapter or a hook it must be called: expanded
        if up_XC is not None and self._absorbs(x_BTD.shape[1], sparse, decoding=state is not None):
            if latent_BSL is None:
                latent_BSL = torch.cat([c_BTC, r_BTR], -1)
            o_BTHV, aux = self._absorbed(q_BTHK, latent_BSL, up_XC, seq, selection)
        else:
            if latent_BSL is not None:
                c_BTC, r_BTR = latent_BSL.split([config.kv_lora_rank, config.qk_rope_head_dim], -1)
            if sparse:  # selected keys are places of the whole history
                c_BTC, r_BTR = seq.history(c_BTC), seq.history(r_BTR)
            o_BTHV, aux = self._expanded(q_BTHK, c_BTC, r_BTR, seq, selection)
        return self.o_proj(apply_output_gate(o_BTHV, x_BTD, self.g_proj, config.output_gate)), aux

    def _latents(self, x_BTD: Tensor, seq: SequenceInfo,
                 state: LatentState | None) -> tuple[Tensor | None, Tensor, Tensor]:
        """Normed latents and rotated key parts, made here or by the layer that is read.

        Returns:
            Both in one tensor for all tokens that are kept, [B, S, L], None without a decode state; those of the tokens
            held here, [B, T, C] and [B, T, R], which nothing reads where the first one is there.
        """
        config = self.config
        if self.latent_layer is not None:
            return seq.read(LATENTS, self.latent_layer)
        c_BTC, r_BTR = self.kv_a_proj(x_BTD).split([config.kv_lora_rank, config.qk_rope_head_dim], -1)
        c_BTC = self.kv_a_norm(c_BTC)
        r_BTR = rotate(r_BTR[:, :, None], config.rope, config.qk_rope_head_dim, seq)[:, :, 0]
        latent_BSL = None if state is None else state.latent.append(torch.cat([c_BTC, r_BTR], -1))
        if self.latents_are_read:
            seq.leave(LATENTS, self.layer_index, (latent_BSL, c_BTC, r_BTR))
        return latent_BSL, c_BTC, r_BTR

    def _absorbs(self, queries: int, sparse: bool, decoding: bool) -> bool:
        """Whether to take the absorbed form, where it does less work.

        Dense: it saves expanding the latents, but its scores are wider; it wins for few queries (decoding). Over
        selected keys it reads one latent where the expanded form gathers the keys and values of every head. Without a
        decode state the number of tokens decides nothing: it differs between ranks, which under ZeRO-3 must use the
        same modules.
        """
        config = self.config
        if sparse or not decoding:
            return sparse
        widths = config.qk_nope_head_dim + config.v_head_dim
        return queries * (2 * config.kv_lora_rank - widths) < config.kv_lora_rank * widths

    def _split_queries(self, q_BTHK: Tensor, seq: SequenceInfo) -> tuple[Tensor, Tensor]:
        """Unrotated dims [B, T, H, N] and rotated dims [B, T, H, R]."""
        config = self.config
        q_BTHN, q_BTHR = q_BTHK.split([config.qk_nope_head_dim, config.qk_rope_head_dim], -1)
        return q_BTHN, rotate(q_BTHR, config.rope, config.qk_rope_head_dim, seq)

    def _expanded(self, q_BTHK: Tensor, c_BSC: Tensor, r_BSR: Tensor, seq: SequenceInfo,
                  selection: Selection) -> tuple[Tensor, Aux]:
        """o [B, T, H, V] by the keys and values of every head."""
        config = self.config
        if config.rope.kind != "none":
            q_BTHK = torch.cat(self._split_queries(q_BTHK, seq), -1)
        kv = self.kv_b_proj(c_BSC).unflatten(-1, (config.num_heads, -1))
        k_BSHK, v_BSHV = kv.split([config.qk_nope_head_dim, config.v_head_dim], -1)
        if config.qk_rope_head_dim:
            k_BSHK = torch.cat([k_BSHK, r_BSR[:, :, None].expand(-1, -1, config.num_heads, -1)], -1)
        return self.attend(q_BTHK, k_BSHK, v_BSHV, seq, selection, scale=self.scale)

    def _absorbed(self, q_BTHK: Tensor, latent_BSL: Tensor, up_XC: Tensor, seq: SequenceInfo,
                  selection: Selection) -> tuple[Tensor, Aux]:
        """o [B, T, H, V] by one key and value for all heads: the latent itself, L = C + R wide."""
        config = self.config
        up_HXC = up_XC.unflatten(0, (config.num_heads, -1))
        up_HNC, up_HVC = up_HXC.split([config.qk_nope_head_dim, config.v_head_dim], 1)
        q_BTHN, q_BTHR = self._split_queries(q_BTHK, seq)
        q_BTHL = torch.cat([torch.einsum("bthn,hnc->bthc", q_BTHN, up_HNC), q_BTHR], -1)
        k_BS1L = (latent_BSL if selection.indices is None else seq.history(latent_BSL))[:, :, None]
        o_BTHC, aux = self.attend(q_BTHL, k_BS1L, k_BS1L[..., : config.kv_lora_rank], seq, selection, scale=self.scale)
        return torch.einsum("bthc,hvc->bthv", o_BTHC, up_HVC), aux

    def prepare_step(self) -> DecodeStep | None:
        if self.indexer_config is not None or self.latents_are_read or self.latent_layer is not None:
            return None
        config = self.config
        if config.q_lora_rank is None:
            project_queries = linear_step(self.q_proj)
        else:
            q_a_proj, q_b_proj = linear_step(self.q_a_proj), linear_step(self.q_b_proj)
            q_a_norm = norm_step(self.q_a_norm)

            def project_queries(x_B1D: Tensor) -> Tensor:
                return q_b_proj(q_a_norm(q_a_proj(x_B1D)))

        kv_a_proj, kv_a_norm, o_proj = linear_step(self.kv_a_proj), norm_step(self.kv_a_norm), linear_step(self.o_proj)
        g_proj = None if self.g_proj is None else linear_step(self.g_proj)
        heads, latent_dim = (-1, config.num_heads, config.qk_head_dim), config.kv_lora_rank
        key_dims = [config.qk_nope_head_dim, config.v_head_dim]
        rotary_dim = config.qk_rope_head_dim

        def step(x_B1D: Tensor, seq: SequenceInfo, state: LatentState) -> Tensor:
            up_XC = readable_weight(self.kv_b_proj, x_B1D.device)
            if up_XC is None:
                return self(x_B1D, seq, state)[0]
            latent_B1L = kv_a_proj(x_B1D)
            c_B1C, r_B11R = kv_a_norm(latent_B1L[..., :latent_dim]), latent_B1L[..., None, latent_dim:]
            r_B1R = rotate_step(r_B11R, config.rope, rotary_dim, seq)[:, 0]
            latent_BSL = state.latent.append(torch.cat([c_B1C, r_B1R], -1))
            up_HNC, up_HVC = up_XC.unflatten(0, (config.num_heads, -1)).split(key_dims, 1)
            q_BHN, q_BHR = project_queries(x_B1D).view(heads).split([key_dims[0], rotary_dim], -1)
            q_BHR = rotate_step(q_BHR.unsqueeze(1), config.rope, rotary_dim, seq)[:, 0]
            q_BHC = torch.bmm(q_BHN.transpose(0, 1), up_HNC).transpose(0, 1)
            k_BS1L = latent_BSL.unsqueeze(2)
            o_BHC = attend_one(torch.cat([q_BHC, q_BHR], -1), k_BS1L, k_BS1L[..., :latent_dim], seq, self.scale)
            o_BHV = torch.bmm(o_BHC.transpose(0, 1), up_HVC.mT).transpose(0, 1)
            return o_proj(apply_output_gate(o_BHV.unsqueeze(1), x_B1D, g_proj, config.output_gate))

        return step

    @property
    def decodes_padded_rows(self) -> bool:
        return self.indexer_config is None

    def head_rows(self) -> dict[str, int]:
        names = ["q_proj", "q_b_proj", "kv_b_proj", *(["g_proj"] if self.config.output_gate == "element" else [])]
        return dict.fromkeys(names, self.config.num_heads)

    def new_state(self, batch: int, max_length: int) -> LatentState:
        return LatentState.empty(max_length, self.index_pool)
