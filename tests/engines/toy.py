"""An engine of a few lines, for tests of everything around engines: rows of bytes after a line of JSON a part."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qcompress.compressed.record import record_of
from qcompress.engines.base import Engine, EngineRun, FileSizes, timed
from qcompress.errors import EngineError
from qcompress.model.parts import Part, unique_state
from qcompress.options import Options, prune_quantize, transform_from_json
from qcompress.transforms.base import Keep, Transform

LINE = 160  # bytes of the JSON before a tensor


@dataclass(frozen=True, kw_only=True)
class Toy(Engine):
    """Keeps the first layer and runs even bit-widths; ties what ``tied`` names.

    Attributes:
        factory: makes the architecture that runs the file.
        wrong: adds this to everything it gives, as a broken engine would.
    """

    name: ClassVar[str] = "toy"
    summary: ClassVar[str] = "rows of bytes"
    tolerance: ClassVar[float] = 1e-6

    factory: Callable[[], nn.Module] | None = None
    tied: tuple[tuple[str, ...], ...] = ()
    wrong: float = 0.0
    more: int = 0  # bytes that nobody predicted

    def options(self) -> Options:
        return prune_quantize(bits=(2, 4, 8), sparsity=(0,))

    def refuse(self, part: Part, transform: Transform) -> str:
        if isinstance(transform, Keep):
            return ""
        bits = getattr(transform, "bits", None)
        return "" if bits in (2, 4, 6, 8) else f"no kernel for {transform.label} in {part.name!r}"

    def ties(self, parts: Sequence[Part]) -> list[tuple[str, ...]]:
        return list(self.tied)

    def sizes(
        self, model: nn.Module, parts: Sequence[Part], transforms: Sequence[Sequence[Transform]], example: Any = None
    ) -> FileSizes:
        inside = {part.modules[0] + ".weight" for part in parts}
        rest = [value for name, value in unique_state(model).items() if name not in inside]
        options = tuple(
            tuple(LINE + transform.size_bytes(part.target) for transform in own)
            for part, own in zip(parts, transforms, strict=True)
        )
        return FileSizes(options=options, overhead=sum(LINE + value.nbytes for value in rest))

    def write(self, model: nn.Module, path: Path, example: Any = None) -> None:
        if any(isinstance(module, nn.Conv2d) for module in model.modules()):
            raise EngineError("engine 'toy' takes no Conv2d")
        record = record_of(model)
        items = {} if record is None else {f"{item.part.modules[0]}.weight": item for item in record.parts}
        with path.open("wb") as file:
            for name, value in unique_state(model).items():
                item = items.get(name)
                stored = item.stored if item is not None and item.stored else {"rows": value.detach()}
                told = {"name": name, "how": {"kind": "keep"} if len(stored) == 1 else item.transform.to_json()}
                file.write(json.dumps(told).ljust(LINE).encode())
                for key in sorted(stored):
                    file.write(stored[key].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            file.write(b"\0" * self.more)

    def run(self, path: Path, batches: Iterable[Any]) -> EngineRun:
        assert self.factory is not None
        model = self.factory().eval()
        content = path.read_bytes()
        with torch.no_grad():
            for name, value in unique_state(model).items():
                told, content = json.loads(content[:LINE]), content[LINE:]
                assert told["name"] == name
                transform = transform_from_json(told["how"])
                if isinstance(transform, Keep):
                    size, arrays = value.nbytes, {}
                    value.copy_(_read(content[:size], value.dtype).view(value.shape))
                else:
                    rows = value.shape[0]
                    codes = transform.size_bytes(_target(value)) - 4 * rows
                    size = codes + 4 * rows
                    arrays = {"codes": _read(content[:codes], torch.uint8),
                              "scales": _read(content[codes:size], torch.float32)}  # fmt: skip
                    value.copy_(transform.decode(arrays, _target(value)))
                content = content[size:]
        return timed((output := model(batch)) + self.wrong * torch.arange(output.shape[-1]) for batch in batches)


def _target(weight: Tensor) -> Any:
    from qcompress.transforms.base import Target

    channels, per_channel = weight.shape
    return Target(layer="Linear", channels=channels, per_channel=per_channel, dtype=weight.dtype, macs=1.0)


def _read(content: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(dtype)
