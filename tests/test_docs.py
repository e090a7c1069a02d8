"""What README.md and docs/*.md show is run as shown.

The convention for authors:

- Blocks marked ``python`` are executed. The blocks of one file share their variables, as in a notebook.
- In blocks marked ``bash``, lines that start with ``hfquant`` are run (a backslash continues a line);
  ``make`` targets, ``pip install`` extras and folders, and ``python`` scripts are checked to exist; any other
  command is an error.
- Both kinds run in document order, in one folder per file. It looks like the root of the repository, but what
  is written there is thrown away.
- ``python no-run`` and ``bash no-run`` are for what needs a network or a big model: Python must still
  compile, a command line may then hold anything. Every other language (``text``, ``yaml``) is left alone.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from tests import fresh

ROOT = Path(__file__).parents[1]
PAGES = [path for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))] if path.exists()]
FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,})(?P<info>[^`\n]*)$")
HARMLESS = {"cd", "export", "git", "source"}

# Runs the steps of one page in order, so that a command can use what a Python block wrote and the reverse. Commands run
# in the same process: starting one for each would take most of the time.
# Python blocks are compiled with their line number in the page: a traceback points into the page.
DRIVER = """
import json, pathlib, sys
page, steps = json.loads(pathlib.Path(sys.argv[1]).read_text())
names = {"__name__": "__main__"}
for step in steps:
    print(f"{page}:{step['line']}", flush=True)
    if step["kind"] == "python":
        exec(compile("\\n" * (step["line"] - 1) + step["text"], page, "exec"), names)
    else:
        from hfquant.cli import main  # not before a page's own first import of the package

        if status := main(step["command"]):
            sys.exit(f"{page}:{step['line']}: exit status {status}: {step['text']}")
"""


@dataclass
class Block:
    """A fenced block; `line` is where its first line stands in the page."""

    language: str
    run: bool
    line: int
    text: str


@dataclass
class Step:
    """Something to execute: a Python block, or one `hfquant` command line."""

    kind: str
    line: int
    text: str
    command: list[str] | None = None


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a Markdown text; one that is never closed is an error."""
    found: list[Block] = []
    opening: re.Match[str] | None = None
    for number, line in enumerate(page.splitlines(), 1):
        fence = FENCE.match(line)
        if opening is None:
            if fence:
                opening = fence
                language, *words = fence["info"].split() or [""]
                found.append(Block(language, "no-run" not in words, number + 1, ""))
        elif fence and not fence["info"].strip() and len(fence["ticks"]) >= len(opening["ticks"]):
            opening = None
        else:
            found[-1].text += line.removeprefix(opening["indent"]) + "\n"
    assert opening is None, f"the block at line {found[-1].line - 1} is never closed"
    return found


def command_lines(block: Block) -> list[tuple[int, str]]:
    """The commands of a shell block with their line numbers; comments, prompts and continuations resolved."""
    lines, pending, start = [], "", 0
    for number, line in enumerate(block.text.splitlines(), block.line):
        start = start if pending else number
        pending += line.strip().removeprefix("$ ")
        if pending.endswith("\\"):
            pending = pending[:-1] + " "
            continue
        if pending and not pending.startswith("#"):
            lines.append((start, pending))
        pending = ""
    return lines


def problem(words: list[str]) -> str | None:
    """Why a command of a page cannot work in this repository, or None."""
    program, *arguments = words
    plain = [word for word in arguments if not word.startswith("-") and "=" not in word]
    if program == "make":
        targets = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
        unknown = [word for word in plain if word not in targets]
        return f"Makefile has no target {unknown}" if unknown else None
    if program == "pip" and plain[:1] == ["install"]:
        return next(filter(None, map(requirement_problem, plain[1:])), None)
    if program in {"python", "python3"} and plain and plain[0].endswith(".py"):
        return None if (ROOT / plain[0]).exists() else f"{plain[0]} does not exist"
    return None if program in HARMLESS else "neither run nor checked: mark the block no-run"


def requirement_problem(requirement: str) -> str | None:
    """Why pip could not install this folder or these extras of hfquant, or None."""
    name, _, extras = requirement.removesuffix("]").partition("[")
    if name.startswith("."):
        if not (ROOT / name / "pyproject.toml").exists():
            return f"{name} has no pyproject.toml"
    elif name.startswith("hfquant") and name != "hfquant":
        folder = ROOT / "plugins" / name.removeprefix("hfquant-").replace("-", "_")
        if not folder.exists():
            return f"{name} is not a distribution of this repository"
    elif name != "hfquant":
        return None
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    unknown = {word.strip() for word in extras.split(",")} - set(declared) if extras else set()
    return f"no extra {sorted(unknown)}" if unknown else None


def steps(page: str) -> list[Step]:
    """What to execute in a page; raises AssertionError for a line that cannot work."""
    found = []
    for block in blocks(page):
        if block.language == "python":
            compile("\n" * (block.line - 1) + block.text, "page", "exec")
            if block.run:
                found.append(Step("python", block.line, block.text))
        elif block.language == "bash" and block.run:
            for line, text in command_lines(block):
                words = shlex.split(text, comments=True)
                if words[0] == "hfquant":
                    found.append(Step("command", line, text, words[1:]))
                else:
                    reason = problem(words)
                    assert reason is None, f"line {line}: {text}: {reason}"
    return found


def execute(name: str, page: str, folder: Path) -> str:
    """Run a page in a folder that looks like the root of the repository; what it printed."""
    work, support = folder / "work", folder / "support"
    work.mkdir()
    support.mkdir()
    for path in ROOT.iterdir():
        if not path.name.startswith("."):
            (work / path.name).symlink_to(path)
    (support / "steps.json").write_text(json.dumps([name, [asdict(step) for step in steps(page)]]))
    done = fresh.run(DRIVER, support / "steps.json", cwd=work)
    if done.returncode:
        pytest.fail(f"{name} does not work as shown:\n{done.stdout}{done.stderr}", pytrace=False)
    return done.stdout


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_page_works_as_shown(path: Path, tmp_path: Path) -> None:
    execute(str(path.relative_to(ROOT)), path.read_text(), tmp_path)


SAMPLE = """\
# Sample

```bash
make demo            # a comment
pip install ".[dev]"
pip install ./plugins/fp8
```

```python
from pathlib import Path

Path("note.txt").write_text(Path("LICENSE").read_text()[:80])
```

Text between the blocks.

```python
print(Path("note.txt").read_text().split()[0])
```

```python no-run
model = download("a-model-of-100-GB")
```

```text
anything at all
```
"""


def test_sample_runs_in_a_folder_of_its_own(tmp_path: Path) -> None:
    assert execute("sample.md", SAMPLE, tmp_path).split() == ["sample.md:10", "sample.md:18", "Apache"]
    assert not (ROOT / "note.txt").exists()


def test_failure_names_the_line_of_the_page(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match=r'"sample.md", line 4'):
        execute("sample.md", "# Title\n\n```python\n1 / 0\n```\n", tmp_path)


def test_commands_become_steps() -> None:
    page = "```bash\n# note\nhfquant quantize model \\\n    --bits 4\n$ hfquant doctor  # why\n```\n"
    found = steps(page)
    assert [step.line for step in found] == [3, 5]
    assert [step.command for step in found] == [["quantize", "model", "--bits", "4"], ["doctor"]]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("make coffee", "no target"),
        ('pip install ".[coffee]"', "no extra"),
        ("pip install ./plugins/coffee", "no pyproject.toml"),
        ("pip install hfquant-coffee", "not a distribution"),
        ("python benchmarks/coffee.py", "does not exist"),
        ("rm -rf coffee", "no-run"),
    ],
)
def test_wrong_command_is_found(line: str, reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        steps(f"```bash\n{line}\n```\n")
    assert steps(f"```bash no-run\n{line}\n```\n") == []


def test_unclosed_block_is_found() -> None:
    with pytest.raises(AssertionError, match="line 1 is never closed"):
        blocks("```python\nprint()\n")
