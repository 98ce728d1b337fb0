"""`verify` judges a file: by outputs of any form, in whatever form the batches are given."""

import errno
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompress
from benchmarks.traces import traced_once
from qcompress.engines.base import EngineRun
from qcompress.engines.onnxruntime import OnnxRuntime
from qcompress.engines.verify import compared
from tests.engines.test_onnxruntime import EXACT, Difference
from tests.measurements import Chain


def verified(path: Path, model: nn.Module, data: list[Any]) -> qcompress.Verification:
    return qcompress.verify(path, model, data, target=EXACT, memory=False)


def with_other_operators(path: Path, old: str, new: str) -> None:
    """Replace operators of a file by others whose name is as long."""
    import onnx

    proto = onnx.load(path)
    for node in proto.graph.node:
        node.op_type = new if node.op_type == old else node.op_type
    onnx.save(proto, path)


ONE_NUMBER: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "regressor": (lambda: nn.Linear(16, 1), (50, 16)),
    "one sample": (lambda: nn.Linear(16, 1), (1, 16)),
    "regressor without a dimension of its own": (lambda: Chain(nn.Linear(16, 1), nn.Flatten(0)), (50, 16)),
    "maps": (lambda: Chain(nn.Unflatten(1, (16, 1, 1)), nn.Conv2d(16, 5, 1)), (50, 16)),
}


@pytest.mark.parametrize("kind", ONE_NUMBER)
def test_outputs_of_one_number_are_compared_over_the_samples(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, shape = ONE_NUMBER[kind]
    model, batch, path = Chain(nn.Linear(16, 16), nn.ReLU(), make()).eval(), torch.randn(shape), tmp_path / "file.onnx"
    qcompress.export(model, path, target=EXACT, example=batch)
    with traced_once():
        sound = verified(path, model, [batch])
        assert sound.ok, sound.why_not
        assert sound.by_rounding is None
        with_other_operators(path, "Relu", "Tanh")
        wrong = verified(path, model, [batch])
    assert not wrong.ok
    assert "its outputs differ" in wrong.why_not
    assert wrong.by_rounding is not None
    assert wrong.by_rounding < 1e-3


@pytest.mark.parametrize(("wanted", "actual", "relative"), [
    ([[1.0], [3.0]], [[1.5], [3.0]], 0.5 / math.sqrt(2)),
    ([[2.0]], [[3.0]], 0.5),
    ([[5.0, 5.0], [5.0, 5.0]], [[5.0, 5.0], [5.0, 6.0]], 0.1),
    ([[0.0], [0.0]], [[0.0], [0.1]], math.inf),
    ([[0.0], [0.0]], [[0.0], [0.0]], 0.0),
])  # fmt: skip
def test_without_a_spread_along_the_last_dimension_that_of_all_outputs_counts(
    wanted: list[list[float]], actual: list[list[float]], relative: float
) -> None:
    runs = [EngineRun(outputs=tuple(torch.tensor([row]) for row in own), wall_s=1.0) for own in (actual, wanted)]
    assert compared(*runs).relative == pytest.approx(relative)


class Tagger(nn.Module):
    """Words with kinds and a mask, which may be left out, and a part of the graph that depends on the length."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.kinds, self.out = nn.Embedding(40, 24), nn.Embedding(2, 24), nn.Linear(24, 7)

    def forward(self, ids: Tensor, mask: Tensor, kinds: Tensor | None = None) -> Tensor:
        x = self.words(ids) * mask[..., None]
        return self.out(x if kinds is None else x + self.kinds(kinds) - self.kinds.weight[0])


def test_a_sound_file_is_sound_whatever_form_its_batches_have(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, ids, mask = Tagger().eval(), torch.randint(40, (4, 9)), torch.ones(4, 9)
    path = qcompress.export(model, tmp_path / "file.onnx", target=EXACT, example={"ids": ids, "mask": mask}).path
    one_word = {"ids": ids[:1, :1], "mask": mask[:1]}
    others = [{"mask": mask, "ids": ids}, {"ids": ids, "mask": mask, "kinds": 0 * ids}, [ids, mask], (ids, mask)]
    with traced_once():
        for batch in (*others, one_word):
            found = verified(path, model, [batch])
            assert found.ok, found.why_not
            assert not found.not_compared
            assert found.speedup > 0


def test_a_model_that_has_one_graph_for_one_word_is_verified_with_it(tmp_path: Path) -> None:
    class Short(Tagger):
        def forward(self, ids: Tensor, mask: Tensor, kinds: Tensor | None = None) -> Tensor:
            x = super().forward(ids, mask, kinds)
            return x if ids.shape[1] == 1 else x + 0 * x.sum(1, keepdim=True)

    torch.manual_seed(0)
    model, ids, mask = Short().eval(), torch.randint(40, (4, 9)), torch.ones(4, 9)
    path = qcompress.export(model, tmp_path / "file.onnx", target=EXACT, example=[ids, mask]).path
    found = verified(path, model, [[ids[:, :1], mask], [ids, mask]])
    assert found.ok, found.why_not


def test_what_the_batches_lack_of_the_example_is_told_and_the_file_is_not_blamed(tmp_path: Path) -> None:
    class Trained(Tagger):
        def forward(self, ids: Tensor, mask: Tensor, labels: Tensor | None = None) -> Tensor:
            return super().forward(ids, mask)

    torch.manual_seed(0)
    model, ids, mask = Trained().eval(), torch.randint(40, (4, 9)), torch.ones(4, 9)
    example = {"ids": ids, "mask": mask, "labels": ids}
    path = qcompress.export(model, tmp_path / "file.onnx", target=EXACT, example=example).path
    found = verified(path, model, [{"ids": ids, "mask": mask}])
    assert found.ok
    assert "its bytes and its time" in found.not_compared
    assert "'labels' is missing" in found.not_compared


def test_a_tensor_that_is_given_twice_is_two_inputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x, other = Difference().eval(), torch.randn(3, 8), torch.randn(3, 8)
    path = qcompress.export(model, tmp_path / "file.onnx", target=EXACT, example={"left": x, "right": x}).path
    found = EXACT.run(path, [{"left": x, "right": other}]).outputs[0]
    torch.testing.assert_close(found, model(x, other).detach())


def test_tensors_with_gradients_and_without_dimensions_are_batches(tmp_path: Path) -> None:
    class Warm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(6, 3)

        def forward(self, x: Tensor, warmth: Tensor) -> Tensor:
            return self.out(x) / warmth

    torch.manual_seed(0)
    model, x, warmth = Warm().eval(), torch.randn(4, 6, requires_grad=True), torch.tensor(2.0)
    path = qcompress.export(model, tmp_path / "file.onnx", target=EXACT, example={"x": x, "warmth": warmth}).path
    assert verified(path, model, [{"x": x, "warmth": warmth}, [x, warmth]]).ok


def test_without_room_for_the_dense_models_file_the_new_file_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, batch = Chain(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)).eval(), torch.randn(8, 64)
    write = OnnxRuntime.write

    def full(self: OnnxRuntime, model: nn.Module, path: Path, example: Any = None) -> None:
        if path.is_relative_to(tempfile.gettempdir()) and not path.is_relative_to(tmp_path):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, model, path, example)

    monkeypatch.setattr(OnnxRuntime, "write", full)
    with traced_once():
        result = qcompress.compress(
            model, [batch], budget={"file_bytes": "60%"}, target=EXACT, output=tmp_path / "small.onnx", guard=False,
            options=qcompress.prune_quantize(bits=(8,), group_size=32), solver="brute-force",
        )  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["small.onnx"]
    assert result.verification is not None
    assert result.verification.ok
    assert math.isnan(result.verification.speedup)
    assert f"is written to {tempfile.gettempdir()}: [Errno 28] No space" in result.verification.not_compared


class Excluding(nn.Module):
    """Scores of four classes of which one is excluded."""

    def __init__(self, score: float) -> None:
        super().__init__()
        self.layers = Chain(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))
        self.register_buffer("mask", torch.tensor([0.0, 0.0, score, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + self.mask


@pytest.mark.parametrize("score", [-math.inf, torch.finfo(torch.float32).min])
def test_excluded_classes_neither_differ_nor_hide_what_differs(score: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batch, path = Excluding(score).eval(), torch.randn(8, 32), tmp_path / "file.onnx"
    qcompress.export(model, path, target=EXACT, example=batch)
    sound = verified(path, model, [batch])
    assert sound.ok, sound.why_not
    assert sound.max_difference < 1e-4
    assert sound.agreement == 1.0
    assert 0 <= sound.kl < 1e-6
    with_other_operators(path, "Relu", "Tanh")
    wrong = verified(path, model, [batch])
    assert not wrong.ok
    assert "its outputs differ" in wrong.why_not
    assert math.isfinite(wrong.max_difference)


def test_a_model_with_an_excluded_class_is_compressed_for_an_engine(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches = [torch.randn(8, 32), torch.randn(8, 32)]
    result = qcompress.compress(
        Excluding(-math.inf).eval(), batches, budget={"bytes": 0.8}, target=EXACT, output=tmp_path / "file.onnx"
    )
    assert result.verification is not None
    assert result.verification.ok, result.verification.why_not


@pytest.mark.parametrize("excluded", [-math.inf, -1e30, float(torch.finfo(torch.float32).min)])
def test_a_class_that_only_one_run_excludes_differs_infinitely(excluded: float) -> None:
    wanted = torch.tensor([[1.0, 2.0, -1e30], [3.0, 1.0, -1e30]])
    same, other = wanted.clone(), wanted.clone()
    same[:, 2], other[0, 1], other[:, 2] = excluded, excluded, excluded
    runs = {name: EngineRun(outputs=(rows,), wall_s=1.0) for name, rows in {"wanted": wanted, "same": same}.items()}
    assert compared(runs["same"], runs["wanted"]) == compared(runs["wanted"], runs["wanted"])
    for actual, expected in ((other, wanted), (wanted, other)):
        found = compared(*(EngineRun(outputs=(rows,), wall_s=1.0) for rows in (actual, expected)))
        assert found.largest == found.relative == math.inf
