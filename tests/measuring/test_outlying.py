"""Tests of the limits for effects that stand out."""

import numpy as np
import pytest

from qcompress.measuring.outlying import LARGEST, limited
from qcompress.measuring.sums import SKETCH_RANK, Sums


def normal(options: int, samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((options, samples))


def test_limit_is_nine_times_the_mean_of_the_limited_squares() -> None:
    effects = normal(200, 40) ** 5  # heavy tails
    squares = limited(effects) ** 2
    ratio = squares.max(axis=1) / squares.mean(axis=1)
    changed = (limited(effects) != effects).any(axis=1)
    assert changed.mean() > 0.5
    np.testing.assert_allclose(ratio[changed], LARGEST)
    assert (ratio <= LARGEST * (1 + 1e-12)).all()


def test_normal_effects_keep_their_cost() -> None:
    effects = normal(2000, 64)
    assert np.square(limited(effects)).mean() == pytest.approx(np.square(effects).mean(), rel=0.01)


def test_only_effects_beyond_the_limit_change() -> None:
    effects = normal(50, 30)
    effects[:, 4] *= 1000
    values = limited(effects)
    np.testing.assert_array_equal(values[:, 5:], effects[:, 5:])
    np.testing.assert_array_equal(np.sign(values), np.sign(effects))
    assert (np.abs(values[:, 4]) < 0.02 * np.abs(effects[:, 4])).mean() > 0.5


def test_nine_samples_or_fewer_are_never_limited() -> None:
    effects = normal(500, 9) ** 9
    np.testing.assert_array_equal(limited(effects), effects)


def test_effects_that_few_samples_have_are_kept() -> None:
    effects = np.zeros((1, 64))
    effects[0, [3, 40]] = 5.0, -7.0
    np.testing.assert_array_equal(limited(effects), effects)


def test_no_cost_falls_by_more_than_its_standard_error() -> None:
    effects = np.full((1, 32), 1e-6)
    effects[0, :2] = 1.0  # limited by the others alone it would be nothing
    squares = effects**2
    error = squares.std(ddof=1) / 32**0.5
    assert np.square(limited(effects)).mean() == pytest.approx(squares.mean() - error)


def test_scale_of_the_effects_does_not_matter() -> None:
    effects = normal(40, 25) ** 5
    np.testing.assert_allclose(limited(1e-9 * effects), 1e-9 * limited(effects), rtol=1e-12)


@pytest.mark.parametrize("samples", [0, 1, 2])
def test_too_few_samples_are_left_alone(samples: int) -> None:
    effects = normal(3, samples)
    np.testing.assert_array_equal(limited(effects), effects)


def test_sums_limit_the_part_of_a_cost_that_comes_from_effects() -> None:
    effects, slope = normal(5, 30) ** 5, 0.25
    sums = Sums(5, 0, by_sample=True)
    sums.add((slope + 0.5 * effects**2).sum(axis=1), [effects], 30)
    expected = limited(effects)
    np.testing.assert_allclose(sums.mean_cost(), slope + 0.5 * np.square(expected).mean(axis=1), rtol=1e-12)
    np.testing.assert_array_equal(sums.factor(), expected / np.sqrt(30))


def test_sums_do_not_limit_columns_that_mix_samples() -> None:
    count = SKETCH_RANK + 8
    effects = normal(2, count) ** 5
    sums = Sums(2, 0, by_sample=True)
    sums.add((0.5 * effects**2).sum(axis=1), [effects], count)
    np.testing.assert_allclose(sums.mean_cost(), 0.5 * np.square(effects).mean(axis=1), rtol=1e-12)
