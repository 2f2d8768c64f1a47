"""The language model: embedding, layers by schedule, output head, and multi-token prediction.

B rows, T tokens per row, N = B*T tokens, D model width, V vocabulary. Single-device code: no trainer, no ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn

from hybridlm.errors import ConfigError
from hybridlm.model.block import Block
from hybridlm.model.config import ModelConfig
from hybridlm.model.context_parallel import ShardGroup
from hybridlm.model.decode_plan import find_plan
from hybridlm.model.feed_forward.contract import ExpertStack, FeedForward
from hybridlm.model.fp32_parameters import KeepsFP32, widen_fp32_tensors
from hybridlm.model.guide import Guide, GuidedForward, follow_guide
from hybridlm.model.init import init_weights
from hybridlm.model.inputs import DocumentBorders, check_tokens, describe_rows
from hybridlm.model.layer_stack import build_layers, number_runs, run_layer, run_layers
from hybridlm.model.loss_names import trains_next_token
from hybridlm.model.mtp import MTPModule
from hybridlm.model.norm import RMSNorm
from hybridlm.model.output import AuxTotals, GlobalBatch, ModelOutput, ModelState
from hybridlm.model.output_head import head_cross_entropy, project_to_vocabulary
from hybridlm.model.padding import TextTokens, text_before_last_label
from hybridlm.model.parameter_roles import ParameterRole, find_roles
from hybridlm.model.parametrization import ParameterScale, compare_shapes
from hybridlm.model.residual import build_residual
from hybridlm.model.run_adapters import PerRunLinear
from hybridlm.model.sequence import SequenceInfo
from hybridlm.model.targets import IGNORE, check_targets, tokens_of_modules
from hybridlm.model.training_watch import TrainingWatch
from hybridlm_kernels import CuSeqlens

MAX_LAYER_GRAPHS = 64  # kinds of layers, times training and evaluation, times attention modes and shapes


class HybridLM(nn.Module):
    """A hybrid language model: each layer has one mixer, named by the schedule, and one feed-forward.

    Made on a real device it has fresh weights of seed 0. Made under `torch.device("meta")` it allocates nothing;
    `to_empty(device=...)` and `init_weights(seed)` then make it usable.

    Attributes:
        activation_checkpointing: whether training keeps only the inputs of layers, and computes everything inside them
            again in the backward.
        compiled: whether `compile_layers` was called.
        runs: the layer and the number of each run, in the order of the forward; layers may run several times.
        loss_weights: weights that replace those of the config, by the names of `ModelOutput.losses`; a training stage
            gives losses that it does not train the weight 0.
        guide: computes losses and statistics of a training forward against another model; None: there is none.
        shard_group: the processes that hold the rows of a batch together with this one, or None. All of them get the
            same rows; each computes its shard, with the losses and logits of its own tokens.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.compiled = False
        self.loss_weights: dict[str, float] = {}
        self.guide: Guide | None = None
        self.shard_group: ShardGroup | None = None
        self._watch = TrainingWatch()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = build_layers(config)
        self.runs = number_runs(config.runs())
        self.norm = RMSNorm.of(config.norm, config.hidden_size)
        self.lm_head: nn.Linear | None = None
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mtp = nn.ModuleList(MTPModule(config) for _ in range(config.mtp.depth))
        self.residual = build_residual(config.residual, config.layer_context(0))
        widen_fp32_tensors(self)
        if self.embed.weight.device.type != "meta":
            self.init_weights(0)

    @property
    def head_weight(self) -> Tensor:
        """The output matrix [V, D]: the weight of `lm_head`, or of the embedding when they are tied.

        What is computed goes through `logits`, which runs what was put around the head (adapters, hooks).
        """
        return self.embed.weight if self.lm_head is None else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        """The device of the weights; of those that are not offloaded, where some are."""
        placed = (p.device for p in self.parameters() if p.device.type != "meta")
        return next(placed, self.embed.weight.device)

    def forward(self, input_ids: Tensor | None, labels: Tensor | None = None,
                cu_seqlens: DocumentBorders | None = None, state: ModelState | None = None,
                targets: Tensor | None = None, *, inputs_embeds: Tensor | None = None, return_logits: bool = False,
                logits_to_keep: int | None = None, return_hidden_states: bool | Literal["last"] = False,
                global_batch: GlobalBatch | None = None, text_mask: Tensor | None = None) -> ModelOutput:
        """Compute logits, or the loss where there are labels or targets.

        Args:
            input_ids: int64 [B, T]; None beside `inputs_embeds`.
            labels: int64 [B, T], aligned with `input_ids` as in transformers (shifted here); -100 does not count.
            cu_seqlens: borders of packed documents over the B*T flattened tokens, row starts included. None: each
                row is one document. A CUDA tensor costs a synchronisation; host numbers do not.
            state: decode state from `new_state`, updated in place; positions count from the tokens it holds.
            targets: int64 [B, T, 1 + mtp.depth] instead of `labels`: entry d is the token at t + 1 + d, or -100.
            inputs_embeds: [B, T, D] instead of `input_ids`.
            return_logits: whether to return logits beside the loss; otherwise they are never all in memory.
            logits_to_keep: number of last positions that get logits; None: all.
            return_hidden_states: whether to return the stream before the first layer and after each one; "last" is
                that after the final norm alone.
            global_batch: the batch of the optimizer step, of which this forward computes a part; losses then add up
                over the parts.
            text_mask: bool [B, T], False for padding, which then counts nowhere (losses, expert loads, statistics) and
                gets logits of zero. None: all tokens are text; but where there are `labels` and no logits are asked
                for, what follows the last label of a row is padding.

        Returns:
            The logits [B, T, V] or the losses, with statistics of the layers.

        Raises:
            ValueError: shapes or borders that do not fit.

        Example:
            >>> import torch
            >>> from hybridlm import build_model, load_config
            >>> model = build_model(load_config("quickstart").model, seed=0)
            >>> ids = torch.arange(12).view(2, 6)
            >>> tuple(model(ids).logits.shape)
            (2, 6, 512)
            >>> int(model(ids, labels=ids, cu_seqlens=[0, 4, 6, 12]).num_tokens)  # one less per document
            9
        """
        tokens = check_tokens(input_ids, inputs_embeds, self.config)
        batch_and_length = tokens.shape[:2]
        if text_mask is not None and text_mask.shape != batch_and_length:
            raise ValueError(f"text_mask must be {list(batch_and_length)}; got {list(text_mask.shape)}")
        # A graph of torch.compile cannot look at the labels.
        looks = text_mask is None and not return_logits and not torch.compiler.is_compiling()
        if looks and labels is not None and labels.shape == batch_and_length:
            text_mask = text_before_last_label(labels)
        if text_mask is not None and self.shard_group is None:
            text = TextTokens.of(text_mask, cu_seqlens, tokens.device)
            if text is not None:
                return self._forward_text(text, text_mask.to(tokens.device), input_ids, inputs_embeds, labels,
                                          cu_seqlens, state, targets, return_logits=return_logits,
                                          logits_to_keep=logits_to_keep, global_batch=global_batch,
                                          return_hidden_states=return_hidden_states)
        seq = describe_rows(batch_and_length, tokens.device, cu_seqlens, state, compiled=self.compiled)
        seq.token_ids_BT = input_ids
        targets = check_targets(batch_and_length, labels, targets, seq.cu_seqlens, self.config.mtp.depth)
        if targets is not None and state is not None:
            raise ValueError("a decode state cannot be trained through: pass labels or targets without state")
        following = tokens_of_modules(input_ids, targets, seq.cu_seqlens)
        if self.shard_group is not None:
            if self.compiled or torch.compiler.is_dynamo_compiling():
                raise ValueError("rows that are divided between processes cannot be compiled: layers exchange tensors "
                                 "in the middle of a graph; set shard_group to None (engine.context_parallel=1)")
            if state is not None:
                raise ValueError("rows that are divided between processes cannot be decoded: set shard_group to None")
            text_mask = None if text_mask is None else text_mask.to(tokens.device)
            seq = seq.shard_rows(self.shard_group, text_mask)
        totals = AuxTotals()
        tokens = seq.local_tokens(tokens)
        embedding_BTD = seq.embedding_BTD = self._embedding(tokens) if inputs_embeds is None else tokens
        guide = self.guide if targets is not None else None
        keep_hidden = return_hidden_states is True or (guide is not None and guide.reads_hidden_states)
        plan = None
        if state is not None and batch_and_length[1] == 1 and not return_hidden_states:
            plan = find_plan(self, self.layers, self.runs, self.norm, tokens.device)
        hidden: list[Tensor] | None = [] if keep_hidden else None
        if plan is not None and state is not None:
            x_BTD = plan.norm(self.residual.end(plan.run(self.residual.start(embedding_BTD), seq, state.layers)))
        else:
            x_BTD = self.norm(run_layers(self.layers, self.runs, self.residual, embedding_BTD, seq, totals,
                                         None if state is None else state.layers, hidden,
                                         self.activation_checkpointing))
        if state is not None:
            state.length += batch_and_length[1]
        output = ModelOutput(state=state)
        if return_hidden_states:
            before = hidden[:-1] if return_hidden_states is True and hidden is not None else []
            output.hidden_states = (*before, x_BTD)
        if targets is not None:
            following = [seq.local_tokens(ids) for ids in following]
            if global_batch is not None:
                own = x_BTD.shape[0] * x_BTD.shape[1] if seq.text_BT is None else seq.text_BT.sum()
                output.batch_fraction = own / global_batch.tokens
            self._losses(output, x_BTD, seq.local_tokens(targets), following, seq, totals, global_batch)
        guided: dict[str, Tensor] = {}
        if targets is not None and guide is not None:
            forward = GuidedForward(self, input_ids, cu_seqlens, hidden or [], x_BTD, seq.local_tokens(targets)[..., 0],
                                    None if global_batch is None else global_batch.targets[0], output.losses["lm"],
                                    output.batch_fraction, seq.text_BT)
            guided = follow_guide(guide, forward, output, self.loss_weights)
        if targets is None or return_logits:
            output.logits = self.logits(x_BTD if logits_to_keep is None else x_BTD[:, -logits_to_keep:])
        output.stats = totals.stats() | guided
        return output

    def compile_layers(self) -> None:
        """Run every layer as one graph of torch.compile from now on, but for decoding, which stays as it is.

        Layers of one kind share a graph, and a graph serves packed documents of any borders. The first steps take
        longer: each kind of layer is compiled once for training and once for evaluation. Raises torch's limit of graphs
        per function for this process, since all layers are one function.
        """
        from torch._dynamo import config  # importing the compiler takes as long as importing torch

        config.recompile_limit = max(config.recompile_limit, MAX_LAYER_GRAPHS)
        self.compiled = True
        for block in (*self.layers, *(module.block for module in self.mtp)):
            cast(Block, block).compile_layer()

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode; mistakes of a training loop that show here are warned of once."""
        self._watch.mode_is_set(self, mode)
        return super().train(mode)

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Compute logits from the output of the final norm.

        Args:
            x_BTD: hidden states [B, T, D] after the final norm.

        Returns:
            Logits [B, T, V], soft-capped if the config says so.
        """
        logits_BTV = project_to_vocabulary(self._scale_for_logits(x_BTD), self.lm_head, self.embed)
        cap = self.config.logit_soft_cap
        return logits_BTV if cap is None else cap * torch.tanh(logits_BTV / cap)

    def new_state(self, batch: int, max_length: int | None = None) -> ModelState:
        """Make an empty decode state.

        Args:
            batch: number of rows B.
            max_length: the most tokens that a row will have, prompt included; None: the model's max_position.

        Returns:
            The state of all layers, for `forward` and `generate`.
        """
        length = self.config.max_position if max_length is None else max_length
        layers = [cast(Block, self.layers[index]).new_state(batch, length) for index, _ in self.runs]
        return ModelState(layers, batch, length)

    @property
    def decodes_padded_rows(self) -> bool:
        """Whether one token per row can be decoded when rows hold unlike numbers of tokens (`ModelState.join`)."""
        mixers = all(cast(Block, layer).mixer.decodes_padded_rows for layer in self.layers)
        return mixers and not self.config.feed_forward.keeps_state

    def init_weights(self, seed: int = 0) -> None:
        """Give every parameter and buffer its initial value; see `hybridlm.model.init`."""
        init_weights(self, self.config.init_std, seed)

    def num_params(self) -> int:
        """Number of parameters, each counted once."""
        return sum(p.numel() for p in self.parameters())

    def fp32_parameter_names(self) -> set[str]:
        """Names of the parameters and buffers that stay in fp32, whoever casts the model."""
        return {f"{prefix}.{name}" for prefix, module in self.named_modules() if isinstance(module, KeepsFP32)
                for name, _ in module.fp32_tensors()}

    def parameter_roles(self) -> dict[str, ParameterRole]:
        """The role of every parameter, by name: what an optimizer groups them by."""
        roles = find_roles(self, {"lm_head.weight": ParameterRole("output_head")})
        for path, part in self.named_modules():
            if isinstance(part, PerRunLinear):
                roles |= {f"{path}.{name}": role for name, role in part.run_roles(roles[f"{path}.weight"]).items()}
        return roles

    def parameter_scales(self) -> dict[str, ParameterScale]:
        """Growth of every matrix from the base model of `config.parametrization`, by name; empty without one.

        Raises:
            ConfigError: the model cannot be made as narrow as the base.
        """
        rule = self.config.parametrization
        if rule.kind == "standard" or rule.base_hidden_size is None:
            return {}
        with torch.device("meta"):
            whole, base = HybridLM(self.config), HybridLM(self.config.resize(rule.base_hidden_size))
        return compare_shapes(whole, base, whole.parameter_roles(), self.config.depth_ratio)

    def autocast_parameters(self) -> dict[str, nn.Parameter]:
        """Weights that autocast rounds wherever they are used, by name.

        They are those of linear maps and of routed experts, without `fp32_parameter_names`.
        """
        fp32 = self.fp32_parameter_names()
        found = {f"{prefix}.{name}": p for prefix, module in self.named_modules()
                 if isinstance(module, (nn.Linear, ExpertStack)) for name, p in module.named_parameters(recurse=False)}
        return {name: p for name, p in found.items() if not name.endswith(".bias") and name not in fp32}

    def router_loads(self) -> dict[str, Tensor]:
        """Number of tokens that each expert got since the last optimizer step, by MoE layer.

        Returns:
            The buffers, int64 [E], by module name.
        """
        loads = {name: m.router_load() for name, m in self.named_modules() if isinstance(m, FeedForward)}
        return {name: load for name, load in loads.items() if load is not None}

    def step_sums(self) -> list[Tensor]:
        """Sums that routers keep since the last optimizer step: ranks add them up, in place, before the next one."""
        return [total for module in self.modules() if isinstance(module, FeedForward) for total in module.step_sums()]

    def post_optimizer_step(self, update: bool = True) -> None:
        """Move the routers' biases by the loads since the last optimizer step, and set the loads to zero.

        Trainers that are not ours have to call it after every step; `hybridlm.interop.RouterBiasCallback` does.

        Args:
            update: whether to move the biases; False after a step that was skipped.
        """
        self._watch.biases_have_followed()
        for module in self.modules():
            if isinstance(module, FeedForward):
                module.post_optimizer_step(update)

    def _forward_text(self, text: TextTokens, text_mask: Tensor, input_ids: Tensor | None, inputs_embeds: Tensor | None,
                      labels: Tensor | None, cu_seqlens: DocumentBorders | None, state: ModelState | None,
                      targets: Tensor | None, *, logits_to_keep: int | None, **options: Any) -> ModelOutput:
        """`forward` over a batch with padding: its text goes through the layers as one row of packed documents."""
        if state is not None:
            raise ValueError("padding cannot be decoded: give prompts of one length, without text_mask")
        if labels is not None:
            labels = labels.masked_fill(~text_mask, IGNORE)
        borders = None if cu_seqlens is None else CuSeqlens.of(cu_seqlens, text_mask.device)
        targets = check_targets(text_mask.shape, labels, targets, borders, self.config.mtp.depth)
        packed_ids, packed_embeds, packed_targets = (None if x is None else text.pack(x)
                                                     for x in (input_ids, inputs_embeds, targets))
        # Of the class: an engine may have put a forward of its own, with another result, over the model's.
        output = HybridLM.forward(self, packed_ids, None, text.borders, None, packed_targets,
                                  inputs_embeds=packed_embeds, **options)
        if output.logits is not None:
            whole = text.unpack(output.logits)
            output.logits = whole if logits_to_keep is None else whole[:, -logits_to_keep:]
        if output.hidden_states is not None:
            output.hidden_states = tuple(text.unpack(x) for x in output.hidden_states)
        return output

    def _losses(self, output: ModelOutput, x_BTD: Tensor, targets_BTd: Tensor, following: list[Tensor],
                seq: SequenceInfo, totals: AuxTotals, global_batch: GlobalBatch | None) -> None:
        config, weights = self.config, self.loss_weights
        losses = output.losses
        counts: Sequence[int | None] = [None] * (1 + config.mtp.depth) if global_batch is None else global_batch.targets
        # A loss without weight needs no gradient where another one trains the head, and no logits where nothing trains.
        weightless = not trains_next_token(weights, config.z_loss)
        frozen = not (x_BTD.requires_grad or self.head_weight.requires_grad) and torch.is_grad_enabled()
        if weightless and frozen and self.training and self.guide is None:
            output.num_tokens, loss = (targets_BTd[..., 0] >= 0).sum(), x_BTD.new_zeros(())
        else:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not (weightless and weights.get("teacher_kl"))):
                losses["lm"], z, output.num_tokens = self.cross_entropy(x_BTD, targets_BTd[..., 0], counts[0],
                                                                         config.z_loss)
            loss = losses["lm"] * weights["lm"] if "lm" in weights else losses["lm"]
            if config.z_loss:
                losses["z"] = z
                loss = loss + weights.get("z", config.z_loss) * z
        if config.mtp.depth:
            by_depth = []
            for k, (module, ahead_BT) in enumerate(zip(self.mtp, following, strict=True), start=1):
                x_BTD = run_layer(module, f"mtp{k}", x_BTD, seq, totals, self.activation_checkpointing,
                                  self._embedding(ahead_BT))
                by_depth.append(self.cross_entropy(x_BTD, targets_BTd[..., k], counts[k])[0])
            losses["mtp"] = torch.stack(by_depth).mean()
            loss = loss + weights.get("mtp", config.mtp.loss_weight) * losses["mtp"]
        means, weighted = totals.losses(output.batch_fraction, weights)
        losses.update(means)
        output.loss = sum(weighted, start=loss)

    def _embedding(self, ids_BT: Tensor) -> Tensor:
        scale = self.config.embedding_scale
        return self.embed(ids_BT) if scale == 1.0 else scale * self.embed(ids_BT)

    def _scale_for_logits(self, x_BTD: Tensor) -> Tensor:
        multiplier = self.config.logit_multiplier
        return x_BTD if multiplier == 1.0 else multiplier * x_BTD

    def cross_entropy(self, x_BTD: Tensor, labels_BT: Tensor, divisor: int | None,
                       z_loss: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """Cross entropy of next tokens, without ever holding all logits.

        Args:
            x_BTD: output of the final norm.
            labels_BT: int64, the next tokens, -100 where none counts.
            divisor: tokens that the sums are divided by; None: those that count.
            z_loss: not zero makes the second result differentiable.

        Returns:
            Cross entropy and logsumexp^2, each summed over the tokens that count and divided by `divisor` (None: their
            number), and the number of these tokens.
        """
        loss_sum, z_sum, count = head_cross_entropy(
            self._scale_for_logits(x_BTD).reshape(-1, x_BTD.shape[-1]), labels_BT.reshape(-1), self.lm_head, self.embed,
            z_loss=z_loss, soft_cap=self.config.logit_soft_cap)
        n = count.clamp(min=1) if divisor is None else max(divisor, 1)
        return loss_sum / n, z_sum / n, count


def build_model(config: Any, *, seed: int | None = None, device: torch.device | str = "cpu",
                shard_experts: Callable[[HybridLM], None] | None = None,
                shard_weights: Callable[[nn.Module], None] | None = None) -> HybridLM:
    """Build a model with fresh weights from a run's config or a ModelConfig.

    Args:
        config: what `hybridlm.load_config` returns, or its `model` section.
        seed: seed of the weights; None takes the run's `training.seed`, or 0 for a ModelConfig.
        device: where the weights are made; on "meta" nothing is allocated.
        shard_experts: drops the experts that other processes hold, before memory is allocated.
        shard_weights: gets each mixer, feed-forward, norm and projection when its weights are there, and may leave a
            shard of them before the next one is allocated.

    Raises:
        ConfigError: a value that cannot be built.

    Example:
        >>> from hybridlm import build_model, load_config
        >>> build_model(load_config("quickstart").model, device="meta").num_params() > 100_000
        True
    """
    model_config = getattr(config, "model", config)
    if not isinstance(model_config, ModelConfig):
        raise ConfigError("config", "is not a config", got=config, expected="what hybridlm.load_config returns, or a "
                                                                            "ModelConfig")
    if seed is None:
        seed = config.training.seed if hasattr(config, "training") else 0
    with torch.device("meta"):
        model = HybridLM(model_config)
    if shard_experts is not None:
        shard_experts(model)
    if torch.device(device).type == "meta":
        return model
    init_weights(model, model_config.init_std, seed, device, shard_weights)
    return model
