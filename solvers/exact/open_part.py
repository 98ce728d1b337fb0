"""What exact back ends share: they decide only what a bound and a good choice leave open."""

from formulations import Problem
from formulations.forms.integer_program import MAX_PRODUCTS, num_products
from formulations.reductions.restriction import Restriction
from solvers.base import Search, Solver
from solvers.bounds.warm import warm_bounds
from solvers.heuristic.lagrangian import begin, certify
from solvers.kernels.local_search import polish


class Exact(Solver):
    """A back end that begins with `undecided`."""

    exact = True

    def prepare(self) -> None:
        """Compile the loops."""
        warm_bounds()


class Linearised(Exact):
    """An exact back end that gives every product of options a variable of its own."""

    def refuse(self, problem: Problem) -> str:
        """Refuse a problem with too many products of options."""
        if (count := num_products(problem)) <= MAX_PRODUCTS:
            return ""
        return (
            f"solver {self.name!r} linearises up to {MAX_PRODUCTS:,} products of options, this problem has {count:,}; "
            "use 'auto', 'lagrangian' or 'anneal'"
        )


def undecided(problem: Problem, search: Search) -> Restriction | None:
    """`begin`, polish and `certify`: what is left for an exact solver; None when it is decided or time is up."""
    begin(problem, search)
    if not problem.pairs and search.choice is not None and not (search.proven() or search.expired()):
        search.offer(polish(problem, search.choice, search.remaining()))
    part = certify(problem, search)
    return None if search.proven() or search.expired() else part
