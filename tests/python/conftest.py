"""Shared by all Python tests: the GPU marker, and random state that no test leaks."""

import os
import random

import numpy as np
import pytest
import torch


def _has_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def pytest_configure():
    """Processes of `pytest -n` share the cores: each would take all of them, as would what tests start and compile."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        own = max(1, len(os.sched_getaffinity(0)) // workers)
        torch.set_num_threads(own)
        os.environ.setdefault("OMP_NUM_THREADS", str(own))
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(own))


def pytest_runtest_setup(item):
    """A test marked `gpu` skips without a Hopper GPU, or fails where MAGE_REQUIRE_GPU=1 says there is one."""
    if item.get_closest_marker("gpu") is None or _has_hopper():
        return
    if os.environ.get("MAGE_REQUIRE_GPU") == "1":
        pytest.fail("MAGE_REQUIRE_GPU=1, but there is no Hopper GPU", pytrace=False)
    pytest.skip("no Hopper GPU")


@pytest.fixture(autouse=True)
def _random_state():
    """Every test starts from the same seeds and leaves the state of its caller."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
