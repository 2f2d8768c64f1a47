"""The report of `hybridlm inspect`: the layer table and the costs of a model, from its config alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from hybridlm.model.config import ModelConfig
from hybridlm.model.cost import ParameterCount, count_parameters, decode_state_bytes, forward_flops, training_parts
from hybridlm.model.memory import Precision, training_memory
from hybridlm.optimizers import OPTIMIZERS, OptimizerConfig
from hybridlm.optimizers.memory import optimizer_state_bytes

CONTEXTS = (1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20)
TOLERANCE = 0.03  # relative difference within which a count agrees with the published one
COUNTS = ("", " K", " M", " G", " T", " P")
BYTES = (" B", " KiB", " MiB", " GiB", " TiB", " PiB")


def inspect(config: ModelConfig, *, batch_size: int = 1, sequence_length: int | None = None,
            precision: Precision = "bf16", optimizer: OptimizerConfig | None = None,
            activation_checkpointing: bool = False) -> dict[str, Any]:
    """Layers, parameters, FLOPs, training memory and decode state of a model, as plain data ready for JSON.

    Args:
        config: the model.
        batch_size: sequences per forward, for the training memory.
        sequence_length: tokens per sequence, for FLOPs and training memory; None takes 4096, or the model's longest
            position when that is shorter.
        precision: of training.
        optimizer: of training; None takes the default kind.
        activation_checkpointing: keep only the inputs of layers in training.

    Raises:
        ConfigError: a mixer or feed-forward that does not fit into its layer.
    """
    length = min(4096, config.max_position) if sequence_length is None else sequence_length
    count = count_parameters(config)
    flops, training = forward_flops(config, length), training_parts(config, length)
    optimizer = optimizer or OPTIMIZERS.default_config()
    memory = training_memory(config, batch_size=batch_size, sequence_length=length, precision=precision,
                             optimizer_bytes=optimizer_state_bytes(config, optimizer),
                             activation_checkpointing=activation_checkpointing)
    return {
        "name": config.name,
        "layers": [{"index": layer.index, "mixer": layer.mixer, "kind": layer.kind, "feed_forward": layer.feed_forward,
                    "params": layer.params, "active": layer.active, "runs": layer.runs} for layer in count.layers],
        "parameters": {"total": count.total, "active": count.active, "active_with_head": count.active_with_head,
                       "active_with_embeddings": count.active_with_embeddings, "embedding": count.embedding,
                       "head": count.head, "lookup_tables": count.lookup, "mtp": count.mtp,
                       "total_with_mtp": count.total_with_mtp},
        "published": _published(config, count),
        "flops_per_token": {"context_length": length, "forward_by_part": flops, "forward": sum(flops.values()),
                            "training_by_part": training, "training": sum(training.values())},
        "training_memory": {"batch_size": batch_size, "sequence_length": length, "precision": precision,
                            "optimizer": optimizer.kind, "activation_checkpointing": activation_checkpointing,
                            "weights": memory.weights, "gradients": memory.gradients,
                            "optimizer_state": memory.optimizer, "activations": memory.activations,
                            "total": memory.total},
        "decode_state_bytes": {str(context): decode_state_bytes(config, context) for context in CONTEXTS},
    }


def _published(config: ModelConfig, count: ParameterCount) -> dict[str, Any] | None:
    """The published parameter counts beside ours; None where the model has none.

    Authors differ in whether they count embedding and head as active, so the nearest of the three counts is compared.
    """
    published = config.published
    if published is None:
        return None
    ways = {"without embedding and head": count.active, "with head": count.active_with_head,
            "with embedding and head": count.active_with_embeddings}
    nearest = min(ways, key=lambda way: abs(ways[way] - published.active))
    return {"total": _compare(published.total, count.total, "without multi-token prediction"),
            "active": _compare(published.active, ways[nearest], nearest)}


def _compare(published: float, counted: int, way: str) -> dict[str, Any]:
    """One published count, ours, and their difference.

    `rounds_to_published`: ours equals the published figure when it is rounded as that is ("A3B" may be 2.5 to 3.5 B).
    """
    difference = counted / published - 1
    unit = min(10.0 ** _trailing_zeros(published), 1e9)
    rounds = abs(counted - published) <= unit / 2
    return {"published": published, "counted": counted, "counted_how": way, "difference": difference,
            "within_3_percent": abs(difference) <= TOLERANCE, "rounds_to_published": rounds}


def _trailing_zeros(value: float) -> int:
    text = str(round(value))
    return len(text) - len(text.rstrip("0"))


def render(report: dict[str, Any], console: Console) -> None:
    """Prints the report as tables."""
    for print_table in (_layers, _parameters, _flops, _memory, *[_rank_memory] * ("rank_memory" in report),
                        _decode_state):
        title, table = print_table(report)
        console.print(title, style="bold", highlight=False)
        console.print(table)
        if print_table is _memory and (fit := report.get("memory")) and fit["exceeded"]:
            console.print(f"warning: {fit['text']}\n", style="yellow", markup=False, highlight=False, soft_wrap=True)


def _layers(report: dict[str, Any]) -> tuple[str, Table]:
    several = any(layer["runs"] > 1 for layer in report["layers"])
    table = _table("layer", "mixer", "kind", "feed-forward", "parameters each", "active each",
                   *(["runs"] if several else []), left=4)
    for indices, layer in _runs(report["layers"]):
        table.add_row(indices, layer["mixer"], layer["kind"], layer["feed_forward"], _count(layer["params"]),
                      _count(layer["active"]), *([str(layer["runs"])] if several else []))
    mixers = Counter(layer["mixer"] for layer in report["layers"])
    parts = " + ".join(f"{number} {name}" for name, number in mixers.items())
    return f"{report['name'] or 'model'}: {len(report['layers'])} layers = {parts}", table


def _runs(layers: Iterable[dict[str, Any]]) -> Iterable[tuple[str, dict[str, Any]]]:
    """The layers in rows of equal neighbours, each with its range of indices: 80 layers should fit a screen."""
    for _, group in groupby(layers, key=lambda layer: {k: v for k, v in layer.items() if k != "index"}):
        same = list(group)
        first, last = same[0]["index"], same[-1]["index"]
        yield (str(first) if first == last else f"{first}-{last}"), same[0]


def _parameters(report: dict[str, Any]) -> tuple[str, Table]:
    table = _table("", "counted", "published", "difference")
    params, published = report["parameters"], report["published"] or {}
    rows = {"total": "total", "active, without embedding and head": "active", "active, with head": "active_with_head",
            "active, with embedding and head": "active_with_embeddings"}
    for label, key in rows.items():
        beside = published.get("total" if key == "total" else "active")
        shown = _agreement(beside) if beside and beside["counted"] == params[key] else ("", "")
        table.add_row(label, _count(params[key]), *shown)
    table.add_row("embedding", _count(params["embedding"]), "", "")
    table.add_row("head", _count(params["head"]) if params["head"] else "tied", "", "")
    if params["lookup_tables"]:
        table.add_row("lookup tables of layers (in the total, not active)", _count(params["lookup_tables"]), "", "")
    if params["mtp"]:
        table.add_row("multi-token prediction (not in the total)", _count(params["mtp"]), "", "")
    return "Parameters", table


def _agreement(beside: dict[str, Any]) -> tuple[str, str]:
    text = f"{beside['difference']:+.1%}"
    if not beside["within_3_percent"]:
        text += ", equal when rounded" if beside["rounds_to_published"] else ", differs"
    return _count(beside["published"]), text


def _flops(report: dict[str, Any]) -> tuple[str, Table]:
    flops = report["flops_per_token"]
    table = _table("part", "forward", "share")
    for part, value in sorted(flops["forward_by_part"].items(), key=lambda item: -item[1]):
        if value:
            table.add_row(part, scaled(value, 1000, COUNTS), f"{value / flops['forward']:.1%}")
    table.add_row("forward", scaled(flops["forward"], 1000, COUNTS), "")
    if loss := flops["training_by_part"]["selector_losses"]:
        table.add_row("losses of selectors of keys, in training", scaled(loss, 1000, COUNTS), "")
    table.add_row("training (forward and backward)", scaled(flops["training"], 1000, COUNTS), "")
    return f"FLOPs per token at a context of {flops['context_length']}", table


def _memory(report: dict[str, Any]) -> tuple[str, Table]:
    memory = report["training_memory"]
    table = _table("part", "bytes")
    for label, key in {"weights": "weights", "gradients": "gradients", "optimizer": "optimizer_state",
                       "activations (estimate)": "activations", "total": "total"}.items():
        table.add_row(label, scaled(memory[key], 1024, BYTES))
    how = "with" if memory["activation_checkpointing"] else "without"
    return (f"Training memory on one device: {memory['batch_size']} x {memory['sequence_length']} tokens, "
            f"{memory['precision']}, {memory['optimizer']}, {how} activation checkpointing"), table


def _rank_memory(report: dict[str, Any]) -> tuple[str, Table]:
    memory = dict(report["rank_memory"])
    kind, ranks = memory.pop("engine"), memory.pop("processes")
    table = _table("part", "bytes")
    for name, value in memory.items():
        table.add_row(name, scaled(value, 1024, BYTES))
    return f"Memory of each of {ranks} processes under {kind}, an estimate", table


def _decode_state(report: dict[str, Any]) -> tuple[str, Table]:
    table = _table("context", "bytes", "per token")
    for context, value in report["decode_state_bytes"].items():
        length = int(context)
        label = f"{length >> 20}M" if length >= 1 << 20 else f"{length >> 10}K"
        table.add_row(label, scaled(value, 1024, BYTES), scaled(value / length, 1024, BYTES))
    return "Decode state of one sequence, keys and values in bf16", table


def _table(*columns: str, left: int = 1) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", no_wrap=index < left)
    return table


def _count(value: float) -> str:
    return scaled(value, 1000, ("", " K", " M", " B", " T"))


def scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    """`value` with three digits and the largest unit that it reaches; each unit is `base` times the one before.

    >>> scaled(1536, 1024, (" B", " KiB"))
    '1.50 KiB'
    """
    power = 0
    while value >= base and power < len(units) - 1:
        value, power = value / base, power + 1
    digits = 0 if value >= 100 or value == int(value) else 1 if value >= 10 else 2
    return f"{value:.{digits}f}{units[power]}"
