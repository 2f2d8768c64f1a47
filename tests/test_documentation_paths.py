"""Every repository path and relative link in README.md, CONTRIBUTING.md and docs/ leads to something that exists.

The commands printed there are the subject of test_printed_commands.py.
"""

import itertools
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
FILES_AND_FOLDERS = {*TRACKED, *(str(folder) for name in TRACKED for folder in Path(name).parents)}
TOP_FOLDERS = {name.split("/")[0] for name in TRACKED if "/" in name}
PAGES = [name for name in TRACKED if re.fullmatch(r"README.md|CONTRIBUTING.md|docs/.+\.md", name)]


def remove_code_blocks(text):
    """The text of a page without its fenced blocks, which hold commands and output."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def expand_braces(path):
    """All paths that a/{b,c}/d stands for."""
    choices = [part.split(",") for part in re.split(r"[{}]", path)]
    return ["".join(parts) for parts in itertools.product(*choices)]


def find_paths(text):
    """(path, folder) of what is in backticks and names something of the repository.

    A path may begin at any folder: `moe/router.py`. A bare file name stands in the folder of the path before it in its
    line; `folder` is None where there is none.
    """
    for line in remove_code_blocks(text).splitlines():
        folder = None
        for word in re.findall(r"`([^`\s]+)`", line):
            for path in expand_braces(word):
                if not re.fullmatch(r"[\w.*-]+(/[\w.*-]+)*/?", path):
                    continue
                is_in_top_folder = "/" in path and path.split("/")[0] in TOP_FOLDERS
                if not (is_in_top_folder or re.search(r"\w\.py$", path)):
                    continue
                path = path.rstrip("/")
                yield path, None if "/" in path else folder
                if "/" in path:
                    folder = path.rpartition("/")[0] if path.endswith(".py") else path


def exists(path, folder=None):
    """Whether the repository has the path, or a path that ends in it; words in capitals and * stand for any name."""
    in_folder = path if folder is None else f"{folder}/{path}"
    pattern = re.compile(r"(?:.*/)?" + re.sub(r"\b[A-Z]{3,}(?=\b|_)|\\\*", r"[^/]+", re.escape(in_folder)))
    return any(pattern.fullmatch(name) for name in FILES_AND_FOLDERS)


def missing_paths(text):
    """Paths of a page that lead nowhere."""
    return [path for path, folder in find_paths(text) if not exists(path, folder)]


def find_links(text):
    """Targets of the relative links of a page."""
    targets = re.findall(r"\]\(([^()\s]+)\)", remove_code_blocks(text))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def list_anchors(text):
    """Anchors of the headings of a page, as GitHub makes them from their words."""
    headings = re.findall(r"^#+ +(.+)$", remove_code_blocks(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def read(name):
    """The text of a file of the repository."""
    return (ROOT / name).read_text(encoding="utf-8")


def link_error(page, target):
    """What is wrong with a link of the page; None for a good one."""
    file, _, anchor = target.partition("#")
    linked = (ROOT / page).parent / file if file else ROOT / page
    if not linked.exists():
        return f"{target}: no such file"
    if anchor and anchor not in list_anchors(linked.read_text(encoding="utf-8")):
        return f"{target}: no such heading"
    return None


@pytest.mark.parametrize("page", PAGES)
def test_paths_in_backticks_exist(page):
    missing = missing_paths(read(page))
    assert not missing, f"{page} names what the repository does not have: {missing}"


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_resolve(page):
    errors = [error for target in find_links(read(page)) if (error := link_error(page, target))]
    assert not errors, f"{page}: {errors}"


def test_missing_paths_are_found():
    text = "`hybridlm/no_file.py`, `hybridlm/{cli,no_folder}/`, `hybridlm/model/mixers/KIND.py`, `mla.py`, `trainer.py`"
    assert missing_paths(text) == ["hybridlm/no_file.py", "hybridlm/no_folder", "trainer.py"]


@pytest.mark.parametrize(("target", "error"), [
    ("docs/no_such_page.md", "docs/no_such_page.md: no such file"),
    ("docs/glossary.md#no-such-heading", "docs/glossary.md#no-such-heading: no such heading"),
    ("docs/glossary.md#the-model", None),
])
def test_broken_links_are_found(target, error):
    assert link_error("README.md", target) == error
