"""The wheel: what it needs, what importing it loads, and beside what it refuses to run.

It is built as `make test` builds everything, which takes seconds where the crates are compiled already, and
installed by pip in an environment of its own.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

pytestmark = [pytest.mark.skate, pytest.mark.slow, pytest.mark.timeout(600)]  # builds, and installs from an index

NOT_LOADED = {
    "asyncio", "concurrent.futures", "ctypes", "dataclasses", "email", "http", "importlib.metadata", "json", "logging",
    "multiprocessing", "numpy", "pathlib", "shutil", "socket", "ssl", "subprocess", "tempfile", "urllib", "uuid",
    "click", "psutil", "yaml",
}  # fmt: skip
"""Modules that `import ray` does not need; cloudpickle's own are counted apart."""

PROGRAM = """
import ray

@ray.remote
def square(x):
    return x * x

with ray.init(num_cpus=2):
    print(ray.get([square.remote(i) for i in range(4)]))
"""


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel of the sources as they are."""
    maturin = Path(sys.executable).parent / "maturin"
    if not maturin.exists():
        pytest.skip("maturin is not installed here; `make test` has it")
    directory = tmp_path_factory.mktemp("wheel")
    run(maturin, "build", "--quiet", "--out", directory, "--interpreter", sys.executable)
    [path] = directory.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """The interpreter of a clean environment into which the wheel was installed."""
    directory = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(directory, with_pip=True)
    python = directory / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel)
    return python


def site_packages(python: Path) -> Path:
    return Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))").strip())


def test_one_wheel_serves_all_supported_versions_of_python(wheel):
    assert re.fullmatch(r"skate-[\d.]+-cp311-abi3-\w+\.whl", wheel.name)


def test_the_wheel_holds_the_package_its_types_and_its_licence(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {"ray/__init__.py", "ray/py.typed", "ray/_core.pyi", "ray/_core.abi3.so"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    [entry_points] = [name for name in names if name.endswith("/entry_points.txt")]
    assert zipfile.ZipFile(wheel).read(entry_points).decode().split() == [
        "[console_scripts]", "ray=ray.scripts.scripts:main",
    ]  # fmt: skip
    assert {name.split("/")[0] for name in names} == {"ray", f"skate-{PROJECT['version']}.dist-info"}


def test_only_declared_dependencies_are_installed(python):
    listed = run(python, "-m", "pip", "list", "--format=freeze", "--disable-pip-version-check").lower().split()
    declared = {re.match(r"[\w-]+", requirement).group().lower() for requirement in PROJECT["dependencies"]}
    assert {line.split("==")[0] for line in listed} - {"pip", "setuptools", "wheel"} == {"skate", *declared}


def test_a_program_runs_with_nothing_else(python, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    assert "[0, 1, 4, 9]" in run(python, program, cwd=tmp_path)


def test_the_command_runs_with_nothing_else(python, tmp_path):
    command = python.parent / "ray"
    version = run(python, "-c", "import ray; print(ray.__version__)", cwd=tmp_path).strip()
    assert run(command, "--version", cwd=tmp_path) == f"ray, version {version}\n"
    assert run(python, "-m", "ray", "--version", cwd=tmp_path) == f"ray, version {version}\n"
    assert "Start a head, or a node that joins one." in run(command, "--help", cwd=tmp_path)


def test_importing_loads_only_what_is_needed(python, tmp_path):
    loaded = "import sys; before = set(sys.modules); import {}; print(*(set(sys.modules) - before))"
    by_ray = set(run(python, "-I", "-c", loaded.format("ray"), cwd=tmp_path).split())
    by_dependencies = set(run(python, "-I", "-c", loaded.format("cloudpickle, msgspec"), cwd=tmp_path).split())
    assert by_ray & NOT_LOADED - by_dependencies == set()
    assert {name for name in by_ray if name.startswith(("ray._node", "ray._control"))} == set()
    heavy = {"asyncio", "logging", "numpy", "ssl", "importlib.metadata"}
    assert by_ray & heavy == set()


def test_the_original_ray_beside_it_is_refused(python, tmp_path):
    other = site_packages(python) / "ray-2.60.0.dist-info"
    other.mkdir()
    try:
        done = subprocess.run([python, "-c", "import ray"], cwd=tmp_path, capture_output=True, text=True, check=False)
    finally:
        other.rmdir()
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: Skate cannot run beside the original Ray")
    assert str(other) in last
    assert "Install Skate in an environment of its own" in last
