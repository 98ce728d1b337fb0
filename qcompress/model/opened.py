"""Opened models: a folder of safetensors files as a model whose weights are read block by block.

The blocks are the model's repeated layers. Unless a block is running, its weights are on PyTorch's ``meta`` device,
which holds shapes but no values. A block reads its weights when it is called and releases them afterwards, so that the
model works with any function that runs it; `Opened.loaded` keeps the weights of one block for longer. Everything
outside the blocks (embeddings, norms, the output layer) is read once and stays in memory.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from formulations.files import AnyPath
from qcompress.errors import ModelError, found
from qcompress.identity import Identity, identify_read
from qcompress.model import forward as forwards
from qcompress.model.blocks import Blocks, blocks_of
from qcompress.model.building import parameters_on_meta
from qcompress.model.composed import compose_, computed
from qcompress.model.hugging_face import built, require_original, stored_weights
from qcompress.model.stored_names import named_as_in, surplus_names
from qcompress.model.tensors import bytes_of
from qcompress.model.weight_files import MAIN, WeightFiles

_ATTRIBUTE = "_qcompress_opened"


class Opened(Blocks):
    """The source of an opened model's weights.

    Args:
        model: model with its blocks' weights on the meta device.
        files: files with the weights.
        blocks: paths of its blocks, in their order.
        make: function that returns the model; None for one of transformers.
        dtype: type that the model was opened in; None for that of its configuration or of ``make``.

    Attributes:
        files, make, dtype: the arguments.
        stubs: while above 0, blocks read no weights when called.
    """

    def __init__(
        self,
        model: nn.Module,
        files: WeightFiles,
        blocks: Sequence[str],
        make: Callable[[], nn.Module] | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(model, blocks)
        self.files, self.make, self.dtype, self.stubs = files, make, dtype, 0
        self._stored = {name: next(filter(files.__contains__, names)) for names in _by_tensor(model) for name in names}
        self._held: dict[str, int] = {}
        self._meta: dict[str, list[tuple[nn.Module, str, nn.Parameter]]] = {}
        self._fingerprint: str | None = None
        for path in self.blocks:
            block = model.get_submodule(path)
            block.register_forward_pre_hook(lambda *_, path=path: self._called(path))
            block.register_forward_hook(lambda *_, path=path: self._returned(path), always_call=True)

    def read(self, name: str) -> Tensor:
        """Read the weight with the given name in the state dict, in the model's type."""
        path, _, key = name.rpartition(".")
        place = self._model.get_submodule(path)._parameters[key]
        assert place is not None  # noqa: S101
        return self.files.read(self._stored.get(name, name)).to(place.dtype)

    @contextlib.contextmanager
    def loaded(self, block: str) -> Iterator[nn.Module]:
        """Keep the weights of the block with the given path in memory inside a ``with`` block.

        Raises:
            ModelError: a weight is not finite.
        """
        try:
            self._load(block)
            yield self._model.get_submodule(block)
        finally:
            self._free(block)

    @contextlib.contextmanager
    def unread(self) -> Iterator[None]:
        """Let blocks that are called inside the ``with`` block read no weights."""
        self.stubs += 1
        try:
            yield
        finally:
            self.stubs -= 1

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the names, types and values of the state dict, equal to that of the model in memory."""
        if self._fingerprint is None:
            digest, seen = hashlib.sha256(), set()
            for name, tensor in self._model.state_dict(keep_vars=True).items():
                if id(tensor) in seen:
                    continue
                seen.add(id(tensor))
                numbers = self.read(name) if tensor.device.type == "meta" else tensor.detach()
                digest.update(f"{name} {numbers.dtype} {tuple(numbers.shape)}\n".encode())
                digest.update(bytes_of(numbers))
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    @property
    def identity(self) -> Identity:
        """Identity of the weights and of what the model does with them, which its configuration says."""
        return identify_read(self._model, self, self.fingerprint)

    def _called(self, path: str) -> None:
        if not self.stubs:
            self._load(path)

    def _returned(self, path: str) -> None:
        if not self.stubs:
            self._free(path)

    def _load(self, path: str) -> None:
        """Read a block; `_free` follows, whether this raises or not."""
        self._held[path] = self._held.get(path, 0) + 1
        if path in self._meta:
            return
        places, block = [], self._model.get_submodule(path)
        read: dict[int, nn.Parameter] = {}  # a weight that several modules share is one
        for inner, module in block.named_modules(prefix=path):
            for key, place in module._parameters.items():
                if place is None:
                    continue
                if id(place) not in read:
                    numbers = self.read(f"{inner}.{key}")
                    if not bool(torch.isfinite(numbers).all()):
                        raise ModelError(f"the weight {f'{inner}.{key}'!r} holds NaN or infinity")
                    read[id(place)] = nn.Parameter(numbers, requires_grad=False)
                places.append((module, key, place))
        for module, key, place in places:  # after all is read: an error leaves nothing changed
            module._parameters[key] = read[id(place)]
        self._meta[path] = places

    def _free(self, path: str) -> None:
        self._held[path] -= 1
        if self._held[path] == 0:
            for module, key, place in self._meta.pop(path, []):
                module._parameters[key] = place


def open_model(
    folder: AnyPath,
    *,
    dtype: torch.dtype | None = None,
    model: Callable[[], nn.Module] | None = None,
    blocks: str | Sequence[str] | None = None,
) -> nn.Module:
    """Open a model in evaluation mode; its blocks' weights stay on disk until they are needed.

    `qcompress.measure` (``method="sampled"``), `apply`, `export`, `mean_loss` and `compress` accept it like any other
    model, and process it block by block.

    Args:
        folder: folder written by transformers' ``save_pretrained``, with ``config.json`` and safetensors files; with
            ``model``, any folder of safetensors files that hold its state dict. As in transformers, only
            ``model.safetensors`` is read if there is one, or else the files that its index lists. If ``config.json``
            names no class under ``architectures``, it is assumed to be a causal language model where transformers has
            one of its kind.
        dtype: type to compute in; by default that of ``config.json``, or if it names none that of the files; or that of
            ``model``.
        model: function that returns the module, for a model that is not of transformers. It is called while parameters
            take no memory, so whatever values it gives them are lost; buffers keep theirs unless the files have them.
        blocks: path of the list of repeated blocks (a `torch.nn.ModuleList` or `torch.nn.Sequential`), or the paths of
            the blocks in their order; by default the list, all of one class, with most of the weights.

    Raises:
        ModelError: the folder does not exist, the model has no repeated blocks, one of them shares or computes its
            weights, they are quantized, their names in the files differ from those in the model, or two files hold one
            of the same name.
        MissingError: transformers is missing.

    >>> import tempfile
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
    ...     num_attention_heads=2, num_key_value_heads=2)
    >>> folder = tempfile.mkdtemp()
    >>> LlamaForCausalLM(config).save_pretrained(folder)
    >>> model = open_model(folder)
    >>> model.model.layers[0].mlp.up_proj.weight.device.type, model(torch.tensor([[1, 2]])).logits.shape
    ('meta', torch.Size([1, 2, 32]))
    """
    source = Path(folder)
    if model is None:
        require_original(source)
    files = stored_weights(source) if model is None else WeightFiles(source)
    opened = opened_from(files, dtype=dtype, make=model, blocks=blocks)
    if surplus := surplus_names(opened, files):
        raise ModelError(
            f"{files[surplus[0]].file} holds {surplus[0]!r}, which the model does not have ({len(surplus)} such "
            "tensors): it has fewer layers, or is another one; if not, load it whole and save it again without them"
        )
    _require_same_where_tied(opened, files)
    compose_(opened)
    return opened.requires_grad_(False)


def opened_from(
    files: WeightFiles,
    *,
    dtype: torch.dtype | None = None,
    make: Callable[[], nn.Module] | None = None,
    blocks: str | Sequence[str] | None = None,
    like: nn.Module | None = None,
) -> nn.Module:
    """Return an opened model with the weights in ``files``, see `open_model`; of the types of ``like``, if given."""
    with parameters_on_meta():
        model = built(files.folder, dtype, files.dtype) if make is None else _made(make, dtype)
    if make is None:
        model.tie_weights()  # type: ignore[operator]
        model.name_or_path = str(files.folder)  # type: ignore[assignment]
        files = named_as_in(model, files)
    if unmade := next((name for name, buffer in model.named_buffers() if buffer.is_meta), ""):
        raise ModelError(f"the buffer {unmade!r} has no values when the model is built; load the model whole")
    model.eval().requires_grad_(False)
    if like is not None:
        _retype_(model, like)
    _require_stored(model, files)
    opened = Opened(model, files, blocks_of(model, blocks), make, dtype)
    _require_not_computed(model, opened.blocks)
    _read_the_rest(model, opened)
    setattr(model, _ATTRIBUTE, opened)
    return model


def _retype_(model: nn.Module, like: nn.Module) -> None:
    """Give the parameters and buffers of a model the types that those of another one have."""
    types = {name: tensor.dtype for name, tensor in (*like.named_parameters(), *like.named_buffers())}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if types.get(name, tensor.dtype) != tensor.dtype:
            tensor.data = tensor.to(types[name])


def _made(make: Callable[[], nn.Module], dtype: torch.dtype | None) -> nn.Module:
    """Call a function that builds a model."""
    model = make()
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"open_model(model=…) must be a function that returns a module, it gave {found(model, nn.Module)}"
        )
    return model if dtype is None else model.to(dtype)


def opened_of(model: nn.Module) -> Opened | None:
    """Return the source of an opened model's weights, or None for a model in memory."""
    opened: Opened | None = getattr(model, _ATTRIBUTE, None)
    return opened


def numbers_of(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Return a tensor of the state dict on the CPU; of an opened model, a weight in a block is read."""
    opened = opened_of(model)
    return opened.read(name) if opened is not None and tensor.is_meta else tensor.detach().cpu()


def require_in_memory(model: nn.Module, name: str, instead: str) -> None:
    """Refuse an opened model.

    Args:
        model: any.
        name: name of the function that does not take one.
        instead: what to do.

    Raises:
        ModelError: it is one, or no module.
    """
    forwards.require_module(model)
    if opened_of(model) is not None:
        raise ModelError(f"{name} needs a model in memory, and this one is read block by block: {instead}")


def _require_not_computed(model: nn.Module, blocks: Sequence[str]) -> None:
    """Check that the weights in blocks are parameters themselves.

    Raises:
        ModelError: names one that is computed from others.
    """
    for block in blocks:
        for path, module in model.get_submodule(block).named_modules(prefix=block):
            if names := computed(module):
                raise ModelError(
                    f"{path!r} computes its {names[0]!r} from other parameters (weight norm, or another "
                    "parametrization), which is not done block by block: load the model into memory"
                )


def _by_tensor(model: nn.Module) -> list[list[str]]:
    """Return the names in the state dict by tensor; a shared one has several."""
    names: dict[int, list[str]] = {}
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    return list(names.values())


def _require_stored(model: nn.Module, files: WeightFiles) -> None:
    """Check that the files hold the model's weights.

    Raises:
        ModelError: names a weight that is missing or has another shape.
    """
    by_tensor, state = _by_tensor(model), model.state_dict()
    missing = [names[0] for names in by_tensor if not any(name in files for name in names)]
    if missing:
        alone = f"; {MAIN} is read alone where there is one" if (files.folder / MAIN).is_file() else ""
        raise ModelError(
            f"{files.folder} has no {missing[0]!r} ({len(missing)} of the model's weights are not in its files under "
            f"the names in the model's state dict{alone}): load the model whole and save it again"
        )
    for names in by_tensor:
        stored = next(files[name] for name in names if name in files)
        if stored.shape != tuple(state[names[0]].shape):
            raise ModelError(
                f"{names[0]!r} has the shape {stored.shape} in {stored.file}, the model's is "
                f"{tuple(state[names[0]].shape)}"
            )


def _require_same_where_tied(model: nn.Module, files: WeightFiles) -> None:
    """Check that a weight which the files hold under several names has the same values under all of them.

    Raises:
        ModelError: names two that differ.
    """
    for names in _by_tensor(model):
        stored = [name for name in names if name in files]
        first = next(iter(stored), "")
        for name in stored[1:]:
            if not torch.equal(files.read(first), files.read(name)):
                raise ModelError(
                    f"{first!r} and {name!r} are one weight in the model, but differ in {files.folder}: if they are "
                    "two, say so in the model (tie_word_embeddings in config.json)"
                )


def _read_the_rest(model: nn.Module, opened: Opened) -> None:
    """Read all parameters and buffers outside the blocks; shared ones are read once."""
    inside = tuple(f"{path}." for path in opened.blocks)
    places = {
        name: (module, key, place)
        for path, module in model.named_modules(remove_duplicate=False)
        for key, place in module._parameters.items()
        if place is not None and not (name := f"{path}.{key}" if path else key).startswith(inside)
    }
    numbers: dict[int, nn.Parameter] = {}
    for _, _, place in places.values():
        if id(place) not in numbers:
            stored = next(
                name for name, (_, _, parameter) in places.items() if parameter is place and name in opened.files
            )
            numbers[id(place)] = nn.Parameter(opened.files.read(stored).to(place.dtype), requires_grad=False)
    for module, key, place in places.values():
        module._parameters[key] = numbers[id(place)]
    persistent = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in persistent and name in opened.files:
            buffer.copy_(opened.files.read(name))
