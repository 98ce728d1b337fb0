"""Options of a processor: chain strength, schedule, gauges, own embeddings; what is not taken; mock and service."""

import contextlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

from formulations import FileFormatError
from formulations.generators.random_instances import layered_problem
from formulations.reductions.scaling import scaled
from qcompress.cli import main
from solvers import InvalidOptionError, Solution, UnsupportedProblemError, solve
from solvers.testing import optimum

pytest.importorskip("dwave.cloud")
from solvers.leap import device
from solvers.leap.decomposed import Decomposed
from solvers.leap.embedded import EmbeddedForm
from solvers.leap.errors import LeapConnectionError
from solvers.leap.job import Job, jobs_in
from solvers.leap.qpu import QuantumProcessor
from tests.leap.fixtures import one_large_group, pegasus

SPARSE = layered_problem(4, rank=0, degree=2, bits=(2, 4, 8), seed=2)


def form_of(problem, folder, **options):
    """The embedded form on a small processor, and the processor."""
    remote = type("Remote", (), {"name": "p", "properties": pegasus()["properties"]})
    values = QuantumProcessor(**options, jobs=str(folder)).option_values
    return EmbeddedForm.first(scaled(problem).problem, remote, values), remote


def test_the_chain_strength_is_relative_to_the_derived_one(mock):
    plain, twice = (solve(SPARSE, "qpu", chain_strength=factor, **mock).details for factor in (1.0, 2.0))
    assert twice["chain_strength"] == pytest.approx(2 * plain["chain_strength"])
    dense = layered_problem(8, bits=(2, 4, 8), seed=2)
    weak, strong = (solve(dense, "qpu", chain_strength=factor, **mock).details for factor in (0.01, 1.0))
    assert weak["chain_breaks"] > strong["chain_breaks"]


def test_schedule_and_anneal_time_are_sent(leap):
    solve(SPARSE, "qpu", anneal_schedule=[(0, 0), (10, 0.5), (20, 1)])
    solve(SPARSE, "qpu", annealing_time_us=50)
    sent = [one["params"] for one in leap.problems.values()]
    assert sent[0] == {"num_reads": 100, "anneal_schedule": [[0, 0], [10, 0.5], [20, 1]]}
    assert sent[1] == {"num_reads": 100, "annealing_time": 50}


WRONG = [
    ({"anneal_schedule": ((0, 0), (10, 1)), "annealing_time_us": 10.0}, "not both"),
    ({"anneal_schedule": ((0, 0),)}, "must begin at"),
    ({"anneal_schedule": ((0, 1), (10, 0.5), (20, 1))}, "reverse annealing is not offered"),
    ({"anneal_schedule": ((1, 0), (20, 1))}, "must begin at"),
    ({"anneal_schedule": ((0, 0), (20, 0.9))}, "end at fraction 1"),
    ({"anneal_schedule": ((0, 0), (10, 0.5), (10, 1))}, "times that rise"),
    ({"anneal_schedule": ((0, 0), (10, 0.5), (15, 0.4), (20, 1))}, "do not fall"),
    ({"anneal_schedule": (0, 1)}, "pairs of a time"),
    ({"chain_strength": 0.0}, "above 0"),
    ({"chain_strength": float("nan")}, "above 0"),
    ({"gauges": 0}, "at least 1"),
    ({"gauges": 11, "num_reads": 10}, "as many reads"),
    ({"annealing_time_us": -5.0}, "at least 0"),
    ({"annealing_time_us": float("nan")}, "at least 0"),
    ({"size": -1}, "at least 1"),
    ({"embedding": {"a": [1]}}, "each variable"),
    ({"embedding": {0: "ab"}}, "each variable"),
    ({"embedding": {1.7: [1]}}, "each variable"),
    ({"embedding": {float("inf"): [1]}}, "each variable"),
    ({"embedding": {0: [1], "0": [2]}}, "found two for 0"),
    ({"embedding": {0: [1, 2], 1: [3, 4, 3]}}, "each qubit of a chain once, found one twice for variable 1"),
    ({"embedding": "nowhere.json"}, "nowhere.json"),
]


@pytest.mark.parametrize(("options", "said"), WRONG)
@pytest.mark.parametrize("solver", ["qpu", "qpu-decomposed"])
def test_wrong_options_are_refused_before_anything_is_sent(leap, solver, options, said):
    for simulated in (False, True):
        with pytest.raises(InvalidOptionError, match=said):
            solve(SPARSE, solver, simulated=simulated, **options)
    assert not leap.problems


NOT_TAKEN = [
    ({"num_reads": 20_000}, "num_reads=20000, it takes 1 to 10000"),
    ({"annealing_time_us": 1e9}, "annealing_time_us=1e.09, it takes"),
    ({"annealing_time_us": float("inf")}, "annealing_time_us=inf, it takes"),
    ({"annealing_time_us": 0.01}, "annealing_time_us=0.01, it takes"),
    ({"anneal_schedule": ((0, 0), (5000, 1))}, "schedule of 5000 microseconds, it takes at most 2000"),
    ({"anneal_schedule": ((0, 0), (10, 0), (10.1, 1))}, "steeper than"),
    ({"annealing_time_us": 2000, "num_reads": 10_000}, "runs for 2.*e.07 microseconds, it takes at most 1e.07"),
    ({"anneal_schedule": ((0, 0), (2000, 1)), "num_reads": 10_000, "gauges": 1}, "runs for 2.*e.07 microseconds"),
]


@pytest.mark.parametrize(("options", "said"), NOT_TAKEN)
@pytest.mark.parametrize("solver", [QuantumProcessor, Decomposed])
def test_what_the_processor_does_not_take_is_refused_before_anything_is_sent(leap, mock, solver, options, said):
    for more in ({}, {name: value for name, value in mock.items() if name != "seed"}):
        assert re.search(said, solver(**options, **more).estimate(SPARSE).refusal)
        with pytest.raises(UnsupportedProblemError, match=said):
            solve(SPARSE, solver(**options, **more), initial=[0] * 4)
    assert not leap.problems


@pytest.mark.parametrize("solver", [QuantumProcessor, Decomposed])
def test_gauges_divide_the_reads_so_that_each_submission_is_short_enough(mock, solver):
    options = {"annealing_time_us": 2000, "num_reads": 10_000, **{k: v for k, v in mock.items() if k != "seed"}}
    assert solver(**options, gauges=2).estimate(SPARSE).refusal  # programming takes time too
    assert not solver(**options, gauges=3).estimate(SPARSE).refusal


def test_a_schedule_of_too_many_points(mock):
    points = tuple((float(k), k / 20) for k in range(21))
    with pytest.raises(UnsupportedProblemError, match="of 21 points, it takes at most 12"):
        solve(SPARSE, "qpu", anneal_schedule=points, **mock)


def test_gauges_change_signs_of_whole_chains_and_no_energies(tmp_path):
    form, remote = form_of(layered_problem(8, bits=(2, 4, 8), seed=2), tmp_path, gauges=3)
    rng = np.random.default_rng(0)
    spins = rng.choice([-1, 1], size=form.source.num_variables)
    wanted = form.source.energy(dict(enumerate(spins.tolist())))
    assert max(map(len, form.chains.values())) > 1
    biases = set()
    for gauge in range(3):
        model, signs = form.on_device(remote.properties, gauge), form.signs(gauge)
        biases.add(tuple(model.linear.values()))
        whole = {qubit: int(spins[v] * signs[v]) for v, chain in form.chains.items() for qubit in chain}
        assert model.energy(whole) == pytest.approx(wanted, abs=1e-6)
        inside = [
            bias for (p, q), bias in model.quadratic.items() if any({p, q} <= set(c) for c in form.chains.values())
        ]
        assert max(inside) < 0
    assert len(biases) == 3


def test_gauges_share_the_reads_of_the_mock_and_of_the_service(processors, mock):
    problem = layered_problem(5, bits=(2, 4, 8), seed=2)
    simulated = solve(problem, "qpu", num_reads=100, gauges=3, **mock)
    assert simulated.details["samples"] == 100
    assert simulated.objective == pytest.approx(optimum(problem))
    solution = solve(problem, "qpu", num_reads=100, gauges=3)
    sent = list(processors.problems.values())
    assert [one["params"]["num_reads"] for one in sent] == [34, 33, 33]
    assert len({one["data"]["lin"] for one in sent}) == 3
    assert solution.details["samples"] == 100
    assert solution.objective == pytest.approx(optimum(problem))
    assert solution.timing["qpu_s"] == pytest.approx(3 * 0.02)


def test_every_gauge_is_charged(processors):
    one, three = (QuantumProcessor(gauges=gauges, num_reads=90) for gauges in (1, 3))
    few = QuantumProcessor(num_reads=30)
    assert three.estimate(SPARSE).charge_s == pytest.approx(3 * few.estimate(SPARSE).charge_s)
    assert three.estimate(SPARSE).charge_s > one.estimate(SPARSE).charge_s
    solve(SPARSE, Decomposed(gauges=3, num_reads=30, calls=2, variables=4), seed=0, initial=[0] * 4)
    assert len(processors.problems) == 6
    assert [job.sent for job in jobs_in("leap-jobs")] == [True, True]


def test_gauges_go_on_where_the_connection_was_lost(leap, tmp_path, monkeypatch):
    """Nothing is sent twice, whichever answer was lost."""

    def job():
        return solve(SPARSE, "qpu", num_reads=10, gauges=2, wait=False)

    job()
    requests, seen = len(leap.requests), set()
    for k in range(requests):
        monkeypatch.chdir((tmp_path / f"{k}") if (tmp_path / f"{k}").mkdir() is None else tmp_path)
        leap.problems.clear()
        leap.requests.clear()
        leap.drop_at, leap.drop_on, leap.drop_after = k, True, True
        with contextlib.suppress(LeapConnectionError):
            job()
        leap.restart()
        (begun,) = jobs_in("leap-jobs") or [job()]
        refreshed = begun.refresh()
        assert refreshed.status == ("NOT SENT", "PARTLY SENT", "COMPLETED")[len(refreshed.problem_ids)]
        seen.add(refreshed.status)
        assert Job.load(begun.path).fetch().details["samples"] == 10
        assert len(leap.problems) == 2, f"dropped at request {k}"
        assert Job.load(begun.path).status == "COMPLETED"
    assert seen == {"PARTLY SENT", "COMPLETED"}


def test_an_own_embedding_is_used(processors, mock, tmp_path, monkeypatch):
    solve(SPARSE, "qpu", **mock)
    (kept,) = tmp_path.glob("embedding-*.json")
    chains = {int(v): chain for v, chain in json.loads(kept.read_text()).items()}
    monkeypatch.setattr(device.Device, "embed", lambda *_: pytest.fail("embedded anew"))
    (tmp_path / "own.json").write_text(kept.read_text())
    for own in (chains, {str(v): tuple(np.array(chain)) for v, chain in chains.items()}, str(tmp_path / "own.json")):
        solution = solve(SPARSE, "qpu", embedding=own, **mock)
        assert solution.details["qubits"] == sum(map(len, chains.values()))
        assert solution.objective == pytest.approx(optimum(SPARSE))
        json.dumps(solution.to_json(), allow_nan=False)
    sent = solve(SPARSE, "qpu", embedding=chains, num_reads=10, wait=False)
    assert sent.record["chains"] == list(chains.values())
    assert Job.load(sent.path).fetch().feasible


def test_the_file_of_an_embedding_is_read_at_once(tmp_path):
    file = tmp_path / "own.json"
    file.write_text('{"0": [3, 7]}')
    solver = QuantumProcessor(embedding=str(file))
    assert solver == QuantumProcessor(embedding={0: [3, 7]})
    file.write_text('{"0": [3, 8]}')
    assert solver != QuantumProcessor(embedding=str(file))
    for damaged in ("{", "[1]"):
        file.write_text(damaged)
        with pytest.raises(FileFormatError, match="own.json"):
            QuantumProcessor(embedding=str(file))


def test_an_embedding_that_does_not_fit_is_refused_before_anything_is_sent(processors, mock, tmp_path):
    solve(SPARSE, "qpu", **mock)
    (kept,) = tmp_path.glob("embedding-*.json")
    good = {int(v): chain for v, chain in json.loads(kept.read_text()).items()}
    graph = QuantumProcessor(simulated=True, size=3).device().graph()
    used = {qubit for chain in good.values() for qubit in chain}
    far = next(qubit for qubit in graph if qubit not in used and not set(graph[qubit]) & set(good[0]))
    wrong = [
        {v: chain for v, chain in good.items() if v != 3},
        {**good, 0: []},
        {**good, 0: [10**6]},
        {**good, 0: good[1]},
        {**good, 0: [*good[0], far]},
        {v: [qubit] for v, qubit in enumerate(range(30, 38))},
    ]
    for embedding in wrong:
        for more in ({}, mock):
            with pytest.raises(InvalidOptionError, match="'embedding' does not fit a model of 8 variables"):
                solve(SPARSE, "qpu", embedding=embedding, **more)
    assert not processors.problems


def test_an_own_embedding_of_a_complete_graph_serves_all_parts(mock):
    from minorminer import busclique

    graph = QuantumProcessor(simulated=True, size=3).device().graph()
    clique = busclique.find_clique_embedding(6, graph)
    options = mock | {"initial": [0] * 8, "calls": 4}
    problem = layered_problem(8, bits=(2, 4, 8))
    solution = solve(problem, "qpu-decomposed", embedding=clique, **options)
    assert solution.details["room"] == 6
    assert {part["variables"] for part in solution.details["parts"]} <= {2, 4, 6}
    assert solution.details["improved"] > 0
    with pytest.raises(InvalidOptionError, match="'embedding' does not fit a model of 6 variables and 15 couplings"):
        solve(problem, "qpu-decomposed", embedding={v: [qubit] for v, qubit in enumerate(range(30, 36))}, **options)
    with pytest.raises(UnsupportedProblemError, match="'g2' alone, with 20 options"):
        solve(one_large_group(20, 2), "qpu-decomposed", embedding=clique, **mock)


def test_the_room_of_large_groups_is_tried_once_for_each_size_and_not_after_the_limit(mock, monkeypatch):
    problem = one_large_group(6, others=3)
    tried, embed = [], EmbeddedForm.embed

    def counted(form, *others):
        tried.append(form.encoded.bqm.num_variables)
        embed(form, *others)

    monkeypatch.setattr(EmbeddedForm, "embed", counted)
    monkeypatch.setattr(device.Device, "largest_clique", lambda _: 1)
    Decomposed(**{name: value for name, value in mock.items() if name != "seed"}).estimate(problem)
    assert tried == [5, 2]
    tried.clear()
    solution = solve(problem, "qpu-decomposed", initial=[0] * 4, time_limit=1e-9, **mock)
    assert solution.stop_reason == "TIME_LIMIT"
    assert not tried


def test_options_of_a_processor_on_the_command_line(processors, tmp_path, capsys):
    SPARSE.save(tmp_path / "problem.npz")
    simulated = solve(SPARSE, "qpu", simulated=True, size=3, jobs=str(tmp_path), seed=0)
    (kept,) = tmp_path.glob("embedding-*.json")
    given = ("chain_strength=1.5", "gauges=2", "anneal_schedule=((0, 0), (10, 0.5), (20, 1))", f"embedding={kept}")
    words = [word for option in given for word in ("--option", option)]
    assert main(["leap", "submit", "problem.npz", "--solver", "qpu", *words, "--json"]) == 0
    assert [one["params"]["num_reads"] for one in processors.problems.values()] == [50, 50]
    assert all(one["params"]["anneal_schedule"][1] == [10, 0.5] for one in processors.problems.values())
    told = json.loads(capsys.readouterr().out)
    assert told["problem_ids"] == list(processors.problems)
    job = told["job"]
    assert main(["leap", "fetch", job]) == 0
    solution = Solution.load(Path(job.replace(".job.", ".solution.")))
    assert solution.details["chain_strength"] == pytest.approx(1.5 * simulated.details["chain_strength"])
    mock = ("--option", "simulated=true", "--option", "size=3")
    assert main(["solve", "problem.npz", "--solver", "qpu", *words, *mock]) == 0
