"""Which processor is used; what happens without room or time on it, and with damaged files; times; mock and service."""

import itertools
import json
import types

import numpy as np
import pytest

from formulations.generators.families import signed_pairs
from formulations.generators.random_instances import layered_problem
from solvers import UnsupportedProblemError, solve
from solvers.sweep import sweep
from solvers.testing import optimum
from tests.quick import slow_but

pytest.importorskip("dwave.cloud")
from solvers.leap import device
from solvers.leap.decomposed import Decomposed
from solvers.leap.qpu import QuantumProcessor
from tests.leap.fixtures import one_large_group

SPARSE = layered_problem(4, rank=0, degree=2, bits=(2, 4, 8), seed=2)


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


# --- time and room ---------------------------------------------------------------------------------------------------

LARGE = signed_pairs(60, 2, 4, seed=1)


def test_parts_whose_embedding_gets_no_time_leave_the_answer_so_far(mock, monkeypatch):
    """No complete graph of that size fits; from the second search on, the search uses up what is left."""
    found, searches = device.find_embedding, []

    def slow(*args, timeout, **kwargs):
        searches.append(timeout)
        return found(*args, timeout=timeout, **kwargs) if len(searches) == 1 else {}

    monkeypatch.setattr(device, "find_embedding", slow)
    monkeypatch.setattr(device, "time", types.SimpleNamespace(perf_counter=itertools.count(0.0, 50.0).__next__))
    solution = solve(LARGE, "qpu-decomposed", time_limit=50.0, variables=40, initial=[0] * 60, **mock)
    assert len(searches) == 2
    assert solution.feasible
    assert solution.stop_reason == "TIME_LIMIT"
    assert len(solution.details["parts"]) == 1


def test_a_short_time_limit_is_called_one(mock):
    chain = signed_pairs(20, 2, 4, seed=1)
    assert solve(chain, "qpu", **mock).feasible
    with pytest.raises(UnsupportedProblemError, match="the time limit left .* too short; use a longer one"):
        solve(LARGE, "qpu", time_limit=0.01, **mock | {"size": 4})


def test_a_model_that_fits_as_a_complete_graph_needs_no_time_to_search(mock, monkeypatch):
    monkeypatch.setattr(device, "find_embedding", lambda *_, **__: {})
    monkeypatch.setattr(device, "DENSE", 1.0)
    assert solve(SPARSE, "qpu", **mock).objective == pytest.approx(optimum(SPARSE))


def test_a_group_larger_than_the_processor_is_told_before_anything_is_sent(processors):
    for options in ({}, {"variables": 6}):
        with pytest.raises(
            UnsupportedProblemError, match="group 'g10' alone, with 120 options, .*nothing was sent"
        ) as told:
            solve(one_large_group(), "qpu-decomposed", encoding="one-hot", num_reads=10, **options)
        assert "qpu-decomposed" not in str(told.value)
        with pytest.raises(UnsupportedProblemError, match="group 'g10' alone"):
            Decomposed(encoding="one-hot", **options).estimate(one_large_group())
    assert not processors.problems


def test_parts_that_do_not_fit_are_divided(mock, monkeypatch):
    embed = device.Device.embed

    def strict(self, bqm, *rest):
        if bqm.num_variables > 6:
            raise device.NoRoomError("too large")
        return embed(self, bqm, *rest)

    monkeypatch.setattr(device.Device, "embed", strict)
    solution = solve(layered_problem(8, bits=(2, 4, 8)), "qpu-decomposed", variables=16, initial=[0] * 8, **mock)
    assert {part["variables"] for part in solution.details["parts"]} <= {2, 4, 6}
    assert solution.details["improved"] > 0


# --- times -----------------------------------------------------------------------------------------------------------


def test_building_tuning_embedding_queue_and_access_have_times_of_their_own(processors, mock, monkeypatch):
    embed = device.Device.embed

    def slow(self, *args):
        deadline = device.time.perf_counter() + 0.2
        while device.time.perf_counter() < deadline:
            pass
        return embed(self, *args)

    monkeypatch.setattr(device.Device, "embed", slow)
    for solver in ("qpu", "qpu-decomposed"):
        for simulated in (True, False):
            options = mock if simulated else {"seed": 0, "num_reads": 20}
            solution = solve(SPARSE, solver, initial=[0] * 4, **options)
            timing = solution.timing
            assert {"build_s", "tune_s", "embed_s"} <= set(timing)
            assert simulated or {"queue_s", "qpu_s"} <= set(timing)
            assert timing["embed_s"] >= 0.2
            assert 0.0 <= timing["build_s"] < solution.wall_s - timing["embed_s"]


def test_tables_of_comparisons_show_the_times_apart(mock):
    from solvers.compare.runs import compare

    options = {name: value for name, value in mock.items() if name != "seed"}
    shown = compare(SPARSE, [QuantumProcessor(**options)], time_limit=10.0, seeds=[0]).to_markdown()
    (heads,) = [line for line in shown.splitlines() if "seconds by phase" in line]
    assert all(f" {word} " in heads for word in ("build", "tune", "embed", "solve"))


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["qpu", "qpu-decomposed"])
def test_numbers_of_numpy_are_numbers(mock, solver):
    options = {"num_reads": np.int64(50), "annealing_time_us": np.float32(20), "simulated": np.bool_(True)}
    seeded = solve(SPARSE, solver, **mock | options | {"seed": np.int64(3)})
    assert seeded.choice.tolist() == solve(SPARSE, solver, **mock | {"num_reads": 50, "seed": 3}).choice.tolist()
    json.dumps(seeded.to_json(), allow_nan=False)


PLAIN = layered_problem(4, bits=(2, 4, 8))
DAMAGED = ["", "[]", "{}", "cut", {"0": [10**6]}, {"0": "x"}, {"0": []}, "lacks 0", "overlap", "twice"]


@pytest.mark.parametrize("content", slow_but(["", "cut", {"0": [10**6]}, "lacks 0", "overlap"], DAMAGED), ids=str)
def test_a_stored_embedding_that_is_damaged_is_found_anew(mock, tmp_path, content):
    plain = solve(SPARSE, "qpu", **mock)
    (kept,) = tmp_path.glob("embedding-*.json")
    good = json.loads(kept.read_text())
    if isinstance(content, dict):
        content = json.dumps(good | content)
    elif content == "cut":
        content = kept.read_text()[:30]
    elif content == "lacks 0":
        content = json.dumps({v: chain for v, chain in good.items() if v != "0"})
    elif content == "overlap":
        content = json.dumps(good | {"0": good["1"]})
    elif content == "twice":
        content = json.dumps(good | {"0": good["0"] * 2})
    kept.write_text(content)
    assert solve(SPARSE, "qpu", **mock).details["qubits"] == plain.details["qubits"]
    assert json.loads(kept.read_text()) == good


@pytest.mark.parametrize("fault", ["no folder", "empty file"])
def test_a_cache_of_complete_graphs_that_cannot_be_used_is_done_without(mock, tmp_path, monkeypatch, fault):
    from minorminer import busclique

    place = tmp_path / "cache"
    monkeypatch.setattr(busclique.homebase, "user_data_dir", lambda *_: str(place))
    assert solve(PLAIN, "qpu", **mock).feasible
    files = [path for path in (place / "clique").iterdir() if not path.name.startswith(".")]
    assert files
    if fault == "no folder":
        place = tmp_path / "problem"
        place.write_text("a file where the folder would be")
    else:
        files[0].write_bytes(b"")
    assert solve(PLAIN, "qpu", **mock | {"jobs": str(tmp_path / "again")}).feasible
    assert QuantumProcessor(simulated=True, size=3).device().largest_clique() == 24
