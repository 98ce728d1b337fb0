"""`milp`: the integer program of `formulations.to_integer_program`, solved by HiGHS or CBC through PuLP.

MIP solvers compare with absolute tolerances (about 1e-6), so numbers are scaled first and results are checked:

* A dual bound L and an incumbent U are computed first. Options whose reduced cost reaches U - L are left out, and the
  objective is divided by U - L, so that the remaining gap has size 1, however small the scores are.
* A choice that the solver returns is evaluated like any other. If it exceeds a budget, it is cut off by a cover
  inequality (not every group may use as much as in that choice), and the program is solved again.
* PuLP's ``status`` is not used. The solver's own status is read, and its bound is used only if that status proves it.
"""

import re
import signal
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from formulations import Problem
from formulations.forms.integer_program import IntegerProgram, to_integer_program
from formulations.reductions.restriction import Restriction
from formulations.reductions.scaling import scaled
from solvers.base import Search
from solvers.exact.base import Linearised, linearised_s, recovering, require_time, undecided
from solvers.kernels.moves import Integers

BACKENDS = ("highs", "cbc")

SECONDS_PER_VARIABLE, SECONDS_PER_USE = 5e-5, 1e-5
"""Time in seconds to build the model, per option or product, and per use in a budget.

Measured with up to 400,000 options, 8 budgets or 60,000 products on a virtual machine of two cores, where other
processes run: about four times as long as it takes when they rest. PuLP makes a Python object of everything.
"""

PASSED_ON = 0.5
"""Time to pass PuLP's model on to the solver, which is done again after every cut, as a fraction of the above."""

GRACE_S = 0.2
"""Time in seconds that CBC may overrun before it is asked to stop, and after that before it is killed."""

CBC_DIGIT = 1e-3
"""Maximum error of the bound that CBC prints, which is rounded up or down."""

POLL_S = 0.1
"""Time in seconds between two checks whether HiGHS is done or Ctrl-C was pressed."""

SMALLEST_UNIT = 1e-6
"""The objective is divided by U - L, or by this times its largest effect if that is larger, to avoid huge numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Milp(Linearised):
    """Mixed-integer programming, with pair terms linearised by RLT.

    Args:
        backend: MIP solver to use, ``"highs"`` or ``"cbc"``.

    >>> from solvers import solve
    >>> problem = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})
    >>> solution = solve(problem, "milp", backend="highs")
    >>> solution.objective, str(solution.status)
    (1.0, 'OPTIMAL')
    """

    name: ClassVar[str] = "milp"
    summary: ClassVar[str] = "mixed-integer programming by HiGHS or CBC (PuLP); pair terms linearised"
    requires: ClassVar[tuple[str, ...]] = ("pulp", "highspy")

    words: ClassVar[Mapping[str, Collection[str]]] = {"backend": BACKENDS}
    backend: str = "highs"

    @staticmethod
    def build_s(problem: Problem) -> float:
        """Estimate the time in seconds to build the integer program of a problem."""
        return linearised_s(problem, SECONDS_PER_VARIABLE, SECONDS_PER_USE)

    def run(self, problem: Problem, search: Search) -> None:
        """Compute a bound and an incumbent, then solve the integer program on the options that they leave open."""
        part = undecided(problem, search)
        if part is None:
            return
        gap = np.inf if search.objective is None or search.bound is None else search.objective - search.bound
        size = max(min(gap, 1.0), SMALLEST_UNIT)
        with recovering(search):
            self._search(part, problem, size, search)

    def _search(self, part: Restriction, problem: Problem, size: float, search: Search) -> None:
        """Solve the integer program, with objectives in units of ``size``."""
        seconds = self.build_s(part.problem)
        require_time(search, seconds)
        with search.phase("build_s"):
            program = to_integer_program(scaled(part.problem, 1.0 / size).problem)
            start = None if search.choice is None else part.lower(search.choice)
            if start is not None:
                program.start_from(start)
        run = _cbc if self.backend == "cbc" else _highs
        while not search.expired():
            require_time(search, PASSED_ON * seconds)
            with search.phase("solve_s"):
                answer = run(program, search, warm=start is not None)
            if answer.bound is not None:
                bound = (
                    answer.bound + program.model.objective.constant
                ) * size  # PuLP does not pass the constant to solvers
                search.raise_bound(min(bound, np.inf if search.objective is None else search.objective))
            if answer.interrupted or answer.choice is None:
                break
            choice = part.lift(answer.choice)
            search.offer(choice)
            broken = problem.evaluate(choice).violations
            if not broken:
                break
            search.details["cuts"] = search.details.get("cuts", 0) + 1
            _cut_off(program, part.problem, answer.choice, part.problem.evaluate(answer.choice).violations or broken)
            start = None
        else:
            return
        if answer.complete:
            search.close()
        else:
            search.cut_short()
        if answer.interrupted:
            raise KeyboardInterrupt


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """The outcome of one run: a choice, a proven bound, and whether the search was complete."""

    choice: Integers | None
    bound: float | None
    complete: bool
    interrupted: bool = False


def _highs(program: IntegerProgram, search: Search, *, warm: bool) -> _Found:
    import highspy
    import pulp

    model = program.model
    solver = pulp.HiGHS(mip=False, msg=False, gapRel=0.0, gapAbs=0.0, threads=1)
    if not program.y:
        solver.optionsDict["presolve"] = "off"  # nothing is left to presolve, and it checks the clock too rarely
    solver.createAndConfigureSolver(model)
    solver.buildSolverModel(model)
    highs = model.solverModel
    integers = [variable.index for variable in model.variables() if variable.cat == pulp.LpInteger]
    kinds = np.full(len(integers), int(highspy.HighsVarType.kInteger), dtype=np.uint8)
    highs.changeColsIntegrality(
        len(integers), np.array(integers, dtype=np.int32), kinds
    )  # PuLP takes a second for 30,000
    if warm:
        start = highspy.HighsSolution()
        start.col_value = [variable.varValue for variable in model.variables()]
        highs.setSolution(start)
    if search.expired():
        return _Found(choice=None, bound=None, complete=False)
    if np.isfinite(search.remaining()):
        highs.setOptionValue("time_limit", search.remaining())
    _run_until_stopped(highs)
    status, info = highs.getModelStatus(), highs.getInfo()
    states = highspy.HighsModelStatus
    if status in (states.kInfeasible, states.kUnboundedOrInfeasible):  # no variable is unbounded
        return _Found(choice=None, bound=None, complete=True)
    has_choice = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
    if has_choice:
        solver.findSolutionValues(model)
    bound = float(info.mip_dual_bound)
    proves = info.valid and status in (states.kOptimal, states.kTimeLimit, states.kInterrupt) and np.isfinite(bound)
    return _Found(
        choice=program.decode() if has_choice else None,
        bound=bound if proves else None,
        complete=status == states.kOptimal,
        interrupted=status == states.kInterrupt,
    )


def _run_until_stopped(highs: Any) -> None:
    """Run HiGHS and stop it on Ctrl-C; its own handler would print to stdout, where only JSON may be expected."""
    highs.HandleUserInterrupt = True
    highs.startSolve()
    done = False
    while not done:
        try:
            done, _ = highs.wait(POLL_S)
        except KeyboardInterrupt:
            highs.cancelSolve()


def _cbc(program: IntegerProgram, search: Search, *, warm: bool) -> _Found:
    import pulp
    from pulp.apis.coin_api import pulp_cbc_path

    model = program.model
    with tempfile.TemporaryDirectory() as folder:
        paths = {kind: str(Path(folder, f"model.{kind}")) for kind in ("mps", "mst", "sol", "log")}
        cbc = pulp.COIN_CMD(path=pulp_cbc_path)
        variables, names, rows, _ = model.writeMPS(paths["mps"], rename=True)
        command = [pulp_cbc_path, paths["mps"]]
        if warm:
            cbc.writesol(paths["mst"], model, variables, names, rows)
            command += ["-mips", paths["mst"]]
        if np.isfinite(search.remaining()):
            command += ["-sec", f"{search.remaining():.2f}", "-timeMode", "elapsed"]
        command += ["-ratio", "0", "-allow", "0", "-increment", "1e-9", "-solve", "-printingOptions", "all"]
        _run_to_the_end([*command, "-solution", paths["sol"]], paths["log"], search.remaining())
        text = Path(paths["log"]).read_text()
        if not Path(paths["sol"]).exists():
            return _Found(choice=None, bound=None, complete=False)
        model.status, values, *_, model.sol_status = cbc.readsol_MPS(paths["sol"], model, variables, names, rows)
        model.assignVarsVals(values)
    if model.status == pulp.LpStatusInfeasible:
        return _Found(choice=None, bound=None, complete=True)
    complete = model.sol_status == pulp.LpSolutionOptimal and "Result - Optimal solution found" in text
    proves = re.search(r"^Result - (Optimal|Stopped)", text, re.MULTILINE)
    lower = re.search(r"^Lower bound:\s+(\S+)", text, re.MULTILINE)
    bound = float(lower.group(1)) - CBC_DIGIT if proves and lower else None
    has_choice = model.sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible)
    return _Found(choice=program.decode() if has_choice else None, bound=bound, complete=complete)


def _run_to_the_end(command: list[str], log: str, seconds: float) -> None:
    """Run CBC. If it exceeds its time limit, ask it to stop (it then writes its results), and finally kill it."""
    with Path(log).open("w") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)  # noqa: S603
        try:
            for patience in (seconds, GRACE_S):
                try:
                    process.wait(None if np.isinf(patience) else patience + GRACE_S)
                    break
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGINT)
        finally:
            process.kill()
            process.wait()


def _cut_off(program: IntegerProgram, problem: Problem, choice: Integers, broken: dict[str, float]) -> None:
    """Forbid a choice that exceeds a budget, and every choice in which all groups use at least as much."""
    import pulp

    name = next(iter(broken))
    use, chosen = problem.resources[name], problem.flat(choice)
    as_much = np.flatnonzero(use >= use[chosen][problem.group_of])
    row = pulp.LpAffineExpression([(program.x[v], 1.0) for v in as_much])
    program.model.addConstraint(pulp.LpConstraint(row, pulp.LpConstraintLE, None, problem.num_groups - 1.0))
