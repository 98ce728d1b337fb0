"""compressed-tensors: a Hugging Face folder with packed integer weights, which transformers and vLLM load directly.

The folder contains ``config.json``, which says how each layer is stored, safetensors files (several shards with an
index if the dense weights exceed ``shard_bytes``), and the tokenizer's files. Each layer's share of ``config.json`` and
of the headers is padded to the longest text it may need, so that the size of the folder is a sum over the layers.

vLLM runs q, k and v as one matrix, and also gate and up: layers that it fuses must share one scheme (``fused``).
transformers ties dense weights only, so weights shared by several modules are not compressed.
"""

import functools
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qcompress.compressed.record import CompressedPart, record_of
from qcompress.engines import tensor_file
from qcompress.engines.base import Engine, EngineRun, FileSizes, timed
from qcompress.engines.compressed_tensors_config import (
    CONFIG_ROOM,
    config_bytes,
    config_room,
    generation_config,
    plain_config,
)
from qcompress.engines.compressed_tensors_loading import not_loaded_packed, written_state
from qcompress.engines.integer_codes import Scheme, integer_codes, scheme_of
from qcompress.engines.packed_files import PackedFiles
from qcompress.engines.tensor_file import TensorEntry
from qcompress.errors import EngineError
from qcompress.model import forward as forwards
from qcompress.model.hugging_face import class_of
from qcompress.model.opened import numbers_of, opened_from
from qcompress.model.parts import Part
from qcompress.options import Options, prune_quantize
from qcompress.transforms.base import Keep, Target, Transform

MAX_BITS, ZERO_POINT_BITS = 8, (4, 8)
FUSED = (
    ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("w1", "w3"),
)  # fmt: skip
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "processor_config.json", "sentencepiece.bpe.model", "spiece.model",
)  # fmt: skip
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class CompressedTensors(Engine):
    """transformers with compressed-tensors.

    Attributes:
        tokenizer: folder whose tokenizer files are copied; by default the one that the model was loaded from.
        fused: whether layers that vLLM fuses must share one scheme.
        shard_bytes: maximum bytes of dense weights per file.
        zero_points: whether asymmetric codes of 4 and 8 bits are legal. vLLM runs them; transformers (5.24) does not
            load them, because it expects zero points that are not packed. Here such a folder is run with transformers
            on weights unpacked by compressed-tensors.
    """

    name: ClassVar[str] = "compressed-tensors"
    summary: ClassVar[str] = "Hugging Face folder with packed integer weights, for transformers and vLLM"
    requires: ClassVar[tuple[str, ...]] = ("compressed_tensors", "transformers")
    extra: ClassVar[str] = "compressed-tensors"
    by_block: ClassVar[bool] = True
    opens_by_itself: ClassVar[bool] = True
    writes_folder: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1e-6

    tokenizer: str | None = None
    fused: bool = True
    shard_bytes: int = 5_000_000_000
    zero_points: bool = False

    def options(self) -> Options:
        """2 to 8 bits in groups of 32 to 128, compensated."""
        return prune_quantize(bits=(2, 3, 4, 5, 6, 8), group_size=(32, 64, 128), compensated=True)

    def refuse(self, part: Part, transform: Transform) -> str:
        """Allow whole Linear layers in integers of up to 8 bits, with groups that divide the row evenly."""
        target = part.target
        if isinstance(transform, Keep):
            return ""
        if len(part.modules) > 1:
            return "its weight is shared by several modules, and only dense weights can be tied"
        if target.layer != "Linear":
            return f"only Linear layers can have integer weights, not {target.owner}"
        if not target.whole:
            return "only whole layers can have integer weights, not blocks of them"
        scheme = scheme_of(transform, target)
        if scheme is None or scheme.bits > MAX_BITS:
            return f"{transform.label!r} is not an integer format of up to {MAX_BITS} bits"
        if not scheme.symmetric and not self.zero_points:
            return (
                f"{transform.label!r}: transformers (5.24) does not load packed zero points; for vLLM set "
                "zero_points=True"
            )
        if not scheme.symmetric and scheme.bits not in ZERO_POINT_BITS:
            return f"{transform.label!r}: vLLM runs zero points of 4 and 8 bits"
        if scheme.group_size is not None and target.per_channel % scheme.group_size:
            return f"its {target.per_channel} inputs are not a multiple of {scheme.group_size}"
        if scheme.scale_type != target.dtype and target.dtype != torch.float32:
            return f"scales are read in {target.dtype}, {scheme.scale_type} would be rounded again"
        return ""

    def refuse_in(self, model: nn.Module, parts: Sequence[Part]) -> dict[str, str]:
        """Refuse the layers that transformers does not load packed in a model of this kind, such as those of T5."""
        layers = [part for part in parts if part.target.layer == "Linear"]
        failing = not_loaded_packed(model, (part.modules[0] for part in layers))
        why = f"transformers does not load it packed, because {type(model).__name__} initialises its weight itself"
        return {part.name: why for part in layers if part.modules[0] in failing}

    def ties(self, parts: Sequence[Part]) -> list[tuple[str, ...]]:
        """Return the groups of layers that vLLM runs as one matrix."""
        if not self.fused:
            return []
        groups: dict[tuple[str, int], list[str]] = {}
        for part in parts:
            parent, _, last = part.modules[0].rpartition(".")
            for index, names in enumerate(FUSED):
                if last in names and part.target.layer == "Linear":
                    groups.setdefault((parent, index), []).append(part.name)
        return [tuple(names) for names in groups.values() if len(names) > 1]

    def sizes(
        self,
        model: nn.Module,
        parts: Sequence[Part],
        transforms: Sequence[Sequence[Transform]],
        example: Any = None,  # noqa: ARG002
    ) -> FileSizes:
        """Return the size of all files of the folder."""
        state = written_state(model)
        files = _files_of(state, self.shard_bytes)
        sharded = len(set(files.values())) > 1
        unloaded = self.refuse_in(model, parts)

        def taken(name: str, transform: Transform, target: Target) -> int:
            scheme = scheme_of(transform, target)
            entries = _dense_entries(name, state[name]) if scheme is None else _packed_entries(name, scheme, target)
            index = sum(len(_indexed(entry.name, files[name])) for entry in entries) if sharded else 0
            config = 0 if scheme is None else config_room(name, scheme)
            return index + config + sum(entry.size_bytes for entry in entries)

        weights = {part.name: _weight_name(part, state) for part in parts}
        later = {part.name for part in parts if part.rows is not None and part.rows[0]}  # the first has the weight's
        refused = {
            (place, option): unloaded[part.name]
            for place, (part, part_options) in enumerate(zip(parts, transforms, strict=True))
            for option, transform in enumerate(part_options)
            if part.name in unloaded and not isinstance(transform, Keep)
        }
        options = tuple(
            tuple(
                0
                if part.name in later or (place, option) in refused
                else taken(weights[part.name], transform, part.target)
                for option, transform in enumerate(part_options)
            )
            for place, (part, part_options) in enumerate(zip(parts, transforms, strict=True))
        )
        rest = [name for name in state if name not in weights.values()]
        whole = sum(taken(name, Keep(), _ANY) for name in rest)
        whole += tensor_file.OVERHEAD * len(set(files.values())) + (_INDEX_ROOM if sharded else 0)
        whole += len(plain_config(model)) + CONFIG_ROOM + len(generation_config(model) or b"")
        whole += sum(file.stat().st_size for file in self._tokenizer_files(model))
        return FileSizes(options=options, overhead=whole, refused=refused)

    def write(self, model: nn.Module, path: Path, example: Any = None) -> None:  # noqa: ARG002
        """Write the folder."""
        items, state = _compressed(self, model), written_state(model)
        files = _files_of(state, self.shard_bytes)
        packed = {_weight_name(item.part, state): item for item in items}
        path.mkdir()
        contents: dict[str, list[TensorEntry]] = {file: [] for file in files.values()}
        for name, tensor in state.items():
            read = functools.partial(numbers_of, model, name, tensor)
            contents[files[name]] += (
                _entries_of(name, packed[name]) if name in packed else _dense_entries(name, tensor, read)
            )
        for file, entries in contents.items():
            with (path / file).open("wb") as stream:
                tensor_file.write(stream, entries)
        if len(contents) > 1:
            (path / INDEX).write_bytes(_index(contents))
        schemes = {name: _scheme(item) for name, item in packed.items()}
        (path / "config.json").write_bytes(config_bytes(model, schemes))
        if generation := generation_config(model):
            (path / "generation_config.json").write_bytes(generation)
        for source in self._tokenizer_files(model):
            shutil.copy(source, path / source.name)

    def run(self, path: Path, batches: Iterable[Any]) -> EngineRun:
        """Load the folder with transformers and run it."""
        if PackedFiles(path).has_zero_points:
            return self.run_by_block(path, batches)
        model, batches = loaded(path), list(batches)
        with torch.no_grad():
            forwards.run(model, batches[0], _output)  # the first call unpacks the weights
        return timed(forwards.run(model, batch, _output) for batch in batches)

    def emulate(self, model: nn.Module, batches: Iterable[Any]) -> EngineRun:
        """Compute the model's logits or, for an encoder, its last hidden states."""
        return timed(forwards.run(model, batch, _output) for batch in batches)

    def run_by_block(self, path: Path, batches: Iterable[Any]) -> EngineRun:
        """Run the folder with transformers on weights that compressed-tensors unpacks block by block."""
        model = opened_from(PackedFiles(path))
        return timed(forwards.run(model, batch, _output) for batch in batches)

    def check(self, path: Path, model: nn.Module) -> str:
        """Compare every tensor with the model's, one at a time; compressed-tensors itself decodes the packed ones."""
        files = PackedFiles(path)
        for name, tensor in written_state(model).items():
            if name not in files:
                return f"the folder lacks {name!r}"
            numbers, stored = numbers_of(model, name, tensor), files.read(name)
            if stored.dtype != numbers.dtype or not torch.equal(stored, numbers):
                return f"{name!r} in the folder is not the model's"
        return ""

    def _tokenizer_files(self, model: nn.Module) -> list[Path]:
        source = self.tokenizer or str(getattr(model, "name_or_path", ""))
        folder = Path(source)
        if self.tokenizer is not None and not folder.is_dir():
            raise EngineError(f"tokenizer must be a folder with a tokenizer's files, but {self.tokenizer!r} is not one")
        return [folder / name for name in TOKENIZER if source and (folder / name).is_file()]


def _output(model: nn.Module, batch: Any) -> Tensor:
    """Return the model's logits, or the last hidden states of an encoder, which has none.

    Raises:
        ModelError: the output has neither.
    """
    output = forwards.called(model, batch)
    states = getattr(output, "last_hidden_state", None)
    return forwards.tensor_of(output) if states is None else states


def loaded(path: Path) -> nn.Module:
    """Load the model of a folder with transformers, in evaluation mode.

    Raises:
        EngineError: transformers does not load it.
    """
    import transformers

    try:
        kind: Any = class_of(transformers.AutoConfig.from_pretrained(path))
        model: nn.Module = kind.from_pretrained(path)
    except (RuntimeError, ValueError, KeyError, AttributeError, TypeError, OSError) as error:
        raise EngineError(f"transformers does not load {path}: {error}") from error
    return model.eval()


_ANY = Target(layer="", channels=0, per_channel=0, dtype=torch.float32, macs=0)
_INDEX_ROOM = 100


def _compressed(engine: CompressedTensors, model: nn.Module) -> list[CompressedPart]:
    """Return the compressed parts of a model.

    Raises:
        EngineError: the engine does not run one of them.
    """
    record = record_of(model)
    items = [item for item in record.parts if item.stored] if record is not None else []
    unloaded = engine.refuse_in(model, [item.part for item in items])
    for item in items:
        if why := engine.refuse(item.part, item.transform) or unloaded.get(item.part.name):
            raise EngineError(f"engine {engine.name!r} cannot write this model: {item.part.name!r}: {why}")
    return items


def _scheme(item: CompressedPart) -> Scheme:
    scheme = scheme_of(item.transform, item.part.target)
    assert scheme is not None  # noqa: S101
    return scheme


def _weight_name(part: Part, state: Mapping[str, Tensor]) -> str:
    """Return the name of a part's weight in the state dict."""
    return next(name for module in part.modules if (name := f"{module}.{part.parameter}".lstrip(".")) in state)


def _files_of(state: Mapping[str, Tensor], shard_bytes: int) -> dict[str, str]:
    """Return the file of every weight, which does not depend on how the weight is stored."""
    shards: dict[str, int] = {}
    number, filled = 0, 0
    for name, tensor in state.items():
        if filled and filled + tensor.nbytes > shard_bytes:
            number, filled = number + 1, 0
        shards[name] = number
        filled += tensor.nbytes
    stem, _, ending = WEIGHTS.rpartition(".")
    return {
        name: f"{stem}-{place + 1:05}-of-{number + 1:05}.{ending}" if number else WEIGHTS
        for name, place in shards.items()
    }


def _dense_entries(name: str, tensor: Tensor, read: Callable[[], Tensor] | None = None) -> list[TensorEntry]:
    """Return a dense weight, which is read when it is written."""
    return [TensorEntry(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape), tensor=read)]


def _packed_entries(name: str, scheme: Scheme, target: Target) -> list[TensorEntry]:
    """Return the tensors that replace the weight ``name``: codes, scales, its shape and possibly zero points."""
    rows, groups = target.channels, scheme.num_groups(target)
    shapes = {
        "weight_packed": (torch.int32, (rows, -(-target.per_channel * scheme.bits // 32))),
        "weight_scale": (scheme.scale_type, (rows, groups)),
        "weight_shape": (torch.int64, (2,)),
    }
    if not scheme.symmetric:
        shapes["weight_zero_point"] = (torch.int32, (-(-rows * scheme.bits // 32), groups))
    module = name.removesuffix(".weight")
    return [TensorEntry(name=f"{module}.{key}", dtype=dtype, shape=shape) for key, (dtype, shape) in shapes.items()]


def _entries_of(name: str, item: CompressedPart) -> list[TensorEntry]:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    scheme, target = _scheme(item), item.part.target

    def numbers(key: str) -> Tensor:
        if key == "weight_shape":
            return torch.tensor([target.channels, target.per_channel])
        item_codes = integer_codes(item.transform, item.stored, target)
        if key == "weight_scale":
            return item_codes.scales
        codes, along = (item_codes.zeros, 0) if key == "weight_zero_point" else (item_codes.codes, 1)
        signed = (codes - 2 ** (scheme.bits - 1)).to(torch.int8)
        packed: Tensor = pack_to_int32(signed, scheme.bits, packed_dim=along)
        return packed.contiguous()

    return [
        TensorEntry(
            name=entry.name,
            dtype=entry.dtype,
            shape=entry.shape,
            tensor=functools.partial(numbers, entry.name.rpartition(".")[2]),
        )
        for entry in _packed_entries(name, scheme, target)
    ]


def _indexed(name: str, file: str) -> str:
    return f"\n{json.dumps(name)}:{json.dumps(file)},"


def _index(contents: Mapping[str, list[TensorEntry]]) -> bytes:
    """Return the index of the shards, padded to the size predicted by `sizes`."""
    lines = [_indexed(entry.name, file) for file, entries in contents.items() for entry in entries]
    total = sum(entry.nbytes for entries in contents.values() for entry in entries)
    text = f'{{"metadata":{{"total_size":{total}}},"weight_map":{{{"".join(lines).rstrip(",")}\n}}}}'
    return text.encode().ljust(sum(map(len, lines)) + _INDEX_ROOM)
