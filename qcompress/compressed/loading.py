"""Check a model's architecture against a file, and copy the file's tensors into the model."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from formulations.files import AnyPath
from qcompress.compressed.cutting import Cuts
from qcompress.compressed.index import Contents, Described, dtype_name
from qcompress.errors import ArtefactError
from qcompress.model import layers
from qcompress.model.coupled import Bypass
from qcompress.model.parts import Part
from qcompress.model.tensors import EXTRA_STATE, held_tensors


def part_differences(part: Part, model: nn.Module) -> list[str]:
    """Describe how ``model`` differs from a part of the file."""
    target = part.target
    try:
        site = part.site(model)
    except AttributeError:
        return [f"it has no layer {part.modules[0]!r}"]
    module = site.module
    names = {type(module).__name__, layers.kind_name(module)}
    if not site.is_layer:
        names = {f"{name}.{part.parameter}" for name in names}
    if site.why_not() or target.layer not in names:
        return [f"{part.modules[0]!r} is {type(module).__name__}, in the file {target.layer}"]
    if target.window is not None:
        kernel, expected = (*module.kernel_size, module.groups), (*target.window.kernel, 1)  # type: ignore[misc]
        if kernel != expected:
            words = ["a kernel of {}×{} in {} groups".format(*shape) for shape in (kernel, expected)]
            return [f"{part.modules[0]!r} has {words[0]}, in the file {words[1]}"]
    rows = site.rows
    start, stop = part.rows or (0, len(rows))
    if stop > len(rows) or (stop - start, rows.shape[1]) != (target.channels, target.per_channel):
        size = f"{len(rows)} channels of {rows.shape[1]} weights"
        return [f"{part.name!r} has {size}, in the file {target.channels} of {target.per_channel}"]
    return []


def bypass_differences(bypasses: Sequence[Bypass], model: nn.Module) -> list[str]:
    """Describe what ``model`` lacks of the modules that are to be bypassed."""
    paths = {path for path, _ in model.named_modules()}
    wanted = [path for item in bypasses for path in (item.path, item.reader) if path is not None]
    return [f"it has no module {path!r}" for path in wanted if path not in paths]


def cut_differences(contents: Contents, cuts: Cuts, model: nn.Module) -> list[str]:
    """Describe how ``model`` differs from the one in which ``cuts`` give the file's model.

    Of weights that smaller layers replace in the file, `part_differences` compares the shapes after the cut.
    """
    shapes = {item.name: list(item.tensor.shape) for item in held_tensors(model)}
    expected: dict[str, list[int]] = {}
    for (name, dim), indices in cuts.items():
        if name not in shapes:
            return [f"it lacks {name!r}"]
        if name not in contents.state:
            continue
        shape = expected.setdefault(name, list(contents.state[name].shape))
        shape[dim] += len(indices)
    return [
        f"{name!r} is of shape {shapes[name]}, the file was cut from {shape}"
        for name, shape in expected.items()
        if shapes[name] != shape
    ]


def state_differences(expected: dict[str, Described], actual: dict[str, Described]) -> list[str]:
    """Describe how a state differs from the file's; non-persistent buffers are replaced, whatever the model has."""
    differences = [
        f"it lacks {name!r}" for name, described in expected.items() if described.persistent and name not in actual
    ]
    differences += [
        f"it has {name!r}, the file has not"
        for name, described in actual.items()
        if described.persistent and name not in expected
    ]
    for name, described in expected.items():
        if name in actual and described.persistent and actual[name] != described:
            differences.append(f"{name!r} is {actual[name].words(name)}, in the file {described.words(name)}")
    return sorted(differences)


def put_(model: nn.Module, contents: Contents) -> None:
    """Set every tensor of ``model`` that is not a part's weight to its value in the file.

    Raises:
        ArtefactError: a buffer's module is missing.
    """
    places = {item.name: item for item in held_tensors(model)}
    with torch.no_grad():
        for name, described in contents.state.items():
            if described.first not in contents.plain or (described.persistent and described.first != name):
                continue
            value, item = contents.plain[described.first], places.get(name)
            if item is None or (dtype_name(item.tensor), tuple(item.tensor.shape)) != (
                described.dtype,
                described.shape,
            ):
                _buffer_(model, name, value.clone())
            elif item.key == EXTRA_STATE:
                item.module.set_extra_state(value.to(item.tensor.device))
            else:
                item.tensor.copy_(value)


def _buffer_(model: nn.Module, name: str, value: Tensor) -> None:
    """Create a non-persistent buffer, whose size may depend on the batches that the model was run on."""
    path, _, key = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise ArtefactError(
            f"the given model has another architecture than the file: it has no module {path!r}"
        ) from error
    device = next((tensor.device for tensor in module.parameters()), value.device)
    module.register_buffer(key, value.to(device), persistent=False)


TWICE = (
    ". A model that was compressed twice is loaded into the result of the first time: "
    "load_compressed(path, lambda: load_compressed(first_path, model_factory))"
)


def refuse(path: AnyPath, differences: list[str]) -> None:
    """Raise an error if there are differences.

    Raises:
        ArtefactError: lists the first differences.
    """
    if different := list(dict.fromkeys(differences)):  # the blocks of a layer differ in the same way
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        missing = any(text.startswith(("it lacks", "it has no")) for text in different)
        raise ArtefactError(
            f"the given model has another architecture than the one in {path}: {'; '.join(different[:3])}{more}"
            f"{TWICE if missing else ''}"
        )
