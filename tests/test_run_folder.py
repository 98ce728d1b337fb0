"""A run folder: what is still true is reused, what changed is made anew, a dead process mixes nothing up."""

import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from formulations import FileFormatError
from qcompress import compress, load_compressed, prune_channels, prune_quantize
from qcompress.errors import ArtefactError, OptionsError, UncheckedWarning
from qcompress.report import Report
from qcompress.run_folder import Kept, RunFolder


def write(text: str, path: Path) -> None:
    path.write_text(text)


KEPT = Kept("value.txt", write, Path.read_text)


class Maker:
    """Makes numbered values and counts them."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, cache: Path | None) -> str:
        self.made += 1
        return f"value {self.made}"


def test_a_step_is_done_once_for_one_key_and_again_for_another(tmp_path: Path) -> None:
    make = Maker()
    for key, expected in [({"a": 1}, "value 1"), ({"a": 1}, "value 1"), ({"a": 2}, "value 2"), ({"a": 1}, "value 3")]:
        assert RunFolder(tmp_path).once("step", make, key=key, kept=KEPT) == expected


def test_the_log_says_what_is_reused_and_what_differs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "qcompress.run_folder")
    for key in ({"data": 1, "loss": 2}, {"data": 1, "loss": 2}, {"data": 3, "loss": 2}):
        RunFolder(tmp_path).once("step", Maker(), key=key, kept=KEPT)
    told = [record.message.removeprefix(f"{tmp_path}: ") for record in caplog.records]
    assert told == ["value.txt is reused", "value.txt is computed again, because of another data"]


def test_a_run_states_which_files_it_wrote_replaced_and_reused(tmp_path: Path) -> None:
    files = []
    for key in ({"a": 1}, {"a": 1}, {"a": 2}):
        run = RunFolder(tmp_path)
        assert run.last_files == (files[-1] if files else {})
        run.once("step", Maker(), key=key, kept=KEPT)
        if key == {"a": 1}:
            run.save("report.txt", lambda path: write("report", path))
        else:
            run.discard("report.txt")
        files.append(RunFolder(tmp_path).last_files)
    assert files == [
        {"value.txt": "written", "report.txt": "written"},
        {"value.txt": "reused", "report.txt": "written"},
        {"value.txt": "replaced"},
    ]
    assert not (tmp_path / "report.txt").exists()


def test_without_a_folder_nothing_is_kept_and_no_key_is_looked_at() -> None:
    run, make = RunFolder(None), Maker()
    assert run.once("step", make, key={"lock": threading.Lock()}, kept=KEPT) == "value 1"
    assert run.once("step", make, key={"lock": threading.Lock()}, kept=KEPT) == "value 2"
    assert set(run.wall_s) == {"step"}


def test_a_step_that_leaves_its_cache_is_kept_and_goes_on_in_the_next_run(tmp_path: Path) -> None:
    def make(cache: Path | None) -> str:
        assert cache is not None
        steps = int(cache.read_text()) + 1 if cache.exists() else 1
        if steps < 3:
            cache.write_text(str(steps))
        else:
            cache.unlink()
        return f"{steps} steps"

    found = [RunFolder(tmp_path).once("step", make, key={}, kept=KEPT) for _ in range(5)]
    assert found == ["1 steps", "2 steps", "3 steps", "3 steps", "3 steps"]


def test_the_cache_of_another_key_is_thrown_away(tmp_path: Path) -> None:
    def cut(cache: Path | None) -> str:
        assert cache is not None
        cache.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RunFolder(tmp_path).once("step", cut, key={"a": 1}, kept=KEPT)
    found: list[bool] = []

    def look(cache: Path | None) -> str:
        assert cache is not None
        found.append(cache.exists())
        raise KeyboardInterrupt

    for key in ({"a": 1}, {"a": 2}):
        with pytest.raises(KeyboardInterrupt):
            RunFolder(tmp_path).once("step", look, key=key, kept=KEPT)
    assert found == [True, False]


def test_a_value_whose_process_died_while_it_was_replaced_is_not_taken_for_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    RunFolder(tmp_path).once("step", lambda _: "first", key={"a": 1}, kept=KEPT)
    run = RunFolder(tmp_path)

    def die(text: str, path: Path) -> None:
        write(text, path)
        monkeypatch.setattr(RunFolder, "_write", lambda self: None)  # a dead process writes nothing more
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.once("step", lambda _: "second", key={"a": 2}, kept=Kept("value.txt", die, Path.read_text))
    monkeypatch.undo()
    assert (tmp_path / "value.txt").read_text() == "second"
    assert RunFolder(tmp_path).once("step", lambda _: "first", key={"a": 1}, kept=KEPT) == "first"


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    hand = Clock()
    monkeypatch.setattr(time, "perf_counter", hand)
    return hand


def test_the_time_of_a_step_adds_up_over_attempts_and_outlives_a_killed_process(tmp_path: Path, clock: Clock) -> None:
    def cut(cache: Path | None) -> str:
        clock.now += 5
        raise KeyboardInterrupt

    def killed(cache: Path | None) -> str:
        tell = run.watched(None)
        clock.now += 7
        tell("progress")
        clock.now += 1  # after the last progress: lost with the process
        run._steps = {}
        run.path = None
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RunFolder(tmp_path).once("step", cut, key={}, kept=KEPT)
    run = RunFolder(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run.once("step", killed, key={}, kept=KEPT)

    def finish(cache: Path | None) -> str:
        clock.now += 11
        return "done"

    run = RunFolder(tmp_path)
    run.once("step", finish, key={}, kept=KEPT)
    assert run.wall_s == {"step": 23}
    again = RunFolder(tmp_path)
    again.once("step", finish, key={}, kept=KEPT)
    assert again.wall_s == {"step": 23}
    other = RunFolder(tmp_path)
    other.once("step", finish, key={"a": 2}, kept=KEPT)
    assert other.wall_s == {"step": 11}


def test_what_cannot_be_checked_is_said_once_for_a_run(tmp_path: Path) -> None:
    run, lock = RunFolder(tmp_path), threading.Lock()
    with pytest.warns(UncheckedWarning, match=r"cannot be checked \(forward: lock\).*delete the folder"):
        run.once("measure", Maker(), key={"forward": lock}, kept=KEPT)
    run.once("apply", Maker(), key={"forward": lock}, kept=Kept("other.txt", write, Path.read_text))


@pytest.mark.parametrize(
    ("journal", "error"),
    [
        ("{", FileFormatError),
        ("[]", FileFormatError),
        (json.dumps({"kind": "qcompress run", "version": 99, "steps": {}}), FileFormatError),
        (json.dumps({"kind": "something else", "version": 1}), FileFormatError),
        (json.dumps({"kind": "qcompress run", "version": 1, "steps": {"measure": {}}, "files": {}}), FileFormatError),
        (json.dumps({"kind": "qcompress run", "version": 1, "steps": {}}), FileFormatError),
    ],
)
def test_a_journal_that_is_no_whole_one_is_one_clear_error(
    tmp_path: Path, journal: str, error: type[Exception]
) -> None:
    (tmp_path / "run.json").write_text(journal)
    with pytest.raises(error, match=r"run\.json"):
        RunFolder(tmp_path)


@pytest.mark.parametrize("error", [FileFormatError, ArtefactError])
def test_a_damaged_value_says_what_to_delete_and_is_then_made_again(tmp_path: Path, error: type[Exception]) -> None:
    def load(path: Path) -> str:
        if path.read_text() == "half":
            raise error(f"{path} is truncated")
        return path.read_text()

    make, kept = Maker(), Kept("value.txt", write, load)
    RunFolder(tmp_path).once("make", make, key={}, kept=kept)
    (tmp_path / "value.txt").write_text("half")
    with pytest.raises(error, match=r"value\.txt is truncated\. Delete this file, and the same call makes it again$"):
        RunFolder(tmp_path).once("make", make, key={}, kept=kept)
    (tmp_path / "value.txt").unlink()
    assert RunFolder(tmp_path).once("make", make, key={}, kept=kept) == "value 2"
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(FileFormatError, match=r"run\.json .*\. Delete this file, and the same call makes it again$"):
        RunFolder(tmp_path)
    (tmp_path / "run.json").unlink()
    assert RunFolder(tmp_path).once("make", make, key={}, kept=kept) == "value 3"


@pytest.mark.parametrize("place", ["file", "file/run", "file/deep/run"])
def test_a_file_in_place_of_a_folder_is_one_clear_error(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionsError, match=f"the run folder .*{place}: .*/file is a file; name a folder") as caught:
        RunFolder(tmp_path / place)
    assert "Errno" not in str(caught.value)


def test_the_folder_is_made_with_the_first_step_and_has_a_name(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "deep" / "run")
    assert not list(tmp_path.iterdir())
    run.once("step", lambda _: "made", key={}, kept=KEPT)
    assert (tmp_path / "deep" / "run" / "run.json").exists()
    with pytest.raises(OptionsError, match=r"the name of the run folder is empty; '\.' is the current folder"):
        RunFolder("")


def test_a_value_that_every_run_makes_may_be_the_first(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run").save("note.txt", partial(write, "made"))
    assert (tmp_path / "run" / "note.txt").read_text() == "made"


def test_only_one_run_at_a_time_is_in_a_folder(tmp_path: Path) -> None:
    folder, model, batches = tmp_path / "deep" / "run", nn.Linear(4, 2), Read()

    def run() -> None:
        compress(model, batches, budget={"bytes": 0.5}, options=prune_quantize(bits=(8,)), folder=folder)

    with RunFolder.alone(folder):
        with pytest.raises(OptionsError, match=f"another run is in progress in {folder}: wait until it has ended"):
            run()
        assert not batches.times
        assert not list(folder.iterdir())
    run()
    assert (folder / "report.json").exists()


class Read:
    """Batches that count how often they are read."""

    times = 0

    def __iter__(self) -> Iterator[Tensor]:
        self.times += 1
        yield torch.ones(8, 4)


@pytest.mark.parametrize("output", ["measurement.npz", "run.json", "new.safetensors", "codes", "apply.part", "."])
def test_an_engines_file_takes_no_place_of_the_run_folder(output: str, tmp_path: Path) -> None:
    more: dict[str, Any] = {"target": "onnxruntime", "output": tmp_path / "run" / output, "folder": tmp_path / "run"}
    with pytest.raises(OptionsError, match=r"is a place that the run folder .*run uses itself: name another file"):
        compress(nn.Linear(4, 2), [torch.randn(8, 4)], budget={"bytes": 0.5}, **more)
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_refused_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match="rounds"):
        compress(
            nn.Linear(4, 2), [torch.randn(8, 4)], budget={"bytes": 0.5}, rounds=0, folder=tmp_path / "deep" / "run"
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_without_permission_is_one_clear_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OptionsError, match="cannot be written"):
        RunFolder(tmp_path)


def test_the_value_of_another_step_is_left_alone(tmp_path: Path) -> None:
    other: Kept[Any] = Kept("other.txt", write, Path.read_text)
    RunFolder(tmp_path).once("first", lambda _: "1", key={"a": 1}, kept=KEPT)
    RunFolder(tmp_path).once("second", lambda _: "2", key={"a": 9}, kept=other)
    assert RunFolder(tmp_path).once("first", Maker(), key={"a": 1}, kept=KEPT) == "1"


def test_a_step_whose_file_another_one_wrote_since_is_made_again(tmp_path: Path) -> None:
    make, draft = Maker(), Kept("draft.txt", write, Path.read_text)
    found = [
        RunFolder(tmp_path).once(step, make, key={"a": 1}, kept=kept)
        for step, kept in [("apply", KEPT), ("apply", draft), ("tune", KEPT), ("apply", draft), ("apply", KEPT)]
    ]
    assert found == ["value 1", "value 2", "value 3", "value 2", "value 4"]
    assert RunFolder(tmp_path).last_files == {"value.txt": "replaced"}
    assert RunFolder(tmp_path).once("tune", make, key={"a": 1}, kept=KEPT) == "value 5"
    RunFolder(tmp_path).save("value.txt", partial(write, "saved"))
    assert RunFolder(tmp_path).once("tune", make, key={"a": 1}, kept=KEPT) == "value 6"


def test_the_cache_of_a_step_outlives_that_another_one_writes_its_file(tmp_path: Path) -> None:
    def cut(cache: Path | None) -> str:
        assert cache is not None
        found.append(cache.exists())
        cache.write_text("half")
        raise KeyboardInterrupt

    found: list[bool] = []
    for key in ({"a": 1}, {"a": 1}, {"a": 2}):
        with pytest.raises(KeyboardInterrupt):
            RunFolder(tmp_path).once("tune", cut, key=key, kept=KEPT)
        RunFolder(tmp_path).once("apply", Maker(), key={}, kept=KEPT)
    assert found == [False, True, False]


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))


def batches() -> list[Tensor]:
    return [torch.randn(8, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


CODES: dict[str, Any] = {"options": prune_quantize(bits=(2, 3, 8), sparsity=(0,), compensated=True)}
CHANNELS: dict[str, Any] = {"options": prune_channels()}
PATTERNS = {"0": prune_quantize(bits=(8,), sparsity=(0,)), "*": prune_quantize(bits=(2, 3), sparsity=(0,))}
ASKED: dict[str, dict[str, Any]] = {
    "patterns": {"options": PATTERNS, "budget": {"bytes": 0.5}},
    "patterns, turned": {"options": dict(reversed(PATTERNS.items())), "budget": {"bytes": 0.5}},
    "small": CODES | {"budget": {"bytes": 0.3}},
    "small, tuned": CODES | {"budget": {"bytes": 0.3}, "finetune_steps": 6},
    "large": CODES | {"budget": {"bytes": 0.4}},
    "large, tuned": CODES | {"budget": {"bytes": 0.4}, "finetune_steps": 6},
    "large, tuned for longer": CODES | {"budget": {"bytes": 0.4}, "finetune_steps": 9},
    "large, refined": CODES | {"budget": {"bytes": 0.4}, "refine_rounds": 1},
    "large, unguarded": CODES | {"budget": {"bytes": 0.4}, "guard": False},
    "smallest": CODES | {"budget": {"loss": 0.02}, "minimize": "bytes"},
    "channels": CHANNELS | {"budget": {"macs": 0.5}},
    "channels, tuned": CHANNELS | {"budget": {"macs": 0.5}, "finetune_steps": 6},
    "channels in rounds": CHANNELS | {"budget": {"macs": 0.5}, "rounds": 2},
    "channels in rounds, tuned": CHANNELS | {"budget": {"macs": 0.5}, "rounds": 2, "finetune_steps": 6},
    "channels and codes": {"options": prune_channels() + CODES["options"], "budget": {"bytes": 0.3}},
    "all channels": CHANNELS | {"budget": {"macs": 1.0}},
}


def weights(model: nn.Module) -> dict[str, list[float]]:
    return {name: value.flatten().tolist() for name, value in model.state_dict().items()}


def told(report: Report) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads(json.dumps(report.to_json() | {"wall_s": {}}))
    return figures


def asked(name: str, folder: Path | None = None) -> tuple[dict[str, Any], list[float], dict[str, list[float]]]:
    result = compress(network(), batches(), solver="greedy", folder=folder, **ASKED[name])
    return told(result.report), result.measurement.cost.tolist(), weights(result.model)


fresh = cache(asked)


@pytest.mark.slow
@example(["small, tuned", "large", "small, tuned"])
@example(["small", "small, tuned", "small"])
@example(["small, tuned", "large", "large, tuned"])
@example(["channels, tuned", "channels", "channels, tuned"])
@example(["channels", "channels in rounds", "channels"])
@example(["small", "all channels"])
@example(["patterns", "patterns, turned"])
@settings(max_examples=2)
@given(names=st.lists(st.sampled_from(sorted(ASKED)), min_size=3, max_size=6))
def test_any_calls_in_one_folder_give_and_leave_there_what_each_gives_by_itself(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as place:
        for name in names:
            folder = Path(place)
            assert asked(name, folder) == fresh(name)
            assert weights(load_compressed(folder / "model.safetensors", network)) == fresh(name)[2]
            assert told(Report.load(folder / "report.json")) == fresh(name)[0]
