"""Programs in surroundings that are not those of a terminal: closed standard descriptors, few descriptors, a full or
missing directory for temporary files."""

import pytest

from tests.core.helpers import run_driver


@pytest.mark.parametrize("closed", ["0", "1", "0, 1", "0, 1, 2"])
def test_a_program_without_standard_descriptors_has_a_cluster(no_cluster, tmp_path, closed):
    status, _, errors = run_driver(f"""
        import os
        for number in ({closed},):
            os.close(number)
        import pathlib, ray
        ray.init(num_cpus=1, log_to_driver=False)

        @ray.remote
        def double(x):
            return 2 * x

        pathlib.Path({str(tmp_path / "result")!r}).write_text(str(ray.get(double.remote(4))))
    """)
    assert status == 0, errors
    assert (tmp_path / "result").read_text() == "8"
