"""Models of ours inside transformers: importing this module registers the model type `hybridlm`.

    import hybridlm.interop.auto
    model = AutoModelForCausalLM.from_pretrained(folder)     # what `hybridlm export` wrote
    model.generate(...)                                      # with our decode state as its cache

Letters: B rows, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from hybridlm.checkpoint.legacy_names import are_legacy, current_name
from hybridlm.config.legacy import upgrade_config
from hybridlm.config.serialization import from_dict
from hybridlm.errors import CheckpointError
from hybridlm.interop.families.native import MODEL_TYPE
from hybridlm.interop.hf_cache import CACHE_NAME, HybridCache
from hybridlm.interop.hf_documents import BORDER_TABLES, RowLayout, read_layout
from hybridlm.model.config import ModelConfig
from hybridlm.model.init import init_missing_weights
from hybridlm.model.model import HybridLM
from hybridlm.model.targets import IGNORE, build_targets
from hybridlm.tensor_storage import stored_tensors
from hybridlm_kernels import CuSeqlens

# Arguments of transformers that change nothing here: lengths that follow from the borders, and loop counters.
HARMLESS_ARGUMENTS = ("max_length_q", "max_length_k", "cache_position", "is_first_iteration", "next_sequence_length",
                      "return_dict")


class HybridLMConfig(PreTrainedConfig):
    """The transformers config of a model of ours; `model` is the model section of a hybridlm config, as plain data.

    Attributes:
        logits_in_training: whether a forward with labels in training returns logits too, as transformers' models do.
            False saves their memory; the argument `skip_logits` of forward says it for one call.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012  (as transformers declares it)

    model: dict | None = None
    vocab_size: int = 0
    hidden_size: int = 0
    num_hidden_layers: int = 0
    num_attention_heads: int = 1
    max_position_embeddings: int = 4096
    use_cache: bool = True
    logits_in_training: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def model_config(self) -> ModelConfig:
        """The typed config of the model; keys of earlier versions are read by their names of today.

        Raises:
            ConfigError: a value that cannot be built.
        """
        return from_dict(ModelConfig, upgrade_config({"model": self.model})["model"], "model")


class HybridLMForCausalLM(PreTrainedModel, GenerationMixin):
    """`HybridLM` behind the interface of transformers.

    Rows may be padded on either side and may hold several documents, in every form that transformers' collators write.
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
        if not self.model.embed.weight.is_meta:  # HybridLM has given all of them their values
            for tensor in [*self.model.parameters(), *self.model.buffers()]:
                tensor._is_hf_initialized = True  # type: ignore[attr-defined]
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Load an export, also one whose parameters have the names of an earlier version."""
        renamed = _renamed_since(pretrained_model_name_or_path)
        if renamed:
            kwargs.setdefault("key_mapping", renamed)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if renamed:  # transformers would save the old names again
            (loaded[0] if isinstance(loaded, tuple) else loaded)._weight_conversions = None
        return loaded

    def initialize_weights(self) -> None:
        """Initialise what no file held, with the values that a new model has; transformers calls it after loading."""
        init_missing_weights(self.model, self.model.config.init_std, 0,
                             lambda tensor: getattr(tensor, "_is_hf_initialized", False))

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise a module that transformers makes: a resized embedding or head."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.model.config.init_std)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed = value  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Module | None:
        return self.model.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.lm_head = new_embeddings  # type: ignore[assignment]

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:  # type: ignore[override]
        """Change the vocabulary, here and in both configs, so that the model can be saved and loaded again."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        for module in (self.model.embed, self.model.lm_head):
            if module is not None:  # initialising the model again must not touch them
                module.weight._is_hf_initialized = True  # type: ignore[attr-defined]
        size = embeddings.weight.shape[0]
        self.model.config = replace(self.model.config, vocab_size=size)
        self.config.model = {**(self.config.model or {}), "vocab_size": size}
        return embeddings

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether training keeps only the inputs of layers; transformers sets it."""
        return self.model.activation_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        self.model.activation_checkpointing = enable

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        self.gradient_checkpointing = enable

    @can_return_tuple
    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                position_ids: Tensor | None = None, past_key_values: Any = None, inputs_embeds: Tensor | None = None,
                labels: Tensor | None = None, use_cache: bool | None = None,
                logits_to_keep: int | Tensor = 0, cu_seqlens: Tensor | None = None,
                cu_seq_lens_q: Tensor | None = None, cu_seq_lens_k: Tensor | None = None,
                seq_idx: Tensor | None = None, num_items_in_batch: Tensor | int | None = None,
                output_hidden_states: bool | None = None, output_attentions: bool | None = None,
                skip_logits: bool | None = None, cache: Any = None, **kwargs: Any) -> CausalLMOutputWithPast:
        """Compute logits [B, T, V], and the loss when there are labels.

        Args:
            input_ids: token ids [B, T].
            attention_mask: [B, T]: 0 is padding, on either side of the text; a number per sample of a packed row may
                stand for 1. With a cache it covers the tokens of the cache too.
            position_ids: [B, T], counted from 0 in each document of a packed row; with a cache they go on.
            past_key_values: the cache, which is updated; an empty DynamicCache will do. Nothing of it has a gradient.
            inputs_embeds: [B, T, D] instead of `input_ids`.
            labels: [B, T], to compute the loss. Labels of padding do not count, nor does the first token of a document.
            use_cache: make a cache when none is given. With labels there is none.
            logits_to_keep: number of last positions to return, 0 for all, or the positions themselves.
            cu_seqlens: borders of packed documents over the B*T flattened tokens, [documents + 1].
            cu_seq_lens_q: the same, as flash attention's users call it.
            cu_seq_lens_k: the same; it must not differ.
            seq_idx: [B, T], a number per document.
            num_items_in_batch: tokens of an accumulated batch, over which the loss is averaged.
            output_hidden_states: return the hidden states of all layers.
            output_attentions: refused: no layer computes a matrix of attention weights.
            skip_logits: leave out the logits beside a loss; None follows `config.logits_in_training`.
            cache: the same as `past_key_values`.
            kwargs: `shift_labels` [B, T] are labels that are shifted already, instead of `labels`; they have no name
                here because the Trainer of transformers takes every name with "label" for one that a batch must have.
                Other arguments of transformers change nothing, and unknown ones are refused.

        Raises:
            ValueError: documents or padding in a form that cannot be honoured.
            TypeError: an unknown argument.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        _check_arguments(kwargs)
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError("output_attentions is not supported: linear layers have no attention weights, and the "
                             "others do not keep theirs")
        hidden = bool(self.config.output_hidden_states if output_hidden_states is None else output_hidden_states)
        cache = past_key_values if cache is None else cache
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens is None:
            raise ValueError("pass input_ids or inputs_embeds")
        batch, length = tokens.shape[:2]
        tables = dict(zip(BORDER_TABLES, (cu_seqlens, cu_seq_lens_q, cu_seq_lens_k), strict=True))
        has_labels = labels is not None or shift_labels is not None
        if cache is not None or (use_cache and not has_labels):
            if has_labels:
                raise ValueError("a cache cannot be trained through: pass labels without it")
            if seq_idx is not None or any(table is not None for table in tables.values()):
                raise ValueError("packed documents cannot be decoded: give each its own row, or leave the cache out")
            cache = HybridCache() if cache is None else HybridCache.adopt(cache)
            keep = logits_to_keep or None if isinstance(logits_to_keep, int) else None
            logits, states = cache.forward(self.model, input_ids, inputs_embeds, attention_mask, position_ids,
                                           logits_to_keep=keep, return_hidden_states=hidden)
            logits = logits[:, logits_to_keep] if isinstance(logits_to_keep, Tensor) else logits
            return CausalLMOutputWithPast(logits=logits, hidden_states=states, **{CACHE_NAME: cache})
        layout = read_layout(batch, length, attention_mask=attention_mask, position_ids=position_ids, seq_idx=seq_idx,
                             tables=tables)
        borders = None if layout.borders is None else CuSeqlens(layout.borders, tokens.device)
        skip = self.training and not self.config.logits_in_training if skip_logits is None else skip_logits
        output = self.model(input_ids, inputs_embeds=inputs_embeds, cu_seqlens=borders,
                            targets=self._targets(labels, shift_labels, layout, borders), text_mask=layout.is_text_BT,
                            return_logits=has_labels and not skip, return_hidden_states=hidden,
                            logits_to_keep=logits_to_keep or None if isinstance(logits_to_keep, int) else None)
        loss = output.loss
        if loss is not None and num_items_in_batch is not None:  # the mean over an accumulated batch
            loss = loss * output.num_tokens / num_items_in_batch
        logits = output.logits
        if logits is not None and isinstance(logits_to_keep, Tensor):
            logits = logits[:, logits_to_keep]
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=output.hidden_states)

    def _targets(self, labels: Tensor | None, shift_labels: Tensor | None, layout: RowLayout,
                 borders: CuSeqlens | None) -> Tensor | None:
        """Targets [B, T, 1 + depth] of all tokens, where there are labels."""
        if labels is None and shift_labels is None:
            return None
        if shift_labels is not None:
            if self.model.config.mtp.depth:
                raise ValueError("shift_labels say the next token alone: a model with multi-token prediction needs "
                                 "labels")
            return shift_labels.long()[..., None]
        assert labels is not None
        if layout.is_text_BT is not None:
            labels = labels.masked_fill(~layout.is_text_BT.to(labels.device), IGNORE)
        return build_targets(labels, self.model.config.mtp.depth, borders)

    def _prepare_cache_for_generation(  # type: ignore[override]
            self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Put our cache where `generate` expects one, and refuse prompts that are padded on the right."""
        mask = model_kwargs.get("attention_mask")
        if mask is not None and bool((mask[:, -1] == 0).any()):
            raise ValueError("prompts that are padded on the right cannot be continued: set padding_side='left' in the "
                             "tokenizer")
        given = model_kwargs.get(CACHE_NAME)
        if given is not None:
            model_kwargs[CACHE_NAME] = HybridCache.adopt(given)
        elif generation_config.use_cache is not False:
            model_kwargs[CACHE_NAME] = HybridCache()

    def prepare_inputs_for_generation(  # type: ignore[override]
            self, input_ids: Tensor, next_sequence_length: int | None = None, inputs_embeds: Tensor | None = None,
            is_first_iteration: bool | None = False, **kwargs: Any) -> dict[str, Any]:
        """The arguments of the next forward.

        Mask and positions were checked with the prompt. What `generate` appends to them says nothing new, and reading
        it would stop a GPU at every token.
        """
        inputs = super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration, **kwargs)
        if inputs.get(CACHE_NAME) is not None and not is_first_iteration and next_sequence_length == 1:
            inputs |= {"attention_mask": None, "position_ids": None}
        return inputs


def _check_arguments(kwargs: dict[str, Any]) -> None:
    for name, value in kwargs.items():
        if name == "token_type_ids" and isinstance(value, Tensor) and not bool(value.any()):
            continue  # tokenizers of one segment write zeros
        if value is not None and value is not False and name not in HARMLESS_ARGUMENTS:
            raise TypeError(f"HybridLMForCausalLM.forward got an argument that it cannot honour: {name}")


def _renamed_since(folder: Any) -> dict[str, str] | None:
    """Patterns that turn the parameter names of an earlier version into those of today; None: nothing to rename."""
    if folder is None or not Path(folder).is_dir():
        return None
    try:
        names = [name.removeprefix("model.") for name in stored_tensors(Path(folder))]
    except CheckpointError:
        return None  # transformers says what is wrong with it
    return {f"^model\\.{_escape(name)}$": f"model.{current_name(name)}" for name in names
            if current_name(name) != name} if are_legacy(names) else None


def _escape(name: str) -> str:
    return name.replace(".", r"\.")


AutoConfig.register(MODEL_TYPE, HybridLMConfig, exist_ok=True)
AutoModelForCausalLM.register(HybridLMConfig, HybridLMForCausalLM, exist_ok=True)
