"""What holds around any engine: only what it runs is searched, sizes are to the byte, lies are found out."""

import math

import pytest
import torch
from torch import nn

import qcompress
from formulations.reductions.tie import tie
from qcompress.budgets import FILE_BYTES
from qcompress.engines.base import EngineRun
from qcompress.engines.compressed_tensors import CompressedTensors
from qcompress.engines.legal import for_engine
from qcompress.engines.llama_cpp.engine import LlamaCpp
from qcompress.engines.registry import TABLE, as_engine
from qcompress.engines.verify import ROWS, compared
from qcompress.errors import (
    ArtefactError,
    DataError,
    EngineError,
    MissingError,
    ModelError,
    OptionsError,
    VerificationError,
)
from solvers import solve
from tests.engines.tiny import WORDS, tiny
from tests.engines.toy import Toy
from tests.models import seeded


def network() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)))


@pytest.fixture
def data():
    torch.manual_seed(1)
    return [torch.randn(16, 8), torch.randn(5, 8)]


@pytest.fixture
def measurement(data):
    return qcompress.measure(network(), data, qcompress.prune_quantize(bits=(2, 3, 4, 5), sparsity=(0,)))


def compressed(measurement, engine, share):
    model = network()
    legal = for_engine(engine, model, measurement)
    solution = solve(qcompress.formulate(legal, {FILE_BYTES: share}), "brute-force")
    return qcompress.apply(model, legal, solution), solution


def test_only_what_the_engine_runs_is_left(measurement):
    legal = for_engine(Toy(), network(), measurement)
    assert {label for own in legal.labels for label in own} == {"keep", "2 bits", "4 bits"}
    kept = [measurement.labels[0].index(label) for label in legal.labels[0]]
    assert legal.cost[: len(kept)].tolist() == measurement.cost[kept].tolist()


def test_tied_parts_have_the_same_options_in_the_same_order(data):
    model = network()
    measurement = qcompress.measure(model, data, Toy().options())
    engine = Toy(tied=(("0", "2"),))
    legal = for_engine(engine, model, measurement)
    assert legal.labels[0] == legal.labels[1]
    both = tie(qcompress.formulate(legal, {FILE_BYTES: 0.5}), engine.ties(legal.parts))
    choice = both.lift(solve(both.problem, "brute-force").choice)
    assert choice[0] == choice[1]


def test_an_engine_that_runs_nothing_of_it_says_what_it_refused(data):
    model = network()
    measurement = qcompress.measure(model, data, qcompress.prune_quantize(bits=(3,), sparsity=(0,)))
    with pytest.raises(
        EngineError, match="engine 'toy' runs none of the measured options: no kernel for 3 bits in '0'"
    ):
        for_engine(Toy(), model, measurement)


@pytest.mark.parametrize("share", [0.9, 0.7, 0.55])
def test_the_file_takes_the_predicted_bytes_and_gives_the_emulations_outputs(measurement, data, tmp_path, share):
    engine = Toy(factory=network)
    model, solution = compressed(measurement, engine, share)
    file = qcompress.export(model, tmp_path / "small.toy", target=engine)
    assert file.size_bytes == solution.usage[FILE_BYTES] == file.path.stat().st_size
    found = qcompress.verify(file.path, model, data, target=engine)
    assert found.ok
    assert (found.max_difference, found.kl, found.agreement) == (0.0, 0.0, 1.0)
    assert found.speedup > 0


def test_a_model_that_is_not_compressed_is_written_as_it_is(data, tmp_path):
    engine = Toy(factory=network)
    file = qcompress.export(network(), tmp_path / "whole.toy", target=engine)
    assert qcompress.verify(file.path, network(), data, target=engine).ok


def test_an_engine_that_gives_something_else_is_found_out(measurement, data, tmp_path):
    engine = Toy(factory=network)
    model, _ = compressed(measurement, engine, 0.7)
    path = qcompress.export(model, tmp_path / "small.toy", target=engine).path
    found = qcompress.verify(path, model, data, target=Toy(factory=network, wrong=0.5))
    assert not found.ok
    assert found.max_difference == pytest.approx(1.0)
    assert "differ from the emulation's by" in found.why_not


@pytest.mark.parametrize("target", ["toy", "onnxruntime"])
def test_the_file_of_another_model_is_refused_by_the_shapes_of_its_outputs(data, tmp_path, target):
    def other():
        return seeded(lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))

    engine = Toy(factory=other) if target == "toy" else target
    path = qcompress.export(other(), tmp_path / "other", target=engine, example=data[0]).path
    with pytest.raises(EngineError, match=r"file of another model: its outputs have the shape \[16, 4\].*\[16, 3\]"):
        qcompress.verify(path, network(), data, target=engine)


@pytest.mark.parametrize("target", ["llama.cpp", "compressed-tensors"])
def test_the_file_of_a_language_model_with_another_vocabulary_is_refused(tmp_path, target):
    model, other = tiny("llama", tmp_path / "model"), tiny("llama", tmp_path / "other", vocab_size=WORDS + 13)
    path = qcompress.export(other, tmp_path / "file", target=target).path
    with pytest.raises(EngineError, match=r"file of another model: its outputs have the shape .*333\].*320\]"):
        qcompress.verify(path, model, [torch.ones(2, 5, dtype=torch.long)], target=target)


class Chaotic(nn.Module):
    """Two layers around a chaotic map: an error of one in ten million becomes as large as the numbers themselves."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)
        for parameter in self.parameters():
            parameter.data = torch.rand(parameter.shape, generator=generator)

    def forward(self, x):
        x = torch.sigmoid(self.first(x))
        for _ in range(60):
            x = 3.99 * x * (1 - x)
        return self.last(x)


def test_of_a_chaotic_model_no_more_is_asked_than_rounding_allows(tmp_path):
    data = [torch.rand(64, 8, generator=torch.Generator().manual_seed(1))]
    engine = Toy(factory=Chaotic)
    path = qcompress.export(Chaotic(), tmp_path / "chaotic.toy", target=engine).path
    assert qcompress.verify(path, Chaotic(), data, target=engine).by_rounding is None

    moved = Chaotic()
    moved.first.weight.data *= 1 + 1e-6
    found = qcompress.verify(path, moved, data, target=engine)
    assert found.ok
    assert found.by_rounding > 0.1

    wrong = qcompress.verify(path, moved, data, target=Toy(factory=Chaotic, wrong=9.0))
    assert not wrong.ok
    assert "rounding alone makes" in wrong.why_not


def test_bytes_that_nobody_predicted_are_found_out(measurement, data, tmp_path):
    engine = Toy(factory=network, more=1)
    model, solution = compressed(measurement, engine, 0.7)
    path = qcompress.export(model, tmp_path / "small.toy", target=engine).path
    found = qcompress.verify(path, model, data, target=engine)
    assert not found.ok
    assert found.size_bytes == solution.usage[FILE_BYTES] + 1
    assert "instead of the predicted" in found.why_not


def test_nothing_is_left_half_written(tmp_path):
    with pytest.raises(EngineError, match="no Conv2d"):
        qcompress.export(nn.Sequential(nn.Conv2d(1, 1, 1)), tmp_path / "small.toy", target=Toy())
    assert list(tmp_path.iterdir()) == []


def test_a_weight_that_was_changed_since_is_refused(measurement, tmp_path):
    model, _ = compressed(measurement, Toy(), 0.7)
    with torch.no_grad():
        model[2].weight.add_(1.0)
        model[0].weight.add_(1.0)
        model[4].weight.add_(1.0)
    with pytest.raises(ArtefactError, match="no longer what apply"):
        qcompress.export(model, tmp_path / "small.toy", target=Toy())


@pytest.mark.parametrize("notes", [(), ("note",)])
def test_a_folder_is_not_replaced_by_a_file(tmp_path, notes):
    (tmp_path / "mine").mkdir()
    for note in notes:
        (tmp_path / "mine" / note).write_text("mine")
    with pytest.raises(EngineError, match="'toy' writes a file, but .*mine is a folder; name a file"):
        qcompress.export(network(), tmp_path / "mine", target=Toy())
    assert tuple(path.name for path in (tmp_path / "mine").iterdir()) == notes


def test_unknown_engines_settings_and_things_that_are_none_are_refused(tmp_path):
    with pytest.raises(EngineError, match="there is no engine 'nobody'; .* own file, for PyTorch"):
        qcompress.export(network(), tmp_path / "x", target="nobody")
    with pytest.raises(EngineError, match="found int"):
        as_engine(3)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match=r"has no setting 'speed'; it has: factory"):
        as_engine(Toy(), speed=1)
    with pytest.raises(EngineError, match="found dict"):
        qcompress.export({}, tmp_path / "x", target=Toy())  # type: ignore[arg-type]


@pytest.mark.parametrize(("engine", "setting", "value", "wanted"), [
    (CompressedTensors, "shard_bytes", -5, "a whole number from 0"),
    (CompressedTensors, "shard_bytes", "1GB", "a whole number from 0"),
    (CompressedTensors, "fused", "no", "True or False"),
    (CompressedTensors, "tokenizer", 5, "a text"),
    (LlamaCpp, "threads", "two", "a whole number from 0"),
    (LlamaCpp, "source", 5, "a text"),
    (LlamaCpp, "source", None, "a text"),
])  # fmt: skip
def test_a_setting_of_another_kind_is_refused_by_name(engine, setting, value, wanted, tmp_path):
    told = f"{setting} of engine '{engine.name}' must be {wanted}, found {value!r}"
    with pytest.raises(OptionsError, match=told):
        qcompress.export(network(), tmp_path / "x", target=engine(**{setting: value}))
    with pytest.raises(OptionsError, match=told):
        as_engine(engine.name, **{setting: value})


def test_a_text_may_be_a_path(tmp_path):
    assert as_engine("llama.cpp", source=tmp_path).source == tmp_path
    assert as_engine("compressed-tensors", tokenizer=None, shard_bytes=10).shard_bytes == 10


def test_a_class_is_named_with_the_call_that_is_missing(data, tmp_path):
    with pytest.raises(EngineError, match=r"found the class Toy; write Toy\(\); known: llama.cpp"):
        qcompress.export(network(), tmp_path / "x", target=Toy)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match=r"found the class dict; known:"):
        as_engine(dict)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match=r"found the class Chaotic; write Chaotic\(\)"):
        qcompress.export(Chaotic, tmp_path / "x", target=Toy())  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"found the class Chaotic; write Chaotic\(\)"):
        qcompress.measure(Chaotic, data, Toy().options())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("compressed-tensors", "writes a folder, but .*place is a file; give what export wrote"),
        ("llama.cpp", "writes a file, but .*place is a folder; give what export wrote"),
        ("onnxruntime", "writes a file, but .*place is a folder; give what export wrote"),
    ],
)
def test_verifying_a_file_in_place_of_a_folder_or_the_other_way_round_is_refused(tmp_path, target, told):
    place = tmp_path / "place"
    place.write_bytes(b"GGUF") if told.endswith("a file; give what export wrote") else place.mkdir()
    with pytest.raises(EngineError, match=f"engine '{target}' {told}"):
        qcompress.verify(place, network(), [torch.ones(1, 8)], target=target)


def test_a_link_into_a_folder_that_is_missing_is_refused_by_the_folders_name(data, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to("nowhere/small.toy")
    with pytest.raises(FileNotFoundError, match=r"there is no such folder: .*nowhere'"):
        qcompress.export(network(), tmp_path / "link", target=Toy())
    monkeypatch.setattr("qcompress.steps.measuring.measure", lambda *_, **__: pytest.fail("it was measured"))
    with pytest.raises(FileNotFoundError, match=r"there is no such folder: .*nowhere'"):
        qcompress.compress(network(), data, budget={FILE_BYTES: 0.7}, target=Toy(), output=tmp_path / "link")


def test_verifying_with_nothing_or_no_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        qcompress.verify(tmp_path / "none", network(), [torch.ones(1, 8)], target=Toy())
    path = qcompress.export(network(), tmp_path / "whole.toy", target=Toy()).path
    with pytest.raises(DataError, match="nothing to verify with"):
        qcompress.verify(path, network(), [], target=Toy())


def test_a_missing_package_is_named_with_what_to_install():
    class Absent(Toy):
        name = "absent"
        requires = ("surely_not_there.core",)
        extra = "absent"

    assert not Absent.info().available
    with pytest.raises(MissingError, match=r"engine 'absent' needs surely_not_there.core: pip install 'qcompress\[abs"):
        as_engine(Absent())


def test_the_listed_engines_are_those_of_the_table():
    assert [info.name for info in qcompress.engines()] == list(TABLE)


def test_compress_for_an_engine_searches_what_it_runs_and_ends_with_its_file(data, tmp_path):
    engine = Toy(factory=network)
    result = qcompress.compress(
        network(),
        data,
        budget={FILE_BYTES: "1.5 kB"},
        target=engine,
        output=tmp_path / "small.toy",
        solver="brute-force",
    )
    assert {label for labels in result.measurement.labels for label in labels} <= {"keep", "2 bits", "4 bits", "8 bits"}
    assert result.exported.size_bytes == result.solution.usage[FILE_BYTES] <= 1500
    assert result.exported.path.stat().st_size == result.exported.size_bytes
    assert result.verification.ok


@pytest.mark.parametrize("second", [{"bytes": "50%"}, {FILE_BYTES: "60%"}, {"bits_per_weight": 9}])
@pytest.mark.parametrize("minimize", [None, "bits_per_weight"])
def test_the_measurement_of_a_run_by_bits_per_weight_serves_every_budget(data, minimize, second):
    first = {"bits_per_weight": 8} if minimize is None else {"loss": 0.1}
    given = {"target": Toy(), "solver": "milp", "guard": False}
    measurement = qcompress.compress(network(), data, budget=first, minimize=minimize, **given).measurement
    again = qcompress.compress(network(), data, budget=second, measurement=measurement, **given)
    anew = qcompress.compress(network(), data, budget=second, **given)
    assert again.problem.budgets == anew.problem.budgets
    assert again.solution.objective == pytest.approx(anew.solution.objective, rel=1e-6)


def test_compress_keeps_to_what_the_engine_ties(data):
    engine = Toy(factory=network, tied=(("0", "2", "4"),))
    for share in (0.9, 0.75, 0.6):
        result = qcompress.compress(network(), data, budget={FILE_BYTES: share}, target=engine, solver="milp")
        assert (
            len(
                {
                    options[option]
                    for options, option in zip(result.measurement.labels, result.solution.choice, strict=False)
                }
            )
            == 1
        )


def test_a_file_that_is_not_what_was_chosen_is_an_error(data, tmp_path):
    with pytest.raises(VerificationError, match=r"small.toy does not match the chosen model: its outputs differ"):
        qcompress.compress(
            network(),
            data,
            budget={FILE_BYTES: 0.7},
            target=Toy(factory=network, wrong=1.0),
            output=tmp_path / "small.toy",
        )


def test_an_output_without_an_engine_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(OptionsError, match="name the engine too"):
        qcompress.compress(network(), [torch.ones(1, 8)], budget={"bytes": 0.5}, output=tmp_path / "x")


@pytest.mark.parametrize("earlier", [True, False])
@pytest.mark.parametrize("fault", ["check", "run"])
def test_a_file_that_is_rejected_does_not_replace_a_good_one(data, tmp_path, monkeypatch, fault, earlier):
    """Also a run that was cut after its choice only writes and compares the file again."""
    goal, rejected = tmp_path / "small.toy", tmp_path / "small.toy.rejected"
    engine = Toy(factory=network)

    def compress():
        return qcompress.compress(
            network(), data, budget={FILE_BYTES: 0.7}, target=engine, output=goal, folder=tmp_path / "run"
        )

    def refuse(self, path, batches):
        raise RuntimeError(f"no such kernel in {path}")

    if earlier:
        goal.write_bytes(b"good")
    faults = {"check": lambda *_: "its weights are wrong", "run": refuse}
    with monkeypatch.context() as patched, pytest.raises(VerificationError) as error:
        patched.setattr(Toy, fault, faults[fault])
        compress()
    message = str(error.value)
    assert f"the new file for {goal}" in message
    assert ("its weights are wrong" if fault == "check" else f"no such kernel in {rejected}") in message
    assert f"kept as {rejected}" in message
    assert ("is unchanged" if earlier else "nothing was written") in message
    assert (goal.read_bytes() == b"good") if earlier else not goal.exists()
    assert qcompress.verify(rejected, compress().model, data, target=engine).ok
    assert goal.read_bytes() == rejected.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"run", "small.toy", "small.toy.rejected"}


def test_outputs_are_compared_over_all_batches_and_rows_whatever_is_looked_at_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    wanted = [torch.randn(*shape, 5, generator=generator) for shape in ((3, ROWS), (7,))]
    actual = [own + 0.3 * torch.randn(own.shape, generator=generator) for own in wanted]
    found = compared(*(EngineRun(outputs=tuple(own), wall_s=1.0) for own in (actual, wanted)))
    first, second = (torch.cat([each.reshape(-1, 5) for each in own]).double() for own in (actual, wanted))
    kl = nn.functional.kl_div(first.log_softmax(-1), second.log_softmax(-1), reduction="batchmean", log_target=True)
    assert found.largest == float((first - second).abs().max())
    assert found.relative == pytest.approx(float((first - second).norm() / second.sub(second.mean(-1, True)).norm()))
    assert found.kl == pytest.approx(float(kl))
    assert found.agreement == float((first.argmax(-1) == second.argmax(-1)).double().mean()) < 1.0
    actual[0][0, 0, 0] = torch.nan
    assert math.isnan(compared(*(EngineRun(outputs=tuple(own), wall_s=1.0) for own in (actual, wanted))).largest)
