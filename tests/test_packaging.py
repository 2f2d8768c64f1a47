"""The wheel holds everything the command needs, and works outside the checkout."""

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import hybridlm

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


def test_metadata_is_what_an_index_shows(wheel):
    archive = zipfile.ZipFile(wheel)
    folder = f"hybridlm-{hybridlm.__version__}.dist-info"
    metadata = Parser().parsestr(archive.read(f"{folder}/METADATA").decode())
    assert metadata["Version"] == hybridlm.__version__
    assert (metadata["License-Expression"], metadata["Requires-Python"]) == ("Apache-2.0", ">=3.11")
    assert metadata.get_payload().startswith("# hybridlm")  # the README
    assert f"{folder}/licenses/LICENSE" in archive.namelist()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = {str(Requirement(text)) for text in metadata.get_all("Requires-Dist") if "extra ==" not in text}
    assert required == {str(Requirement(text)) for text in project["dependencies"]}
    assert set(metadata.get_all("Provides-Extra")) == set(project["optional-dependencies"])


def test_the_version_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert project["version"] == citation["version"] == hybridlm.__version__
    assert citation["license"] == project["license"]
    released = re.findall(r"^## \[(\d[\d.]*)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert not released or released[0] == hybridlm.__version__  # the newest section of the changelog


def test_pinned_versions_lie_in_the_ranges_and_are_those_of_the_tests():
    """`pip install -c constraints.txt hybridlm` must find a solution, and it must be what the tests ran with."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [text for texts in project["optional-dependencies"].values() for text in texts]
    ranges = {r.name: r.specifier for r in map(Requirement, project["dependencies"] + extras)}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert {r.name for r in map(Requirement, project["dependencies"])} <= set(pins)
    for name, pinned in pins.items():
        assert name not in ranges or ranges[name].contains(pinned), (name, pinned, str(ranges[name]))
    for name in ("torch", "transformers", "tokenizers", "safetensors", "accelerate"):
        assert version(name).split("+")[0] == pins[name], name


def test_the_installed_command_works_without_the_checkout(wheel, tmp_path):
    """pip installs the wheel into a prefix of its own; the script that it makes runs from an empty folder."""
    prefix, elsewhere = tmp_path / "prefix", tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run([sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--ignore-installed",
                    "--prefix", str(prefix), str(wheel)], check=True, capture_output=True)
    (site,) = prefix.glob("lib/python*/site-packages")
    done = subprocess.run([str(prefix / "bin" / "hybridlm"), "configs", "mixer"], cwd=elsewhere, capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(site)})
    assert done.returncode == 0, done.stderr
    assert "kda" in done.stdout
    assert list(elsewhere.iterdir()) == []


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
