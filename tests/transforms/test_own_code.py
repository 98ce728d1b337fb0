"""Results of a transform that a user wrote are taken up only while its code is the same."""

import contextlib
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qcompress import Measurement, Options, apply, compress, finetune, formulate, measure, prune_quantize, refine, solve
from qcompress.errors import DataError, OptionsError
from qcompress.options.kinds import OFFERS
from qcompress.transforms.base import Keep
from qcompress.transforms.channels import Jointly
from qcompress.transforms.own_code import code_of

SIGNS = """
from dataclasses import dataclass
from qcompress.transforms.base import Transform
from qcompress.transforms.quantize.packing import pack, packed_bytes, unpack

def scale(rows):
    return FACTOR * rows.abs().mean(dim=1).float()

@dataclass(frozen=True)
class Signs(Transform):
    kind = "signs"
    label = property(lambda self: "signs")

    def why_not(self, target):
        return ""

    def size_bytes(self, target):
        return packed_bytes(target.num_weights, 1) + 4 * target.channels

    def encode(self, weight):
        TABLES[len(TABLES)] = len(TABLES)
        rows = weight.exact()
        return {"signs": pack((rows >= 0).view(-1), 1), "scales": scale(rows)}

    def decode(self, stored, target):
        signs = unpack(stored["signs"], 1, target.num_weights).view(target.channels, target.per_channel)
        return ((2 * signs - 1) * stored["scales"][:, None]).to(target.dtype)
"""


def signs(factor: float, code: str = SIGNS) -> Any:
    """The transform of a user's module whose functions read a factor."""
    module = types.ModuleType("a_users_module")
    module.FACTOR, module.TABLES = factor, {}  # type: ignore[attr-defined]
    exec(code, vars(module))  # noqa: S102 - the only way to have two classes of one name
    OFFERS["signs"] = module.Signs
    return module.Signs()


@pytest.fixture(autouse=True)
def _kinds_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OFFERS, "signs", OFFERS["keep"])  # so that it is put back


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))


DATA = [torch.linspace(-1, 1, 16 * 32).view(16, 32).sin()]


def test_code_counts_also_within_other_transforms() -> None:
    for around in (lambda own: own, lambda own: Jointly(removal=Keep(), layers=("a",), codes=(own,))):
        first, same, other = (code_of([around(signs(factor))]) for factor in (1.0, 1.0, 2.0))
        assert first == same != other
        assert not first.unchecked


def test_a_run_folder_measures_again(tmp_path: Path) -> None:
    def predicted(factor: float, folder: Path) -> float:
        options = prune_quantize(bits=(2, 8)) + Options((signs(factor),))
        result = compress(network(), DATA, budget={"bytes": "40%"}, options=options, solver="lagrangian", folder=folder)
        return float(result.measurement.cost.sum())

    first = predicted(1.0, tmp_path / "run")
    assert predicted(9.0, tmp_path / "run") == predicted(9.0, tmp_path / "fresh") != first


def measured(factor: float, **settings: Any) -> float:
    return float(measure(network(), DATA, Options((signs(factor),)), **settings).cost.sum())


def test_a_cache_of_other_code_is_refused_and_its_codes_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qcompress.measuring.accumulation.SAVE_EVERY_S", 0.0)
    for name, is_kept in (("sums", True), ("codes", False)):
        with pytest.raises(KeyboardInterrupt):
            measured(1.0, cache=tmp_path / name, on_progress=cut)
        if not is_kept:  # only the codes beside it stay
            (tmp_path / name).unlink()
    with pytest.raises(DataError, match="another measurement"):
        measured(9.0, cache=tmp_path / "sums")
    assert measured(9.0, cache=tmp_path / "codes") == measured(9.0) != measured(1.0)


def test_what_code_keeps_when_it_runs_is_taken_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qcompress.measuring.accumulation.SAVE_EVERY_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        measured(1.0, cache=tmp_path / "sums", on_progress=cut)
    again = signs(1.0)  # as in another process
    measure(network(), DATA, Options((again,)), cache=tmp_path / "sums")
    assert not type(again).encode.__globals__["TABLES"]
    for is_first in (True, False):
        own = signs(1.0)
        options = prune_quantize(bits=(2, 8)) + Options((own,))
        compress(
            network(), DATA, budget={"bytes": "40%"}, options=options, solver="lagrangian", folder=tmp_path / "run"
        )
        assert bool(type(own).encode.__globals__["TABLES"]) == is_first


def test_refining_and_training_do_not_go_on_with_other_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qcompress.training.finetune.SAVE_EVERY_S", -1.0)
    measure(network(), DATA, prune_quantize(bits=(8,)) + Options((signs(1.0),))).save(tmp_path / "measurement.npz")

    def go_on(code: str, press: object = None) -> None:
        signs(1.0, code)
        measurement = Measurement.load(tmp_path / "measurement.npz")  # its transforms are those of this code
        problem, start = formulate(measurement, {"bytes": "15%"}), [own.index("signs") for own in measurement.labels]
        settings: dict[str, Any] = {"rounds": 3, "solver": "lagrangian", "time_limit": 1.0}
        with contextlib.suppress(KeyboardInterrupt):
            refine(network(), DATA, measurement, problem, start, cache=tmp_path / "refined", on_round=press, **settings)
        small = apply(network(), measurement, solve(problem, "lagrangian"))
        finetune(small, DATA, 4, teacher=network(), cache=tmp_path / "trained", on_progress=press)

    go_on(SIGNS, cut)
    assert (tmp_path / "refined").exists()
    assert (tmp_path / "trained").exists()
    other = SIGNS.replace("FACTOR * rows", "1 * FACTOR * rows")
    with pytest.raises(OptionsError, match="another refinement"):
        go_on(other)
    (tmp_path / "refined").unlink()
    with pytest.raises(DataError, match="another training"):
        go_on(other)
    (tmp_path / "refined").unlink()
    go_on(SIGNS)
    assert not (tmp_path / "trained").exists()
