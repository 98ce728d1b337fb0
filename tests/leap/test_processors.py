"""Which processor is used, and with which settings: chains, schedules, gauges, embeddings; mock and service."""

import pytest

from formulations.generators.random_instances import layered_problem
from solvers import solve
from solvers.sweep import sweep

pytest.importorskip("dwave.cloud")

SPARSE = layered_problem(4, rank=0, degree=2, bits=(2, 4, 8), seed=2)


def pegasus(size=3, name="pegasus", load=0.0):
    """A processor with chains, as the service describes it."""
    from dwave.cloud.testing.mocks import qpu_pegasus_solver_data, qpu_problem_timing_data

    timing = qpu_problem_timing_data()
    properties = qpu_pegasus_solver_data(size, avg_load=load, problem_timing_data=timing)
    return properties | {"identity": {"name": name, "version": {"graph_id": name}}}


@pytest.fixture
def processors(leap):
    """Two of one size and a smaller one, whose loads say nothing good of the one that Ocean takes."""
    described = (pegasus(2, "small", 0.1), pegasus(3, "b", 0.2), pegasus(3, "a", 0.9))
    leap.solvers = {one["identity"]["name"]: one for one in described}
    return leap


def test_the_processor_with_most_qubits_is_used_by_a_whole_sweep_whatever_the_loads(processors):
    from dwave.system import DWaveSampler

    used = []

    def loads_change(point):
        used.append(point.solution.details["remote"])
        for load, one in enumerate(processors.solvers.values()):
            one["avg_load"] = (load + len(used)) % 3 / 3

    sweep(SPARSE, "bytes", 4, solver="qpu", seed=0, num_reads=20, on_point=loads_change)
    assert set(used) == {"a"}
    assert DWaveSampler().solver.num_active_qubits == len(processors.solvers["a"]["properties"]["qubits"])


def test_a_configured_choice_of_processors_keeps_its_own_order(processors, monkeypatch):
    monkeypatch.setenv("DWAVE_API_SOLVER", '{"qpu": true}')
    assert solve(SPARSE, "qpu", num_reads=20).details["remote"] == "a"
    monkeypatch.setenv("DWAVE_API_SOLVER", '{"qpu": true, "order_by": "avg_load"}')
    assert solve(SPARSE, "qpu", num_reads=20).details["remote"] == "small"
