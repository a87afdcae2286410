"""Rules of the repository that no linter knows, applied to it and tested on examples.

A rule is a function from a file (its path in the repository, its text) to its breaches. Old breaches are listed
here and may only become fewer: a listed file that keeps the rule must be taken off its list.
"""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINES_MAX = 900

TOO_LONG = {
    "crates/skate-proto/tests/simulation.rs",  # one world, its schedule and its oracles
}

MACHINES = re.compile(
    r"python/ray/_control/\w+\.py"
    r"|python/ray/_node/(adoptions|bundles|directory|events|exits|fairness|lease_records|lease_words|leases|looks|manager"
    r"|memory|memory_victims|peer_protocol|processes|pulls|requests|resources|segments|spill_files|spills|turns|worker_records|workers)\.py"
)
IMPURE_MODULES = {
    "asyncio", "datetime", "multiprocessing", "os", "random", "secrets", "select", "selectors", "socket", "subprocess",
    "threading", "time", "uuid",
}  # fmt: skip
IMPURE_RUST = re.compile(r"\b(Instant|SystemTime)::now|\bstd::(net|thread|fs|process|os)\b|\blibc::|\brustix::")

# Written in two parts, so that this file keeps the rule.
MACHINE_PATH = re.compile(r"(?<![\w./-])(/" + r"(?:home|root|work|opt|mnt|Users)/[\w.-]+|[A-Z]:\\\\?Users)")
OPEN_END = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b(?!\(#\d+\))")

CODE = {".py", ".pyi", ".rs", ".sh"}
PRIVATE_PACKAGES = ("_control", "_node", "_runtime")


def repository_files() -> dict[str, str]:
    """The text of every file that is, or is about to be, in the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git repository: nobody says which files belong to it")
    names = sorted(name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file())
    return {name: (ROOT / name).read_text(encoding="utf-8", errors="replace") for name in names}


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    return repository_files()


# -- Rules ----------------------------------------------------------------------------------------


def impurities(path: str, text: str) -> list[str]:
    """Clocks, sleeps, threads, sockets and random sources in machines."""
    if MACHINES.fullmatch(path):
        found = {name.split(".")[0] for name in imported_modules(text)} & IMPURE_MODULES
        return [f"{path} imports {name}; a machine is told what it needs" for name in sorted(found)]
    if path.startswith("crates/skate-proto/src/"):
        code = "\n".join(line.split("//")[0] for line in text.splitlines())
        return [
            f"{path} names {match.group()}; a machine is told what it needs" for match in IMPURE_RUST.finditer(code)
        ]
    return []


def imported_modules(text: str) -> set[str]:
    """Dotted names of everything that is imported at run time, at any depth."""
    found = set()
    for node in statements(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def statements(tree: ast.AST) -> list[ast.AST]:
    """All nodes but those that only a type checker sees."""
    found, work = [], [tree]
    while work:
        node = work.pop()
        found.append(node)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            work += node.orelse
        else:
            work += ast.iter_child_nodes(node)
    return found


def excess_lines(path: str, text: str) -> list[str]:
    count = len(text.splitlines())
    if Path(path).suffix not in CODE or count <= LINES_MAX:
        return []
    return [f"{path} has {count} lines, and {LINES_MAX} are many: split it by the state that it owns"]


def machine_paths(path: str, text: str) -> list[str]:
    return [f"{path} names {match.group()}, which other machines do not have" for match in MACHINE_PATH.finditer(text)]


def open_ends(path: str, text: str) -> list[str]:
    if Path(path).suffix not in CODE:
        return []
    return [f"{path} has a {match.group()} without the number of an issue" for match in OPEN_END.finditer(text)]


def unmapped(paths: list[str], architecture: str) -> list[str]:
    """Directories with code that the code map does not name, and those that it names and nobody has."""
    section = re.search(r"^## Code map\n(.*?)(?=^## )", architecture, re.DOTALL | re.MULTILINE)
    if section is None:
        return ["ARCHITECTURE.md has no section `Code map`"]
    named = {name.rstrip("/") for name in re.findall(r"`([\w./-]+/)`", section.group(1))}
    held = {str(Path(path).parent) for path in paths if Path(path).suffix in CODE}
    missing = [f"{name}/ is missing from the code map in ARCHITECTURE.md" for name in sorted(held - named - {"."})]
    ghosts = [name for name in sorted(named) if not any(path.startswith(name + "/") for path in paths)]
    return missing + [f"the code map in ARCHITECTURE.md names {name}/, which does not exist" for name in ghosts]


def unimported(files: dict[str, str]) -> list[str]:
    """Private modules that no other file names, neither in an import nor as a string."""
    private = {}
    for path in files:
        parts = Path(path).parts
        if parts[:2] == ("python", "ray") and path.endswith(".py") and len(parts) > 3 and parts[2] in PRIVATE_PACKAGES:
            private[path] = ".".join(parts[1:])[: -len(".py")]
    named = set()
    for path, text in files.items():
        if path.endswith(".py") and not path.startswith("tests/"):
            tree = ast.parse(text)
            strings = {
                node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
            }
            everything = imported_names(tree) | strings
            named |= everything - {private.get(path, "")}
    entry = ("__init__", "__main__")
    return [
        f"nobody imports {path}"
        for path, module in private.items()
        if module.rpartition(".")[2] not in entry and module not in named
    ]


def imported_names(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


# -- The repository keeps them --------------------------------------------------------------------


def test_machines_have_no_clock_thread_socket_or_random_source(files):
    assert breaches(impurities, files) == []


def test_no_new_file_is_too_long(files):
    assert breaches(excess_lines, {path: text for path, text in files.items() if path not in TOO_LONG}) == []


def test_files_listed_as_too_long_still_are(files):
    assert [path for path in sorted(TOO_LONG) if not excess_lines(path, files.get(path, ""))] == []


def test_every_directory_is_in_the_code_map(files):
    assert unmapped(list(files), files["ARCHITECTURE.md"]) == []


def test_no_file_names_a_path_of_a_machine(files):
    assert breaches(machine_paths, files) == []


def test_open_ends_have_issues(files):
    assert breaches(open_ends, files) == []


def test_every_private_module_is_used(files):
    assert unimported(files) == []


def breaches(rule, files):
    return [breach for path, text in files.items() for breach in rule(path, text)]


# -- The rules find what they are for -------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("python/ray/_control/kv.py", "import time"),
        ("python/ray/_node/leases.py", "def f():\n    from random import choice"),
        ("crates/skate-proto/src/owner.rs", "let now = Instant::now();"),
        ("crates/skate-proto/src/owner.rs", "use std::net::TcpStream;"),
    ],
)
def test_an_impure_machine_is_found(path, text):
    assert impurities(path, text)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("python/ray/_node/shell.py", "import time"),
        ("python/ray/_control/kv.py", "if TYPE_CHECKING:\n    import time"),
        ("crates/skate-proto/src/owner.rs", "// not Instant::now()"),
        ("crates/skate-core/src/core/mod.rs", "Instant::now()"),
    ],
)
def test_a_shell_may_have_a_clock(path, text):
    assert impurities(path, text) == []


def test_a_long_file_is_found():
    assert excess_lines("a.py", "x\n" * (LINES_MAX + 1))
    assert excess_lines("a.py", "x\n" * LINES_MAX) == []
    assert excess_lines("Cargo.lock", "x\n" * (LINES_MAX + 1)) == []


@pytest.mark.parametrize("path", ["/home" + "/somebody/x", "see /work" + "/main", "C:\\" + "Users"])
def test_a_path_of_a_machine_is_found(path):
    assert machine_paths("a.md", path)


@pytest.mark.parametrize("path", ["/proc/self/fd", "/dev/shm", "tests/wo" + "rk/x", "a/ho" + "me/x"])
def test_other_paths_are_allowed(path):
    assert machine_paths("a.md", path) == []


def test_an_open_end_needs_an_issue():
    assert open_ends("a.py", "# TO" + "DO" + ": later")
    assert open_ends("a.py", "# TO" + "DO" + "(#7): later") == []


def test_the_code_map_is_compared_both_ways():
    page = "## Code map\n`a/` and `gone/`\n## Next\n`b/`\n"
    found = unmapped(["a/x.py", "b/y.rs", "docs/z.md"], page)
    assert [("b/" in line, "gone/" in line) for line in found] == [(True, False), (False, True)]


def test_a_module_that_nobody_imports_is_found():
    used = {"python/ray/_node/a.py": "from ray._node import b", "python/ray/_node/b.py": "", "x.py": "'ray._node.a'"}
    assert unimported(used) == []
    assert unimported({**used, "x.py": ""}) == ["nobody imports python/ray/_node/a.py"]
