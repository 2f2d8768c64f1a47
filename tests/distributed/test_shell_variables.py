"""Variables of the shell change no run: those of Accelerate and DeepSpeed, of a cluster around a process, of OpenMP."""

import ast
import importlib.util
import os
from pathlib import Path

import pytest
import torch

from hybridlm.distributed.engine import Contribution
from hybridlm.distributed.engines import make_engine
from hybridlm.distributed.rank_environment import RankEnvironment
from hybridlm.distributed.shell_variables import (
    HARMLESS,
    LAUNCHER,
    MPI,
    describe_ignored,
    is_setting,
    settings_hidden,
)
from hybridlm.errors import ConfigError
from hybridlm.model.model import build_model
from hybridlm.optimizers import AdamWConfig, build_optimizer
from tests.support import tiny_run
from tests.support.engine_configs import engine_config

# Files that training does not run: launchers, which are told by their own command line, tools, and other devices.
OTHER_FILES = {
    "accelerate": ("commands/", "test_utils/", "launchers.py", "utils/launch.py", "tracking.py"),
    "deepspeed": ("launcher/", "autotuning/", "inference/", "elasticity/", "ops/", "compile/", "model_implementations/",
                  "module_inject/", "monitor/", "env_report.py", "accelerator/klxpu_accelerator.py",
                  "moe/ep_tp_dispatch.py")}
# What is no setting of these packages, by what it belongs to: the machine, their logging, other launchers' own roads.
NOT_SETTINGS = {
    "CUDA_VISIBLE_DEVICES", "NCCL_SOCKET_IFNAME", "PYTORCH_NVML_BASED_CUDA_CHECK", "TORCH_DISTRIBUTED_DEBUG",
    "systemdrive", "DISABLE_LOGS_WHILE_COMPILING", "LOGGER_METHODS_TO_EXCLUDE_FROM_DISABLE", "MORI_ENABLE_SDMA",
    "AZ_BATCHAI_MPI_MASTER_NODE", "AZ_BATCH_MASTER_NODE", "LOCAL_SIZE",  # read by the discovery of MPI, which is off
    "DS_ACCELERATOR",  # set by the engine
    "OMP_NUM_THREADS"}


def variables_read(package):
    """Names of environment variables that the Python files of an installed package read, by file."""
    root = Path(importlib.util.find_spec(package).origin).parent
    for file in root.rglob("*.py"):
        if file.relative_to(root).as_posix().startswith(OTHER_FILES[package]):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            asked = []
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                if name.endswith(("environ.get", "getenv", "parse_flag_from_env", "parse_choice_from_env")):
                    asked = node.args[:1]
                elif name.endswith("get_int_from_env"):
                    asked = node.args[0].elts if isinstance(node.args[0], ast.List) else []
            elif isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("environ"):
                asked = [node.slice] if isinstance(node.ctx, ast.Load) else []
            yield from ((word.value, file.name) for word in asked if isinstance(word, ast.Constant))


@pytest.mark.parametrize("package", ["accelerate", "deepspeed"])
def test_every_variable_that_the_packages_read_has_a_kind(package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    known = {*HARMLESS, *MPI, *LAUNCHER, *NOT_SETTINGS}
    read = dict(variables_read(package))
    assert len(read) > 15
    assert {name: file for name, file in read.items() if name not in known and not is_setting(name)} == {}


def one_step():
    """Loss, gradient norm and weights after one step of a tiny model in this process alone."""
    engine = make_engine(engine_config("single"), "fp32")
    model = build_model(tiny_run.model(), device=engine.device)
    engine.prepare(model, build_optimizer(model, AdamWConfig(lr=1e-3)))
    ids_BT = torch.randint(257, (2, 17), generator=torch.Generator().manual_seed(0))
    engine.begin_step(0, 0)
    batch = [Tokens(ids_BT)]
    values = engine.compute_gradients(lambda model, part: Contribution(model(part.ids_BT, labels=part.ids_BT).loss),
                                      batch)
    update = engine.update(values, lr=1e-3, clip=1.0)
    engine.release()
    return update.values["loss"], update.grad_norm, {name: w.clone() for name, w in model.named_parameters()}


class Tokens:
    def __init__(self, ids_BT):
        self.ids_BT = ids_BT

    def to(self, device, non_blocking=False):
        return self


@pytest.fixture(scope="module")
def plain():
    return one_step()


@pytest.mark.parametrize("shell", [
    {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
    {"ACCELERATE_MIXED_PRECISION": "bf16"},
    {"ACCELERATE_DYNAMO_BACKEND": "EAGER", "ACCELERATE_DYNAMO_USE_FULLGRAPH": "true"},
    {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_MEGATRON_LM": "true"},
    {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": "2"},
    {"ACCELERATE_TORCH_DEVICE": "meta", "FORK_LAUNCHED": "perhaps"},
    {"PMI_SIZE": "1", "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
    {"WORLD_SIZE": "1"},
    {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": "1"},
    {"LOCAL_RANK": "3", "RANK": "5", "MASTER_ADDR": "no-such-host.invalid"},
    {"WORLD_SIZE": "", "RANK": ""},
    {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},
    {"OMP_NUM_THREADS": "2,1"}, {"OMP_NUM_THREADS": "many"},
    {"DS_ACCELERATOR": "cuda", "DEEPSPEED_TIMEOUT": "soon"},
], ids=lambda shell: ",".join(shell))
def test_a_process_alone_does_not_listen_to_the_shell(shell, plain, monkeypatch):
    for name, value in shell.items():
        monkeypatch.setenv(name, value)
    loss, norm, weights = one_step()
    assert (loss, norm) == plain[:2]
    assert all(torch.equal(weight, plain[2][name]) for name, weight in weights.items())
    assert shell.items() <= os.environ.items()  # the shell's variables stay for programs that run beside


def test_what_a_package_sets_does_not_stay(monkeypatch):
    """DeepSpeed's plugin leaves ACCELERATE_USE_DEEPSPEED behind; the next engine would follow it."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("RANK", "3")
    with settings_hidden(process_group=True):
        assert "ACCELERATE_MIXED_PRECISION" not in os.environ
        assert os.environ["RANK"] == "3"
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    assert "ACCELERATE_USE_DEEPSPEED" not in os.environ
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"
    with settings_hidden(process_group=False):
        assert "RANK" not in os.environ
    assert os.environ["RANK"] == "3"


def test_what_is_ignored_is_said_once_with_our_setting(monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    make_engine(engine_config("single"), "fp32")
    message, = [record.getMessage() for record in caplog.records]
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 is ignored (training.micro_batch_size says it)" in message
    assert "ACCELERATE_DYNAMO_BACKEND=INDUCTOR is ignored" in message


def test_what_accelerate_launch_always_sets_is_no_news():
    assert describe_ignored({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO",
                             "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1", "ACCELERATE_USE_CPU": "False",
                             "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}) == ""


@pytest.mark.parametrize(("shell", "says"), [
    ({"WORLD_SIZE": "4", "RANK": "0"}, "without MASTER_ADDR and MASTER_PORT; got 'WORLD_SIZE=4'; .*unset WORLD_SIZE"),
    ({"WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "without RANK;"),
    ({"WORLD_SIZE": "two", "RANK": "0"}, "must be numbers"),
    ({"WORLD_SIZE": "1", "RANK": "3"}, "rank 3 of 1"),
    ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "2"}, "srun started 8 processes and told them no RANK"),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun started 2 processes"),
    ({"PMI_SIZE": "2"}, "mpiexec started 2 processes"),
])
def test_half_a_launcher_is_refused(shell, says):
    with pytest.raises(ConfigError, match=says) as error:
        RankEnvironment.from_launcher(shell)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("shell", "expected"), [
    ({}, RankEnvironment()),
    ({"WORLD_SIZE": "1"}, RankEnvironment()),
    ({"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, RankEnvironment()),  # Kubeflow
    ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
     RankEnvironment(launched=True)),  # torchrun --nproc-per-node 1
    ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, RankEnvironment(1, 2, 0, True)),
    ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"}, RankEnvironment()),  # srun --pty bash inside a job
])
def test_who_has_started_this_process(shell, expected):
    assert RankEnvironment.from_launcher(shell) == expected
