"""The messages that docs/troubleshooting.md explains are messages of the program."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
TABLES = re.findall(r"\| message \| cause \| what to do \|\n\|---\|---\|---\|\n((?:\|.*\n)+)", PAGE)
MESSAGES = [row.split("`")[1] for table in TABLES for row in table.splitlines()]


@pytest.fixture(scope="module")
def source():
    """Every string of the program in one line, adjacent literals put together."""
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "hybridlm").rglob("*.py"))
    return re.sub(r"\"\s*\n?\s*f?\"", "", text)


def test_the_page_explains_messages():
    assert len(MESSAGES) > 25


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_one_of_the_program(message, source):
    assert message in source
