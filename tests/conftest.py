"""One thread per test process, and the same random numbers in every run of a test."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest-xdist already uses every core; two pools on one core wait

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from qcompress.measuring.methods import reruns
from tests.leap.fixtures import leap, mock, one_connection, processors  # noqa: F401  (fixtures of several modules)

pytest_plugins = ["tests.durations"]

# The same examples in every run, and no verdict by the clock; `pytest --hypothesis-profile=default` searches anew.
settings.register_profile("steady", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")


DRAWN_WHILE_COLLECTING = pytest.StashKey[list[str]]()
"""Modules whose import changed the state of a global generator."""


def pytest_configure(config: pytest.Config) -> None:
    config.stash[DRAWN_WHILE_COLLECTING] = []


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    before = generator_states()
    report = yield
    if generator_states() != before:
        collector.config.stash[DRAWN_WHILE_COLLECTING].append(collector.nodeid)
    return report


def generator_states() -> tuple[bytes, str]:
    """State of PyTorch's and of NumPy's global generator."""
    return torch.get_rng_state().numpy().tobytes(), repr(np.random.get_state())  # noqa: NPY002


@pytest.fixture
def estimates_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `measure` by ``"sampled"`` run no option alone, for tests of what it estimates."""
    monkeypatch.setattr(reruns, "PASSES", 0)


@pytest.fixture(autouse=True)
def seeded_generators() -> None:
    """Start every test at the same state of the global generators, whatever ran before it.

    Fixtures of a wider scope and what a module holds come before this one: the former seed themselves, the latter
    is not random (`tests.test_architecture`).
    """
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
