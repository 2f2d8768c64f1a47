"""The pilot of a ladder: which rates are tried, which is best, and that the rungs take it."""

import json
import math

import pytest

from hybridlm.cli import main
from hybridlm.files import write_json
from hybridlm.sweep import estimate, execute
from hybridlm.sweep.folder import point_outcome, prepare_point
from tests.support.ladder_folders import finish_with_loss

BEST = {"full": 8e-3, "kda": 6.4e-2}  # where the losses are least


class Machine:
    """Stands for the processes of points: the loss is a parabola in log lr, and from 0.2 on training diverges."""

    def __init__(self):
        self.started = []
        self.reason = "the run diverged: its validation loss after step 9 is nan"

    def __call__(self, points, *, jobs, retry_failed, say, imports, progress):
        for point in points:
            if point_outcome(point)["status"] != "waiting":
                continue
            self.started.append(point.name)
            rate = point.config.optimizer.lr
            if rate > 0.2:
                write_json(prepare_point(point) / "outcome.json", {"status": "failed", "reason": self.reason})
            else:
                best = BEST[point.settings["architecture"].partition("_lr-")[0]]
                finish_with_loss(point, 2.0 + 0.01 * math.log2(rate / best) ** 2)
        return None


@pytest.fixture
def machine(monkeypatch):
    made = Machine()
    monkeypatch.setattr(execute, "run_points", made)
    monkeypatch.setattr(estimate, "peak_flops", lambda *_: (1e9, "made up"))
    return made


def ladder(folder, *more):
    return ["ladder", "ladder=tiny", "ladder.fit.bootstrap=8", f"ladder.dir={folder}", "--no-measure", *more]


def pilot(folder):
    return json.loads((folder / "pilot.json").read_text())


def rates_of_the_plan(folder, capsys, *more):
    capsys.readouterr()
    assert main(ladder(folder, "--dry-run", "--json", *more)) == 0
    costs = json.loads(capsys.readouterr().out)["ladder"]["costs"]
    return {name.split("_")[0]: cost["lr"] for name, cost in costs.items() if "_t0_" in name}


def test_the_best_rate_is_found_and_the_rungs_take_it(machine, tmp_path, capsys):
    assert rates_of_the_plan(tmp_path, capsys) == {"full": 8e-3, "kda": 8e-3}
    assert main(ladder(tmp_path, "--pilot")) == 0
    out = capsys.readouterr().out
    assert "note: the best rate of kda, 0.032, is at the edge" in out
    assert "best rate of full" not in out
    assert len(machine.started) == 10
    assert all("_t0_seed-0" in name for name in machine.started)
    found = pilot(tmp_path)["architectures"]
    assert [row["lr"] for row in found["full"]["rates"]] == [2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2]
    assert found["full"]["rates"][1]["loss"] == pytest.approx(2.01)
    assert (found["full"]["best"], found["full"]["at_edge"]) == (8e-3, False)
    assert (found["kda"]["best"], found["kda"]["at_edge"]) == (3.2e-2, True)
    assert rates_of_the_plan(tmp_path, capsys) == {"full": 8e-3, "kda": 3.2e-2}
    assert rates_of_the_plan(tmp_path, capsys, "ladder.pilot.use=false") == {"full": 8e-3, "kda": 8e-3}
    # The advice at the edge adds rates, keeps those that were tried, and finds the best.
    assert main(ladder(tmp_path, "--pilot", "ladder.architectures.kda.optimizer.lr=0.032")) == 0
    assert machine.started[10:] == ["kda_lr-0.064_t0_seed-0", "kda_lr-0.128_t0_seed-0"]
    found = pilot(tmp_path)["architectures"]["kda"]
    assert (found["best"], found["at_edge"], len(found["rates"])) == (6.4e-2, False, 7)
    assert main(ladder(tmp_path)) == 0
    assert "learning rates of the pilot: full 0.008, kda 0.064" in capsys.readouterr().out
    report = json.loads((tmp_path / "ladder.json").read_text())
    assert report["pilot"] == pilot(tmp_path)
    rates = {(cell["architecture"], cell["rung"]): cell["lr"] for cell in report["cells"]}
    assert rates["kda", "t0"] == 6.4e-2


def test_a_rate_that_diverges_is_a_result_and_another_failure_is_none(machine, tmp_path, capsys):
    more = ["ladder.pilot.factors=1,2,32", "ladder.pilot.seeds=3,4", "ladder.base=t1"]
    assert main(ladder(tmp_path / "a", "--pilot", "--json", *more)) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report == pilot(tmp_path / "a")
    assert report["seeds"] == [3, 4]
    row = report["architectures"]["kda"]["rates"][-1]
    assert (row["lr"], row["loss"], row["diverged"]) == (0.256, None, 2)
    assert report["architectures"]["kda"]["best"] == 1.6e-2
    assert not report["missing"]
    machine.reason = "killed by SIGKILL (out of memory?)"
    assert main(ladder(tmp_path / "b", "--pilot", *more)) == 1
    assert "without a result: kda_lr-0.256_t0_seed-3: failed" in capsys.readouterr().out
    assert main(ladder(tmp_path / "b", "--dry-run", *more)) == 2
    assert "holds a pilot that has not finished; got 'full_lr-0.256_t0_seed-3: failed'" in capsys.readouterr().err
    assert main(ladder(tmp_path / "b", "--dry-run", "ladder.pilot.use=false", *more)) == 0


def test_a_pilot_that_cannot_be_read_is_named(machine, tmp_path, capsys):
    (tmp_path / "pilot.json").write_text("{}")
    assert main(ladder(tmp_path, "--dry-run")) == 2
    error = capsys.readouterr().err
    assert "ladder.dir: holds a pilot that cannot be read" in error
    assert error.count("\n") == 1
