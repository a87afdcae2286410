"""Where and when a node spills, as arguments and the environment say it."""

from __future__ import annotations

import json

import pytest

from ray._node.spill_settings import SpillSettings, as_environment, read_spill_settings


def config(directory: object) -> str:
    return json.dumps({"type": "filesystem", "params": {"directory_path": directory}})


def test_nothing_said_is_the_session_directory():
    assert read_spill_settings(None, {}) == SpillSettings()


def test_the_argument_goes_before_the_environment_and_the_directory_is_made(tmp_path):
    here, there = str(tmp_path / "a" / "b"), str(tmp_path / "c")
    environ = {"RAY_object_spilling_directory": there, "RAY_object_spilling_config": config("/nowhere")}
    assert read_spill_settings(here, environ).directory == here
    assert (tmp_path / "a" / "b").is_dir()
    assert read_spill_settings(None, environ).directory == there


def test_the_config_names_a_directory_or_several_or_a_file_url(tmp_path):
    for named in (str(tmp_path), [str(tmp_path), "/other"], f"file://{tmp_path}"):
        assert read_spill_settings(None, {"RAY_object_spilling_config": config(named)}).directory == str(tmp_path)
    remote = '{"type": "smart_open", "params": {"uri": "s3://bucket/spilled"}}'
    with pytest.raises(NotImplementedError, match="s3://bucket"):
        read_spill_settings(None, {"RAY_object_spilling_config": remote})


@pytest.mark.parametrize("text", ["{", "[]", '{"type": "filesystem"}', '{"type": "filesystem", "params": {}}'])
def test_a_config_that_makes_no_sense_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match="is to be JSON such as"):
        read_spill_settings(None, {"RAY_object_spilling_config": text})


def test_a_directory_that_cannot_be_is_refused_and_named(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ValueError, match=r"object_spilling_directory is .*file"):
        read_spill_settings(str(file), {})


@pytest.mark.parametrize("name", ["RAY_object_spilling_threshold", "RAY_local_fs_capacity_threshold"])
def test_shares_are_above_zero_and_at_most_one(name):
    for text in ("0", "1.1", "much"):
        with pytest.raises(ValueError, match=name):
            read_spill_settings(None, {name: text})
    assert 0.5 in (
        read_spill_settings(None, {name: "0.5"}).high_water_share,
        read_spill_settings(None, {name: "0.5"}).capacity_share,
    )


def test_system_config_says_the_same_as_the_environment(tmp_path):
    said = as_environment(
        {
            "object_spilling_config": {"type": "filesystem", "params": {"directory_path": str(tmp_path)}},
            "object_spilling_threshold": 0.6,
            "local_fs_capacity_threshold": 0.9,
            "automatic_object_spilling_enabled": True,
            "min_spilling_size": 1,
        }
    )
    assert read_spill_settings(None, said) == SpillSettings(str(tmp_path), 0.6, 0.9, True)
    before = {"RAY_object_spilling_directory": str(tmp_path / "before")}
    said = as_environment({"object_spilling_config": config(str(tmp_path))})
    assert read_spill_settings(None, {**before, **said}).directory == str(tmp_path)
    assert not read_spill_settings(None, as_environment({"automatic_object_spilling_enabled": False})).enabled


def test_other_keys_of_system_config_are_refused_by_name():
    with pytest.raises(NotImplementedError, match="'raylet_heartbeat'"):
        as_environment({"raylet_heartbeat": 1})
    with pytest.raises(TypeError, match="dict"):
        as_environment("{}")  # type: ignore[arg-type]
