"""Collects the command lines that documentation, help texts, scripts, configs and messages print."""

import ast
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLACEHOLDERS = {"CHECKPOINT": "runs/first", "RUN": "runs/first", "KIND": "kda", "GROUP": "mixer", "NAME": "kda",
                "A": "runs/first", "B": "runs/muon", "FILE.py": "my_mixer.py", "$run": "runs/first",
                "/your/texts": "texts"}
HYBRIDLM = r"(?:\.venv/bin/)?hybridlm"
STARTS = re.compile(rf"^(?:[A-Z_]+=\S+ )*(?:{HYBRIDLM}|bash|sbatch|torchrun|python|scripts/\S+) ")


@dataclass(frozen=True)
class Printed:
    """A command line and the file that prints it; `whole`: nothing in it stands for something else."""

    place: str
    words: tuple[str, ...]
    whole: bool

    def __str__(self):
        return shlex.join(self.words)


def pages():
    """README.md, CONTRIBUTING.md and all pages of docs/ and of the kernels."""
    below = [page for top in ("docs", "kernels") for page in sorted((ROOT / top).rglob("*.md"))]
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *below]


def of_pages():
    """Commands of blocks marked as bash, and those in backticks."""
    for page in pages():
        text = page.read_text(encoding="utf-8")
        blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
        prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        yield from _read(str(page.relative_to(ROOT)), [*blocks, *_in_backticks(prose)])


def of_help(texts):
    """Commands of help texts by command: their examples, and those in backticks."""
    for command, text in texts.items():
        examples = text.partition("examples:")[2]
        yield from _read(f"hybridlm {command} --help", [examples, *_in_backticks(text)])


def of_scripts():
    """Commands that shell scripts print or hold in comments, and those at the head of configs and examples."""
    for file in [*sorted((ROOT / "scripts").rglob("*")), *sorted((ROOT / "examples").glob("*.py")),
                 *sorted((ROOT / "configs").rglob("*.yaml"))]:
        if not file.is_file() or file.suffix not in ("", ".sh", ".sbatch", ".py", ".yaml"):
            continue
        text = re.sub(r"^[ #]+", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
        lines = "\n".join(line for line in text.splitlines() if re.match(rf"{HYBRIDLM} [a-z]|scripts/\S+ \S*=", line))
        yield from _read(str(file.relative_to(ROOT)), [lines, *_in_backticks(text)])


def of_source():
    """Commands in backticks in any text of the program: messages, hints, docstrings."""
    for file in sorted((ROOT / "hybridlm").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield from _read(str(file.relative_to(ROOT)), _in_backticks(node.value))


def _in_backticks(text):
    return [re.sub(r"\s+", " ", found) for found in re.findall(r"`([^`]+)`", text)]


def _read(place, blocks):
    for block in blocks:
        for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines():
            for part in re.split(r" && | \| ", re.sub(r"\s\s+[#(].*|\s# .*", "", line.strip())):
                if STARTS.match(part + " ") and not re.match(rf"{HYBRIDLM} [^a-z-]", part):
                    made = _words(part)
                    if made is not None:
                        yield Printed(place, *made)


def _words(line):
    """The words of a line with placeholders replaced, without an ellipsis; and whether nothing was left out."""
    try:
        words = shlex.split(line)
    except ValueError:
        return None
    kept, whole = [], True
    for word in words:
        key, equals, value = word.partition("=")
        if word == "..." or value == "..." or word.startswith("[") or re.fullmatch(r"\w+(\|\w+)+", word):
            whole = False
            continue
        name = value if equals else word
        if name in PLACEHOLDERS:
            name = PLACEHOLDERS[name]
        elif re.fullmatch(r"[A-Z][A-Z_]+", name) and not re.fullmatch(r"[A-Z_]+", key + equals):
            whole = False
            continue
        kept.append(f"{key}={name}" if equals else name)
    return tuple(kept), whole


def setting_advice():
    """(place, key) of settings such as `training.micro_batch_size` that texts of errors and warnings name."""
    pattern = re.compile(r"\b((?:training|data|engine|tracking|recipe)\.[a-z_]+\w*(?:\.\w+)*)")
    for file in sorted((ROOT / "hybridlm").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call | ast.Raise):
                continue
            for text in ast.walk(node):
                if isinstance(text, ast.Constant) and isinstance(text.value, str) and " " in text.value:
                    for key in pattern.findall(text.value):
                        yield str(file.relative_to(ROOT)), key
