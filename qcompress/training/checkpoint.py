"""A training that was cut goes on from its file: weights, optimiser, schedule and the best weights so far.

The file is safetensors with one JSON header, written whole or not at all; no pickle is written or read. What always
holds: going on from it takes the same steps to the last bit as the training that was not cut, where the data gives
the same batches again.
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
class Standing:
    """Where a training stands.

    Attributes:
        step: steps taken.
        before: the validation loss before any.
        best: the least since.
        idle: looks without a better one.
        kept: the state that had the best; None as long as it is that of the start.
    """

    step: int = 0
    before: float
    best: float
    idle: int = 0
    kept: State | None = None


@dataclass(frozen=True)
class Checkpoint:
    """The file of a training.

    Args:
        path: where it is.
        key: which training it belongs to.
        model: what is trained.
    """

    path: Path
    key: str
    model: nn.Module

    def save(self, standing: Standing, optimiser: Optimizer, schedule: LRScheduler) -> None:
        """Write everything."""
        moments = optimiser.state_dict()
        tensors = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"kept/{name}": value for name, value in (standing.kept or {}).items()}
        tensors |= {
            f"optimiser/{index}/{name}": value
            for index, values in moments["state"].items()
            for name, value in values.items()
        }
        header = {
            **FILE_KIND.header, "key": self.key,
            "step": standing.step, "before": standing.before, "best": standing.best, "idle": standing.idle,
            "kept": standing.kept is not None,
            "groups": moments["param_groups"], "schedule": schedule.state_dict(),
        }  # fmt: skip
        copies = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        content = safetensors.torch.save(copies, {_HEADER: json.dumps(header)})
        with replacing(self.path) as file:
            file.write(content)

    def load(self, optimiser: Optimizer, schedule: LRScheduler) -> Standing:
        """Give model, optimiser and schedule what they had, and say where the training stands.

        Raises:
            FileNotFoundError: there is no such file.
            DataError: it is not whole, or belongs to another training.
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
        return Standing(**numbers, kept=kept)

    def _read(self) -> tuple[dict[str, Any], State]:
        try:
            with safetensors.safe_open(self.path, framework="pt") as file:
                header = json.loads((file.metadata() or {})[_HEADER])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            FILE_KIND.require(header, "it")
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{self.path} is not a whole {FILE_KIND.name} file ({error}); delete it") from error
        return header, tensors


def _below(start: str, tensors: State) -> State:
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
