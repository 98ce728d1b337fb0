"""Checkpoints of a training: weights, optimiser, schedule and the best weights so far.

The file is safetensors with one JSON header, written atomically; no pickle is written or read. If the data yields the
same batches again, a resumed training takes bit for bit the same steps as an uninterrupted one.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from formulations.file_kinds import FileKind
from formulations.files import replacing
from qcompress.errors import DataError

FILE_KIND = FileKind("qcompress training", version=1)
_HEADER = "qcompress"

State = dict[str, Tensor]


@dataclass(kw_only=True)
class TrainingState:
    """State of a training.

    Attributes:
        step: number of steps taken.
        before: validation loss before the first step.
        best: least validation loss so far.
        idle: number of successive evaluations without improvement.
        kept: weights with the best loss; None as long as these are the initial ones.
    """

    step: int = 0
    before: float
    best: float
    idle: int = 0
    kept: State | None = None


@dataclass(frozen=True)
class Checkpoint:
    """The checkpoint file of a training.

    Args:
        path: path of the file.
        key: identity of the training that it belongs to.
        model: the model in training.
    """

    path: Path
    key: str
    model: nn.Module

    def save(self, state: TrainingState, optimiser: Optimizer, schedule: LRScheduler) -> None:
        """Write the checkpoint."""
        moments = optimiser.state_dict()
        tensors = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"kept/{name}": value for name, value in (state.kept or {}).items()}
        tensors |= {
            f"optimiser/{index}/{name}": value
            for index, values in moments["state"].items()
            for name, value in values.items()
        }
        header = {
            **FILE_KIND.header, "key": self.key,
            "step": state.step, "before": state.before, "best": state.best, "idle": state.idle,
            "kept": state.kept is not None,
            "groups": moments["param_groups"], "schedule": schedule.state_dict(),
        }  # fmt: skip
        copies = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        content = safetensors.torch.save(copies, {_HEADER: json.dumps(header)})
        with replacing(self.path) as file:
            file.write(content)

    def load(self, optimiser: Optimizer, schedule: LRScheduler) -> TrainingState:
        """Restore model, optimiser and schedule, and return the state of the training.

        Raises:
            FileNotFoundError: the file does not exist.
            DataError: the file is incomplete, or belongs to another training.
        """
        header, tensors = self._read()
        if header["key"] != self.key:
            raise DataError(
                f"{self.path} holds another training (model, teacher, data, loss, steps or learning rate differ); "
                "choose another file or delete it"
            )
        state: dict[int, State] = {}
        for name, value in _below("optimiser/", tensors).items():
            index, _, what = name.partition("/")
            state.setdefault(int(index), {})[what] = value
        self.model.load_state_dict(_below("model/", tensors))
        optimiser.load_state_dict({"state": state, "param_groups": header["groups"]})
        schedule.load_state_dict(header["schedule"])
        kept = _below("kept/", tensors) if header["kept"] else None
        numbers = {name: header[name] for name in ("step", "before", "best", "idle")}
        return TrainingState(**numbers, kept=kept)

    def _read(self) -> tuple[dict[str, Any], State]:
        try:
            with safetensors.safe_open(self.path, framework="pt") as file:
                header = json.loads((file.metadata() or {})[_HEADER])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            FILE_KIND.require(header, "it")
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{self.path} is not a complete {FILE_KIND.name} file ({error}); delete it") from error
        return header, tensors


def _below(start: str, tensors: State) -> State:
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
