"""Pair terms of sampled measurements count as far as two halves of the samples agree on them."""

import functools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import qcompress
from qcompress import interactions
from qcompress.formulation import consistent_rows
from qcompress.interactions import LEAST_SIGNAL, pair_terms, signal_of
from qcompress.measurement import Measurement
from tests.measurements import measured

WIDTH = 4


@functools.cache
def network(num_blocks: int, layers: int) -> Measurement:
    """Blocks of layers without effects, with two options a layer."""
    blocks = [nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers))) for _ in range(num_blocks)]
    options = qcompress.prune_quantize(bits=(3, 4), sparsity=(0,))
    return measured(nn.Sequential(*blocks).eval(), torch.zeros(4, WIDTH), options)


def sampled(num_blocks: int, layers: int, columns: int, shares: Sequence[float], seed: int = 0) -> Measurement:
    """The options' effects have these squared correlations: all layers of a block, and all blocks."""
    rng = np.random.default_rng(seed)
    within, between = shares
    block = np.repeat(np.arange(num_blocks), layers * 3)
    own = rng.normal(size=(len(block), columns))
    factor = (1 - within - between) ** 0.5 * own + within**0.5 * rng.normal(size=(num_blocks, columns))[block]
    factor += between**0.5 * rng.normal(size=columns)
    factor *= rng.uniform(0.5, 2.0, size=(len(factor), 1)) / columns**0.5
    factor[::3] = 0.0  # the original
    half_square = 0.5 * np.square(factor).sum(axis=1)
    return replace(network(num_blocks, layers), factor=factor, cost=half_square, standard_error=0.1 * half_square)


def gram(measurement: Measurement) -> NDArray[np.float64]:
    rows = consistent_rows(measurement.factor, measurement.cost)
    return np.asarray(rows @ rows.T)


def dense(terms: qcompress.Problem) -> NDArray[np.float64]:
    """All pair terms of a problem."""
    size = terms.num_options
    sparse = np.zeros((size, size)) if terms.pairs.sparse is None else terms.pairs.sparse.toarray()
    rows = np.zeros((size, 1)) if terms.pairs.factor is None else terms.pairs.factor
    other = terms.group_of[:, None] != terms.group_of
    return np.triu(sparse + (rows @ rows.T) * other, 1)


@pytest.mark.parametrize(("within", "between"), [(0.0, 0.0), (0.5, 0.0), (0.8, 0.0), (0.2, 0.5)])
@pytest.mark.parametrize("columns", [16, 64])
def test_the_share_of_signal_is_what_the_best_estimate_weighs_terms_by(
    within: float, between: float, columns: int
) -> None:
    """A correlation c estimated from n numbers has the variance (1 - c²)² / n, roughly."""
    signals = [signal_of(sampled(12, 3, columns, (within, between), seed)) for seed in range(8)]
    mean = np.mean(signals, axis=0)
    for share, true in zip(mean, (within + between, between), strict=True):
        expected = true**2 / (true**2 + (1 - true**2) ** 2 / columns)
        assert share == pytest.approx(expected, abs=0.15)  # eight draws with few independent pairs each


def test_terms_between_blocks_that_are_noise_are_left_out_and_the_others_weighed() -> None:
    measurement = sampled(12, 3, 32, (0.7, 0.0))
    signal = signal_of(measurement)
    assert signal.between < LEAST_SIGNAL < signal.within < 1
    problem = qcompress.formulate(measurement, {"bytes": 0.9}, pairs=0.5)
    block = problem.group_of // 3
    other = problem.group_of[:, None] != problem.group_of
    expected = np.triu(0.5 * signal.within * gram(measurement) * (block[:, None] == block) * other, 1)
    assert np.allclose(dense(problem), expected, rtol=1e-12, atol=1e-15)
    assert problem.pairs.factor is None


def test_terms_between_blocks_that_are_signal_are_kept() -> None:
    measurement = sampled(6, 3, 32, (0.2, 0.6))
    signal = signal_of(measurement)
    assert signal.between > LEAST_SIGNAL
    problem = qcompress.formulate(measurement, {"bytes": 0.9}, pairs=1.0)
    block, other = problem.group_of // 3, problem.group_of[:, None] != problem.group_of
    weight = np.where(block[:, None] == block, max(signal), signal.between)
    assert np.allclose(dense(problem), np.triu(weight * gram(measurement) * other, 1), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("shares", [(0.7, 0.0), (0.2, 0.6), (0.0, 0.0)])
@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_no_choice_is_predicted_below_its_share_of_the_additive_part(shares: Sequence[float], strength: float) -> None:
    measurement = sampled(4, 3, 8, shares)
    problem = qcompress.formulate(measurement, {"bytes": 0.9}, pairs=strength)
    rng = np.random.default_rng(1)
    for choice in rng.integers(0, 3, size=(200, problem.num_groups)):
        additive = measurement.cost[problem.flat(choice)].sum()
        assert problem.evaluate(choice).objective >= (1 - strength) * additive - 1e-12


def test_too_many_terms_within_blocks_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    measurement = sampled(4, 3, 32, (0.7, 0.0))
    monkeypatch.setattr(interactions, "MOST_TERMS", 10)
    assert not pair_terms(measurement, measurement.factor, 1.0)


def test_terms_that_are_not_estimated_from_samples_count_in_full() -> None:
    measurement = replace(sampled(4, 3, 8, (0.0, 0.0)), standard_error=None)
    problem = qcompress.formulate(measurement, {"bytes": 0.9}, pairs=1.0)
    other = problem.group_of[:, None] != problem.group_of
    assert np.allclose(dense(problem), np.triu(gram(measurement) * other, 1))
