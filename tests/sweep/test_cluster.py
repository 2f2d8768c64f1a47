"""Points as jobs: options, the script that sbatch gets, a whole sweep through stand-ins for Slurm, and a local Ray."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

from hybridlm.cli import main
from hybridlm.errors import ConfigError
from hybridlm.sweep import cluster_runner, estimate
from hybridlm.sweep.hydra_launcher import check_launcher, run_job
from hybridlm.sweep.request import read_request
from hybridlm.sweep.slurm_jobs import find_pending_jobs

SUPPORT = Path(__file__).parents[1] / "support"
TOOLS = {  # run at once what they are given, and list it until it ends
    "sbatch": r"""
echo "$1" >> {home}/calls
last=$(sed -n 's/^#SBATCH --array=0-\([0-9]*\).*/\1/p' "$1")
for i in $(seq 0 ${{last:-0}}); do
  if [ -n "$last" ]; then export SLURM_ARRAY_JOB_ID=77 SLURM_ARRAY_TASK_ID=$i; fi
  touch {home}/job_77${{last:+_$i}}
  (SLURM_JOB_ID=77 bash "$1"; rm {home}/job_77${{last:+_$i}}) < /dev/null > {home}/sbatch.log 2>&1 &
done
echo Submitted batch job 77""",
    "srun": r"""
while [[ $1 == --* ]]; do [[ $1 == --unbuffered ]] || shift; shift; done
PYTHONPATH={home}/patch:$PYTHONPATH exec "$@" """,
    "squeue": "for f in {home}/job_*; do [ -e $f ] && echo ${{f##*/job_}} RUNNING; done; exit 0",
    "sacct": "echo 'JobID|State|NodeList'"}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A folder with the stand-ins; jobs start the stand-in for training."""
    home = tmp_path / "slurm"
    (home / "patch").mkdir(parents=True)
    for name, text in TOOLS.items():
        (home / name).write_text("#!/bin/bash" + text.format(home=home) if text[0] == "\n" else
                                 "#!/bin/bash\n" + text.format(home=home))
        (home / name).chmod(0o755)
    (home / "patch" / "sitecustomize.py").write_text(
        "import sys\nif 'submitit.core._submit' in sys.orig_argv:\n    import hybridlm.sweep.process as process\n"
        f"    fake = {str(SUPPORT / 'fake_train.py')!r}\n"
        "    process.point_command = lambda file, imports: [sys.executable, fake, str(file), *imports]\n")
    monkeypatch.setenv("PATH", f"{home}:{os.environ['PATH']}")
    monkeypatch.setattr(estimate, "peak_flops", lambda *_: (1e9, "made up"))
    monkeypatch.setattr(cluster_runner, "SQUEUE_INTERVAL_S", 0.1)
    return home


def words(folder, seeds, *more):
    return ["model=hybrid_tiny", "training.steps=20", f"training.seed={seeds}", f"sweep.dir={folder}",
            "sweep.launcher=slurm", *more]


def test_a_sweep_goes_through_slurm(slurm, tmp_path, capsys):
    pytest.importorskip("submitit")
    options = ["sweep.slurm.partition=gpu", "sweep.slurm.gpus_per_node=1", "sweep.slurm.timeout_min=90",
               "sweep.slurm.account=lab", 'sweep.slurm.setup=["export READY=1"]']
    kinds = tmp_path / "kinds.py"
    kinds.write_text("")
    assert main(["sweep", *words(tmp_path / "out", "0,1", *options), "--import", str(kinds)]) == 1
    out = capsys.readouterr().out
    assert "2 of 2 points to slurm" in out
    assert "seed-0: finished" in out
    assert "failed: seed-1: the disk is full; make room" in out
    assert "1 of 2 points are finished" in out
    command = (tmp_path / "out" / "points" / "seed-0" / "output.txt").read_text().splitlines()[0]
    assert str(kinds) in command.split()  # what --import names reaches the process of the point
    script = (tmp_path / "out" / "jobs" / "1" / "77_submission.sh").read_text()
    for line in ("#SBATCH --partition=gpu", "#SBATCH --gpus-per-node=1", "#SBATCH --time=90", "#SBATCH --account=lab",
                 "#SBATCH --array=0-1%2", "#SBATCH --job-name=custom", "#SBATCH --nodes=1", "export READY=1"):
        assert line in script.splitlines()
    assert main(["sweep", *words(tmp_path / "out", "0,1", *options)]) == 1  # neither is submitted again
    assert len((slurm / "calls").read_text().splitlines()) == 1


def submitted(folder, *names):
    """Write the files that submitting these points leaves in a sweep's folder."""
    launched = folder / "jobs" / "1"
    launched.mkdir(parents=True)
    points = [folder / "points" / name for name in names]
    (launched / "launch.json").write_text(json.dumps({"points": [str(point) for point in points]}))
    for index, point in enumerate(points):
        point.mkdir(parents=True)
        (launched / f"77_{index}_submitted.pkl").touch()


def squeue_says(slurm, first, later):
    """A squeue that is asked once when the sweep starts, and later while it waits."""
    (slurm / "squeue").write_text(f"#!/bin/bash\nif [ -e {slurm}/asked ]; then\n{later}\nelse\n{first}\nfi\n"
                                  f"touch {slurm}/asked\n")


def test_queued_points_are_shown_and_waited_for_and_not_submitted_again(slurm, tmp_path, capsys):
    folder = tmp_path / "out"
    submitted(folder, "seed-0", "seed-4")
    queue = "echo 77_0 PENDING; echo 77_1 RUNNING; echo 78 RUNNING"
    ended = '{"status": "finished", "step": 20, "seconds": 1.0}'
    squeue_says(slurm, queue, f"for x in seed-0 seed-4; do echo '{ended}' > {folder}/points/$x/outcome.json; done")
    assert main(["sweep", *words(folder, "0,4")]) == 0
    out = capsys.readouterr().out
    assert "seed-0: queued, job 77_0" in out
    assert "seed-4: running, job 77_1" in out
    assert "2 of 2 points are finished" in out
    assert not (slurm / "calls").exists()
    (folder / "points" / "seed-0" / "outcome.json").unlink()
    squeue_says(slurm, queue, queue)
    assert main(["sweep", f"sweep.dir={folder}", "--collect", "--json"]) == 0
    captured = capsys.readouterr()
    points = json.loads(captured.out)["points"]
    assert [(point["status"], point.get("job")) for point in points] == [("queued", "77_0"), ("finished", None)]
    assert "1 of 2 points are finished, 1 queued" in captured.err


def test_a_job_that_is_lost_has_failed(slurm, tmp_path, capsys):
    folder = tmp_path / "out"
    submitted(folder, "seed-0", "seed-4")
    ended = '{"status": "interrupted", "step": 7}'
    squeue_says(slurm, "echo 77_0 RUNNING; echo 77_1 RUNNING", f"echo '{ended}' > {folder}/points/seed-4/outcome.json")
    assert main(["sweep", *words(folder, "0,4")]) == 1
    out = capsys.readouterr().out
    assert "failed: seed-0: job 77_0 left the queue without a result" in out
    assert "seed-4: stopped at step 7" in out


def test_without_squeue_a_job_counts_as_submitted(tmp_path, monkeypatch):
    submitted(tmp_path, "seed-0")
    monkeypatch.setenv("PATH", "")
    assert find_pending_jobs(tmp_path)["seed-0"].state == "submitted"


def test_a_job_that_starts_after_the_sweep_was_stopped_does_nothing(tmp_path):
    (tmp_path / "stop").touch()
    run_job(tmp_path, [], None)
    assert [path.name for path in tmp_path.iterdir()] == ["stop"]


def test_options_of_a_launcher_stand_in_a_file_and_on_the_command_line(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("vary: {training.seed: [0, 1]}\nlauncher: slurm\nslurm: {partition: gpu, timeout_min: 5}\n")
    sweep = read_request([f"sweep={file}", "sweep.slurm.timeout_min=90"]).sweep
    assert sweep.launcher_options == {"partition": "gpu", "timeout_min": 90}
    words = ["training.seed=0,1", "sweep.launcher=ray", "sweep.ray.remote.num_gpus=1"]
    assert read_request(words).sweep.launcher_options == {"remote": {"num_gpus": 1}}


@pytest.mark.parametrize(("options", "says"), [
    ({"partitio": "gpu"}, ["sweep.slurm.partitio", "did you mean 'partition'"]),
    ({"timeout_min": "soon"}, ["sweep.slurm.timeout_min", "soon"]),
    ({"timeout_min": 0}, ["sweep.slurm.timeout_min", "must be positive"]),
    ({"nodes": 2}, ["sweep.slurm.nodes", "a point is one process"]),
    ({"submitit_folder": "x"}, ["sweep.slurm.submitit_folder"]),
])
def test_an_option_that_slurm_does_not_have_is_refused(options, says):
    pytest.importorskip("submitit")
    with pytest.raises(ConfigError) as caught:
        check_launcher("slurm", options)
    assert all(part in str(caught.value) for part in says), caught.value


@pytest.mark.parametrize(("more", "says"), [
    (["sweep.launcher=slrum"], ["sweep.launcher", "local, slurm, ray"]),
    (["--jobs", "2"], ["--jobs", "sweep.launcher=local"]),
    ([], ["there is no Slurm here: sbatch is not found", "sweep.launcher=local"]),
])
def test_a_mistake_is_one_line(tmp_path, capsys, monkeypatch, more, says):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(estimate, "peak_flops", lambda *_: (1e9, "made up"))
    assert main(["sweep", *words(tmp_path / "out", "0,1", *more)]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert all(part in line for part in says), line


def test_a_launcher_that_is_not_installed_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "hydra_plugins.hydra_ray_launcher", None)
    with pytest.raises(ConfigError, match=r"pip install 'hybridlm\[ray\]'"):
        check_launcher("ray", {})


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (hybridlm[ray])")
def test_a_sweep_goes_through_a_local_ray(tmp_path, capsys):
    data = Path(json.__file__).parent
    sweep = ["model=hybrid_tiny", "model.num_layers=2", "model.schedule.ratio=0,inf", "training.steps=2",
             "training.sequence_length=32", "training.batch_size=2", "training.eval_batches=1",
             f"data.path={data / 'decoder.py'}", f"data.validation_path={data / 'encoder.py'}",
             f"data.cache_dir={tmp_path / 'cache'}", f"sweep.dir={tmp_path / 'out'}", "engine.device=cpu",
             "sweep.launcher=ray", "sweep.ray.init.num_cpus=2", "sweep.ray.init.include_dashboard=false"]
    for _ in range(2):
        code = main(["sweep", *sweep, "--json", "--retry-failed"])
        said = capsys.readouterr()
        if "timed out during startup" not in said.err:
            break
    else:
        pytest.skip("Ray did not start within its 30 seconds, which cannot be set: the machine is too busy")
    assert code == 0
    points = json.loads(said.out.splitlines()[-1])["points"]
    assert [point["status"] for point in points] == ["finished", "finished"]
