"""The library of instances: records that can be recomputed, and improve only."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

import benchmarks.library
from benchmarks import kinds
from formulations import FormulationError, PairTerms, Problem
from formulations.generators.families import FAMILIES, member
from formulations.generators.random_instances import small_problem
from qcompress.cli import main
from solvers import judge, solve
from solvers.library import Library, Record, recomputed
from solvers.library.library import CHOICES, RECORDS, RECORDS_FILE

SMALL = {
    "multiple_choice_knapsack": {"groups": 3, "options": 3, "budgets": 2},
    "signed_pairs": {"groups": 4, "options": 3, "degree": 2, "largest": 5},
    "dense_pairs": {"groups": 3, "options": 3},
    "chain": {"groups": 4, "options": 2},
    "layers": {"num_groups": 3, "more_budgets": 1},
    "factor_and_pairs": {"num_groups": 3, "degree": 1},
    "random_max_cut": {"vertices": 6, "density": 0.6},
    "torus_max_cut": {"rows": 2, "columns": 3},
    "random_qubo": {"variables": 6, "density": 0.8},
    "quadratic_knapsack": {"items": 8, "density": 0.5},
}


@pytest.fixture
def library(tmp_path):
    (tmp_path / "library").mkdir()
    made = Library(tmp_path / "library")
    made.add(Record(name="qubo", origin="drawn", family="random_qubo", arguments=SMALL["random_qubo"]))
    return made


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_what_is_recomputed_is_what_the_problem_judges(data):
    problem = small_problem(data.draw(st.integers(0, 10**6)))
    choice = [data.draw(st.integers(0, len(options) - 1)) for options in problem.options]
    objective, excess = recomputed(problem, choice)
    judged = problem.evaluate(choice)
    assert objective == pytest.approx(judged.objective, rel=1e-9, abs=1e-9 * (1 + np.abs(problem.cost).sum()))
    assert set(excess) == set(judged.violations)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_draws_the_same_member_again_and_another_for_another_seed(family):
    first, again, other = (member(family, {**SMALL[family], "seed": seed}) for seed in (3, 3, 4))
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()


@pytest.mark.parametrize("family", FAMILIES)
def test_members_of_families_can_be_solved(family):
    assert solve(member(family, SMALL[family]), "brute-force").feasible


def test_a_cut_is_what_a_graph_says():
    problem = member("torus_max_cut", {"rows": 2, "columns": 3, "seed": 1})
    cuts = [problem.evaluate(choice).objective for choice in itertools.product((0, 1), repeat=6)]
    assert cuts == cuts[::-1]  # a cut is that of its other side
    assert cuts[0] == 0


def test_an_unknown_family_or_argument_is_named():
    with pytest.raises(FormulationError, match="no family 'cliques'"):
        member("cliques", {})
    with pytest.raises(FormulationError, match="unexpected keyword argument 'vertices'"):
        member("random_qubo", {"vertices": 3, "density": 1.0})


def test_records_improve_only(library):
    problem = library.problem("qubo")
    assert library.improve("qubo", judge(problem, [0] * 6))
    best = solve(problem, "brute-force")
    assert library.improve("qubo", best)
    assert not library.improve("qubo", judge(problem, [0] * 6))
    assert library.records["qubo"].best == best.objective
    assert library.records["qubo"].proven


def test_what_is_saved_is_loaded_and_holds(library):
    library.improve("qubo", solve(library.problem("qubo"), "brute-force"))
    library.save()
    loaded = Library(library.folder)
    assert loaded.records == library.records
    assert loaded.check("qubo") == []


def test_an_option_of_any_number_is_saved_as_it_is(library):
    library.choices["qubo"] = np.array([0, 70_000])
    library.save()
    assert Library(library.folder).choices["qubo"].tolist() == [0, 70_000]


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"best": -1e6}, "its choice costs"),
        ({"bound": 1e6}, "above the best known"),
        ({"best": float("nan")}, "its best nan is not a finite number"),
        ({"bound": float("nan")}, "its bound nan is not a finite number"),
        ({"bound": float("-inf")}, "its bound -inf is not a finite number"),
        ({"best": "much"}, "its best 'much' is not a finite number"),
        ({"arguments": [3]}, "must be a mapping"),
        ({"arguments": {"variables": "many", "density": 1.0}}, ""),
        ({"family": "", "file": "problem.npz", "reader": "none"}, "there is no reader 'none'"),
        ({"family": ""}, "neither a family nor a file"),
        ({"best": 10**400}, "is not a finite number"),
        ({"best": True}, "its best True is not a finite number"),
        ({"sums": {"offset": None}}, "its sum of offset None is not a finite number"),
        ({"fingerprint": ""}, "its fingerprint differs"),
        ({"fingerprint": "0" * 64}, "its fingerprint differs"),
        ({"sums": {"offset": 0.0}}, "its numbers differ"),
    ],
)
def test_a_record_that_does_not_hold_is_found(library, change, wrong):
    library.improve("qubo", solve(library.problem("qubo"), "brute-force"))
    library.records["qubo"] = replace(library.records["qubo"], **change)
    (library.folder / "problem.npz").touch()
    assert any(wrong in found for found in library.check("qubo"))


@pytest.mark.parametrize(
    "choice", [[0] * 5, [0] * 7, 0, [[0] * 6], [0, 0, 0, 0, 0, 2], [2, -1, 0, 0, 0, 0], [0.5] * 6, [float("nan")] * 6]
)
def test_a_choice_that_is_none_is_found(library, choice):
    library.improve("qubo", solve(library.problem("qubo"), "brute-force"))
    CHOICES.write_arrays(library.folder / "choices.npz", {}, {"qubo": np.array(choice)})
    library.choices = Library(library.folder).choices
    (wrong,) = library.check("qubo")
    assert wrong.startswith("its choice ")


def test_every_wrong_record_is_told_in_one_line(library, capsys):
    library.add(
        Record(name="other", origin="drawn", family="random_qubo", arguments={**SMALL["random_qubo"], "seed": 2})
    )
    for name in library.records:
        library.improve(name, solve(library.problem(name), "brute-force"))
    library.choices["qubo"] = library.choices["qubo"][1:]
    library.save()
    content = json.loads((library.folder / RECORDS_FILE).read_text())
    content["records"].append(content["records"][1])
    (library.folder / RECORDS_FILE).write_text(json.dumps(content))
    assert main(["instances", "verify", str(library.folder)]) == 1
    qubo, other, total = (line for line in capsys.readouterr().err.splitlines() if "recomputed" not in line)
    assert "qubo: its choice has the shape (5,), for 6 groups" in qubo
    assert "other: more than one record has this name" in other
    assert "2 records are wrong" in total


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda entry: {**entry, "extra": 1}, "qubo: it has unknown fields: extra"),
        (lambda entry: {"name": "qubo"}, "qubo: it lacks the fields: origin"),
        (lambda entry: {**entry, "best": 10**400}, "is not a finite number"),
        (lambda entry: {**entry, "best": "3"}, "qubo: its best '3' is not a finite number"),
        (lambda entry: {**entry, "sums": {"offset": "much"}}, "its sum of offset 'much' is not a finite number"),
        (lambda entry: {**entry, "sums": {"offset": None}}, "its sum of offset None is not a finite number"),
        (lambda entry: {**entry, "arguments": None}, "qubo: its arguments must be a mapping, found None"),
        (lambda entry: {**entry, "family": 5}, "qubo: its family must be a text, found 5"),
        (lambda entry: {**entry, "name": ["qubo"]}, "record 0: its name must be a text"),
        (lambda entry: [1], "record 0: a record must be a mapping, found [1]"),
    ],
)
def test_an_entry_that_is_no_record_is_told_beside_the_others_and_never_lost(library, capsys, damage, told):
    library.add(Record(name="right", origin="drawn", family="random_qubo", arguments=SMALL["random_qubo"]))
    library.save()
    content = json.loads((library.folder / RECORDS_FILE).read_text())
    content["records"][0] = damage(content["records"][0])
    (library.folder / RECORDS_FILE).write_text(json.dumps(content))
    assert main(["instances", "verify", str(library.folder)]) == 1
    printed = capsys.readouterr()
    line, total = (line for line in printed.err.splitlines() if "recomputed" not in line)
    assert told in line
    assert "1 records are wrong" in total
    assert "1 instances recomputed, 0 published" in printed.err + printed.out
    assert main(["instances", "verify", str(library.folder), "--only", told[-5:]]) == 0  # its error has it, no name
    capsys.readouterr()
    for command in ("list", "improve"):
        assert main(["instances", command, str(library.folder)]) == 1
        assert told in capsys.readouterr().err
    with pytest.raises(FormulationError, match="damaged records"):
        Library(library.folder).save()
    assert json.loads((library.folder / RECORDS_FILE).read_text()) == content


def test_a_benchmark_refuses_a_library_with_damaged_records_before_it_starts(library, monkeypatch):
    (library.folder / RECORDS_FILE).write_text(json.dumps({**RECORDS.header, "records": [1]}))
    monkeypatch.setattr(kinds, "LIBRARY", library.folder)
    monkeypatch.setattr(benchmarks.library, "add_missing", lambda _: pytest.fail("it drew problems"))
    monkeypatch.setattr("sys.argv", ["library", "--library", str(library.folder)])
    for start in (benchmarks.library.main, kinds.best_known, lambda: list(kinds.instances("", None))):
        with pytest.raises(FormulationError, match="damaged records"):
            start()


def test_a_record_with_neither_family_nor_file_is_not_a_published_one(library, capsys):
    library.records["qubo"] = replace(library.records["qubo"], family="")
    library.save()
    assert main(["instances", "verify", str(library.folder)]) == 1
    printed = capsys.readouterr()
    assert "neither a family nor a file" in printed.err
    assert "1 instances recomputed, 0 published" in printed.err + printed.out


def test_a_best_value_without_its_choice_is_found(library):
    library.improve("qubo", solve(library.problem("qubo"), "brute-force"))
    del library.choices["qubo"]
    assert any("no choice is recorded" in found for found in library.check("qubo"))


def test_an_objective_that_its_choice_does_not_have_is_not_taken_over(library):
    honest = judge(library.problem("qubo"), [0] * 6)
    library.improve("qubo", replace(honest, objective=-1e6))
    assert library.records["qubo"].best == honest.objective


@pytest.mark.slow
def test_the_records_of_this_repository_hold():
    library = Library(Path(__file__).parents[1] / "benchmarks" / "instances")
    here = [record.name for record in library if library.has(record.name)]
    assert len(here) >= 58
    assert {name: wrong for name in here if (wrong := library.check(name))} == {}


def test_a_choice_over_a_budget_is_found(tmp_path):
    library = Library(tmp_path)
    library.add(
        Record(name="k", origin="drawn", family="multiple_choice_knapsack", arguments=SMALL["multiple_choice_knapsack"])
    )
    problem = library.problem("k")
    most = [int(np.argmax(problem.resources["use0"][3 * group : 3 * group + 3])) for group in range(3)]
    library.choices["k"] = np.array(most)
    assert any("over the budget 'use0'" in found for found in library.check("k"))


def test_a_generator_that_changed_is_noticed(library):
    library.records["qubo"] = replace(library.records["qubo"], arguments={"variables": 7, "density": 0.8})
    with pytest.raises(FormulationError, match="fingerprint differs"):
        library.problem("qubo")
    assert ["fingerprint differs" in wrong for wrong in library.check("qubo")] == [True]


def test_a_generated_problem_without_sums_is_not_taken_for_the_recorded_one(library):
    library.records["qubo"] = replace(library.records["qubo"], sums={})
    assert ["its numbers differ" in wrong for wrong in library.check("qubo")] == [True]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("factor", "accepted"), [(1 + 2e-16, True), (1 - 2e-16, True), (1 + 1e-9, False)])
def test_a_generated_problem_may_differ_in_its_last_bits(family, tmp_path, monkeypatch, factor, accepted):
    """NumPy's exponential depends on the processor."""
    library = Library(tmp_path)
    library.add(Record(name="one", origin="drawn", family=family, arguments=SMALL[family]))
    original = library.problem("one")
    sparse, terms = original.pairs.sparse, original.pairs.factor
    other = original.derived(
        cost=original.cost * factor,
        resources={name: use * factor for name, use in original.resources.items()},
        budgets={name: budget * factor for name, budget in original.budgets.items()},
        pairs=replace(
            original.pairs,
            sparse=None if sparse is None else sparse * factor,
            factor=None if terms is None else terms * factor,
        ),
    )
    monkeypatch.setattr("solvers.library.library.member", lambda *_: other)
    assert (library.check("one") == []) == accepted


def numbers_of_every_kind() -> Problem:
    terms = scipy.sparse.csr_array(([1.0, 2.0, 3.0], ([0, 1, 1], [2, 2, 3])), shape=(4, 4))
    pairs = PairTerms(sparse=terms, factor=np.eye(4))
    tables = (["a", "b"], [["x", "y"]] * 2, [0, 3, 0, 5], {"bytes": [8, 4, 8, 4]}, {"bytes": 20})
    return Problem(*tables, pairs, 2.0, {"bytes": 1.0}, {"bytes": terms})


@pytest.mark.parametrize(
    "what", ["cost", "resources", "budgets", "no budgets", "sparse", "factor", "offset", "fixed", "resource pairs"]
)
def test_no_number_of_a_problem_changes_unseen_even_if_its_recorded_choice_costs_the_same(what, tmp_path, monkeypatch):
    """The bound is no proof for another problem."""
    library = Library(tmp_path)
    original = numbers_of_every_kind()
    monkeypatch.setattr("solvers.library.library.member", lambda *_: original)
    library.add(Record(name="one", origin="drawn", family="by hand"))
    library.improve("one", solve(original, "brute-force"))
    unchosen = np.setdiff1d(np.arange(original.num_options), original.flat(library.choices["one"]))[-1]
    lower = 1.0 - 1e-6 * (np.arange(original.num_options) == unchosen)
    pairs = original.pairs
    other = {
        "cost": {"cost": original.cost * lower - 1e-9 * (lower < 1)},
        "resources": {"resources": {name: use * lower for name, use in original.resources.items()}},
        "budgets": {"budgets": {name: budget * (1 + 1e-6) for name, budget in original.budgets.items()}},
        "no budgets": {"budgets": {}},
        "sparse": {"pairs": replace(pairs, sparse=(pairs.sparse * lower[:, None] * lower).tocsr())},
        "factor": {"pairs": replace(pairs, factor=pairs.factor * lower[:, None])},
        "offset": {"offset": original.offset + 1e-6},
        "fixed": {"fixed": {"bytes": 1.0 + 1e-6}},
        "resource pairs": {
            "resource_pairs": {"bytes": (original.resource_pairs["bytes"] * lower[:, None] * lower).tocsr()}
        },
    }[what]
    monkeypatch.setattr("solvers.library.library.member", lambda *_: original.derived(**other))
    differs = "its fingerprint differs" if what == "no budgets" else "its numbers differ"
    assert [differs in wrong for wrong in library.check("one")] == [True]


def test_published_instances_are_read_from_their_folder(tmp_path):
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "triangle.txt").write_text("3 3\n1 2 1\n2 3 1\n1 3 5\n")
    library = Library(tmp_path / "library", tmp_path / "published")
    library.add(Record(name="triangle", origin="a paper", licence="public", file="triangle.txt", reader="max-cut"))
    library.improve("triangle", solve(library.problem("triangle"), "brute-force"))
    library.save()
    assert library.records["triangle"].best == -6
    alone = Library(tmp_path / "library")
    assert not alone.has("triangle")
    with pytest.raises(FileNotFoundError, match="triangle"):
        alone.problem("triangle")


def test_the_table_of_solvers_counts_from_the_best_known_objective_or_a_better_one():
    rows = [
        {"kind": kind, "seed": 0, "solver": solver, "status": "FEASIBLE", "objective": objective, "wall_s": 1.0,
         "bound": None}
        for kind, solver, objective in [("a", "auto", -99.0), ("a", "ga", -98.0), ("b", "auto", -102.0)]
    ]  # fmt: skip
    text, lines = kinds.table(rows, ("auto", "ga"), {("a", 0): -100.0, ("b", 0): -100.0})
    assert [(line["best"], line["auto"], line.get("ga")) for line in lines] == [(-100.0, 1.0, 2.0), (-102.0, 0.0, None)]
    assert "on 1 of 2" in text
