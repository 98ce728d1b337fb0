"""Files of problems and solutions: an exact round trip, one clear error for everything else, nothing half-written."""

import io
import json
import pickle
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import formulations.files
from formulations import FileFormatError, FormulationError, InvalidProblemError, Problem
from formulations.files import read_json, replacing, write_json
from formulations.generators.random_instances import layered_problem, small_problem
from solvers import Solution, Status, StopReason, TracePoint

SEEDS = st.integers(0, 10**6)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)


@pytest.fixture
def saved(tmp_path):
    """A problem with sparse pair terms, a factor and budgets, and the file it was saved to."""
    seeds = range(100)
    problem = next(p for p in map(small_problem, seeds) if p.pairs.num_sparse and p.pairs.rank and p.budgets)
    path = tmp_path / "problem.npz"
    problem.save(path)
    return problem, path


def entries_of(path):
    """The archive's entries, by name."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_entries(path, entries):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def with_header(path, **changes):
    """Rewrite the file with some of its header's entries set anew."""
    entries = entries_of(path)
    header = json.loads(np.load(io.BytesIO(entries["header.npy"])).tobytes())
    text = json.dumps({**header, **changes}).encode()
    buffer = io.BytesIO()
    np.save(buffer, np.frombuffer(text, dtype=np.uint8))
    write_entries(path, {**entries, "header.npy": buffer.getvalue()})


# --- round trips ---------------------------------------------------------------------------------------------------


@given(SEEDS)
@settings(max_examples=100, deadline=None)
def test_a_problem_comes_back_exactly(tmp_path_factory, seed):
    path = tmp_path_factory.mktemp("files") / "problem.npz"
    problem = small_problem(seed)
    problem.save(path)
    loaded = Problem.load(path)
    assert loaded.fingerprint() == problem.fingerprint()
    assert loaded.groups == problem.groups
    assert loaded.options == problem.options
    assert loaded.budgets == problem.budgets
    assert loaded.offset == problem.offset
    assert loaded.cost.tobytes() == problem.cost.tobytes()
    choice = np.zeros(problem.num_groups, int)
    assert loaded.evaluate(choice) == problem.evaluate(choice)


@given(st.lists(FLOATS, min_size=1, max_size=5), st.text(min_size=1), FLOATS)
@settings(max_examples=100, deadline=None)
def test_any_finite_number_and_any_name_comes_back(tmp_path_factory, cost, name, offset):
    path = tmp_path_factory.mktemp("files") / "problem.npz"
    options = [[f"{name}{i}" for i in range(len(cost))]]
    try:
        name.encode()
    except UnicodeEncodeError:  # lone surrogates are no text
        return
    problem = Problem([name], options, cost, {name: np.abs(cost)}, {name: offset}, offset=offset)
    problem.save(path)
    assert Problem.load(path).fingerprint() == problem.fingerprint()


def test_saving_takes_the_place_of_the_file_before(saved, tmp_path):
    problem, path = saved
    other = layered_problem(3)
    other.save(path)
    assert Problem.load(path).fingerprint() == other.fingerprint() != problem.fingerprint()
    assert [entry.name for entry in tmp_path.iterdir()] == ["problem.npz"]


def solution_of(problem):
    choice = np.zeros(problem.num_groups, dtype=np.int64)
    judged = problem.evaluate(choice)
    return Solution(
        choice=choice,
        objective=judged.objective,
        usage=judged.usage,
        feasible=judged.feasible,
        bound=None,
        gap=None,
        status=Status.FEASIBLE,
        stop_reason=StopReason.TIME_LIMIT,
        wall_s=0.1 + 0.2,
        timing={"solve_s": 1 / 3},
        trace=(TracePoint(0.1, None, -1.5), TracePoint(0.2, judged.objective, -1.5)),
        solver="greedy",
        seed=7,
        options={"sweeps": 3},
        details={"why": "because", "prices": {"bytes": 1e-300}},
        pool=(((0, 1), 2.5),),
        problem_fingerprint=problem.fingerprint(),
    )


def test_a_solution_comes_back_exactly(tmp_path):
    path = tmp_path / "solution.json"
    solution = solution_of(small_problem(3))
    solution.save(path)
    loaded = Solution.load(path)
    assert loaded.to_json() == solution.to_json()
    assert loaded.status is Status.FEASIBLE
    assert loaded.stop_reason is StopReason.TIME_LIMIT
    assert isinstance(loaded.trace[0], TracePoint)
    assert loaded.choice.dtype == np.int64


def test_a_solution_without_a_choice_comes_back(tmp_path):
    path = tmp_path / "solution.json"
    Solution(
        choice=None, objective=None, usage={}, feasible=False, bound=None, gap=None,
        status=Status.INFEASIBLE, stop_reason=StopReason.COMPLETED, wall_s=0.0,
    ).save(path)  # fmt: skip
    assert Solution.load(path).choice is None
    assert Solution.load(path).status is Status.INFEASIBLE


# --- files that are not what they should be ------------------------------------------------------------------------


def test_a_problem_file_cut_short_anywhere_is_refused(saved, tmp_path):
    whole = saved[1].read_bytes()
    path = tmp_path / "cut.npz"
    lengths = {*range(0, len(whole), 37), *range(8), *range(len(whole) - 40, len(whole))}
    for length in sorted(lengths):
        path.write_bytes(whole[:length])
        with pytest.raises(FileFormatError, match="cut.npz"):
            Problem.load(path)


def test_a_problem_file_with_any_byte_changed_is_refused_or_read_the_same(saved, tmp_path):
    problem, whole_path = saved
    whole = whole_path.read_bytes()
    path = tmp_path / "damaged.npz"
    refused = 0
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            loaded = Problem.load(path)
        except FormulationError as error:
            refused += 1
            assert "damaged.npz" in str(error)  # noqa: PT017
        else:  # a byte that means nothing, such as a time stamp
            assert loaded.fingerprint() == problem.fingerprint()
    assert refused > len(whole) / 7 / 2


class Bomb:
    """Unpickling it is noticed."""

    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was executed')",)


def test_a_pickle_in_a_file_is_refused_and_never_executed(saved, tmp_path):
    plain = tmp_path / "plain.npz"
    plain.write_bytes(pickle.dumps(Bomb()))
    array = tmp_path / "array.npz"
    with array.open("wb") as file:
        np.save(file, np.array([Bomb()], dtype=object), allow_pickle=True)
    inside = saved[1]
    buffer = io.BytesIO()
    np.save(buffer, np.array([Bomb()] * 5, dtype=object), allow_pickle=True)
    write_entries(inside, {**entries_of(inside), "cost.npy": buffer.getvalue()})
    for path in (plain, array, inside):
        with pytest.raises(FileFormatError, match="pickle"):
            Problem.load(path)


@pytest.mark.parametrize("content", [b"", b"PK", b"not a problem", b"{}", pickle.dumps([1]), bytes(1000)])
def test_something_else_is_refused(tmp_path, content):
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match="other is not a qcompress problem file"):
        Problem.load(path)


def test_a_plain_npz_and_a_plain_npy_are_no_problem_files(tmp_path):
    archive, array = tmp_path / "plain.npz", tmp_path / "plain.npy"
    np.savez(archive, cost=np.zeros(3))
    np.save(array, np.zeros(3))
    with pytest.raises(FileFormatError, match="it has no header"):
        Problem.load(archive)
    with pytest.raises(FileFormatError, match="plain.npy is not a qcompress problem file"):
        Problem.load(array)


def test_another_kind_and_a_newer_version_are_refused(saved):
    path = saved[1]
    with_header(path, version=99)
    with pytest.raises(FileFormatError, match="of version 99; this program reads up to version 1"):
        Problem.load(path)
    with_header(path, version="one")
    with pytest.raises(FileFormatError, match="of version 'one'"):
        Problem.load(path)
    with_header(path, kind="qcompress measurement")
    with pytest.raises(FileFormatError, match="its header says 'qcompress measurement'"):
        Problem.load(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"groups": 3},
        {"groups": None},
        {"options": [3]},
        {"budgets": [1]},
        {"budgets": None},
        {"offset": "x"},
        {"resources": 1},
    ],
)
def test_a_header_that_makes_no_problem_is_refused(saved, changes):
    with_header(saved[1], **changes)
    with pytest.raises(FormulationError, match="problem.npz"):
        Problem.load(saved[1])


@pytest.mark.parametrize("entry", ["cost.npy", "resource_0.npy", "sparse_indices.npy"])
def test_a_missing_or_misshaped_array_is_refused(saved, entry):
    path = saved[1]
    entries = entries_of(path)
    buffer = io.BytesIO()
    np.save(buffer, np.array([[0.5]]))
    write_entries(path, {**entries, entry: buffer.getvalue()})
    with pytest.raises(FormulationError, match="problem.npz"):
        Problem.load(path)
    write_entries(path, {name: content for name, content in entries.items() if name != entry})
    with pytest.raises(FormulationError, match="problem.npz is not a whole .* lists the arrays"):
        Problem.load(path)


def test_sparse_indices_out_of_range_are_refused(saved):
    path = saved[1]
    entries = entries_of(path)
    indices = np.load(io.BytesIO(entries["sparse_indices.npy"]))
    for wrong in (indices + 10**6, indices - 10**6):
        buffer = io.BytesIO()
        np.save(buffer, wrong)
        write_entries(path, {**entries, "sparse_indices.npy": buffer.getvalue()})
        with pytest.raises(FormulationError, match="problem.npz"):
            Problem.load(path)


def test_a_missing_file_is_called_missing(tmp_path):
    for load in (Problem.load, Solution.load):
        with pytest.raises(FileNotFoundError):
            load(tmp_path / "nowhere")


def test_a_solution_file_cut_short_anywhere_is_refused(tmp_path):
    path = tmp_path / "solution.json"
    solution_of(small_problem(3)).save(path)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 2, 5):
        path.write_bytes(whole[:length])
        with pytest.raises(FileFormatError, match="solution.json"):
            Solution.load(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "qcompress problem"}, {"version": 99}, {"version": None}, {"status": "FINE"}, {"choice": ["a"]},
        {"choice": 3}, {"choice": [[0]]}, {"choice": [0.5]}, {"trace": [1]}, {"pool": [[1]]}, {"surprise": 1},
        {"objective": "low"}, {"usage": 3}, {"wall_s": None},
    ],
)  # fmt: skip
def test_a_solution_file_with_other_content_is_refused(tmp_path, changes):
    path = tmp_path / "solution.json"
    solution = solution_of(small_problem(3))
    write_json(path, {**solution.to_json(), **changes})
    with pytest.raises(FileFormatError, match="solution.json"):
        Solution.load(path)


def test_a_solution_file_without_an_entry_it_needs_is_refused(tmp_path):
    path = tmp_path / "solution.json"
    whole = solution_of(small_problem(3)).to_json()
    for name in ("kind", "choice", "status", "trace", "wall_s"):
        write_json(path, {key: value for key, value in whole.items() if key != name})
        with pytest.raises(FileFormatError, match="solution.json"):
            Solution.load(path)


@pytest.mark.parametrize("content", [b"", b"[1]", b"3", b"\xff\xfe", b"{", b"nothing"])
def test_json_that_is_no_object_is_refused(tmp_path, content):
    path = tmp_path / "value.json"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match="value.json is not a note file"):
        read_json(path, "note")


# --- writing -------------------------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(saved, tmp_path, monkeypatch):
    problem, path = saved
    before = path.read_bytes()

    def breaks_midway(file, **arrays):
        file.write(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(formulations.files.np, "savez", breaks_midway)
    with pytest.raises(OSError, match="no space left"):
        problem.save(path)
    assert path.read_bytes() == before
    with pytest.raises(OSError, match="no space left"):
        problem.save(tmp_path / "new.npz")
    assert [entry.name for entry in tmp_path.iterdir()] == ["problem.npz"]


def test_an_interrupted_write_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "file") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_json_refuses_what_json_cannot_say(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "value.json", {"x": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_saving_into_a_folder_that_is_not_there_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        small_problem(0).save(tmp_path / "nowhere" / "problem.npz")


def test_written_files_have_ordinary_permissions(saved):
    ordinary = saved[1].with_name("ordinary")
    ordinary.touch()
    assert saved[1].stat().st_mode == ordinary.stat().st_mode


def test_no_object_array_is_ever_written(tmp_path):
    """What has no plain array form must not become a pickle inside the file."""
    with pytest.raises(InvalidProblemError):
        Problem(["a"], [["x"]], [object()], {}, {})
    with pytest.raises(ValueError, match="[Oo]bject"):
        formulations.files.write_arrays(
            tmp_path / "x", kind="k", version=1, header={}, arrays={"x": np.array([object()], dtype=object)}
        )
    assert list(tmp_path.iterdir()) == []
