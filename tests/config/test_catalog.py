"""The catalog of config groups and options, as `hybridlm configs` shows it."""

import re

import pytest

from hybridlm.config.catalog import GROUPS, describe_configs, render
from hybridlm.config.paths import config_dir, options
from hybridlm.errors import ConfigError


def test_every_built_in_group_and_option_has_its_sentence(project_kinds):
    assert {path.name for path in config_dir().iterdir() if path.is_dir()} == set(GROUPS)
    for row in describe_configs()["groups"]:
        group = describe_configs(row["group"])
        assert [option["name"] for option in group["options"]] == row["options"] == options(row["group"])
        for option in group["options"]:
            sentence = option["summary"]
            assert len(sentence) > 15, f"{row['group']}/{option['name']} needs a comment at its top"
            assert sentence.endswith("."), sentence
            assert option["built_in"]


def test_the_text_names_how_an_option_is_chosen():
    text = render(describe_configs())
    assert "  model         a whole model (model=NAME)\n" in text
    assert text.endswith("`hybridlm configs GROUP` lists the options of a group.\n")
    text = render(describe_configs("mixer"))
    assert text.startswith("model.schedule.linear=NAME    the mixer of the layers")
    sentence = "Kimi Delta Attention (Kimi Linear): delta rule with one decay for each key channel."
    assert re.search(rf"^  kda +{re.escape(sentence)}$", text, re.MULTILINE)
    option = describe_configs("schedule", "ratio_3")
    file = config_dir() / "schedule" / "ratio_3.yaml"
    assert render(option) == f"# schedule@model.schedule=ratio_3\n# {file}\n{file.read_text()}"
    assert option["summary"] == "Three linear layers, then one full (Kimi Linear, Qwen3-Next)."


def test_a_folder_of_ones_own_is_listed_too(tmp_path):
    for name, text in (("mixer/kda.yaml", "# Mine.\nkind: delta_rule\n"), ("mixer/other.yaml", "kind: delta_rule\n"),
                       ("extra/a.yaml", "x: 1\n")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "empty").mkdir()
    rows = {row["name"]: row for row in describe_configs("mixer", own=tmp_path)["options"]}
    assert (rows["kda"]["summary"], rows["kda"]["built_in"]) == ("Mine.", False)
    assert (rows["other"]["summary"], rows["gdn"]["built_in"]) == ("", True)
    groups = [row["group"] for row in describe_configs(own=tmp_path)["groups"]]
    assert groups == [*GROUPS, "extra"]
    assert "  extra         (extra@KEY=NAME)\n" in render(describe_configs(own=tmp_path))
    assert describe_configs("mixer", "other", tmp_path)["text"] == "kind: delta_rule\n"


@pytest.mark.parametrize(("words", "message"), [
    (["modle"], f"no such config group; got 'modle'; expected one of {', '.join(GROUPS)}; did you mean 'model'?"),
    (["engine", "zero"], "engine: no such option; got 'zero'; expected one of ddp, single, zero1, zero2, zero3; "
                         "did you mean 'zero3'?"),
])
def test_a_name_that_is_not_there(words, message):
    with pytest.raises(ConfigError) as caught:
        describe_configs(*words)
    assert str(caught.value) == message
