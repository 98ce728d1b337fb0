"""Every back end does what every solver must; and the checks catch solvers that do not."""

import contextlib
import importlib.metadata
import itertools
import time
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest
from dwave.samplers import SteepestDescentSampler

from formulations.generators.random_instances import layered_problem
from formulations.problem import limit_of
from solvers import Solver, SolverUnavailableError, Status, UnknownSolverError, available, solve
from solvers.registry import configured
from solvers.run import as_solver
from solvers.testing import ConformanceError, check_solver, checks, checks_for, optimum, problems

EFFORT = {  # small problems need no more, and these take their time
    "ga": {"population": 40, "generations": 40},
    "bifurcation": {"num_steps": 100, "rounds": 4},
    "openjij": {"num_sweeps": 50, "num_reads": 2, "rounds": 4},
}
HERE = [info.name for info in available() if info.available and not info.needs_network]


ROUNDS = {name: {"rounds": 4} for name in ("sa", "sqa", "tabu", "steepest-descent")}
"""As above, but a number of rounds would end the runs that a check cuts."""

CUTTING = (checks.check_time_limit, checks.check_interrupt_keeps_the_best)


@pytest.mark.parametrize(("name", "check"), [(name, check) for name in HERE for check in checks_for(name)])
def test_back_end(name, check):
    check(configured(as_solver(name), (EFFORT if check in CUTTING else EFFORT | ROUNDS).get(name, {})))


def test_every_back_end_of_a_plain_installation_is_checked():
    assert {"auto", "brute-force", "dp", "milp", "lagrangian", "greedy", "anneal", "sa", "ga"} <= set(HERE)


# --- a user's own solver -------------------------------------------------------------------------------------------


def leanest(problem):
    """Per group the option that uses least of what has a budget."""
    uses = sum((problem.resources[name] for name in problem.budgets), np.zeros(problem.num_options))
    return np.array([uses[a:b].argmin() for a, b in itertools.pairwise(problem.group_offsets)])


@dataclass(frozen=True)
class Descent(Solver):
    """A whole solver of somebody else's, in one file: try random choices, then improve one group at a time."""

    name = "descent"
    summary = "random choices, each improved one group at a time"

    starts: int = 20

    def run(self, problem, search):
        sizes = np.diff(problem.group_offsets)
        choice = leanest(problem)
        for _ in range(self.starts):
            if search.expired():
                return
            self._improve(problem, search, choice)
            choice = search.rng.integers(0, sizes)

    @staticmethod
    def _improve(problem, search, choice):
        search.offer(choice)
        for group in range(problem.num_groups):
            for option in range(len(problem.options[group])):
                if search.expired():
                    return
                changed = choice.copy()
                changed[group] = option
                if search.offer(changed):
                    choice = changed


def test_a_users_own_solver_passes_the_suite():
    assert "check_time_limit" in check_solver(Descent)


def test_class_instance_and_name_mean_the_same_solver():
    assert as_solver(Descent) == as_solver(Descent())
    assert as_solver("greedy") == as_solver(type(as_solver("greedy")))
    assert checks_for(Descent) == checks_for(Descent(starts=2))


def test_a_users_own_solver_is_found_through_its_entry_point(monkeypatch):
    def entry_points(*, group):
        return [importlib.metadata.EntryPoint("descent", "tests.test_conformance:Descent", group)]

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    assert "descent" in [info.name for info in available()]
    assert solve(layered_problem(3), "descent", seed=1, starts=3).options == {"starts": 3}
    checks.check_description(as_solver("descent"))


# --- broken solvers, each with the check that must catch it -----------------------------------------------------------


@dataclass(frozen=True)
class Toy(Solver):
    """Offers every choice of a small problem in turn, and a few of a large one: sound, but proves nothing."""

    name = "toy"
    summary = "a toy"

    def run(self, problem, search):
        for choice in self.choices(problem):
            search.offer(choice)

    def choices(self, problem):
        yield leanest(problem)
        sizes = (range(len(group)) for group in problem.options)
        yield from itertools.islice(itertools.product(*sizes), 3000)


class Silent(Toy):
    def run(self, problem, search):
        pass


class FalseProof(Toy):
    def run(self, problem, search):
        search.offer(next(self.choices(problem)))
        search.close()


class FalseDespair(Toy):
    def run(self, problem, search):
        search.close()


class HighBound(Toy):
    def run(self, problem, search):
        super().run(problem, search)
        search.raise_bound(1e9)


class NotExact(Toy):
    exact = True


class CountsEveryPairUse(Toy):
    """Judges budgets as if all their pair terms were met by every choice."""

    exact = native_use_pairs = True

    def run(self, problem, search):
        extra = {name: terms.sum() for name, terms in problem.resource_pairs.items()}
        for choice in self.choices(problem):
            usage = problem.derived(resource_pairs={}).evaluate(choice).usage
            if all(usage[name] + extra.get(name, 0.0) <= limit_of(most) for name, most in problem.budgets.items()):
                search.offer(choice)
        search.close()


class IgnoresPairUses(Toy):
    """Offers only the best choice without pair terms in budgets, and calls that everything."""

    exact = native_use_pairs = True

    def run(self, problem, search):
        judged = [(problem.derived(resource_pairs={}).evaluate(choice), choice) for choice in self.choices(problem)]
        feasible = [(own.objective, choice) for own, choice in judged if own.feasible]
        if feasible:
            search.offer(min(feasible, key=lambda entry: entry[0])[1])
        search.close()


class RefusesPairUses(Toy):
    native_use_pairs = True

    def refuse(self, problem):
        return "not with these" if problem.paired_budgets else ""


class Unseeded(Toy):
    calls = itertools.count()

    def run(self, problem, search):
        search.offer(next(itertools.islice(self.choices(problem), next(self.calls) % 2, None)))


class GloballySeeded(Toy):
    def run(self, problem, search):
        search.offer(next(itertools.islice(self.choices(problem), np.random.randint(2), None)))  # noqa: NPY002


class Absolute(Toy):
    def run(self, problem, search):
        super().run(problem, search) if np.ptp(search.original.cost) > 1e-9 else search.offer(
            next(self.choices(problem))
        )


class SwallowsInterrupt(Toy):
    def run(self, problem, search):
        with contextlib.suppress(KeyboardInterrupt):
            super().run(problem, search)


class SwallowsErrors(Toy):
    def run(self, problem, search):
        for choice in self.choices(problem):
            with contextlib.suppress(Exception):
                search.offer(choice)


class Secretive(Toy):
    """Judges for itself and tells nobody until the end."""

    def run(self, problem, search):
        search.stated._on_progress = None
        super().run(problem, search)


class Overtime(Toy):
    def run(self, problem, search):
        super().run(problem, search)
        time.perf_counter.now += 5.0  # the test's clock


class Meddles(Toy):
    def run(self, problem, search):
        super().run(problem, search)
        for use in problem.resources.values():
            use.flags.writeable = True
            use += 1.0


class TakesPairsAnyway(Toy):
    native_pairs = False

    def refuse(self, problem):
        return ""


class RefusesAll(Toy):
    def refuse(self, problem):
        return "not today"


class Nameless(Toy):
    summary = ""


class Misspelt(Toy):
    native_resource_pairs = True


class LazyClose(Toy):
    """Says that everything was considered, although its time was over."""

    def run(self, problem, search):
        for choice in itertools.product(*(range(len(group)) for group in problem.options)):
            if search.expired():
                break
            search.offer(choice)
        search.close()


class NotJson(Toy):
    def run(self, problem, search):
        super().run(problem, search)
        search.details["generator"] = search.rng


class PoolLies(Toy):
    def run(self, problem, search):
        super().run(problem, search)
        search.pool.append((tuple(search.choice), -1e6))


class Crashes(Toy):
    def run(self, problem, search):
        super().run(problem, search)
        if problem.num_groups == 1:
            raise IndexError("one group only")


@dataclass(frozen=True)
class Unpicklable(Toy):
    callback: Any = field(default=lambda: None)


@dataclass(frozen=True)
class Lax(Toy):
    minima: ClassVar = {"tries": 1}
    tries: int = 1

    def __post_init__(self):
        """Nothing is checked."""


BROKEN = [
    (Silent, "check_answers_are_sound", "no choice, though one exists"),
    (FalseProof, "check_answers_are_sound", "lies above the optimum|OPTIMAL, the optimum is"),
    (FalseDespair, "check_answers_are_sound", "called a feasible problem INFEASIBLE|no choice, though one exists"),
    (HighBound, "check_answers_are_sound", "bound .* lies above the optimum"),
    (NotExact, "check_equals_brute_force", "status FEASIBLE, must be OPTIMAL"),
    (NotExact, "check_budgets_that_clash", "must prove INFEASIBLE"),
    (CountsEveryPairUse, "check_pair_terms_in_budgets", "called a feasible problem INFEASIBLE"),
    (IgnoresPairUses, "check_pair_terms_in_budgets", "called a feasible problem INFEASIBLE"),
    (RefusesPairUses, "check_pair_terms_in_budgets", "declares native_use_pairs but refuses: not with these"),
    (NotExact, "check_pair_terms_in_budgets", "must be"),
    (Unseeded, "check_same_seed_same_answer", "from seed 11"),
    (GloballySeeded, "check_same_seed_same_answer", "from seed 11"),
    (Absolute, "check_scale_changes_no_choice", "objective times 1e-12 changed the choice"),
    (SwallowsInterrupt, "check_interrupt_keeps_the_best", "stop reason must be INTERRUPTED, found COMPLETED"),
    (Secretive, "check_interrupt_keeps_the_best", "never told on_progress"),
    (SwallowsErrors, "check_errors_of_on_progress_surface", "swallowed"),
    (Meddles, "check_inputs_are_unchanged", "changed the problem"),
    (TakesPairsAnyway, "check_pair_terms_are_refused", "solved a problem with pair terms"),
    (RefusesAll, "check_answers_are_sound", "refuses every small problem: not today"),
    (Nameless, "check_description", "summary is empty"),
    (
        Misspelt,
        "check_description",
        "native_resource_pairs: no such property of a solver; there are .*native_use_pairs",
    ),
    (LazyClose, "check_cut_runs_claim_nothing_false", "when its time was over at look 1 at the clock"),
    (NotJson, "check_answers_are_sound", "cannot be saved as JSON"),
    (PoolLies, "check_degenerate_problems", "its pool holds"),
    (Unpicklable, "check_pickle", "cannot be pickled"),
    (Lax, "check_option_limits", "accepted tries=0"),
]


def test_other_units_change_every_use_and_no_other_field():
    for problem in problems.paired_problems(True):
        changed = problems.in_other_units(problem, 4.0)
        assert changed.fingerprint() != problem.fingerprint()
        assert problems.in_other_units(changed, 0.25).fingerprint() == problem.fingerprint()
        for choice in itertools.product(*(range(len(options)) for options in problem.options)):
            before, after = problem.evaluate(choice), changed.evaluate(choice)
            assert after.objective == before.objective
            assert after.usage == {name: 4.0 * use for name, use in before.usage.items()}
            assert after.feasible == before.feasible


@pytest.mark.parametrize(("broken", "check", "found"), BROKEN)
def test_a_broken_solver_is_caught(broken, check, found):
    try:
        with pytest.raises(ConformanceError, match=f"toy: .*({found})"):
            getattr(checks, check)(broken())
    finally:
        problems.random_problems.cache_clear()  # one of them writes into the problems


def test_a_solver_that_overruns_its_time_limit_is_caught(monkeypatch):
    class Clock:
        now = 0.0

        def __call__(self):
            return self.now

    monkeypatch.setattr(time, "perf_counter", Clock())
    with pytest.raises(ConformanceError, match=r"took 5.00 s with time_limit=0.5 \(allowed: 1.55 s\)"):
        checks.check_time_limit(Overtime())
    checks.check_time_limit(Toy())


def test_the_toy_that_the_broken_ones_derive_from_is_sound():
    check_solver(Toy)


def test_check_solver_lists_every_failure_and_goes_on_after_a_crash():
    with pytest.raises(ConformanceError) as failed:
        check_solver(Crashes)
    lines = str(failed.value).splitlines()
    assert lines[0].endswith("checks failed for 'toy':")
    assert "  check_degenerate_problems: raised IndexError('one group only')" in lines
    assert isinstance(failed.value.__cause__, IndexError)


def test_an_unknown_or_missing_solver_is_named():
    class Missing(Toy):
        requires = ("a_package_that_is_not_there",)

    with pytest.raises(UnknownSolverError, match="no solver is called 'nobody'; known: auto, "):
        check_solver("nobody")
    with pytest.raises(SolverUnavailableError, match="needs a_package_that_is_not_there: pip install"):
        check_solver(Missing)


def test_the_oracle_knows_infeasible_from_optimal():
    problem = layered_problem(3, bits=(2, 4), seed=1)
    assert optimum(problem) == pytest.approx(solve(problem, "brute-force").objective)
    assert optimum(problem.with_budgets(bytes=0)) is None
    assert solve(problem, "brute-force").status is Status.OPTIMAL


def test_a_dimod_sampler_passes_the_suite():
    assert "check_answers_are_sound" in check_solver(SteepestDescentSampler())
