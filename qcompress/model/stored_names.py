"""Read a folder's tensors under the names in a transformers model, also if its files name or split them differently.

Many mixtures of experts are stored with one tensor per expert and matrix, and computed with one tensor for all experts.
The table of conversions in transformers lists the stored tensors of each weight. A weight is assembled when it is read,
so that only one is in memory at a time.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from qcompress.errors import ModelError
from qcompress.model.weight_files import StoredTensor, WeightFiles

Sources = list[list[str]]
"""Names of stored tensors: each inner list is stacked, and the stacks are joined along the next dimension."""


def named_as_in(model: nn.Module, files: WeightFiles) -> WeightFiles:
    """Return ``files`` under the names in the model's state dict; the same object if they have those already.

    Args:
        model: a transformers model; its weights may be on the meta device.
        files: the stored tensors.

    Raises:
        ModelError: a weight is stored in a form that cannot be read tensor by tensor.
    """
    state = model.state_dict()
    groups, converters = _grouped(model, [name for name in files if name not in state])
    sources: dict[str, Sources] = {}
    for name, patterns in groups.items():
        if name not in state or name in files:
            continue
        converter = next(
            (converter for converter in converters if set(converter.source_patterns) & set(patterns)), None
        )
        if converter is None:
            sources[name] = list(patterns.values())
        elif _kinds(converter) in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]):
            sources[name] = [patterns[pattern] for pattern in converter.source_patterns if pattern in patterns]
        else:
            raise ModelError(
                f"{files.folder} holds {name!r} in a form that cannot be read block by block "
                f"({', '.join(_kinds(converter))}): load the model with from_pretrained and measure it in memory"
            )
    return ConvertedFiles(files, sources) if sources else files


def surplus_names(model: nn.Module, files: WeightFiles) -> list[str]:
    """Return the names of stored tensors that the model does not have, in the files' order.

    Of a transformers model, those that transformers itself would ignore without a word are left out.

    Args:
        model: the model; its weights may be on the meta device.
        files: the stored tensors.
    """
    state = model.state_dict()
    others = [name for name in files if name not in state]
    if not (others and hasattr(model, "_adjust_missing_and_unexpected_keys")):
        return others
    groups, _ = _grouped(model, others)
    report = SimpleNamespace(missing_keys=set(), unexpected_keys={name for name in groups if name not in state})
    model._adjust_missing_and_unexpected_keys(report)  # type: ignore[operator]
    surplus = {
        stored for name in report.unexpected_keys for stored_names in groups[name].values() for stored in stored_names
    }
    return [name for name in files if name in surplus]


def _grouped(model: nn.Module, names: list[str]) -> tuple[dict[str, dict[str, list[str]]], list[Any]]:
    """Return a mapping (name in the model → pattern → stored names in order), and the conversions of the patterns."""
    from transformers import conversion_mapping, core_model_loading

    transforms = conversion_mapping.get_model_conversion_mapping(model)
    renamings = [rule for rule in transforms if isinstance(rule, core_model_loading.WeightRenaming)]
    converters = [rule for rule in transforms if isinstance(rule, core_model_loading.WeightConverter)]
    groups: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(names, key=_by_number):
        renamed, pattern = core_model_loading.rename_source_key(name, renamings, converters)
        groups[renamed][pattern or name].append(name)
    return groups, converters


def _kinds(converter: Any) -> list[str]:
    return [type(operation).__name__ for operation in converter.operations]


def _by_number(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts expert 10 after expert 9."""
    return [(int(word), "") if word.isdecimal() else (-1, word) for word in name.split(".")]


class ConvertedFiles(WeightFiles):
    """Tensors in files, some of them renamed or assembled from several stored tensors.

    Args:
        files: the stored tensors.
        sources: mapping from names to the names of stored tensors.
    """

    def __init__(self, files: WeightFiles, sources: dict[str, Sources]) -> None:
        self.folder, self._files, self._sources = files.folder, files, sources

    def __getitem__(self, name: str) -> StoredTensor:
        if name not in self._sources:
            return self._files[name]
        stacks = self._sources[name]
        first = self._files[stacks[0][0]]
        if stacks == [[stacks[0][0]]]:
            return first
        rows = sum(self._files[stack[0]].shape[0] for stack in stacks)
        nbytes = sum(self._files[stored].nbytes for stack in stacks for stored in stack)
        return replace(first, shape=(len(stacks[0]), rows, *first.shape[1:]), nbytes=nbytes)

    def __iter__(self) -> Iterator[str]:
        yield from self._files
        yield from self._sources

    def __len__(self) -> int:
        return len(self._files) + len(self._sources)

    def read(self, name: str) -> Tensor:
        """Read a tensor in its stored type, putting it together if it is stored in several.

        Raises:
            ModelError: a file is truncated, or the stored tensors do not fit together.
        """
        if name not in self._sources:
            return self._files.read(name)
        stacks = self._sources[name]
        if stacks == [[stacks[0][0]]]:
            return self._files.read(stacks[0][0])
        try:
            return torch.cat([torch.stack([self._files.read(stored) for stored in stack]) for stack in stacks], dim=1)
        except RuntimeError as error:
            raise ModelError(f"the tensors of {name!r} in {self.folder} do not fit together: {error}") from error
