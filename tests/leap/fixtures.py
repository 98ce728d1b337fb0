"""What the tests of the Leap back ends share: a service, and a machine that is configured for it.

D-Wave's own libraries are imported only by the fixtures.
"""

import contextlib
import itertools
import types

import numpy as np
import pytest

from formulations import Problem
from tests.leap.server import TOKEN, LeapServer

HYBRID = ("leap-cqm", "leap-bqm", "leap-nl")
"""Back ends for the service's hybrid solvers."""

REMOTE = (*HYBRID, "qpu")
"""All back ends that send one problem a run."""


def hybrid_solvers():
    """Descriptions as the service publishes them, large enough for every test."""
    from dwave.cloud.testing.mocks import hybrid_bqm_solver_data, hybrid_cqm_solver_data, hybrid_nl_solver_data

    return (
        hybrid_cqm_solver_data(avg_load=0.1, maximum_number_of_biases=750_000_000),
        hybrid_bqm_solver_data(avg_load=0.1),
        hybrid_nl_solver_data(avg_load=0.1, maximum_state_size=52_000_000),
    )


def processor(size=24):
    """A quantum processor on which every qubit meets every other."""
    from dwave.cloud.testing.mocks import qpu_clique_solver_data, qpu_problem_timing_data

    more = {"problem_timing_data": qpu_problem_timing_data(), "problem_run_duration_range": [0.0, 1e7]}
    return qpu_clique_solver_data(size, avg_load=0.1, **more)


def pegasus(size=3, name="pegasus", load=0.0):
    """A processor with chains, as the service describes it."""
    from dwave.cloud.testing.mocks import qpu_pegasus_solver_data, qpu_problem_timing_data

    timing = qpu_problem_timing_data()
    properties = qpu_pegasus_solver_data(size, avg_load=load, problem_timing_data=timing)
    return properties | {"identity": {"name": name, "version": {"graph_id": name}}}


def one_large_group(options=120, others=10):
    """Small groups and one that no small processor holds one-hot."""
    rng, sizes = np.random.default_rng(0), [3] * others + [options]
    names, count = [f"g{i}" for i in range(len(sizes))], sum(sizes)
    uses = rng.integers(1, 50, count)
    labels = [[str(j) for j in range(size)] for size in sizes]
    return Problem(names, labels, rng.random(count), {"bytes": uses}, {"bytes": 300})


def interrupted_at(count):
    """Ends a run when it has told its progress so often."""
    countdown = itertools.count(1)

    def interrupt(_):
        if next(countdown) == count:
            raise KeyboardInterrupt

    return interrupt


def configure(monkeypatch, folder, endpoint, token=TOKEN):
    """Point D-Wave's client to ``endpoint`` by a configuration file of its own kind; work in ``folder``."""
    for name in ("DWAVE_API_TOKEN", "DWAVE_API_ENDPOINT", "DWAVE_API_SOLVER", "DWAVE_API_REGION", "DWAVE_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    lines = ["[defaults]", f"endpoint = {endpoint}", "http_retry_backoff_factor = 0", "http_retry_total = 3"]
    (folder / "dwave.conf").write_text("\n".join(lines + ([f"token = {token}"] if token else [])) + "\n")
    monkeypatch.setenv("DWAVE_CONFIG_FILE", str(folder / "dwave.conf"))
    monkeypatch.setenv("DWAVE_CACHE_ENABLED", "off")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    pauses = types.SimpleNamespace(sleep=lambda _: None)  # between the client's repetitions of an upload
    monkeypatch.setattr("dwave.cloud.utils.decorators.time", pauses)
    monkeypatch.setattr("solvers.leap.job.SETTLE_S", 0.0)
    monkeypatch.chdir(folder)


@pytest.fixture
def leap(tmp_path, monkeypatch):
    """A running service, and this machine configured for it."""
    with LeapServer(*hybrid_solvers(), processor()) as server:
        configure(monkeypatch, tmp_path, server.endpoint)
        yield server


@pytest.fixture
def one_connection(leap, monkeypatch):
    """All runs of a test over one connection, which spares the client's start each time."""
    from solvers.leap import connection

    with connection.connect() as line:

        @contextlib.contextmanager
        def same(config=None):
            yield line

        monkeypatch.setattr(connection, "connect", same)
        yield line


@pytest.fixture
def processors(leap):
    """Two of one size and a smaller one, whose loads say nothing good of the one that Ocean takes."""
    described = (pegasus(2, "small", 0.1), pegasus(3, "b", 0.2), pegasus(3, "a", 0.9))
    leap.solvers = {one["identity"]["name"]: one for one in described}
    return leap


@pytest.fixture
def mock(tmp_path):
    """Options for a mock that keeps its files here."""
    return {"simulated": True, "jobs": str(tmp_path), "size": 3, "seed": 0}
