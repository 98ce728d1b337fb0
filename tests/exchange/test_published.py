"""Published instances: the objective of every assignment is the source's own, computed from the text by plain loops."""

import itertools

import numpy as np
import pytest

from formulations import FileFormatError
from formulations.exchange.published import (
    read_coordinate_qubo,
    read_ising,
    read_max_cut,
    read_multidimensional_knapsack,
    read_multiple_choice_knapsack,
    read_quadratic_knapsack,
)


def bits(size):
    return itertools.product((0, 1), repeat=size)


def test_every_cut_has_its_weight(tmp_path):
    rng = np.random.default_rng(0)
    edges = [(i, j, int(rng.integers(-5, 6))) for i, j in itertools.combinations(range(6), 2) if rng.random() < 0.7]
    file = tmp_path / "graph.txt"
    file.write_text(f"6 {len(edges)} \n" + "".join(f"{i + 1} {j + 1} {w}\n" for i, j, w in edges))
    problem = read_max_cut(file)
    for x in bits(6):
        assert problem.evaluate(x).objective == -sum(w for i, j, w in edges if x[i] != x[j])


def test_words_behind_the_sizes_are_remarks(tmp_path):
    file = tmp_path / "remarked.txt"
    file.write_text("3 3 J\n1 2 1\n2 3 1\n1 3 5\n")
    assert read_max_cut(file).evaluate([0, 0, 1]).objective == -6


def test_lines_that_begin_with_a_hash_are_remarks(tmp_path):
    file = tmp_path / "commented.txt"
    file.write_text("# 9 nine words\n3 3\n1 2 1\n  # 1 2 7\n\t#\n2 3 1\n1 3 5\n")
    assert read_max_cut(file).evaluate([0, 0, 1]).objective == -6


def test_a_byte_order_mark_and_accents_in_remarks_are_read(tmp_path):
    file = tmp_path / "accented.txt"
    file.write_text("\ufeff3 3 graphe à trois sommets\n1 2 1\n2 3 1\n1 3 5\n", encoding="utf-8")
    assert read_max_cut(file).evaluate([0, 0, 1]).objective == -6
    file.write_bytes("3 0 à\n".encode("latin-1"))
    with pytest.raises(FileFormatError, match="utf-8"):
        read_max_cut(file)


def test_every_state_of_an_ising_model_has_its_energy(tmp_path):
    rng = np.random.default_rng(0)
    places = [(i, j) for i in range(5) for j in range(i, 5) if rng.random() < 0.8] + [(3, 1)]
    entries = [(i, j, float(rng.normal())) for i, j in places]
    file = tmp_path / "spins.txt"
    file.write_text(f"5 {len(entries)}\n" + "".join(f"{i + 1} {j + 1} {value!r}\n" for i, j, value in entries))
    problem = read_ising(file)
    for x in bits(5):
        spins = [2 * bit - 1 for bit in x]
        energy = sum(value * spins[i] * (spins[j] if i != j else 1) for i, j, value in entries)
        assert problem.evaluate(x).objective == pytest.approx(energy, abs=1e-12)  # sums of ten numbers of about 1


def test_every_set_of_items_has_its_profit_and_weights(tmp_path):
    rng = np.random.default_rng(0)
    profits, weights, capacities = rng.integers(1, 20, 6), rng.integers(0, 9, (3, 6)), [12, 15, 9]
    rows = [profits, *weights, capacities]
    file = tmp_path / "items.txt"
    file.write_text("6 3 0\n" + "\n".join(" ".join(map(str, row)) for row in rows))
    problem = read_multidimensional_knapsack(file)
    for x in bits(6):
        evaluation = problem.evaluate(x)
        assert evaluation.objective == -(profits @ x)
        assert evaluation.feasible == bool((weights @ x <= capacities).all())


def test_an_off_diagonal_entry_of_a_qubo_counts_twice(tmp_path):
    file = tmp_path / "small.txt"
    file.write_text("3 4\n1 1 -4\n1 2 3\n3 2 -2\n3 3 1\n")
    problem = read_coordinate_qubo(file)
    matrix = np.array([[-4, 3, 0], [3, 0, -2], [0, -2, 1]])
    for x in bits(3):
        assert problem.evaluate(x).objective == np.array(x) @ matrix @ np.array(x)


def test_a_quadratic_knapsack_has_its_profits_and_its_capacity(tmp_path):
    rng = np.random.default_rng(1)
    size = 5
    profit, weight = rng.integers(0, 100, (size, size)), rng.integers(1, 50, size)
    triangle = "\n".join(" ".join(str(profit[i, j]) for j in range(i + 1, size)) for i in range(size - 1))
    linear, weights = (" ".join(map(str, row)) for row in (profit.diagonal(), weight))
    file = tmp_path / "items.txt"
    file.write_text(f"r_5\n{size}\n{linear}\n{triangle}\n\n0\n60\n{weights}\n\nComments\nDensity : 25 %\n")
    problem = read_quadratic_knapsack(file)
    for x in bits(size):
        judged = problem.evaluate(x)
        value = sum(profit[i, i] for i in range(size) if x[i])
        value += sum(profit[i, j] for i, j in itertools.combinations(range(size), 2) if x[i] and x[j])
        assert judged.objective == -value
        assert judged.feasible == (weight @ np.array(x) <= 60)


def test_a_multiple_choice_knapsack_has_every_capacity(tmp_path):
    file = tmp_path / "choices.txt"
    file.write_text(" 2 2 2\n 7 5\n 1\n 10.0 1 2\n 20.0 4 3\n 2\n 5.0 2 2\n 9.5 3 3\n")
    problem = read_multiple_choice_knapsack(file)
    assert problem.budgets == {"use 1": 7, "use 2": 5}
    assert problem.evaluate([1, 0]).objective == -25.0
    assert problem.evaluate([1, 0]).feasible
    assert problem.evaluate([1, 1]).violations == {"use 2": 1.0}


def test_groups_of_a_multiple_choice_knapsack_have_the_numbers_of_the_file(tmp_path):
    file = tmp_path / "choices.txt"
    file.write_text("2 1 1\n7\n2\n10 1\n1\n20 4\n")
    problem = read_multiple_choice_knapsack(file)
    assert problem.groups == ("2", "1")
    assert problem.cost.tolist() == [-10, -20]


@pytest.mark.parametrize(
    ("reader", "text", "says"),
    [
        (read_max_cut, "3 2\n1 2 1\n", "2 entries need 6 numbers, found 3"),
        (read_max_cut, "3 1\n1 4 1\n", "between 1 and 3, found 1 to 4"),
        (read_max_cut, "3 1\n2 2 1\n", "joins a vertex to itself"),
        (read_max_cut, "3 2\n1 2 1\n1.5 3 1\n", "whole numbers, found 1.5"),
        (read_max_cut, "3 1\n1 1e30 1\n", "between 1 and 3, found 1 to 1e\\+30"),
        (read_max_cut, "3 1\n1 nan 1\n", "between 1 and 3, found nan"),
        (read_max_cut, "3 1\n1 2 inf\n", "finite"),
        (read_max_cut, "99999999999999 0\n", "at most 10,000,000 variables can be read, found 99,999,999,999,999"),
        (read_coordinate_qubo, f"{10**30} 0\n", "at most 10,000,000 variables"),
        (read_coordinate_qubo, "3 3\n1 2 1\n2 1 1\n3 3 1\n", "1 entries are given in both triangles, such as 1 2"),
        (read_max_cut, "", "should begin with n m in whole numbers, found ''"),
        (read_coordinate_qubo, "# only a remark\n", "should begin with n m in whole numbers, found ''"),
        (read_coordinate_qubo, "two", "not a QUBO instance.*n m in whole numbers, found 'two'"),
        (read_max_cut, "3 1.5\n", "n m in whole numbers, found '3 1.5'"),
        (read_quadratic_knapsack, "", "should begin with a name and n in whole numbers, found ''"),
        (read_quadratic_knapsack, "r_5\n", "a name and n in whole numbers, found ''"),
        (read_ising, "2 1\n1 3 1\n", "entries lie between 1 and 2, found 1 to 3"),
        (read_ising, "0 1\n1 1 1\n", "entries lie between 1 and 0, found 1 to 1"),
        (read_coordinate_qubo, "0 1\n1 1 1\n", "entries lie between 1 and 0, found 1 to 1"),
        (read_max_cut, "0 1\n1 2 1\n", "entries lie between 1 and 0, found 1 to 2"),
        (read_ising, "1 1\n1 1 1e308\n", "finite"),
        (read_ising, "2 2\n1 2 1e308\n1 2 1e308\n", "is not an Ising instance"),
        (read_ising, "2 2\n1 2 4e307\n1 2 4e307\n", "finite"),
        (read_coordinate_qubo, "1 2\n1 1 1e308\n1 1 1e308\n", "finite"),
        (read_coordinate_qubo, "2 1\n1 2 1e308\n", "finite"),
        (read_max_cut, "2 2\n1 2 1e308\n1 2 1e308\n", "finite"),
        (read_multiple_choice_knapsack, f"0 {10**11} 0\n", "at most 10,000,000 variables"),
        (read_multidimensional_knapsack, "2 1 0\n3 4\n1 1\n", "2 items and 1 capacities need 5 numbers, found 4"),
        (read_multidimensional_knapsack, "2\n", "begin with n m best in whole numbers, found '2'"),
        (read_multidimensional_knapsack, f"{10**30} 1 0\n", "at most 10,000,000 variables"),
        (read_multiple_choice_knapsack, "\n", "groups options budgets in whole numbers, found ''"),
        (read_multiple_choice_knapsack, "2 3", "groups options budgets in whole numbers, found '2 3'"),
        (read_quadratic_knapsack, f"r\n{10**30}\n1 2 3\n", "is incomplete"),
        (read_multiple_choice_knapsack, "0 1 1000000000000\n", "need as many capacities"),
        (read_multiple_choice_knapsack, f"{10**30} 1 0\n", "is incomplete"),
        (read_quadratic_knapsack, "r\n3\n1 2 3\n", "3 items need 11 numbers, found 3"),
        (read_quadratic_knapsack, "r\n1\n5\n1\n9\n3\n", "found kind 1"),
        (read_multiple_choice_knapsack, "1 2 1\n 4\n 1\n 3 4\n", "need 5 numbers after the capacities, found 3"),
        (read_multiple_choice_knapsack, "2 1 1\n7\n1\n10 1\n1\n20 4\n", "names must differ, found '1' twice"),
        (read_multiple_choice_knapsack, "2 1 1\n7\n1\n10 1\n01\n20 4\n", "names must differ, found '1' twice"),
        (read_multiple_choice_knapsack, "2 1 1\n7\n1\n10 1\nb\n20 4\n", "numbers of groups are whole, found 'b'"),
        (read_multiple_choice_knapsack, "1 1 1\n7\n1.5\n10 1\n", "numbers of groups are whole, found '1.5'"),
    ],
)
def test_damage_is_named(reader, text, says, tmp_path):
    file = tmp_path / "damaged.txt"
    file.write_text(text)
    with pytest.raises(FileFormatError, match=says):
        reader(file)
