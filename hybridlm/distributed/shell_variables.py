"""Shell variables that Accelerate and DeepSpeed read, and what becomes of each kind: only the run's config decides.

Both packages take settings from the environment where a caller leaves them open. A variable that another project left
in the shell, or that `accelerate launch` sets from its own file, would otherwise change gradients (accumulation),
precision or compilation of a run without a word.

    kind            what becomes of it
    settings        hidden from both packages; a value that asks for something is named in one line of the log
    MPI             hidden: ranks come from RANK, WORLD_SIZE and LOCAL_RANK alone
    launcher        hidden from a process that trains alone
    OMP_NUM_THREADS stays in force; a list such as 4,2, which Accelerate cannot read, is shown to it as one number
    HARMLESS        left alone: they change no number

`tests/distributed/test_shell_variables.py` reads the source of both packages and fails on a name that stands nowhere
here.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping

import torch

SETTINGS_PREFIXES = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_", "FP8_")
SETTINGS = ("FORK_LAUNCHED", "DEEPSPEED_TIMEOUT", "USE_TORCH_XLA", "PT_HPU_LAZY_MODE")
HARMLESS = (
    "ACCELERATE_CPU_AFFINITY", "ACCELERATE_DEBUG_MODE", "ACCELERATE_ENABLE_RICH", "ACCELERATE_LOG_LEVEL",
    "DS_ALLOW_DEPRECATED_FP16", "DS_PIN_MEMORY_BACKEND", "DS_PIN_MEMORY_REGISTER_DEVICE", "DS_SDMA_ALLGATHER",
    "DS_SDMA_ALLGATHER_MAX_NUMEL")
MPI = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS", "MPI_LOCALRANKID",
       *(f"{name}_COMM_WORLD_{what}" for name in ("OMPI", "MV2")
         for what in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")))
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
            "TORCHELASTIC_USE_AGENT_STORE")

# Variables that ask Accelerate for something: the values that ask for nothing, and where a run says it instead.
_OFF = ("", "0", "false", "no", "none")
REPLACEMENTS: dict[str, tuple[tuple[str, ...], str]] = {
    "ACCELERATE_MIXED_PRECISION": (_OFF, "training.precision"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (("", "1", "auto"), "training.micro_batch_size"),
    "ACCELERATE_GRADIENT_CLIPPING": (("", "auto", "none"), "training.grad_clip"),
    "ACCELERATE_DYNAMO_BACKEND": (_OFF, ""),
    "ACCELERATE_USE_FSDP": (_OFF, "engine=zero3"),
    "ACCELERATE_USE_MEGATRON_LM": (_OFF, "engine.expert_parallel, engine.context_parallel"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (_OFF, "engine.expert_parallel, engine.context_parallel"),
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": (_OFF, "engine=zero1, zero2 or zero3"),
    "ACCELERATE_USE_CPU": (_OFF, "engine.device"),
    "ACCELERATE_TORCH_DEVICE": (("",), "engine.device"),
    "ACCELERATE_DOWNCAST_BF16": (_OFF, "training.precision"),
    "ACCELERATE_FP8_BACKEND": (_OFF, ""),
}


def is_setting(name: str) -> bool:
    """Tell whether a variable is a setting of Accelerate or DeepSpeed that a run does not take from the shell.

    >>> is_setting("ACCELERATE_MIXED_PRECISION"), is_setting("ACCELERATE_LOG_LEVEL"), is_setting("CUDA_VISIBLE_DEVICES")
    (True, False, False)
    """
    return name not in HARMLESS and (name in SETTINGS or name.startswith(SETTINGS_PREFIXES))


def describe_ignored(environment: Mapping[str, str]) -> str:
    """Say in one line which settings of the shell ask for something and are ignored; empty where there are none.

    >>> describe_ignored({"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_FSDP": "false"})
    'the shell does not change a run: ACCELERATE_MIXED_PRECISION=bf16 is ignored (training.precision says it)'
    """
    found = []
    for name, (neutral, ours) in REPLACEMENTS.items():
        value = environment.get(name)
        if value is not None and value.lower() not in neutral:
            found.append(f"{name}={value} is ignored" + (f" ({ours} says it)" if ours else ""))
    return f"the shell does not change a run: {', '.join(found)}" if found else ""


@contextlib.contextmanager
def settings_hidden(*, process_group: bool) -> Iterator[None]:
    """Let Accelerate and DeepSpeed see none of the shell's settings inside the block; afterwards all is as before.

    What they set themselves is taken back too: after an engine of DeepSpeed, Accelerate would go on with it.

    Args:
        process_group: this process meets others by the launcher's variables; otherwise it sees none of these either.
    """
    before = dict(os.environ)
    hidden = [name for name in before if is_setting(name) or name in MPI or (not process_group and name in LAUNCHER)]
    for name in hidden:
        del os.environ[name]
    if "OMP_NUM_THREADS" in before:
        os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    try:
        yield
    finally:
        for name in [name for name in os.environ if is_setting(name)]:
            del os.environ[name]
        os.environ.update({name: before[name] for name in [*hidden, "OMP_NUM_THREADS"] if name in before})
