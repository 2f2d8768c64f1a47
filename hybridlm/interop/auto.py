"""Models of ours inside transformers: importing this module registers the model type `hybridlm`.

    import hybridlm.interop.auto
    model = AutoModelForCausalLM.from_pretrained(folder)     # what `hybridlm export` wrote
    model.generate(...)                                      # with our decode state as its cache

Letters: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from hybridlm.config.serialization import from_dict
from hybridlm.interop.families.native import MODEL_TYPE
from hybridlm.model.config import ModelConfig
from hybridlm.model.feed_forward.contract import FeedForward
from hybridlm.model.model import HybridLM
from hybridlm.model.output import ModelState


class HybridLMConfig(PreTrainedConfig):
    """The transformers config of a model of ours; `model` is the model section of a hybridlm config, as plain data."""

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  (as transformers declares it)

    model: dict | None = None
    vocab_size: int = 0
    hidden_size: int = 0
    num_hidden_layers: int = 0
    num_attention_heads: int = 1
    max_position_embeddings: int = 4096
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def model_config(self) -> ModelConfig:
        """The typed config of the model.

        Raises:
            ConfigError: a value that cannot be built.
        """
        return from_dict(ModelConfig, self.model, "model")


class HybridCache:
    """Our decode state behind the interface of a transformers cache."""

    is_compileable = False

    def __init__(self, state: ModelState):
        self.state = state

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.state.length

    def get_max_length(self) -> int:
        return self.state.max_length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the rows of every tensor into the order of `beam_idx`."""
        self.state.reorder(beam_idx)


class HybridLMForCausalLM(PreTrainedModel, GenerationMixin):
    """`HybridLM` behind the interface of transformers.

    Rows may be padded on the right, but not with a cache: linear mixers would read padding as tokens.
    """

    config_class = HybridLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _is_stateful = True  # a recurrent state cannot be rolled back
    _no_split_modules = ["Block"]  # noqa: RUF012

    def __init__(self, config: HybridLMConfig):
        super().__init__(config)
        self.model = HybridLM(config.model_config())
        self._keep_in_fp32_modules_strict = {f"model.{name}" for name in self.model.fp32_parameter_names()}
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise what no file holds, the counts of router loads; HybridLM has initialised everything else."""
        load = module.router_load() if isinstance(module, FeedForward) else None
        if load is not None:
            load.zero_()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed

    def get_output_embeddings(self) -> nn.Module | None:
        return self.model.lm_head

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        self.model.activation_checkpointing = enable

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None,
                past_key_values: HybridCache | None = None, use_cache: bool | None = None,
                logits_to_keep: int | Tensor = 0, cu_seqlens: Tensor | None = None,
                num_items_in_batch: Tensor | int | None = None, **kwargs: Any) -> CausalLMOutputWithPast:
        """The logits [B, T, V], and the loss when there are labels.

        Args:
            input_ids: token ids [B, T].
            attention_mask: [B, T], 0 for padding.
            labels: [B, T], to compute the loss.
            past_key_values: the cache, which is updated.
            use_cache: make a cache when none is given.
            logits_to_keep: number of last positions to return; 0: all.
            cu_seqlens: borders of packed documents.
            num_items_in_batch: tokens of an accumulated batch, over which the loss is averaged.
            kwargs: other arguments of transformers, which change nothing.

        Raises:
            ValueError: padding on the left or with a cache, or a mask that is not two-dimensional.
        """
        if use_cache and past_key_values is None and labels is None:
            past_key_values = HybridCache(self.model.new_state(input_ids.shape[0]))
        _check_mask(attention_mask, past_key_values is not None)
        if isinstance(logits_to_keep, Tensor):
            raise ValueError("logits_to_keep must be a number of last positions")
        state = None if past_key_values is None else past_key_values.state
        output = self.model(input_ids, labels=labels, state=state, cu_seqlens=cu_seqlens,
                            return_logits=labels is not None and not self.training,
                            logits_to_keep=logits_to_keep or None)
        loss = output.loss
        if loss is not None and num_items_in_batch is not None:  # the mean over an accumulated batch
            loss = loss * output.num_tokens / num_items_in_batch
        return CausalLMOutputWithPast(loss=loss, logits=output.logits, past_key_values=past_key_values)  # type: ignore[arg-type]

    def _prepare_cache_for_generation(  # type: ignore[override]
            self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, batch_size: int,
            max_cache_length: int, *args: Any, **kwargs: Any) -> None:
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
            model_kwargs["past_key_values"] = HybridCache(self.model.new_state(rows, max_cache_length + 1))

    def prepare_inputs_for_generation(  # type: ignore[override]
            self, input_ids: Tensor, past_key_values: HybridCache | None = None, attention_mask: Tensor | None = None,
            **kwargs: Any) -> dict[str, Any]:
        """The arguments of the next forward: the tokens that the cache has not seen."""
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        return {"input_ids": input_ids[:, seen:], "past_key_values": past_key_values,
                "attention_mask": attention_mask, "logits_to_keep": kwargs.get("logits_to_keep") or 0}


def _check_mask(mask: Tensor | None, cached: bool) -> None:
    if mask is None or bool(mask.all()):
        return
    if mask.dim() != 2:
        raise ValueError(f"attention_mask must be [batch, time]; got {list(mask.shape)}")
    if cached or bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise ValueError("hybridlm models cannot skip padding: generate from prompts of one length (or one by one), "
                         "and pad on the right otherwise")


AutoConfig.register(MODEL_TYPE, HybridLMConfig, exist_ok=True)
AutoModelForCausalLM.register(HybridLMConfig, HybridLMForCausalLM, exist_ok=True)
