"""Agreement: the samples whose answer changes under compression, by the original's margin and by class.

A mean loss hides where the harm lies: compression mostly changes answers that the original was unsure of, and those of
rare classes (Hooker et al., arXiv 1911.05248). The margin is the difference between the original's largest and second
largest log-probability.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from formulations.file_kinds import FileKind
from formulations.files import AnyPath
from qcompress.measuring.true_loss import paired_outputs
from qcompress.model import forward as forwards
from qcompress.model.padding import real_positions
from qcompress.model.steady import steady

FILE_KIND = FileKind("qcompress agreement", version=1)

BINS = 10
"""Number of groups of equally many samples, by ascending margin."""

MOST_CLASSES = 30
"""Maximum number of classes listed, those with the largest share of changed answers first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Some samples, and how many of them get another answer."""

    samples: int
    changed: int

    @property
    def share(self) -> float:
        """Share of these samples whose answer changed."""
        return self.changed / self.samples


@dataclass(frozen=True, slots=True, kw_only=True)
class MarginGroup(Group):
    """Samples whose margins lie between ``low`` and ``high``."""

    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassGroup(Group):
    """Samples to which the original gives the answer ``label``."""

    label: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement(Group):
    """Where the original and the compressed model give the same first answer, and where not.

    Attributes:
        samples: number of compared answers (tokens for a language model).
        changed: number of answers that differ.
        by_margin: groups of about equally many samples, by ascending margin.
        by_class: the classes with the largest share of changed answers, at most `MOST_CLASSES`.
    """

    by_margin: tuple[MarginGroup, ...]
    by_class: tuple[ClassGroup, ...]

    @property
    def tail_ratio(self) -> float:
        """Changed answers in the less sure half, divided by those in the surer half (infinite without any)."""
        half = len(self.by_margin) // 2
        low, high = (sum(group.changed for group in part) for part in (self.by_margin[:half], self.by_margin[half:]))
        return low / high if high else float("inf")

    def save(self, path: AnyPath) -> None:
        """Write it as JSON, atomically."""
        FILE_KIND.write_json(path, asdict(self))

    @classmethod
    def load(cls, path: AnyPath) -> "Agreement":
        """Read what `save` wrote.

        Raises:
            FileFormatError: the file is incomplete, or of another kind or version.
        """
        value = FILE_KIND.read_json(path)
        with FILE_KIND.building(path):
            return cls(
                samples=value["samples"],
                changed=value["changed"],
                by_margin=tuple(MarginGroup(**group) for group in value["by_margin"]),
                by_class=tuple(ClassGroup(**group) for group in value["by_class"]),
            )


@torch.no_grad()
def agreement(
    original: nn.Module, compressed: nn.Module, data: Iterable[Any], *, forward: forwards.Forward | None = None
) -> Agreement:
    """Compare the first answers of two models, whose outputs are ``(…, C)`` scores of C ≥ 2 classes.

    Raises:
        ValueError: the outputs are not scores of classes, the models' outputs differ in shape, or there is no data.

    >>> model = nn.Linear(4, 3)
    >>> agreement(model, model, [torch.randn(8, 4)]).changed
    0
    """
    forwards.require_samples_in(data, "data")
    margins, answers, changed = [], [], []
    with paired_outputs(original, compressed, data, steady(forward)) as outputs:
        for batch, before, after in outputs:
            first, margin, differs = _compared(batch, before, after)
            answers.append(first)
            margins.append(margin)
            changed.append(differs)
    if not margins:
        raise ValueError("there is no data to compare on")
    return _grouped(*(torch.cat(parts).numpy() for parts in (margins, answers, changed)))


def _compared(batch: Any, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the original's first answers, their margins, and which of them change.

    Raises:
        ValueError: the outputs are not scores of classes, or differ in shape.
    """
    if before.shape != after.shape or before.ndim < 2 or before.shape[-1] < 2:
        raise ValueError(
            f"answers can be compared for outputs (…, classes) of two classes or more; found {tuple(before.shape)} "
            f"and {tuple(after.shape)}"
        )
    if (real := real_positions(batch, before)) is not None:
        before, after = before[real], after[real]
    top = before.float().log_softmax(-1).topk(2, dim=-1)
    first, margin = top.indices[..., 0].flatten(), (top.values[..., 0] - top.values[..., 1]).flatten()
    return first.cpu(), margin.cpu(), (after.argmax(-1).flatten() != first).cpu()


def _grouped(margins: NDArray[np.float32], answers: NDArray[np.int64], changed: NDArray[np.bool_]) -> Agreement:
    order = np.argsort(margins, kind="stable")
    bins = [part for part in np.array_split(order, min(BINS, len(order))) if len(part)]
    by_margin = [
        MarginGroup(
            low=float(margins[part[0]]),
            high=float(margins[part[-1]]),
            samples=len(part),
            changed=int(changed[part].sum()),
        )
        for part in bins
    ]
    labels, inverse = np.unique(answers, return_inverse=True)
    samples, differing = np.bincount(inverse), np.bincount(inverse, weights=changed)
    by_class = [
        ClassGroup(label=int(label), samples=int(count), changed=int(count_changed))
        for label, count, count_changed in zip(labels, samples, differing, strict=True)
    ]
    by_class.sort(key=lambda group: (-group.share, group.label))
    return Agreement(
        samples=len(margins),
        changed=int(changed.sum()),
        by_margin=tuple(by_margin),
        by_class=tuple(by_class[:MOST_CLASSES]),
    )
