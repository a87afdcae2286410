"""Small clusters of real machines in virtual time, with their validators on, under everything that can go wrong."""

from __future__ import annotations

import os

import pytest

from tests.simulation.adversary import Adversary

SEEDS = [int(os.environ["SKATE_SIMULATION_SEED"])] if "SKATE_SIMULATION_SEED" in os.environ else list(range(1, 13))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_small_world_is_safe_under_faults_and_comes_to_rest_after_them(seed):
    Adversary(seed).run()
