"""Examples in documents and docstrings run, and what documents refer to exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"]


@pytest.mark.slow  # starts an interpreter and a cluster
def test_the_example_in_the_readme_prints_what_it_says():
    program = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    promised = re.search(r"print\(.*\)  # (.*)\n\Z", program).group(1)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == promised


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text())
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_makefile_targets_that_pages_name_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"`?make ([a-z-]+)[`\s]", (ROOT / page).read_text())}
    prose = {"put", "it", "run", "one", "sure", "room", "what", "of"}
    assert named - prose - targets == set()


def test_constants_in_the_table_of_limits_have_not_gone():
    page = (ROOT / "ARCHITECTURE.md").read_text()
    table = page[page.index("**Limits.**") : page.index("**Security.**")]
    names = {name for row in table.splitlines() for name in re.findall(r"`([A-Z][A-Z_]+)`", row)}
    sources = [*ROOT.glob("crates/*/src/**/*.rs"), *ROOT.glob("python/ray/**/*.py")]
    text = "\n".join(path.read_text() for path in sources)
    assert {name for name in names if not re.search(rf"\b{name}\b", text)} == set()


def test_functions_that_the_lives_pass_through_have_not_gone():
    page = (ROOT / "ARCHITECTURE.md").read_text()
    lives = page[page.index("## Life of a task") : page.index("## Code map")]
    sources = [*ROOT.glob("crates/*/src/**/*.rs"), *ROOT.glob("python/ray/**/*.py")]
    text = "\n".join(path.read_text() for path in sources)
    words = {word for code in re.findall(r"`([^`]+)`", lives) for word in re.findall(r"(?:::|\._?|^)(\w{4,})$", code)}
    assert {word for word in words if not re.search(rf"\b_?{word}\b", text)} == set()
