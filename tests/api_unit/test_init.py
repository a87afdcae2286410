"""Arguments of ray.init, and what importing costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import fake_core
import pytest

import ray
from ray._runtime import local
from ray.job_config import JobConfig
from ray.runtime_env import RuntimeEnv

PYTHON = Path(__file__).parents[2] / "python"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"foo": 1}, RuntimeError),
        ({"address": "ray://host:10001"}, NotImplementedError),
        ({"address": "auto"}, NotImplementedError),
        ({"address": 3}, TypeError),
        ({"num_cpus": -1}, ValueError),
        ({"num_cpus": 1.5}, TypeError),
        ({"num_gpus": "1"}, TypeError),
        ({"resources": {"CPU": 1}}, ValueError),
        ({"resources": {"x": -1}}, ValueError),
        ({"object_store_memory": 1}, ValueError),
        ({"namespace": 3}, TypeError),
        ({"namespace": ""}, ValueError),
        ({"runtime_env": {"env_vars": {"A": 1}}}, TypeError),
        ({"runtime_env": {"working_dir": "."}}, NotImplementedError),
        ({"local_mode": True}, NotImplementedError),
        ({"include_dashboard": True}, NotImplementedError),
        ({"labels": {"a": "b"}}, NotImplementedError),
        ({"_system_config": {"a": 1}}, NotImplementedError),
        ({"job_config": 3}, TypeError),
    ],
)
def test_bad_argument_is_refused_by_name(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(arguments))):
        ray.init(**arguments)
    assert not ray.is_initialized()


def test_address_of_the_environment_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(NotImplementedError, match="RAY_ADDRESS"):
        ray.init()


def test_second_init(core: fake_core.Core) -> None:
    with pytest.raises(RuntimeError, match="ignore_reinit_error"):
        ray.init()
    assert ray.init(ignore_reinit_error=True)["node_id"] == ray.NodeID._from_key(7).hex()


def test_resources_in_fixed_point() -> None:
    amounts = local._resources(3, 1, {"x": 0.5}, 100 * 2**20, 1000)
    assert amounts == {
        "CPU": 30_000, "GPU": 10_000, "x": 5_000, "object_store_memory": 100 * 2**20 * 10_000, "memory": 10_000_000,
    }  # fmt: skip
    assert local._resources(0, 0, None, None, None)["CPU"] == 0
    assert local.available_cpus() >= 1


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert local.available_gpus() == 2
    assert local.gpu_ids(2) == [3, 5]
    assert local.gpu_ids(1) == [3]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert local.available_gpus() == 0


def test_job() -> None:
    job = local._job(JobConfig(ray_namespace="n", metadata={"a": "b"}), None, {"env_vars": {"A": "1"}})
    assert (job["namespace"], job["runtime_env"]) == ("n", {"env_vars": {"A": "1"}})
    assert local._job(None, None, None)["namespace"] != local._job(None, None, None)["namespace"]


def test_context_reads_like_a_dictionary() -> None:
    found = local.RayContext({"node_id": "ab", "session_dir": "/s"}, "2.60.0")
    assert found["node_id"] == "ab"
    assert dict(found) == {"node_id": "ab", "session_dir": "/s"}
    assert "node_id='ab'" in repr(found)
    assert found.dashboard_url is None


def test_runtime_env() -> None:
    env = RuntimeEnv(env_vars={"A": "1"}, config={"setup_timeout_seconds": 5})
    assert RuntimeEnv.deserialize(env.serialize()) == env
    assert env.env_vars() == {"A": "1"}
    env.set("env_vars", None)
    assert "env_vars" not in env
    with pytest.raises(ValueError, match="name of an environment variable"):
        RuntimeEnv(env_vars={"A=B": "1"})
    with pytest.raises(NotImplementedError, match="pip"):
        env["pip"] = ["x"]


def run(code: str) -> str:
    stub = f"import sys; sys.path[:0] = [{str(PYTHON)!r}, {str(Path(__file__).parent)!r}]\n"
    stub += "import fake_core; sys.modules['ray._core'] = fake_core\n"
    done = subprocess.run([sys.executable, "-c", stub + code], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_import_loads_little() -> None:
    loaded = run("before = set(sys.modules)\nimport ray\nprint(sorted(set(sys.modules) - before))")
    for module in ("asyncio", "cloudpickle", "msgspec", "logging", "inspect", "ssl", "numpy", "importlib.metadata",
                   "traceback", "dataclasses", "concurrent"):  # fmt: skip
        assert f"'{module}'" not in loaded, module


def test_lazy_names_are_there() -> None:
    assert ray.init is local.init
    for name in ray.__all__:
        assert getattr(ray, name) is not None
    for name in ray.util.__all__:
        assert getattr(ray.util, name) is not None
    with pytest.raises(AttributeError, match="timeline"):
        _ = ray.timeline


def test_original_beside_it_is_refused(tmp_path: Path) -> None:
    import shutil

    shutil.copytree(PYTHON / "ray", tmp_path / "ray", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "ray-2.60.0.dist-info").mkdir()
    out = run(f"sys.path.insert(0, {str(tmp_path)!r})\nimport ray")
    assert "ImportError: Skate cannot run beside the original Ray" in out
