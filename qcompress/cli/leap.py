"""``leap``: send problems to D-Wave's service, as jobs that outlive the command.

    submit PROBLEM --solver leap-cqm  ──▶ leap-jobs/….job.json ──▶ status ──▶ fetch ──▶ solution.json

The API token is read from ``DWAVE_API_TOKEN`` or from D-Wave's configuration file, never from the command line.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qcompress.cli import arguments
from qcompress.cli.console import complain, print_json, print_lines, print_table, say
from qcompress.cli.printing import print_solution

if TYPE_CHECKING:
    from solvers.leap.estimate import Estimate
    from solvers.leap.hybrid import LeapSolver
    from solvers.leap.job import Job

JOBS = "leap-jobs"

JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="A job file, as written by 'qcompress leap submit'.")]
Jobs = Annotated[Path, typer.Option("--jobs", help="Folder for job files.", callback=arguments.a_folder)]


def register(app: typer.Typer) -> None:
    """Add the ``leap`` commands."""
    leap = typer.Typer(
        help="Send problems to D-Wave's Leap service and fetch the answers.", rich_markup_mode="markdown"
    )
    leap.command()(submit)
    leap.command()(status)
    leap.command()(fetch)
    leap.command("list")(list_jobs)
    leap.command("solvers")(list_solvers)
    app.add_typer(leap, name="leap", no_args_is_help=True)


def submit(
    problem_file: arguments.ProblemFile,
    solver: Annotated[
        str,
        typer.Option("--solver", "-s", help="leap-cqm, leap-nl, leap-bqm or qpu (with --dry-run also qpu-decomposed)."),
    ],
    time_limit: Annotated[
        float | None, typer.Option(help="Seconds for the service's solver. Default: the minimum it accepts.", min=0)
    ] = None,
    option: arguments.SolverOptions = None,
    jobs: Jobs = Path(JOBS),
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Show the size, and from the service the minimum time and expected charge; send no problem. "
            "Without a token or the network, show what is known without the service.",
        ),
    ] = False,
    as_json: arguments.AsJson = False,
) -> int:
    """Send a problem to D-Wave's service and write a job file without waiting for the answer.

    Example: `qcompress leap submit problem.npz --solver leap-cqm --time-limit 10`
    """
    from formulations import Problem
    from solvers import registry
    from solvers.leap.hybrid import LeapSolver
    from solvers.run import solve

    problem = Problem.load(problem_file)
    options = {"jobs": str(jobs)} | arguments.assignments(option or [], "--option")
    solver_type = registry.solver_class(solver)
    if not issubclass(solver_type, LeapSolver) or not (solver_type.has_jobs or dry_run):
        known = [name for name in registry.names() if getattr(registry.solver_class(name), "has_jobs", False)]
        raise typer.BadParameter(f"--solver must be one of {', '.join(known)}, found {solver!r}.")
    back_end = registry.configured(solver_type(), options)
    assert isinstance(back_end, LeapSolver)  # noqa: S101  (checked above)
    if dry_run:
        problem.require_reachable_budgets()
        back_end.require(problem)
        return _show_estimates(_estimates(back_end, problem, time_limit), as_json)
    job = solve(problem, back_end, wait=False, time_limit=time_limit)
    say(f"submitted to {job.remote} as {job.problem_id}; expected charge {job.charge_s:.3g} s")
    say(f"next: qcompress leap fetch {job.path}")
    if as_json:
        print_json(_job_json(job))
    else:
        print_lines(str(job.path))
    return 0


def status(job_file: JobFile, as_json: arguments.AsJson = False) -> None:
    """Ask the service for the state of a job. This sends no problem.

    Example: `qcompress leap status leap-jobs/leap-cqm-20260102-030405-0a1b2c3d.job.json`
    """
    _require_extra()
    from solvers.leap.job import Job

    _show_jobs([Job.load(job_file).refresh()], as_json)


def fetch(
    job_file: JobFile,
    output: Annotated[Path | None, arguments.output_option("Default: JOB's name with .solution.json.")] = None,
    as_json: arguments.AsJson = False,
) -> int:
    """Wait for a job's answer and write its solution; an interrupted submission is resumed, never sent twice.

    Example: `qcompress leap fetch leap-jobs/leap-cqm-20260102-030405-0a1b2c3d.job.json`
    """
    _require_extra()
    from solvers.leap.job import SUFFIX, Job

    job = Job.load(job_file)
    heard: list[str] = []

    def waiting(now: Job) -> None:
        if now.status not in heard:
            heard.append(now.status)
            say(f"{now.problem_id}: {now.status}; Ctrl-C does not cancel the job")

    solution = job.fetch(on_wait=waiting)
    target = output or job_file.with_name(job_file.name.removesuffix(SUFFIX) + ".solution.json")
    solution.save(target)
    say(f"wrote {target}")
    if as_json:
        print_json(solution.to_json())
    else:
        print_solution(solution, dict(job.problem().budgets))
    if solution.choice is None:
        return complain("no sample could be made to meet the budgets; submit the problem again with more time")
    return 0


def list_jobs(jobs: Jobs = Path(JOBS), as_json: arguments.AsJson = False) -> None:
    """List the jobs in a folder with their last known states. This needs no network.

    Example: `qcompress leap list`
    """
    _require_extra()
    from solvers.leap.job import jobs_in

    _show_jobs(jobs_in(jobs), as_json)


def list_solvers(as_json: arguments.AsJson = False) -> None:
    """List the solvers available to your account.

    Example: `qcompress leap solvers`
    """
    _require_extra()
    from solvers.leap.connection import connect

    with connect() as connection:
        solvers = [
            {
                "name": solver.name,
                "takes": sorted(solver.supported_problem_types),
                "kind": str(solver.properties.get("category", "")),
                "online": bool(solver.online),
                "load": solver.avg_load,
            }
            for solver in connection.solvers()
        ]
    if as_json:
        print_json(solvers)
        return
    rows = [
        (
            solver["name"],
            solver["kind"],
            ", ".join(solver["takes"]),
            "yes" if solver["online"] else "no",
            f"{solver['load'] or 0:.2f}",
        )
        for solver in solvers
    ]
    print_table(("solver", "kind", "takes", "online", ">load"), rows)


def _require_extra() -> None:
    """Raise an error that says what to install if the client is missing."""
    from solvers import SolverUnavailableError
    from solvers.leap.hybrid import LeapCqm

    if why := LeapCqm.why_not():
        raise SolverUnavailableError(why)


def _estimates(back_end: "LeapSolver", problem: Any, time_limit: float | None) -> dict[str, "Estimate"]:
    """Estimates for the named solver and, for CQM and nonlinear solvers, for the other one of the two."""
    from solvers.leap.errors import LeapError
    from solvers.leap.hybrid import LeapCqm, LeapNonlinear

    named = back_end.preview(problem, time_limit=time_limit)
    estimates = {back_end.name: named}
    for other in (LeapCqm, LeapNonlinear):
        if isinstance(back_end, LeapCqm | LeapNonlinear) and other.name not in estimates and not other.why_not():
            second = other(config=back_end.config)
            try:
                estimates[other.name] = second.offline(problem) if named.not_looked_up else second.estimate(problem)
            except LeapError as error:
                say(f"not compared with {other.name}: {error}")
    return estimates


def _show_estimates(estimates: dict[str, "Estimate"], as_json: bool) -> int:
    named = next(iter(estimates.values()))
    if as_json:
        print_json({name: estimate.to_json() for name, estimate in estimates.items()})
        return 0
    rows = []
    for name, estimate in estimates.items():
        sizes = "; ".join(
            f"{word.replace('_', ' ')} {size:,}" + (f" of {limit:,}" if limit else "")
            for word, (size, limit) in estimate.sizes.items()
        )
        times = (estimate.min_time_s, estimate.time_limit_s, estimate.charge_s, estimate.quota_s)
        rows.append((name, estimate.remote or "–", sizes, *map(_seconds, times)))
    print_table(("solver", "at the service", "size", ">minimum time", ">time", ">charge", ">of the quota"), rows)
    known = {name: least for name, estimate in estimates.items() if (least := estimate.min_time_s) is not None}
    if len(known) > 1:
        cheapest = min(known, key=lambda name: (bool(estimates[name].refusal), known[name], estimates[name].numbers))
        print_lines(f"cheaper for this problem: {cheapest} ({'; '.join(map(_least, estimates.items()))})")
    print_lines(*(f"{name}: {estimate.coefficients}" for name, estimate in estimates.items() if estimate.coefficients))
    print_lines(*(f"{name}: {estimate.refusal}" for name, estimate in estimates.items() if estimate.refusal))
    print_lines(
        *(f"{name}: {estimate.not_looked_up}" for name, estimate in estimates.items() if estimate.not_looked_up)
    )
    print_lines("nothing was sent")
    return complain(named.refusal) if named.refusal else 0


def _least(named: "tuple[str, Estimate]") -> str:
    name, estimate = named
    word = "biases" if "biases" in estimate.sizes else "numbers of state"
    return f"{name}: {estimate.numbers:,} {word}, {_seconds(estimate.min_time_s)}"


def _seconds(time_s: float | None) -> str:
    return "–" if time_s is None else f"{time_s:.3g} s"


def _job_json(job: "Job") -> dict[str, Any]:
    names = ("solver", "status", "created", "remote", "problem_ids", "fingerprint", "time_limit_s", "charge_s")
    return {"job": str(job.path)} | {name: getattr(job, name) for name in names}


def _show_jobs(jobs: "list[Job]", as_json: bool) -> None:
    if as_json:
        print_json([_job_json(job) for job in jobs])
        return
    rows = [(job.path.name, job.status, job.created, job.remote, job.problem_id or "–") for job in jobs]
    print_table(("job", "status", "created", "at the service", "problem"), rows)
