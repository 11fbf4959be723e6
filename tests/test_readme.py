"""README tells the truth: its snippets run, its commands, files and links exist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import agents
from experiments.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

# Each block in a namespace of its own, all in one process: what one registers, the next may use.
RUN_BLOCKS = """
import json, sys
for number, (line, code) in enumerate(json.load(sys.stdin)):
    print(f"-- README.md line {line}", flush=True)
    exec(compile("\\n" * (line - 1) + code, "README.md", "exec"), {"__name__": f"readme_{number}"})
"""


def blocks(language: str) -> list[tuple[int, str]]:
    """Return README's fenced blocks of a language as (line of the first code line, code)."""
    # Every block is matched, or the end of one would pass for the beginning of another.
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [(README.count("\n", 0, match.start(2)) + 1, match[2]) for match in found if match[1] == language]


def test_every_python_snippet_runs() -> None:
    snippets = blocks("python")
    assert len(snippets) >= 6
    done = subprocess.run(
        [sys.executable, "-c", RUN_BLOCKS], input=json.dumps(snippets), capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_every_command_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    shell = "\n".join(code for _, code in blocks("bash"))
    for target in re.findall(r"^make ([\w-]+)", shell, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"
    commands = set(re.findall(r"\bkvenv ([a-z]+)", shell)) | set(re.findall(r"^\| `kvenv (\w+)`", README, re.MULTILINE))
    assert commands == set(COMMANDS)


@pytest.mark.parametrize(
    "document", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "experiments/paper_index.md"]
)
def test_every_link_inside_the_repository_leads_somewhere(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        linked = (ROOT / document).parent / path if path else ROOT / document
        assert linked.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings], target


def test_the_file_tree_names_what_is_there() -> None:
    tree = next(block for _, block in blocks("") if block.startswith("kvenv/"))
    folder = ROOT
    for line in tree.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = ROOT / name
        assert (folder if not line.startswith(" ") else folder / name).exists(), line
    listed = set(re.findall(r"^  ([\w/.]+)", tree, re.MULTILINE))
    there = {path.name for path in (ROOT / "kvenv").glob("*.py")} - {"__init__.py"}
    assert there <= listed, f"missing in README's tree: {sorted(there - listed)}"


def test_the_paper_index_names_what_is_there() -> None:
    text = (ROOT / "experiments" / "paper_index.md").read_text(encoding="utf-8")
    paths = re.findall(r"`((?:kvenv|agents|experiments|tests)/[\w/.]+?)(?:::(\w+))?`", text)
    assert len(paths) > 60
    for path, test in paths:
        source = ROOT / path
        assert source.is_file(), path
        assert not test or f"def {test}(" in source.read_text(encoding="utf-8"), f"{path}::{test}"
    assert set(re.findall(r"`kvenv (\w+)", text)) <= set(COMMANDS)
    known = agents.names()
    assert set(re.findall(r"\| `([\w-]+)` \|$", text, re.MULTILINE)) <= set(known)
    # Every heuristic that comes with the package is somebody's.
    unnamed = {"random", "golden", "golden-expected", *agents.TRAINED}
    assert set(known) - unnamed == set(re.findall(r"^\| .*`agents/\w+\.py` \| `([\w-]+)` \|$", text, re.MULTILINE))
