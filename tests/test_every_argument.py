"""Every argument of `compress`, varied alone in one run folder: each call gives there what it gives by itself."""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qcompress import compress, measure, open_model, prune_channels, prune_quantize
from qcompress.engines.base import EngineRun
from qcompress.model.parts import Part
from qcompress.transforms.base import Transform
from tests.engines.toy import Toy
from tests.quick import slow_but
from tests.test_run_folder import told, weights

Values = dict[str, Any]


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)
        )


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(x))


class Blocks(nn.Module):
    """A network whose blocks can be read one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@functools.cache
def opened_folder(seed: int, place: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        folder = place / str(seed)
        folder.mkdir()
        save_file(Blocks().state_dict(), folder / "model.safetensors")
    return folder


def opened(seed: int, place: Path) -> nn.Module:
    return open_model(opened_folder(seed, place), model=Blocks, blocks="layers")


def batches(seed: int = 0, size: int = 8) -> list[Tensor]:
    return [torch.randn(size, 6, generator=torch.Generator().manual_seed(10 * seed + number)) for number in range(3)]


@dataclass(frozen=True, kw_only=True)
class Rounding(Toy):
    """An engine that rounds outputs, and that has times which never vary.

    Attributes:
        to: outputs are rounded to multiples of this.
        slow: seconds of a bit.
    """

    name: ClassVar[str] = "rounding"
    to: float = 0.05
    slow: float = 1e-3

    @contextmanager
    def rounding(self, model: nn.Module, choice: Iterable[tuple[Part, Transform]] | None = None) -> Iterator[None]:
        hook = model.register_forward_hook(lambda _, __, output: (output / self.to).round() * self.to)
        try:
            yield
        finally:
            hook.remove()

    def run(self, path: Path, batches: Iterable[Any]) -> EngineRun:
        run = super().run(path, batches)
        return replace(run, outputs=tuple((output / self.to).round() * self.to for output in run.outputs))

    def seconds(self, paths: Sequence[Path], batches: Sequence[Any]) -> list[float]:
        return [path.stat().st_size * 1e-6 for path in paths]

    def why_not_timed(self) -> str:
        return ""

    def time_options(self, model: nn.Module, measurement: Any, batch: Any, on_progress: Any = None) -> Any:
        bits = [getattr(option, "bits", 16) for options in measurement.transforms for option in options]
        times = np.array(bits) * self.slow
        starts = np.cumsum([0, *map(len, measurement.transforms[:-1])])
        added = {"latency_s": times}, {"latency_s": 0.0}, {"latency_s": float(times[starts].sum())}
        names = "resources", "fixed", "original"
        tables = {name: {**getattr(measurement, name), **new} for name, new in zip(names, added, strict=True)}
        return replace(measurement, **{name: MappingProxyType(table) for name, table in tables.items()})

    def seconds_of(self, model: nn.Module, measurement: Any, choices: Any, batch: Any) -> list[float]:
        pairs = [zip(measurement.transforms, choice, strict=True) for choice in choices]
        return [1.2 * self.slow * sum(getattr(own[option], "bits", 16) for own, option in pair) for pair in pairs]


CODES = prune_quantize(bits=(2, 3, 8), sparsity=(0,), compensated=True)
OTHER_CODES = prune_quantize(bits=(3, 4), sparsity=(0,))


def halved(model: nn.Module, batch: Tensor) -> Tensor:
    output: Tensor = model(batch) * 0.5
    return output


def largest(model: nn.Module) -> float:
    return max(float(value.abs().max()) for value in model.state_dict().values())


def base_of(name: str, place: Path) -> Values:
    """Arguments that lead through some of the steps."""
    codes = {"model": network(), "data": batches(), "budget": {"bytes": 0.5}, "options": CODES, "solver": "greedy"}
    tuned = {"finetune_steps": 6, "learning_rate": 0.01}
    streamed = {"model": opened(0, place), "method": "sampled", "loss": "mse"}
    in_engine = {"options": OTHER_CODES, "target": Rounding(factory=network)}
    bases: dict[str, Callable[[], Values]] = {
        "codes": lambda: codes,
        "tuned": lambda: codes | tuned | {"refine_rounds": 1},
        "smallest": lambda: codes | {"budget": {"loss": 0.05}, "minimize": "bytes"},
        "channels": lambda: (
            codes | tuned | {"data": batches(size=64), "options": prune_channels(), "budget": {"macs": 0.6}}
        ),
        "engine": lambda: codes | in_engine,
        "timed": lambda: codes | in_engine | {"budget": {"latency_s": "20 ms"}},
        "measured": lambda: codes | {"options": None, "measurement": measure(network(), batches(), CODES)},
        "opened": lambda: codes | streamed,
        "opened,measured": lambda: (
            codes
            | streamed
            | {
                "guard": False,
                "options": None,
                "measurement": measure(opened(0, place), batches(), CODES, loss="mse", method="sampled"),
            }
        ),
    }
    return bases[name]()


def other_budget(_: str, base: Values, __: Path) -> Values:
    return {"budget": {key: "15 ms" if key == "latency_s" else 1.2 * value for key, value in base["budget"].items()}}


VARIED: dict[str, tuple[str, Callable[[str, Values, Path], Values]]] = {
    "model": (
        "codes opened",
        lambda name, _, place: {"model": opened(1, place) if name == "opened" else network(1)},
    ),
    "data": (
        "codes channels opened,measured",
        lambda _, base, __: {"data": [base["data"][0], *batches(1)[1:]]},
    ),
    "budget": ("codes smallest channels timed", other_budget),
    "minimize": ("codes", lambda *_: {"minimize": "bytes", "budget": {"loss": 0.02}}),
    "options": (
        "codes channels",
        lambda name, *_: {"options": prune_channels(keep=(0.75, 0.25)) if name == "channels" else OTHER_CODES},
    ),
    "skip": ("codes channels", lambda *_: {"skip": "5"}),
    "only": ("codes channels", lambda *_: {"only": ("0", "3")}),
    "solver": ("codes smallest channels", lambda *_: {"solver": "brute-force"}),
    "time_limit": ("codes", lambda *_: {"time_limit": 30}),
    "seed": ("codes opened", lambda *_: {"seed": 1}),
    "method": ("codes", lambda *_: {"method": "direct"}),
    "loss": ("codes", lambda *_: {"loss": "mse"}),
    "forward": ("codes channels", lambda *_: {"forward": halved}),
    "granularity": ("codes", lambda *_: {"granularity": 4}),
    "pairs": ("codes channels", lambda *_: {"pairs": False}),
    "measurement": ("codes", lambda *_: {"measurement": measure(network(), batches(1), CODES), "options": None}),
    "validation": ("codes channels", lambda *_: {"validation": batches(3)}),
    "guard": ("codes channels", lambda *_: {"guard": False}),
    "target": ("codes engine timed", lambda *_: {"target": Rounding(factory=network, to=0.8, slow=1.5e-3)}),
    "output": ("engine", lambda _, __, place: {"output": place / "model.toy"}),
    "memory": ("opened", lambda *_: {"memory": "64 GB"}),
    "batch_norm_data": ("codes measured", lambda *_: {"batch_norm_data": batches(4)}),
    "rounds": ("channels", lambda *_: {"rounds": 2}),
    "refine_rounds": ("codes", lambda *_: {"refine_rounds": 1}),
    "finetune_steps": ("tuned channels", lambda *_: {"finetune_steps": 30}),
    "learning_rate": ("tuned channels", lambda *_: {"learning_rate": 0.002}),
    "evaluate": ("codes", lambda *_: {"evaluate": largest}),
    **{
        f"on_{what}": (base, lambda *_, what=what: {f"on_{what}": lambda progress: None})
        for what, base in [("encode", "codes"), ("measure", "codes"), ("timing", "timed"), ("progress", "codes"),
                           ("round", "tuned"), ("finetune", "tuned")]
    },
}  # fmt: skip
"""Argument → bases to vary it in, and what another value of it changes in a call."""

NOT_VARIED = {
    "folder": "holds the run itself",
    "jobs": "another number gives the same measurement up to rounding",
}
"""Argument → why the key of no step needs it."""

WITHOUT_EFFECT = {
    "seed of codes",
    "time_limit",
    "memory",
    "output",
    *(name for name in VARIED if name.startswith("on_")),
}
"""Arguments that change no figure of these small networks, or of one of them."""

QUICK = (
    "minimize", "options", "loss", "measurement", "refine_rounds", "evaluate", "on_round", "finetune_steps",
)  # fmt: skip
"""Arguments of different steps, and one that changes nothing; the others lead through the same steps again."""

Figures = tuple[dict[str, Any], list[float], list[int], dict[str, list[float]]]


def figures_of(call: Values, folder: Path | None) -> Figures:
    result = compress(**call, folder=folder)
    report = told(result.report)
    read = any(value.is_meta for value in result.model.parameters())
    state = {"output": result.model(batches()[0]).tolist()} if read else weights(result.model)
    return report, result.measurement.cost.tolist(), list(map(int, result.solution.choice)), state


@pytest.mark.parametrize("argument", slow_but(QUICK, VARIED))
def test_calls_in_one_folder_that_differ_in_an_argument_give_what_each_gives_by_itself(
    argument: str, tmp_path: Path
) -> None:
    names, change = VARIED[argument]
    for name in names.split():
        base = base_of(name, tmp_path)
        other = base | change(name, base, tmp_path)
        alone = [figures_of(call, None) for call in (base, other)]
        for call, expected in zip((base, other, base), (*alone, alone[0]), strict=True):
            assert figures_of(call, tmp_path / name) == expected, name
        assert (alone[0] == alone[1]) == (not WITHOUT_EFFECT.isdisjoint({argument, f"{argument} of {name}"})), name


def test_every_argument_is_varied_or_needs_no_key() -> None:
    assert VARIED.keys() | NOT_VARIED.keys() == inspect.signature(compress).parameters.keys()
