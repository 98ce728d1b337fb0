"""Files of problems and solutions: an exact round trip, one clear error for everything else, nothing half-written."""

import contextlib
import errno
import io
import json
import os
import pickle
import re
import shutil
import stat
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import formulations
import formulations.file_kinds
from formulations import FileFormatError, FormulationError, InvalidProblemError, Problem
from formulations.file_kinds import FileKind
from formulations.files import drafting, read_json, replacing, write_json
from formulations.generators.random_instances import layered_problem, small_problem
from qcompress import plots
from solvers import Solution, Status, StopReason, TracePoint
from solvers.compare.runs import compare

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


def test_another_kind_or_version_is_refused(saved):
    path = saved[1]
    for version in (2, 99):
        with_header(path, version=version)
        with pytest.raises(FileFormatError, match=f"of version {version}; this program reads version 3"):
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
        {"fixed": [1]},
        {"fixed": None},
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
    with pytest.raises(FormulationError, match="problem.npz is not a complete .* lists the arrays"):
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

    monkeypatch.setattr(formulations.file_kinds.np, "savez", breaks_midway)
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
        FileKind("k", version=1).write_arrays(tmp_path / "x", {}, {"x": np.array([object()], dtype=object)})
    assert list(tmp_path.iterdir()) == []


def write(path, content=b"whole"):
    with replacing(path) as file:
        file.write(content)


def writers():
    """Every kind of file that the three packages write, by name: a function that writes it to a path."""
    problem = small_problem(3)
    solution = solution_of(problem)
    compared = compare(problem, ["brute-force"])
    return {
        "problem.npz": problem.save,
        "solution.json": solution.save,
        "problem.lp": lambda path: formulations.write_lp(problem, path),
        "problem.mps": lambda path: formulations.write_mps(problem, path),
        "problem.cqm": lambda path: formulations.write_cqm(problem, path),
        "problem.qubo": lambda path: formulations.write_qubo(problem, path),
        "anytime.png": lambda path: plots.plot_anytime(compared, path),
    }


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o755])
def test_a_file_that_is_written_anew_keeps_its_mode(tmp_path, mode):
    path = tmp_path / "file"
    path.touch()
    path.chmod(mode)
    write(path)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert path.read_bytes() == b"whole"


def test_modes_of_new_files_follow_the_umask_without_setting_it(tmp_path, monkeypatch):
    before = os.umask(0o027)
    try:
        monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask of all threads was set"))
        write(tmp_path / "file")
    finally:
        monkeypatch.undo()
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_a_link_stays_a_link_and_what_it_leads_to_is_written(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    file, link, second = tmp_path / "elsewhere" / "file", tmp_path / "link", tmp_path / "second"
    link.symlink_to("elsewhere/file")
    second.symlink_to(link)
    for content in (b"new", b"again"):  # the first time the link leads to nothing yet
        write(second, content)
        assert link.is_symlink()
        assert second.is_symlink()
        assert file.read_bytes() == content
    assert [entry.name for entry in (tmp_path / "elsewhere").iterdir()] == ["file"]


def test_links_in_a_circle_are_refused(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links.*'.*a'"):
        write(tmp_path / "a")


def test_a_pipe_gets_the_whole_content_and_stays_a_pipe(tmp_path):
    path, received = tmp_path / "pipe", []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: received.append(path.read_bytes()))
    reader.start()
    small_problem(3).save(path)
    reader.join()
    assert stat.S_ISFIFO(path.stat().st_mode)
    small_problem(3).save(tmp_path / "file")
    assert len(received[0]) == (tmp_path / "file").stat().st_size
    assert zipfile.is_zipfile(io.BytesIO(received[0]))


def test_nothing_reaches_a_pipe_when_writing_fails(tmp_path):
    path, received = tmp_path / "pipe", []
    os.mkfifo(path)
    descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK)  # a reader that is there, so that opening would not wait
    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write(b"half")
        raise RuntimeError
    with contextlib.suppress(BlockingIOError):
        received.append(os.read(descriptor, 10))
    os.close(descriptor)
    assert received == []


def test_a_device_is_written_into():
    null = Path("/dev/null")
    before = null.stat()
    write(null)
    assert os.path.samestat(null.stat(), before)


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_standard_output_can_be_the_file(tmp_path, name):
    """A shell's redirection keeps its file: what is written before and after stays in it."""
    code = f"""
import sys
from formulations.files import write_json
print("before", flush=True)
write_json({name!r}, [1])
"""
    path = tmp_path / "output"
    with path.open("ab") as output:
        subprocess.run([sys.executable, "-c", code], stdout=output, check=True)
    assert path.read_text() == "before\n[\n 1\n]\n"


def test_every_writer_follows_links_and_keeps_modes(tmp_path):
    (tmp_path / "real").mkdir()
    for name, save in writers().items():
        file, link = tmp_path / "real" / name, tmp_path / name
        file.touch(mode=0o600)
        link.symlink_to(file)
        save(link)
        assert link.is_symlink(), name
        assert file.stat().st_size > 0, name
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, name


def test_a_disk_without_room_is_named_with_the_file_and_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match=r"No space left on device: '.*problem.npz'"), replacing(tmp_path / "problem.npz"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as write() says it: without a name
    assert list(tmp_path.iterdir()) == []


def test_a_full_device_is_named():
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        write("/dev/full", b"x" * 100_000)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_and_a_read_only_file_are_named(tmp_path):
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    folder.chmod(0o555)
    file.touch(mode=0o444)
    for path in (folder / "new", file):
        with pytest.raises(PermissionError, match=f"Permission denied: '{path}'"):
            write(path)
    assert file.read_bytes() == b""


def test_permission_errors_name_the_file_not_the_unfinished_one(tmp_path, monkeypatch):
    def refuse(path, *_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fspath(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError, match=f"Read-only file system: '{tmp_path / 'file'}'"):
        write(tmp_path / "file")


def test_a_folder_is_no_place_to_write_to(tmp_path):
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        write(tmp_path)


WRITES = re.compile(
    r"\.write_(text|bytes)\(|savez\w*\(|save_file\(|\.open\(\"[wx]b?\"|\bos\.replace\(|\.rename\(|umask\("
)
OTHERS = {  # what writes files and is not meant to replace anything
    "formulations/file_kinds.py",  # through replacing()
    "formulations/files.py",
    "formulations/drafts.py",  # puts back what was set aside
    "solvers/exact/milp.py",  # the log of a solver's process, in a temporary folder
    "qcompress/engines/compressed_tensors.py",  # engines write to the place that drafting() gives them
    "qcompress/engines/llama_cpp/container.py",
    "qcompress/engines/onnxruntime.py",
    "benchmarks/smollm2_gguf.py",  # through drafting()
    "benchmarks/streaming.py",  # models of random weights, in a folder that is made for them
    "qcompress/engines/onnx_clock.py",  # graphs that are timed, in a temporary folder
    "qcompress/engines/onnx_timing.py",  # graphs that are timed, in a temporary folder
    "qcompress/testing.py",  # weights that a check compares, in a temporary folder
}


def test_every_file_is_written_through_one_function():
    root = Path(formulations.__file__).parents[1]
    for package in ("formulations", "solvers", "qcompress", "benchmarks"):
        for module in sorted((root / package).rglob("*.py")):
            code = "".join(line for line in module.read_text().splitlines(True) if not line.lstrip().startswith(">>>"))
            name = str(module.relative_to(root))
            assert name in OTHERS or not WRITES.search(code), f"{name}: {WRITES.search(code)}"


def draft(path, content=b"whole"):
    with drafting(path) as place:
        place.write_bytes(content)


def folder_draft(path):
    with drafting(path) as place:
        place.mkdir()
        (place / "part").write_bytes(b"x")


@pytest.mark.parametrize("put", [write, draft, folder_draft])
def test_a_link_into_a_folder_that_is_missing_is_named_with_the_folder(tmp_path, put):
    link = tmp_path / "link"
    link.symlink_to("nowhere/file")
    with pytest.raises(FileNotFoundError, match=f"{link} is a link into a folder that .*: '{tmp_path / 'nowhere'}'"):
        put(link)
    (tmp_path / "nowhere").mkdir()
    put(link)
    assert link.is_symlink()
    assert (tmp_path / "nowhere" / "file").exists()


def test_a_draft_follows_links_and_keeps_modes(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    file, link = tmp_path / "elsewhere" / "file", tmp_path / "link"
    link.symlink_to(file)
    draft(link, b"new")
    file.chmod(0o600)
    draft(link, b"again")
    assert link.is_symlink()
    assert file.read_bytes() == b"again"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [entry.name for entry in file.parent.iterdir()] == ["file"]


def test_a_draft_is_written_into_a_device_and_leaves_it(tmp_path):
    draft("/dev/null")
    assert not Path("/dev/null").is_file()
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        draft("/dev/full", b"x" * 100_000)


def test_a_draft_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"), drafting(path) as place:
        place.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_copy_into_a_draft_that_fails_names_the_place_asked_for(tmp_path):
    path, source = tmp_path / "small", tmp_path / "tokenizer.json"
    with pytest.raises(OSError, match=f"No space left on device: '{path}'$"), drafting(path) as place:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source), None, str(place / source.name))
    with pytest.raises(FileNotFoundError, match=f"{source}'$"), drafting(path) as place:
        place.mkdir()
        shutil.copy(source, place)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("over_folder", [False, True])
def test_a_file_does_not_take_the_place_of_a_folder(tmp_path, over_folder):
    (tmp_path / "empty").mkdir()
    with (
        pytest.raises(IsADirectoryError, match="empty'$"),
        drafting(tmp_path / "empty", over_folder=over_folder) as place,
    ):
        place.write_bytes(b"new")
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_dir()] == ["empty"]


def test_a_folder_of_drafts_takes_the_place_of_an_empty_one_only(tmp_path):
    for name in ("new", "empty", "full"):
        goal = tmp_path / name
        if name != "new":
            goal.mkdir()
        if name == "full":
            (goal / "other").touch()
        if name == "full":
            with pytest.raises(OSError, match="not empty"):
                folder_draft(goal)
        else:
            folder_draft(goal)
        assert [entry.name for entry in goal.iterdir()] == (["other"] if name == "full" else ["part"])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["empty", "full", "new"]
    with pytest.raises(FileNotFoundError, match="nowhere/new'"):
        draft(tmp_path / "nowhere" / "new")
