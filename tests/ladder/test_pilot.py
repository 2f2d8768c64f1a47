"""The pilot of a ladder: which rates are tried, which is best, and that the rungs take it."""

import json
import math
import shutil

import pytest

from hybridlm.cli import main
from hybridlm.errors import ConfigError
from hybridlm.files import write_json
from hybridlm.ladder.pilot_report import read_pilot
from hybridlm.sweep import estimate, execute
from hybridlm.sweep.folder import point_outcome, prepare_point
from tests.support.ladder_folders import finish_with_loss

BEST = {"full": 8e-3, "kda": 6.4e-2}  # where the losses are least


class Machine:
    """Stands for the processes of points: the loss is a parabola in log lr, and from 0.2 on training diverges."""

    def __init__(self):
        self.started = []
        self.diverges_at = 0.2
        self.diverged = True

    def __call__(self, points, *, jobs, retry_failed, say, imports, progress):
        for point in points:
            if point_outcome(point)["status"] != "waiting":
                continue
            self.started.append(point.name)
            rate = point.config.optimizer.lr
            if rate > self.diverges_at:
                write_json(prepare_point(point) / "outcome.json",
                           {"status": "failed", "reason": "whatever it was", "diverged": self.diverged})
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
    assert not report["architectures"]["kda"]["missing"]
    machine.diverged = False
    assert main(ladder(tmp_path / "b", "--pilot", *more)) == 1
    out = capsys.readouterr().out
    assert "without a result: kda_lr-0.256_t0_seed-3: failed" in out
    assert "the ladder does not train before every architecture has a best rate" in out
    assert main(ladder(tmp_path / "b", "--dry-run", *more)) == 2
    assert "holds a pilot that has not finished; got 'full_lr-0.256_t0_seed-3: failed'" in capsys.readouterr().err
    assert main(ladder(tmp_path / "b", "--dry-run", "ladder.pilot.use=false", *more)) == 0


FEW = ("ladder.pilot.factors=1,2", "ladder.rungs=[{name: t0, hidden_size: 32, num_layers: 4}]")


@pytest.fixture
def piloted(machine, tmp_path, capsys):
    """The folder of a ladder after a pilot of two rates per architecture."""
    assert main(ladder(tmp_path, "--pilot", *FEW)) == 0
    capsys.readouterr()
    return tmp_path


def refused(capsys, *words):
    """The one line of a command that is refused."""
    assert main(list(words)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def put(data, path, value):
    *folders, last = path
    for key in folders:
        data = data[key]
    if value is None:
        del data[last]
    else:
        data[last] = value


RATES = ("architectures", "kda", "rates", 0)


BROKEN = [  # a key of pilot.json, what is written there (None: the key is left out), and what the error says of it
    (("warnings",), None, "warnings: is missing"), ((*RATES, "diverged"), None, "rates.0.diverged: is missing"),
    (("architectures", "kda", "missing"), True, "architectures.kda.missing"),
    ((*RATES, "lr"), math.nan, "rates.0.lr: is not a number"), ((*RATES, "lr"), "x", "rates.0.lr"),
    ((*RATES, "lr"), -1.0, "rates.0.lr: must be positive"), ((*RATES, "loss"), math.inf, "rates.0.loss"),
    (("architectures", "kda", "best"), "x", "architectures.kda.best"),
    (("architectures", "kda", "best"), -1.0, "architectures.kda.best: is no rate with a loss")]


def test_a_pilot_that_cannot_be_read_is_named(piloted, capsys):
    for path, value, said in BROKEN:
        data = pilot(piloted)
        put(data, path, value)
        (piloted / "broken").mkdir(exist_ok=True)
        (piloted / "broken" / "pilot.json").write_text(json.dumps(data))
        with pytest.raises(ConfigError, match=f"^ladder.dir: holds a pilot that cannot be read .*{said}"):
            read_pilot(piloted / "broken")
    shutil.copy(piloted / "broken" / "pilot.json", piloted / "pilot.json")
    for more in ((), ("ladder.pilot.use=false",), ("--pilot",)):
        error = refused(capsys, *ladder(piloted, "--dry-run", *FEW, *more))
        assert "ladder.dir: holds a pilot that cannot be read (" in error
    (piloted / "pilot.json").unlink()  # what the error advises
    assert main(ladder(piloted, "--pilot", *FEW)) == 0
    assert len(pilot(piloted)["architectures"]["kda"]["rates"]) == 2


def test_an_architecture_without_a_best_rate_does_not_train_beside_tuned_ones(machine, piloted, capsys,
                                                                              monkeypatch):
    more = [*FEW, "ladder.architectures.late.ratio=1"]
    error = refused(capsys, *ladder(piloted, "--dry-run", *more))
    assert "holds a pilot without the architecture late" in error
    assert "give the same command with --pilot, or train with optimizer.lr: ladder.pilot.use=false" in error
    assert main(ladder(piloted, "--dry-run", "ladder.pilot.use=false", *more)) == 0
    machine.diverges_at = 1e-3
    more += ["ladder.architectures.late.optimizer.lr=0.004"]
    capsys.readouterr()
    assert main(ladder(piloted, "--pilot", *more)) == 1
    out = " ".join(capsys.readouterr().out.split())
    advice = "ladder.architectures.late.optimizer.lr=0.001"
    assert f"note: late diverged at every rate: add {advice} to the command of the pilot" in out
    assert "the rungs of this ladder train with the best rates" not in out
    assert "late diverged at every rate" in refused(capsys, *ladder(piloted, "--dry-run", *more))
    monkeypatch.setitem(BEST, "late", 1e-3)
    assert main(ladder(piloted, "--pilot", *more, advice)) == 0
    assert pilot(piloted)["architectures"]["late"]["best"] == 1e-3
    capsys.readouterr()
    assert rates_of_the_plan(piloted, capsys, *more, advice)["late"] == 1e-3


OTHER_SETTINGS = [
    ("ladder.rungs=[{name: t0, hidden_size: 48, num_layers: 4}]",
     "ladder.rungs: is not that of the pilot in the folder of the ladder; got 'hidden_size=48'; expected hidden_size"),
    ("ladder.base=r2", "ladder.base: is not that of the pilot"),
    ("ladder.parametrization=mup", "ladder.parametrization: is not that of the pilot in the folder of the ladder; got "
     "'mup'; expected completep"),
    ("optimizer=lion", "optimizer: is not that of the pilot of full; got 'kind=lion"),
    ("optimizer.weight_decay=0.3", "got 'weight_decay=0.3'; expected weight_decay=0.1"),
    ("optimizer.lr=1e-4", "optimizer.lr: would have no effect: full trains with the best rate of the pilot, 0.008; got "
     "0.0001; leave it out, or train with optimizer.lr: ladder.pilot.use=false"),
    ("ladder.architectures.kda.optimizer.lr=1e-4", "kda trains with the best rate of the pilot, 0.016")]


def test_rates_of_a_pilot_with_other_settings_are_refused(piloted, capsys):
    for word, said in OTHER_SETTINGS:
        assert said in refused(capsys, *ladder(piloted, "--dry-run", *FEW, word))
    words = [word for word, _ in OTHER_SETTINGS]
    assert main(ladder(piloted, "--dry-run", *FEW, *words, "ladder.pilot.use=false")) == 0


def test_architectures_of_earlier_pilots_stay(piloted, capsys):
    data = pilot(piloted)
    data["architectures"]["full"]["missing"] = ["full_t0_seed-0: interrupted"]
    (piloted / "pilot.json").write_text(json.dumps(data))
    shutil.rmtree(piloted / "pilot")
    one = ["ladder.architectures={kda: {linear: kda, ratio: 3}}", "ladder.reference=kda"]
    assert main(ladder(piloted, "--pilot", *FEW, *one)) == 0
    assert pilot(piloted)["architectures"] == data["architectures"]
    out = " ".join(capsys.readouterr().out.split())
    assert "the rungs of this ladder train with the best rates" in out  # those that stay are not of this ladder
    assert "interrupted" not in out


def test_a_ladder_that_began_before_its_pilot_is_told_how_it_goes_on(machine, tmp_path, capsys):
    assert main(ladder(tmp_path, *FEW)) == 0
    assert main(ladder(tmp_path, "--pilot", *FEW)) == 0
    capsys.readouterr()
    error = refused(capsys, *ladder(tmp_path, *FEW))
    assert "a ladder that began before its pilot goes on with ladder.pilot.use=false" in error
    assert main(ladder(tmp_path, *FEW, "ladder.pilot.use=false")) == 0


def test_the_advice_at_an_edge_holds_for_names_with_dots_and_factors_above_one(machine, tmp_path, capsys,
                                                                               monkeypatch):
    monkeypatch.setitem(BEST, "kda.v2", 1e-3)
    more = [*FEW, "ladder.architectures={kda.v2: {linear: kda, ratio: 3}}", "ladder.reference=kda.v2"]
    assert main(ladder(tmp_path, "--pilot", *more)) == 0
    out = " ".join(capsys.readouterr().out.split())
    advice = "ladder.architectures.kda.v2.optimizer.lr=0.004"  # the best, 0.008, is the least that was tried
    assert f"add {advice} to the command of the pilot" in out
    assert main(ladder(tmp_path, "--pilot", *more, advice)) == 0
    assert pilot(tmp_path)["architectures"]["kda.v2"]["best"] == 4e-3
