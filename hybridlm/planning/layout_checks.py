"""Whether a run's experts, rows and batches divide among its processes as its config says."""

from __future__ import annotations

from hybridlm.config.schema import Config
from hybridlm.errors import ConfigError, counted, require


def check_layout(config: Config, size: int) -> None:
    """Check that experts and rows of the model can be split over `size` processes as the engine says.

    Raises:
        ConfigError: they cannot; it lists what would fit.
    """
    _check_experts(config, size)
    _check_context_parallel(config)
    shards = config.engine.context_parallel
    if size % shards:
        raise ConfigError("engine.context_parallel", "must divide the number of processes", got=shards,
                          expected=f"a divisor of {size}")


def check_batch_sizes(config: Config, size: int) -> None:
    """Check that the batches of all stages divide among `size` processes.

    Raises:
        ConfigError: naming the first batch size that does not.
    """
    shards = config.engine.context_parallel
    for key, batch_size in _per_stage(config, "batch_size").items():
        if batch_size % (size // shards):
            processes = "processes"
            if shards > 1:
                processes += f" over engine.context_parallel ({size} / {shards})"
            raise ConfigError(key, f"must be a multiple of the number of {processes}", got=batch_size,
                              expected=f"a multiple of {size // shards}")


def _check_experts(config: Config, size: int) -> None:
    routed = config.model.feed_forward.routed_experts()
    ranks, experts = config.engine.expert_parallel, 1 if routed is None else routed.total
    fitting = [n for n in range(1, size + 1) if size % n == 0 and experts % n == 0]
    if ranks not in fitting:
        raise ConfigError("engine.expert_parallel", f"must divide the {counted(experts, 'expert')} of a layer and the "
                          "number of processes", got=ranks, expected=f"one of {', '.join(map(str, fitting))}")


def _check_context_parallel(config: Config) -> None:
    """Raise ConfigError unless every row and every mixer of the model can be split `engine.context_parallel` times."""
    shards = config.engine.context_parallel
    require(shards >= 1, "engine.context_parallel", "must be at least 1", got=shards)
    if shards == 1:
        return
    lengths = _per_stage(config, "sequence_length")
    for key, length in lengths.items():
        if length % shards:
            raise ConfigError(key, "must divide into engine.context_parallel equal shards", got=length,
                              expected=f"a multiple of {shards}")
    for name in dict.fromkeys([*config.model.layers(), *filter(None, [config.model.mtp.mixer])]):
        try:
            config.model.mixers[name].check_context_parallel(shards, min(lengths.values()) // shards)
        except ConfigError as error:
            raise error.within(f"model.mixers.{name}") from None
    try:
        config.model.feed_forward.check_context_parallel(shards, min(lengths.values()) // shards)
    except ConfigError as error:
        raise error.within("model.feed_forward") from None


def _per_stage(config: Config, option: str) -> dict[str, int]:
    """Return an option of `training`, and of each stage that has its own, by its key in the config."""
    values = {f"training.{option}": getattr(config.training, option)}
    for index, stage in enumerate(config.recipe.stages):
        if getattr(stage, option) is not None:
            values[f"recipe.stages.{index}.{option}"] = getattr(stage, option)
    return values
