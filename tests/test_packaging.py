"""The wheel holds everything the command needs, and works outside the checkout."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=ROOT, check=True,
                   capture_output=True)
    (file,) = folder.glob("*.whl")
    return file


def test_the_wheel_holds_both_packages_and_the_configs(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {p.relative_to(ROOT / "configs").as_posix() for p in (ROOT / "configs").rglob("*.yaml")}
    assert configs
    assert {f"hybridlm/configs/{name}" for name in configs} <= names
    modules = [p for package in ("hybridlm", "kernels/hybridlm_kernels") for p in (ROOT / package).rglob("*.py")]
    expected = {p.relative_to(ROOT).as_posix().removeprefix("kernels/") for p in modules}
    assert expected <= names
    assert not any(name.startswith(("tests/", "kernels/", "scripts/")) for name in names)


def test_the_command_works_from_another_folder_with_the_wheel_alone(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    # -S -E would drop the dependencies; first on the path, the wheel wins over the checkout all the same.
    code = ("import sys, hybridlm, hybridlm_kernels; from hybridlm.cli import main\n"
            "print(hybridlm.__file__, hybridlm_kernels.__file__, file=sys.stderr)\n"
            "sys.exit(main(['inspect', 'model=qwen3_next_80b', '--json']))")
    done = subprocess.run([sys.executable, "-c", code], cwd=elsewhere, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(site)})
    assert done.returncode == 0, done.stderr
    assert all(str(site) in path for path in done.stderr.split()[-2:])
    assert json.loads(done.stdout)["parameters"]["total"] > 70e9
    assert list(elsewhere.iterdir()) == []
