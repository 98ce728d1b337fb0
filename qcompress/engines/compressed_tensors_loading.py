"""What transformers makes of a compressed-tensors folder: the names that it reads, and the layers that it loads packed.

Both follow from an empty model that transformers builds from the same configuration.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from qcompress.engines.compressed_tensors_config import require_of_transformers
from qcompress.errors import EngineError
from qcompress.model.tensors import all_names


def written_state(model: nn.Module) -> dict[str, Tensor]:
    """Return every tensor of a folder by its name in the state dict.

    A tensor that the model has under several names is written under each of them, unless transformers ties them itself.

    Raises:
        EngineError: it is not a transformers model; from its configuration transformers builds another shape, as where
            the layers of one kind have lost different numbers of units, or a weight that the model does not have, or
            ties what are two weights in the model.
    """
    places, state = all_names(_built(model)), all_names(model)
    modules = {
        path for path, _ in model.named_modules()
    }  # one that the model lacks, such as a pooler, was left out on purpose
    if lost := sorted(name for name in places.keys() - state.keys() if name.rpartition(".")[0] in modules):
        raise EngineError(
            f"engine 'compressed-tensors' cannot write this model: from its configuration transformers builds "
            f"{lost[0]!r}, which the model does not have ({len(lost)} such weights), as one that was loaded packed: "
            "give the original model"
        )
    first: dict[int, str] = {}
    written = {}
    for name, tensor in state.items():
        place = places.get(name, tensor)
        if place.shape != tensor.shape:
            raise EngineError(
                f"engine 'compressed-tensors' cannot write this model: from its configuration transformers builds "
                f"{name!r} of shape {list(place.shape)}, and the model's has {list(tensor.shape)}, as after the "
                "removal of channels. ONNX Runtime (target='onnxruntime') and save_compressed() take such a model"
            )
        other = first.setdefault(id(place), name)
        if other == name:
            written[name] = tensor
        elif state[other] is not tensor:
            raise EngineError(
                f"engine 'compressed-tensors' cannot write this model: {other!r} and {name!r} are two weights, but "
                "from its configuration transformers makes them one: set model.config.tie_word_embeddings = False"
            )
    return written


def not_loaded_packed(model: nn.Module, paths: Iterable[str]) -> set[str]:
    """Return the layers whose weight transformers initialises from a module around them before it loads them.

    It initialises packed layers as well, and these have no ``weight``.

    Args:
        model: a model of transformers.
        paths: paths of layers with a weight.
    """
    built = _built(model)
    known = {path for path, _ in built.named_modules()}
    return {path for path in known.intersection(paths) if not _initialised_without_weight(built, path)}


def _initialised_without_weight(built: nn.Module, path: str) -> bool:
    layer = built.get_submodule(path)
    weight = layer._parameters.pop("weight")
    try:
        with torch.no_grad():
            for owner, module in _around(built, path):
                owner._init_weights(module)  # type: ignore[operator]
    except Exception as error:  # of a model's own code; others say nothing about the weight
        return not isinstance(error, AttributeError) or "'weight'" not in str(error)
    finally:
        layer._parameters["weight"] = weight
    return True


def _around(model: nn.Module, path: str) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Every module on the way to ``path``, after the model of transformers around it that initialises it."""
    from transformers import PreTrainedModel

    owner = module = model
    yield owner, module
    for name in path.split("."):
        module = getattr(module, name)
        owner = module if isinstance(module, PreTrainedModel) else owner
        yield owner, module


def _built(model: nn.Module) -> nn.Module:
    """Return the model that transformers builds from the configuration, without memory.

    Raises:
        EngineError: it is not a transformers model.
    """
    require_of_transformers(model)
    with torch.device("meta"):
        return type(model)(model.config)
