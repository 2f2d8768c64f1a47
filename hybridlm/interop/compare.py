"""Compares a checkpoint of ours with a folder of transformers: logits, distributions, and layer by layer.

Letters: B rows, T tokens, V vocabulary, D model width.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hybridlm.checkpoint import load_checkpoint
from hybridlm.errors import CheckpointError
from hybridlm.interop.family_registry import read_config_json
from hybridlm.model.model import HybridLM
from hybridlm.tensor_storage import shard_files

THRESHOLD = 1e-3  # relative difference from which on a layer, or the logits, count as different


@dataclass(frozen=True)
class Comparison:
    """The differences of two models on the same tokens, both in fp32.

    Attributes:
        tokens: how many tokens were compared.
        max_logit_diff: largest absolute difference of logits.
        max_logit: largest absolute logit of theirs.
        kl: KL(theirs || ours) in nats per token.
        top1: fraction of tokens for which both find the same next token most likely.
        layers: after each layer, the RMS of the difference over the RMS of theirs; one entry per run of layers that
            run several times.
        first_different_run: the first entry that exceeds the threshold; None: there is none.
        first_different_layer: the layer of that entry.
        mixer: the mixer of that layer.
    """

    tokens: int
    max_logit_diff: float
    max_logit: float
    kl: float
    top1: float
    layers: list[float]
    first_different_run: int | None
    first_different_layer: int | None
    mixer: str | None


def verify(checkpoint: str | os.PathLike[str] | HybridLM, hf_dir: str | os.PathLike[str] | nn.Module, *,
           text: str | None = None, token_ids: Sequence[int] | None = None, rows: int = 2, length: int = 64,
           seed: int = 0, threshold: float = THRESHOLD) -> dict[str, Any]:
    """Compare a checkpoint with a folder of transformers on random tokens, and on given ones if there are any.

    Args:
        checkpoint: a checkpoint or run folder of ours, or a model.
        hf_dir: a folder of transformers, or one of its models.
        text: text to compare on; needs a tokenizer in the checkpoint.
        token_ids: ids to compare on.
        rows: rows of random tokens.
        length: random tokens per row.
        seed: seed of the random tokens.
        threshold: relative difference from which on a layer counts as different.

    Returns:
        {"random": {...}, "given": {...}} with the fields of `Comparison`.

    Raises:
        CheckpointError: either side cannot be loaded, the vocabularies or sizes differ, or there is no
            tokenizer for `text`.
    """
    ours = checkpoint if isinstance(checkpoint, HybridLM) else load_checkpoint(checkpoint)
    theirs = hf_dir if isinstance(hf_dir, nn.Module) else load_theirs(Path(hf_dir).expanduser())
    vocab = min(ours.config.vocab_size, int(theirs.config.vocab_size))  # type: ignore[union-attr, arg-type]
    if ours.config.vocab_size != theirs.config.vocab_size:  # type: ignore[union-attr]
        raise CheckpointError(f"the vocabularies differ: {ours.config.vocab_size} ids here, "
                              f"{theirs.config.vocab_size} there")  # type: ignore[union-attr]
    our_sizes = ours.config.num_layers, ours.config.hidden_size
    their_sizes = len(_layers_of(theirs)), int(theirs.config.hidden_size)  # type: ignore[union-attr, arg-type]
    if our_sizes != their_sizes:
        raise CheckpointError("the models are of different sizes: {} layers, {} wide here, {} layers, {} wide there"
                              .format(*our_sizes, *their_sizes))
    generator = torch.Generator().manual_seed(seed)
    result = {"random": compare(ours, theirs, torch.randint(vocab, (rows, length), generator=generator), threshold)}
    if text is not None:
        token_ids = _encode(ours, text)
    if token_ids is not None:
        ids = torch.as_tensor(list(token_ids), dtype=torch.int64)[None]
        if ids.numel() < 1 or int(ids.min()) < 0 or int(ids.max()) >= vocab:
            raise CheckpointError(f"the given tokens must be ids from 0 to {vocab - 1}, at least one")
        result["given"] = compare(ours, theirs, ids, threshold)
    return {name: asdict(found) for name, found in result.items()}


def differs(result: dict[str, Any], threshold: float = THRESHOLD) -> bool:
    """Whether a layer or the logits differ by more than the threshold in a result of `verify`.

    Args:
        result: what `verify` returned.
        threshold: relative difference of the logits from which on they count as different.
    """
    return any(found["first_different_layer"] is not None or _logits_differ(found, threshold)
               for found in result.values())


def _logits_differ(found: dict[str, Any], threshold: float = THRESHOLD) -> bool:
    return not found["max_logit_diff"] <= threshold * found["max_logit"]  # NaN is different too


def describe(result: dict[str, Any]) -> str:
    """The result of `verify` in words, one line per kind of tokens."""
    lines = []
    for name, found in result.items():
        layer = found["first_different_layer"]
        if layer is not None:
            size = found["layers"][found["first_different_run"]]
            layers = f"the first layer that differs is {layer} ({found['mixer']}), by {size:.1e} of its size"
        elif _logits_differ(found):
            layers = "no layer differs, but the logits do: the last norm or the head is another"
        else:
            layers = "no layer differs"
        lines.append(f"{name} ({found['tokens']} tokens): max logit difference {found['max_logit_diff']:.1e} "
                     f"(largest logit {found['max_logit']:.2f}), KL {found['kl']:.1e} nats, "
                     f"top-1 agreement {100 * found['top1']:.2f} %; {layers}")
    return "\n".join(lines)


def load_theirs(folder: Path) -> nn.Module:
    """The model of a transformers folder in fp32 and evaluation mode; nothing is downloaded, no code in it is run.

    Raises:
        CheckpointError: it is no such folder, or transformers misses weights in it.
    """
    from transformers import AutoModelForCausalLM

    import hybridlm.interop.auto  # noqa: F401  (registers our model type)

    read_config_json(folder)
    shard_files(folder)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True,
                                                           trust_remote_code=False, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"transformers cannot load {folder}: {' '.join(str(error).split())}") from None
    model, info = loaded
    if info["missing_keys"]:
        raise CheckpointError(f"transformers misses weights in {folder}: {sorted(info['missing_keys'])[:3]}")
    return model.eval()


@torch.no_grad()
def compare(ours: HybridLM, theirs: nn.Module, ids_BT: Tensor, threshold: float) -> Comparison:
    """Run one batch through both models and compare logits and hidden states.

    Args:
        ours: our model.
        theirs: the model of transformers.
        ids_BT: token ids.
        threshold: relative difference from which on a layer counts as different.
    """
    our_logits, our_hidden = _run(ours, ours.layers, ids_BT, {})
    their_logits, their_hidden = _run(theirs, _layers_of(theirs), ids_BT, {"use_cache": False})
    gaps = [_relative_difference(a, b) for a, b in zip(our_hidden, their_hidden, strict=True)]
    different = [place for place, gap in enumerate(gaps) if not gap <= threshold]  # NaN is different too
    run = different[0] if different else None
    layer = None if run is None else ours.runs[run][0]
    p, q = (torch.log_softmax(x.double(), -1) for x in (their_logits, our_logits))
    return Comparison(
        tokens=ids_BT.numel(), max_logit_diff=float((our_logits - their_logits).abs().max()),
        max_logit=float(their_logits.abs().max()), kl=float((p.exp() * (p - q)).sum(-1).mean()),
        top1=float((our_logits.argmax(-1) == their_logits.argmax(-1)).double().mean()), layers=gaps,
        first_different_run=run, first_different_layer=layer,
        mixer=None if layer is None else ours.config.layers()[layer])


def _run(model: nn.Module, layers: nn.ModuleList, ids_BT: Tensor,
         options: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    hidden: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        while not isinstance(output, Tensor):  # the stream stands first, also beside the output of a branch aside
            output = output[0]
        hidden.append(output.float())

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try:
        return model(ids_BT, **options).logits.float(), hidden
    finally:
        for hook in hooks:
            hook.remove()


def _layers_of(model: nn.Module) -> nn.ModuleList:
    inner: Any = model.model  # type: ignore[assignment]
    return getattr(inner, "language_model", inner).layers


def _relative_difference(ours: Tensor, theirs: Tensor) -> float:
    scale = theirs.double().square().mean().sqrt().clamp_min(1e-30)
    return float((ours.double() - theirs.double()).square().mean().sqrt() / scale)


def _encode(model: HybridLM, text: str) -> list[int]:
    tokenizer: Any = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise CheckpointError("the checkpoint holds no tokenizer for the given text; give token ids")
    return [int(i) for i in tokenizer.encode(text)]
