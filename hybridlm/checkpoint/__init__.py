"""Checkpoints: a folder of plain files that appears whole or not at all, and is never unpickled.

    step-N/
      model.safetensors       weights by parameter name (model-00001-of-00003.safetensors, ... when large
                            or written by several processes)
      config.yaml             the resolved config of the run, all of it
      layers.json             the explicit layer list, compared on load
      tokenizer.json          the tokenizer, in the format of the `tokenizers` library (and tokenizer_config.json)
      optimizer.safetensors   optimizer state by parameter name
      trainer.json            step, stage, samples consumed: everything else that resuming needs
      lineage.json            the checkpoint that the run began from, where it did
      ...                     text files of the checkpoint that the run began from: chat template, generation config
      manifest.json           format version, size and SHA-256 of every file above, and the SHA-256 of all this

A folder is written under a temporary name, flushed to disk and renamed. Whatever a crash, a full disk or a
bad copy leaves behind does not match its manifest, and is passed over.

`folder` knows manifests and which folder is whole, `saving` writes checkpoints, `model` reads what a checkpoint says of
a model; `hybridlm.tensor_storage` reads single tensors. Several processes work on one checkpoint together where they
are given as `ranks`.
"""

from hybridlm.checkpoint.folder import newest, prune, remove_drafts, resolve, seal, step_folders, step_of, verify
from hybridlm.checkpoint.legacy_names import checkpoint_tensors
from hybridlm.checkpoint.lineage import (
    LINEAGE_FILE,
    describe_lineage,
    lineage_steps,
    make_lineage,
    read_lineage,
)
from hybridlm.checkpoint.model import (
    carried_texts,
    data_rules,
    layer_diff,
    layer_list,
    load_checkpoint,
    load_tokenizer,
    load_weights,
    model_texts,
    read_config,
    read_model_config,
)
from hybridlm.checkpoint.saving import SHARD_BYTES, Save, write
from hybridlm.tensor_storage import StoredTensor, read_tensors, unique_tensors

__all__ = [
    "LINEAGE_FILE", "SHARD_BYTES", "Save", "StoredTensor", "carried_texts", "checkpoint_tensors", "data_rules",
    "describe_lineage", "layer_diff", "layer_list", "lineage_steps", "load_checkpoint", "load_tokenizer",
    "load_weights", "make_lineage", "model_texts", "newest", "prune", "read_config", "read_lineage",
    "read_model_config", "read_tensors", "remove_drafts", "resolve", "seal", "step_folders", "step_of",
    "unique_tensors", "verify", "write",
]
