"""Crossover part by part, against `Problem.evaluate` and all mixtures of two parents."""

import itertools

import numpy as np
import pytest

from formulations.generators.families import factor_and_pairs, random_max_cut, signed_pairs, torus_max_cut
from solvers.heuristic.recombination import AnnealingChain, Breeding
from solvers.kernels.crossing import cross_parts, is_symmetric, mirrored, parts_of
from solvers.kernels.moves import to_arrays


def parents(problem, seed, differing):
    """Two random choices that differ in some groups."""
    a, rng = to_arrays(problem), np.random.default_rng(seed)
    mother = a.starts[:-1] + rng.integers(0, np.diff(a.starts))
    father = mother.copy()
    for group in rng.choice(len(mother), size=differing, replace=False):
        size = a.starts[group + 1] - a.starts[group]
        father[group] = a.starts[group] + (mother[group] - a.starts[group] + rng.integers(1, size)) % size
    return a, mother, father


def value(problem, chosen):
    return problem.evaluate(chosen - problem.group_offsets[:-1]).objective


@pytest.mark.parametrize("seed", range(20))
def test_the_child_is_the_best_of_all_mixtures_of_whole_parts(seed):
    problem = signed_pairs(30, 3, 4, seed=seed).derived(budgets={})
    a, mother, father = parents(problem, seed, 10)
    parts = parts_of(a, mother, father)
    assert ((parts >= 0) == (mother != father)).all()
    names = np.unique(parts[parts >= 0])
    child, count = cross_parts(a, mother, father, np.zeros(len(mother), dtype=np.int64))
    assert count == len(names)
    mixtures = [
        np.where(np.isin(parts, taken), father, mother)
        for size in range(len(names) + 1)
        for taken in itertools.combinations(names, size)
    ]
    assert value(problem, child) == pytest.approx(min(value(problem, mixed) for mixed in mixtures), abs=1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_parts_have_no_pair_terms_in_common(seed):
    problem = torus_max_cut(6, 6, seed=seed)
    a, mother, father = parents(problem, seed, 12)
    parts = parts_of(a, mother, father)
    whole = value(problem, father) - value(problem, mother)
    alone = [
        value(problem, np.where(parts == part, father, mother)) - value(problem, mother)
        for part in np.unique(parts[parts >= 0])
    ]
    assert len(alone) > 1
    assert sum(alone) == pytest.approx(whole, abs=1e-9)


def test_a_factor_leaves_one_part_and_the_better_parent():
    problem = factor_and_pairs(20, seed=1).derived(budgets={})
    a, mother, father = parents(problem, 1, 8)
    child, count = cross_parts(a, mother, father, np.zeros(20, dtype=np.int64))
    assert count == 1
    assert value(problem, child) == min(value(problem, mother), value(problem, father))


def test_only_problems_whose_mirror_images_are_equal_are_symmetric():
    rng = np.random.default_rng(0)
    cut = random_max_cut(12, 0.5, seed=2)
    assert is_symmetric(to_arrays(cut), rng)
    cost = np.array(cut.cost)
    cost[1] += 0.5
    assert not is_symmetric(to_arrays(cut.derived(cost=cost)), rng)
    assert not is_symmetric(to_arrays(signed_pairs(12, 3, 4).derived(budgets={})), rng)


def test_a_parent_beside_the_mirror_image_of_the_other_is_crossed_as_its_neighbour():
    problem = torus_max_cut(6, 6, seed=0)
    a, mother, father = parents(problem, 3, 6)
    chains = [AnnealingChain(chosen, np.zeros(0), np.random.default_rng(0)) for chosen in (mother, mirrored(a, father))]
    breeding = Breeding(a, np.random.default_rng(0))
    breeding.children(chains, 1)
    crossed, _ = breeding.children(chains, 4)  # every other generation is crossed
    least = min(value(problem, mother), value(problem, father))
    assert all(value(problem, chain.chosen) <= least for chain in crossed)


def test_what_did_not_improve_a_heated_parent_is_undone():
    problem = torus_max_cut(8, 8, seed=1)
    a, mother, worse = parents(problem, 5, 20)
    chain = AnnealingChain(mother, np.zeros(0), np.random.default_rng(0), mother)
    chain.chosen[:] = worse
    Breeding(a, np.random.default_rng(0)).settle([chain])
    assert value(problem, chain.best) == pytest.approx(chain.value + problem.offset, abs=1e-9)
    assert value(problem, chain.best) < value(problem, mother)
