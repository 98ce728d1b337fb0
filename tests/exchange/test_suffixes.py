"""Files for other tools: other solvers find brute force's optimum in them, and what comes back is what was written."""

import itertools
import subprocess

import dimod
import highspy
import numpy as np
import pulp
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from pulp.apis.coin_api import pulp_cbc_path

from formulations import (
    EncodingError,
    FileFormatError,
    PairTerms,
    Problem,
    read_problem,
    to_bqm,
    write_bqm,
    write_cqm,
    write_lp,
    write_mps,
    write_problem,
    write_qubo,
)
from formulations.exchange.suffixes import SUFFIXES
from formulations.generators.random_instances import layered_problem, small_problem
from solvers import solve

LINEAR = {".lp": write_lp, ".mps": write_mps}
NASTY = Problem(
    ["conv 1/weight", "conv 1.weight", 'ünïcode\n"quoted" \\', "e1"],
    [["4 bit, 50 %", "4 bit; 50 %"], ["+", "-"], ["x" * 300, "*"], ["only"]],
    [1e-9, 3.3, -1 / 3, 1e8, 0.1, 0.2, 0.7],
    {"latency (s)": [1e-4, 3e-5, 1.7e-4, 1e-5, 0, 2e-5, 0], "bytes": [10, 5, 7, 3, 9, 1, 2]},
    {"latency (s)": 2.1e-4, "bytes": 21},
    PairTerms(factor=np.random.default_rng(0).normal(size=(7, 2))),
    0.125,
)


def judged_alike(one, other, choices=20):
    """Both problems have the same objective, uses and excesses for the same choices."""
    rng = np.random.default_rng(0)
    for _ in range(choices):
        choice = [rng.integers(len(options)) for options in one.options]
        mine, its = one.evaluate(choice), other.evaluate(choice)
        assert its.objective == pytest.approx(mine.objective, rel=1e-12, abs=1e-12)
        assert its.violations == mine.violations
        assert its.usage == {name: mine.usage[name] for name in one.budgets}


def same(one, other):
    """All that the exchange formats keep."""
    assert (other.groups, other.options) == (one.groups, one.options)
    assert np.array_equal(other.cost, one.cost)
    assert dict(other.budgets) == dict(one.budgets)
    assert all(np.array_equal(other.resources[name], one.resources[name]) for name in one.budgets)
    assert other.offset == one.offset
    judged_alike(one, other)


# --- LP and MPS ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", LINEAR)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_a_problem_comes_back_from_lp_and_mps(suffix, tmp_path_factory, seed):
    path = tmp_path_factory.mktemp("exchange") / f"problem{suffix}"
    problem = small_problem(seed)
    LINEAR[suffix](problem, path)
    same(problem, read_problem(path))


@pytest.mark.parametrize("suffix", [".lp", ".mps", ".cqm"])
def test_names_and_numbers_of_any_kind_come_back(suffix, tmp_path):
    write_problem(NASTY, tmp_path / f"problem{suffix}")
    same(NASTY, read_problem(tmp_path / f"problem{suffix}"))
    (tmp_path / f"problem{suffix}").unlink()
    assert list(tmp_path.iterdir()) == []


def optimum_by_highs(path):
    highs = highspy.Highs()
    highs.silent()
    highs.setOptionValue("mip_rel_gap", 0.0)
    highs.setOptionValue("mip_abs_gap", 0.0)
    assert highs.readModel(str(path)) == highspy.HighsStatus.kOk
    highs.run()
    if highs.getModelStatus() == highspy.HighsModelStatus.kInfeasible:
        return None
    assert highs.getModelStatus() == highspy.HighsModelStatus.kOptimal
    return highs.getInfo().objective_function_value


def optimum_by_pulp(path):
    _, model = pulp.LpProblem.fromMPS(str(path))
    model.solve(pulp.HiGHS(msg=False, gapRel=0.0, gapAbs=0.0))
    return pulp.value(model.objective) if model.status == pulp.LpStatusOptimal else None


def optimum_by_scip(path):
    pyscipopt = pytest.importorskip("pyscipopt")
    model = pyscipopt.Model()
    model.hideOutput()
    model.readProblem(str(path))
    model.optimize()
    return model.getObjVal() if model.getStatus() == "optimal" else None


def optimum_by_cbc(path):
    """CBC's own reader, through its command line."""
    answer = path.with_suffix(".sol")
    subprocess.run(
        [pulp_cbc_path, path, "ratio", "0", "allow", "0", "solve", "solution", answer], check=True, capture_output=True
    )
    head = answer.read_text().splitlines()[0]
    return float(head.split("objective value")[1]) if head.startswith("Optimal") else None


@pytest.mark.parametrize(
    ("suffix", "optimum", "seeds"),
    [
        (".lp", optimum_by_highs, range(25)),
        (".mps", optimum_by_highs, range(25)),
        (".mps", optimum_by_pulp, range(0, 25, 4)),
        (".lp", optimum_by_scip, range(0, 25, 2)),
        (".mps", optimum_by_scip, range(0, 25, 2)),
        (".lp", optimum_by_cbc, range(0, 25, 4)),
        (".mps", optimum_by_cbc, range(0, 25, 4)),
    ],
)
def test_another_tool_finds_the_optimum_of_brute_force_in_the_file(suffix, optimum, seeds, tmp_path):
    for seed in seeds:
        problem, path = small_problem(seed), tmp_path / f"p{seed}{suffix}"
        LINEAR[suffix](problem, path)
        expected = solve(problem, "brute-force").objective
        found = optimum(path)
        assert (found is None) == (expected is None), seed
        assert found is None or found == pytest.approx(expected, abs=1e-5), seed


@pytest.mark.parametrize("suffix", LINEAR)
def test_numbers_come_back_or_are_refused_when_written(suffix, tmp_path):
    """Limits of HiGHS: infinity from 1e20 on; in rows, too large from 1e15 on."""
    path, large, in_row = tmp_path / f"problem{suffix}", np.nextafter(1e20, 0), np.nextafter(1e15, 0)
    terms = scipy.sparse.csr_array(([1e20], ([0], [2])), shape=(4, 4))

    def problem(cost=0.0, use=2.0, budget=4e15, pairs=None, offset=0.0, fixed=0.0):
        uses, fixed_uses = {"r": [use, 1, 2, 1]}, {"r": fixed} if fixed else {}
        return Problem(["a", "b"], [["x", "y"]] * 2, [cost, 1, 0, 1], uses, {"r": budget}, pairs, offset, fixed_uses)

    fitting = [{"cost": large}, {"cost": -large}, {"offset": -large}, {"budget": large}, {"use": in_row}]
    fitting += [{"fixed": in_row}, {"use": np.nextafter(1e-12, 1)}, {"cost": 1e-300}]
    for numbers in fitting:
        write_problem(problem(**numbers), path)
        assert read_problem(path).fingerprint() == problem(**numbers).fingerprint()
    path.unlink()
    beyond = [{"cost": 1e20}, {"cost": -1e21}, {"offset": 1e20}, {"budget": 1e20}, {"budget": -1e20}, {"use": 1e15}]
    for numbers in (*beyond, {"fixed": 1e16}, {"pairs": PairTerms(sparse=terms)}):
        with pytest.raises(EncodingError, match=r"has -?1e[+-]\d+ \(.*\.npz or \.cqm"):
            write_problem(problem(**numbers), path)
        assert not path.exists()
        for exact in (".npz", ".cqm"):
            write_problem(problem(**numbers), path.with_suffix(exact))
            assert read_problem(path.with_suffix(exact)).fingerprint() == problem(**numbers).fingerprint()


@pytest.mark.parametrize("suffix", LINEAR)
def test_a_number_that_another_tool_changed_is_read_as_it_is_now(suffix, tmp_path):
    path = tmp_path / f"problem{suffix}"
    problem = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})
    LINEAR[suffix](problem, path)
    path.write_text(path.read_text().replace("12.0", "11.0"))
    assert read_problem(path).budgets == {"bytes": 11.0}


@pytest.mark.parametrize("suffix", LINEAR)
def test_a_file_that_holds_no_whole_problem_is_refused(suffix, tmp_path):
    path = tmp_path / f"problem{suffix}"
    use = {"bytes": [8, 4, 8, 4]}
    LINEAR[suffix](Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], use, {"bytes": 12}), path)
    whole = path.read_text()
    changes = [
        ("x_1_1", "z_1_1"),
        ("x_1_1", "x_1_9"),
        ("one_1", "row_1"),
        ("budget_0", "budget_9"),
        ("qcompress", "q"),
        ("Minimize", "Maximize"),
        ("NAME", "OBJSENSE\n MAX\nNAME"),
        ("= 1.0", "= 2.0"),
        ("RHS one_0 1.0", "RHS one_0 2.0"),
        ("Binaries", " x_0_0_a_keep <= 0\nBinaries"),
        (" BV BOUND x_0_0_a_keep", " FX BOUND x_0_0_a_keep 1.0"),
        ("Bounds", " extra: x_0_0_a_keep <= 0\nBounds"),
    ]
    changed = [(old, whole.replace(old, new)) for old, new in changes if old in whole]
    assert len(changed) >= 8
    for _, text in changed:
        path.write_text(text)
        with pytest.raises(FileFormatError, match=r"problem\."):
            read_problem(path)
    for content in (whole[: len(whole) // 2], "", "Minimize\n obj: x\nEnd\n"):
        path.write_text(content)
        with pytest.raises(FileFormatError, match=r"problem\."):
            read_problem(path)


def test_a_use_too_small_to_be_read_is_refused_not_dropped(tmp_path):
    use = {"s": [1.0, 1e-14]}
    problem = Problem(["a"], [["x", "y"]], [0, 1], use, {"s": 1})
    write_lp(problem, tmp_path / "problem.lp")
    with pytest.raises(FileFormatError, match="cannot read every number exactly"):
        read_problem(tmp_path / "problem.lp")


# --- CQM -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_a_problem_comes_back_from_a_cqm(tmp_path_factory, seed):
    path = tmp_path_factory.mktemp("exchange") / "problem.cqm"
    problem = small_problem(seed)
    write_cqm(problem, path)
    same(problem, read_problem(path))


def test_the_cqm_is_the_problem_under_its_names(tmp_path):
    write_cqm(NASTY, tmp_path / "problem.cqm")
    cqm = dimod.ConstrainedQuadraticModel.from_file((tmp_path / "problem.cqm").read_bytes())
    names = [(group, option) for group, options in zip(NASTY.groups, NASTY.options, strict=True) for option in options]
    assert list(cqm.variables) == names
    for choice in itertools.product(*(range(len(options)) for options in NASTY.options)):
        on = set(NASTY.flat(choice).tolist())
        sample = {name: int(v in on) for v, name in enumerate(names)}
        judged = NASTY.evaluate(choice)
        assert cqm.objective.energy(sample) == pytest.approx(judged.objective)
        assert cqm.check_feasible(sample, atol=1e-12, rtol=1e-12) == judged.feasible


def cqm_of(objective, constraints):
    cqm = dimod.ConstrainedQuadraticModel()
    cqm.set_objective(objective)
    for constraint in constraints:
        cqm.add_constraint(constraint)
    return cqm


def test_a_cqm_from_elsewhere_is_read_and_one_of_another_form_refused(tmp_path):
    a, b, c, d = dimod.Binaries("abcd")
    i = dimod.Integer("i", upper_bound=3)
    path = tmp_path / "other.cqm"

    def written(objective, *constraints):
        with path.open("wb") as file, cqm_of(objective, constraints).to_file() as model:
            file.write(model.read())
        return path

    problem = read_problem(written(2 * a + b - 3 * a * d + a * c + 1, a + c == 1, b + d == 1, 2 * a + d <= 2))
    assert problem.options == (("a", "c"), ("b", "d"))
    assert [problem.evaluate(choice).objective for choice in ([0, 0], [0, 1], [1, 0], [1, 1])] == [4.0, 0.0, 2.0, 1.0]
    assert [problem.evaluate(choice).feasible for choice in ([0, 1], [1, 1])] == [False, True]
    problem = read_problem(written(2 * a, a + c == 1, b + d == 1))  # b, c and d cost nothing
    assert [problem.evaluate(choice).objective for choice in ([0, 0], [0, 1], [1, 0], [1, 1])] == [2.0, 2.0, 0.0, 0.0]
    for constraints in (
        [a + b == 1],  # c is in no group
        [a + b == 1, b + c == 1],  # b is in two
        [a + b == 1, c + d == 2],
        [a + b == 1, c + d == 1, a - 2 * c <= 1],
        [a + b == 1, c + d == 1, a + c >= 1],
        [a + b == 1, c + d == 1, a * c <= 1],
        [a + b == 1, c + d == 1, i + a <= 1],
    ):
        with pytest.raises(FileFormatError, match=r"other\.cqm is not a CQM file of groups and budgets"):
            read_problem(written(a + b + c, *constraints))


# --- BQM and QUBO --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".bqm", ".qubo"])
@pytest.mark.parametrize("encoding", ["one-hot", "domain-wall", "binary"])
def test_the_bits_read_back_have_the_energy_of_the_model_and_decode_to_the_optimum(suffix, encoding, tmp_path):
    problem = Problem(
        ["a", "b", "c"], [["x", "y", "z"], ["x", "y"], ["only"]], [0, 1, 5, 2, 0, 1],
        {"s": [3, 2, 1, 4, 2, 1]}, {"s": 5}, PairTerms(factor=[[1.0], [0.5], [0], [2], [-1], [1]]), 0.5,
    )  # fmt: skip
    path = tmp_path / f"problem{suffix}"
    write_problem(problem, path, encoding=encoding, proven=True)
    encoded = to_bqm(problem, encoding)
    bits = read_problem(path)
    assert bits.num_groups == encoded.bqm.num_variables
    rng = np.random.default_rng(0)
    for state in rng.integers(0, 2, size=(50, bits.num_groups)):
        energy = encoded.bqm.energy(state)
        assert bits.evaluate(state).objective == pytest.approx(energy, rel=1e-12, abs=1e-9)
    best = solve(bits, "brute-force").choice
    assert problem.evaluate(encoded.decode(best)).objective == pytest.approx(solve(problem, "brute-force").objective)


@pytest.mark.parametrize("suffix", [".bqm", ".qubo"])
def test_bits_of_a_problem_without_a_choice_are_refused_unless_one_hot(suffix, tmp_path):
    path = tmp_path / f"problem{suffix}"
    for budget in ({}, {"s": 5}):
        problem = Problem(["a", "b"], [["x"], ["y"]], [1, 2], {"s": [3, 2]}, budget)
        for encoding in ("domain-wall", "binary"):
            with pytest.raises(EncodingError, match=r"every group has a single option: write an \.npz"):
                write_problem(problem, path, encoding=encoding)
            assert not path.exists()
        write_problem(problem, path, encoding="one-hot")
        assert read_problem(path).num_groups == 2
        path.unlink()


def test_prices_take_the_place_of_slack_bits(tmp_path):
    problem = layered_problem(3, bits=(2, 4), rank=0)
    write_qubo(problem, tmp_path / "a.qubo", prices={"bytes": 1e-5}, encoding="domain-wall")
    assert read_problem(tmp_path / "a.qubo").num_groups == 3
    assert "prices {'bytes': 1e-05}" in (tmp_path / "a.qubo").read_text()
    fractions = Problem(["a"], [["x", "y"]], [0, 1], {"s": [0.5, 0.1]}, {"s": 0.3})
    for write in (write_bqm, write_qubo):
        with pytest.raises(EncodingError, match="fractions"):
            write(fractions, tmp_path / "b.qubo", proven=True)
    assert [file.name for file in tmp_path.iterdir()] == ["a.qubo"]


def test_spins_are_read_as_bits(tmp_path):
    bqm = dimod.BinaryQuadraticModel({"s": 1.0, "t": -2.0}, {("s", "t"): 0.5}, 3.0, dimod.SPIN)
    with (tmp_path / "spins.bqm").open("wb") as file, bqm.to_file() as model:
        file.write(model.read())
    problem = read_problem(tmp_path / "spins.bqm")
    assert problem.groups == ("s", "t")
    for bits in itertools.product((0, 1), repeat=2):
        spins = dict(zip("st", (2 * b - 1 for b in bits), strict=True))
        assert problem.evaluate(bits).objective == pytest.approx(bqm.energy(spins))


def test_qubo_text_from_elsewhere_is_read(tmp_path):
    path = tmp_path / "other.qubo"
    path.write_text("# dimod\nc qbsolv\n\n0 0 1.5\n2 1 -1\n1 2 -1\n0 2 4e0\n3 3 0\nc offset -1\n")
    problem = read_problem(path)
    assert problem.num_groups == 4
    assert [problem.evaluate(bits).objective for bits in ([0] * 4, [1] * 4, [0, 1, 1, 0])] == [-1.0, 2.5, -3.0]


@pytest.mark.parametrize("suffix", [".lp", ".mps", ".qubo"])
def test_comments_may_be_indented(suffix, tmp_path):
    path = tmp_path / f"p{suffix}"
    write_problem(Problem(["a"], [["x", "y"]], [0, 30], {"bytes": [8, 4]}, {"bytes": 12}), path)
    read = read_problem(path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(f"  {line}" if line[0] in "\\*c" else line for line in lines))
    assert read_problem(path).fingerprint() == read.fingerprint()


@pytest.mark.parametrize(
    "comment", ["c offset is left out", "c offset", "c offset 1 of 2", "c decode the bits by hand"]
)
def test_a_comment_that_begins_like_ours_is_a_comment(comment, tmp_path):
    (tmp_path / "other.qubo").write_text(f"{comment}\n0 0 1.5\n")
    assert read_problem(tmp_path / "other.qubo").evaluate([1]).objective == 1.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no entries"),
        ("0 0\n", "line 1 should be 'i j bias'"),
        ("0 0 1\n0 one 1\n", "line 2 should be 'i j bias'"),
        ("p qubo 0 3 2 1\n0 0 1\n1 1 1\n", "announces 2 diagonal entries and 1 couplers of 3 variables; found 2 and 0"),
        ("p qubo 0 1 1 1\n0 0 1\n0 1 1\n", "of 1 variables; found 1 and 1 of 2"),
        ("-1 0 1\n", "counted from 0"),
        ("0 0 nan\n", "finite"),
        ("p qubo 0 3\n0 0 1\n", "line 1 should be 'p qubo 0 variables diagonals couplers', found 'p qubo 0 3'"),
        ("0 0 1\np maxcut\n", "line 2 should be 'p qubo 0 variables diagonals couplers', found 'p maxcut'"),
        ("p maxcut 0 1 1 0\n0 0 1\n", "should be 'p qubo 0 variables diagonals couplers', found 'p maxcut 0 1 1 0'"),
        ("p qubo 0 1 one 0\n0 0 1\n", "should be 'p qubo 0 variables diagonals couplers', found 'p qubo 0 1 one 0'"),
        ('c decode {"kind"\n0 0 1\n', "not QUBO coordinate text"),
        ("p qubo 0 100000000000 1 0\n0 0 1\n", "at most 10,000,000 variables can be read, found 100,000,000,000"),
        ("0 99999999999 1\n", "at most 10,000,000 variables can be read, found 100,000,000,000"),
    ],
)
def test_text_that_is_no_qubo_is_refused(text, message, tmp_path):
    (tmp_path / "bad.qubo").write_text(text)
    with pytest.raises(FileFormatError, match=message):
        read_problem(tmp_path / "bad.qubo")


# --- all of them ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damage_is_refused_and_a_missing_file_named(suffix, tmp_path):
    path = tmp_path / f"problem{suffix}"
    with pytest.raises(FileNotFoundError):
        read_problem(path)
    write_problem(Problem(["a", "b"], [["x", "y"]] * 2, [1, 2, 3, 4], {}, {}), path)
    whole = path.read_bytes()
    read_problem(path)
    for damaged in (whole[: len(whole) // 2], b"", b"\x00" * 100):
        path.write_bytes(damaged)
        with pytest.raises(FileFormatError, match="problem"):
            read_problem(path)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    for suffix in SUFFIXES:
        path = tmp_path / f"problem{suffix}"
        path.write_text("what was there")

        def fails(*_):
            raise OSError("disk full")

        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", fails)
            with pytest.raises(OSError, match="disk full"):
                write_problem(small_problem(1).with_budgets(), path, encoding=None)
        assert path.read_text() == "what was there"
    assert len(list(tmp_path.iterdir())) == len(SUFFIXES)


def test_other_suffixes_and_options_that_mean_nothing_are_refused(tmp_path):
    with pytest.raises(FileFormatError, match=r"known are \.lp, \.mps"):
        write_problem(small_problem(1), tmp_path / "problem.xls")
    with pytest.raises(FileFormatError, match="known are"):
        read_problem(tmp_path / "problem")
    with pytest.raises(EncodingError, match=r"for \.bqm and \.qubo"):
        write_problem(small_problem(1), tmp_path / "problem.lp", encoding="one-hot")
    with pytest.raises(EncodingError, match="no encoding is called 'two-hot'"):
        write_problem(small_problem(1), tmp_path / "problem.bqm", encoding="two-hot")
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_by_suffix_and_back(tmp_path, capsys):
    from qcompress.cli import main

    problem = layered_problem(3, bits=(2, 4), rank=0)
    problem.save(tmp_path / "p.npz")
    for name in ("p.lp", "p.mps", "p.cqm", "p.bqm", "p.qubo"):
        assert main(["convert", str(tmp_path / "p.npz"), str(tmp_path / name)]) == 0
        assert name in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "p.mps"), str(tmp_path / "q.npz")]) == 0
    assert Problem.load(tmp_path / "q.npz").fingerprint() == problem.fingerprint()
    words = ["--encoding", "domain-wall", "--price", "bytes=1e-5"]
    assert main(["convert", str(tmp_path / "p.npz"), str(tmp_path / "p.qubo"), *words]) == 0
    assert read_problem(tmp_path / "p.qubo").num_groups == 3
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "p.npz"), str(tmp_path / "p.xls")]) == 1
    assert "known are .lp" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "p.npz"), str(tmp_path / "p.qubo"), "--price", "bytes=x"]) == 2
