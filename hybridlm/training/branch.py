"""A branch: a run that goes on from a checkpoint of another one, with other settings.

It has a folder of its own and takes weights, optimizer state, step and data cursor. Learning rate, schedule, batch
size, length, data and stages may change; every difference is printed and kept in lineage.json. With none, it computes
bit for bit what the other run would have computed.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hybridlm import checkpoint
from hybridlm.config.schema import Config, StageConfig
from hybridlm.config.serialization import from_dict, to_dict
from hybridlm.data import Tokenizer, tokenizer_differences
from hybridlm.distributed.communicator import Communicator
from hybridlm.errors import CheckpointError, ConfigError
from hybridlm.training.run_changes import Change, config_changes, weight_changes
from hybridlm.training.stages import Progress, Stage, plan_stages

SAME_WHEREVER_IT_RUNS = ("run_dir", "branch_from", "init_from")  # differ in every branch
OF_THE_TOKENIZER = ("data.tokenizer", "data.tokenizer_vocab_size", "data.tokenizer_eos")  # compared by its ids

log = logging.getLogger("hybridlm")


@dataclass
class Branch:
    """The checkpoint that a branch goes on from.

    Args:
        folder: the checkpoint.
        config: of the run that wrote it; None where an earlier version wrote one that is not understood now.
        changes: what differs from that config.
        saved_progress: of that run, in its stages.
        progress: where the branch goes on, in its own stages.
        same_stage: whether the stage there is the one that the checkpoint was saved in.
        data: fingerprint of the data that the checkpoint has seen.
    """

    folder: Path
    config: Config | None
    changes: list[Change]
    saved_progress: Progress
    progress: Progress
    same_stage: bool
    data: str

    @property
    def strict(self) -> bool:
        """Whether every tensor of the optimizer's state must have its place: the same parameters train as before."""
        return self.same_stage and not any(change.key.startswith(("optimizer.", "recipe.")) for change in self.changes)

    def describe(self, data: str) -> list[str]:
        """Describe the branch, one line per difference.

        Args:
            data: fingerprint of the data that the branch reads.
        """
        same = not self.changes and data == self.data
        lines = [f"branch of {self.folder}, which has made {self.progress.step} steps"
                 + ("; nothing has changed" if same else "")]
        lines += [f"  {change}" for change in self.changes]
        keys = {change.key for change in self.changes}
        if "optimizer.kind" in keys:
            lines.append("  another optimizer: state is kept where both update a parameter by the same rule")
        if not self.same_stage:
            lines.append("  its stage begins with the next step; the stages before it are done")
        if data != self.data and not any(key.startswith("data.") for key in keys):
            lines.append("  the data has other tokens under the same name")
        if data != self.data or any(key == "training.seed" or key.endswith("sequence_length") for key in keys):
            lines.append(f"  the data goes on with sample {self.progress.samples} of the new order, in which some text "
                         "that was read before may come again")
        return lines


def open_branch(config: Config, stages: list[Stage], ranks: Communicator) -> Branch:
    """Find the checkpoint `config.branch_from` and check that the run can go on from it. All ranks call it together.

    Raises:
        CheckpointError: there is no such checkpoint, it holds weights alone, or the model's weights are others.
        ConfigError: nothing is left to train.
    """
    assert config.branch_from is not None
    folder = checkpoint.resolve(config.branch_from, ranks)
    return ranks.on_main(lambda: _read_branch(config, folder, stages))


def _read_branch(config: Config, folder: Path, stages: list[Stage]) -> Branch:
    try:
        state = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"branch_from={config.branch_from} holds weights alone, without a step and optimizer "
                              f"state; init_from={config.branch_from} starts a run with them") from None
    saved = checkpoint.read_config(folder)
    if differ := weight_changes(saved, config):
        raise CheckpointError(
            f"branch_from={config.branch_from} has another model: {'; '.join(differ[:4])}. A branch keeps the model: "
            f"leave what changes it out. init_from={config.branch_from} starts a new run with its weights, at step 0, "
            "where recipe=dsa_tiny and its like add indexers")
    try:
        before = from_dict(Config, saved)
    except ConfigError:
        before = None
    not_shown = {*SAME_WHEREVER_IT_RUNS, *OF_THE_TOKENIZER}
    changes = [change for change in config_changes(saved, config) if change.key not in not_shown]
    if before is not None:
        changes = _by_source(_by_stage(changes, before, config), before, config)
    at = Progress.from_dict(state["progress"])
    progress, same_stage = carry_progress(at, before, stages)
    if not any(stage.steps > (progress.step_in_stage if stage.index == progress.stage else 0)
               for stage in stages[progress.stage:]):
        raise ConfigError("branch_from", f"has made all steps of this plan ({progress.step})", got=config.branch_from,
                          expected="more training.steps, or another stage",
                          hint="training.steps=N goes on to step N, recipe=anneal training.steps=N adds a stage of N "
                          "steps in which the learning rate goes to 0")
    return Branch(folder, before, changes, at, progress, same_stage, state["data"])


def _by_source(changes: list[Change], before: Config, config: Config) -> list[Change]:
    """Name another mixture by what it is, where sources came or went."""
    if len(before.data.mixture) == len(config.data.mixture):
        return changes
    old, new = ([source.options() for source in run.data.mixture] for run in (before, config))
    kept = [change for change in changes if not change.key.startswith("data.mixture")]
    return [Change("data.mixture", old, new), *kept]


def _by_stage(changes: list[Change], before: Config, config: Config) -> list[Change]:
    """Name other stages by what they are: compared by their numbers, everything in them would differ."""
    names = [[stage.name for stage in run.recipe.stages] for run in (before, config)]
    if names[0] == names[1]:
        return changes
    kept = [change for change in changes if not change.key.startswith("recipe.")]
    earlier = {stage.name: to_dict(stage) for stage in before.recipe.stages}
    found = [Change("recipe.stages", *names)]
    for stage in config.recipe.stages:
        old, new = earlier.get(stage.name), to_dict(stage)
        usual = to_dict(StageConfig(name=stage.name)) if old is None else old
        options = {key: value for key, value in new.items() if value != usual[key]}
        if options or old is None:
            was = None if old is None else {key: old[key] for key in options}
            found.append(Change(f"recipe.stages.{stage.name}", was, options))
    return kept + found


def carry_progress(progress: Progress, before: Config | None, stages: list[Stage]) -> tuple[Progress, bool]:
    """Find the place of a saved run in other stages: its stage by name, or the start of the first where none has it.

    Args:
        progress: of the saved run.
        before: its config; None keeps the number of the stage.
        stages: of the new run.

    Returns:
        The progress in the new stages, and whether the stage is the same.
    """
    if before is None:
        return progress, progress.stage < len(stages)
    name = before.recipe.stages[progress.stage].name
    for stage in stages:
        if stage.name == name:
            return replace(progress, stage=stage.index), True
    return replace(progress, stage=0, step_in_stage=0), False


def check_tokenizer(branch: Branch, tokenizer: Tokenizer) -> None:
    """Check that the branch reads text as the weights were trained to.

    Raises:
        ConfigError: the tokenizer gives other ids.
    """
    if not (branch.folder / "tokenizer.json").is_file():
        return
    differ = tokenizer_differences(Tokenizer.from_folder(branch.folder), tokenizer)
    if differ:
        raise ConfigError("data.tokenizer", f"is not that of the checkpoint: it differs in {', '.join(differ[:3])}",
                          got=tokenizer.name, expected=f"the tokenizer of {branch.folder}",
                          hint="leave data.tokenizer out, and the branch takes it")


def lr_change(before: list[Stage], at: Progress, after: list[Stage], now: Progress) -> str | None:
    """Describe what other stages do to the learning rate; None where it stays what it was.

    Args:
        before: the stages so far.
        at: the progress in them.
        after: the stages from now on.
        now: the progress in those.
    """
    old, new = _rates_left(before, at), _rates_left(after, now)
    if new == old or not new:
        return None
    last = _rate(before[at.stage], max(at.step_in_stage - 1, 0))
    reference = f"without the change {old[0]:.3g}" if old else f"{last:.3g} in the last step"
    text = (f"learning rate: {new[0]:.3g} in step {now.step + 1} ({reference}), {new[-1]:.3g} in the last step, "
            f"{now.step + len(new)}")
    if old:
        text += f" (without the change {old[-1]:.3g} in step {at.step + len(old)})"
    if now.step_in_stage and new[0] > 1.2 * last:
        schedule = after[now.stage].schedule
        text += (f"; it rises from {last:.3g} because the curve of schedule.kind={schedule.kind} is drawn over all "
                 "steps; with an added stage, or wsd from the start, it would not")
    return text


def _rates_left(stages: list[Stage], progress: Progress) -> list[float]:
    return [_rate(stage, step) for stage in stages[progress.stage:]
            for step in range(progress.step_in_stage if stage.index == progress.stage else 0, stage.steps)]


def _rate(stage: Stage, step: int) -> float:
    return stage.lr_at(min(step, stage.steps - 1))


def previous_stages(saved: Any) -> list[Stage] | None:
    """Plan the stages of a saved config; None where it is not understood now."""
    try:
        return plan_stages(from_dict(Config, saved))
    except ConfigError:
        return None
