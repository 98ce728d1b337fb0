"""Effects by linearisation: a few backward passes serve all options of all parts.

The change ``J_v`` of the output by option v is, to first order, the backward pass's view of the change that the
option makes at its own layer: for a probe ``a`` of the output's shape
``a·J_v(s) = ⟨∂(a·output)/∂(layer output), layer(input; ΔW_v)⟩`` for sample s. Outputs of few numbers are probed one
by one, which gives ``J_v`` itself; others by random probes of the loss's Hessian. The loss increase of any choice is
then ``½·Σ_s Σ_k (Σ_v effect_v)² / N``: a Gram matrix, from as many backward passes as there are probes.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from qcompress.errors import ModelError
from qcompress.measuring.candidates import Candidates, Layer
from qcompress.measuring.effects import curvature_points, exact_effects, option_costs
from qcompress.model import forward as forwards
from qcompress.model import layers
from qcompress.model.losses import Loss

MAX_PROBES = 16  # each probe costs one backward pass
CHUNK = 16  # samples whose products are taken at once, and options whose responses are held
USE_TOLERANCE = 1e-2  # float32 sums over a whole batch, in another order


@dataclass(slots=True)
class _Call:
    """One call of a layer: what went in, and a handle whose gradient is that of the output."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    handle: Tensor


@dataclass(slots=True)
class _Recorder:
    """Forward hooks that note the calls of the candidates' layers and make their outputs differentiable."""

    calls: dict[str, list[_Call]] = field(default_factory=dict)

    def hook(self, path: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            with torch.enable_grad():
                # adding a broadcast zero leaves the output as it is, whatever is done to it in place later
                handle = (
                    torch.zeros((), dtype=output.dtype, device=output.device).requires_grad_(True).expand_as(output)
                )
                self.calls.setdefault(path, []).append(_Call(module, args, kwargs, handle))
                return output + handle

        return note


def batch_effects(
    model: nn.Module,
    batch: Any,
    candidates: Candidates,
    loss: Loss,
    forward: forwards.Forward | None,
    generator: torch.Generator,
    *,
    check: bool,
    reference: Tensor | None = None,
) -> tuple[NDArray[np.float64], Iterable[NDArray[np.floating]], int]:
    """Costs ``(V,)`` summed over the batch, blocks of effects ``(V, columns)``, and the number of samples.

    With ``check`` the recorded calls are compared with the weights' own gradients, to find weights that are also
    used outside their modules. ``reference`` has the original's outputs, where the model is not the original.

    Raises:
        ModelError: a weight is used outside its module's calls, or a layer's output has no sample dimension.
    """
    recorder = _Recorder()
    paths = [path for layer in candidates.layers for path in layer.modules]
    hooks = [model.get_submodule(path).register_forward_hook(recorder.hook(path), with_kwargs=True) for path in paths]
    weights = [layers.weight_of(model.get_submodule(layer.modules[0])) for layer in candidates.layers]
    for weight in weights:
        weight.requires_grad_(check)
    try:
        with torch.enable_grad():
            output = forwards.run(model, batch, forward)
    finally:
        for hook in hooks:
            hook.remove()
    point = output.detach()
    num_samples, numbers = len(point), point[0].numel()
    small = numbers <= MAX_PROBES
    if small:
        units = torch.eye(numbers, dtype=output.dtype, device=output.device)
        probes = list(units.reshape(numbers, 1, *output.shape[1:]).expand(numbers, *output.shape))
    else:
        probes = list(loss.probes(point, batch, generator))
    slope = loss.gradient(point, batch, reference)
    if slope is not None and not small:
        probes.append(slope)
    calls = [call for layer in candidates.layers for path in layer.modules for call in recorder.calls.get(path, [])]
    handles = [call.handle for call in calls]
    if check:
        _check_use(output, probes[0], candidates, weights, recorder, handles)
        for weight in weights:
            weight.requires_grad_(False)
    gradients = [_gradients(output, probe, handles, keep=index + 1 < len(probes)) for index, probe in enumerate(probes)]

    found = np.zeros((candidates.num_options, num_samples, len(probes)), dtype=np.float32)
    position = 0
    with torch.no_grad():
        for layer in candidates.layers:
            for path in layer.modules:
                for call in recorder.calls.get(path, []):
                    own = [per_probe[position] for per_probe in gradients]
                    _add_layer_effects(found, layer, call, own, candidates, num_samples)
                    position += 1
        if small:
            changes = torch.from_numpy(found).to(point).reshape(len(found), *point.shape)
            cost = option_costs(loss, changes, point, batch, reference)
            points = curvature_points(loss, changes, point, cost, candidates) if reference is None else [point]
            return cost, exact_effects(loss, changes, points, batch), num_samples
    first_order = np.zeros(candidates.num_options)
    if slope is not None:
        first_order = found[:, :, -1].sum(axis=1, dtype=np.float64)
        found = found[:, :, :-1]
    cost = first_order + 0.5 * np.square(found, dtype=np.float64).sum(axis=(1, 2))
    return cost, [found.reshape(candidates.num_options, -1)], num_samples


def _gradients(output: Tensor, probe: Tensor, handles: list[Tensor], *, keep: bool) -> list[Tensor]:
    """Gradient of ``probe·output`` with respect to every handle; zeros where the output does not depend on it."""
    found = torch.autograd.grad(output, handles, grad_outputs=probe, retain_graph=keep, allow_unused=True)
    return [torch.zeros_like(handle) if own is None else own for own, handle in zip(found, handles, strict=True)]


def _response(call: _Call, change: Tensor) -> Tensor:
    """What the layer would give for its recorded input with ``change`` as weight and no bias."""
    state: dict[str, Tensor] = {"weight": change}
    bias = call.module._parameters.get("bias")
    if bias is not None:
        state["bias"] = torch.zeros_like(bias)
    response: Tensor = functional_call(call.module, state, call.args, call.kwargs)
    return response


def _add_layer_effects(
    effects: NDArray[np.float32],
    layer: Layer,
    call: _Call,
    gradients: list[Tensor],
    candidates: Candidates,
    num_samples: int,
) -> None:
    """Add one call's share to ``effects``; ``gradients`` are those of the call's output, one a probe."""
    sample_dim = _sample_dim(gradients[0], num_samples)
    gradients = [_wide(gradient) for gradient in gradients]
    changing = candidates.changing(layer)
    for start in range(0, len(changing), CHUNK):
        options = changing[start : start + CHUNK]
        responses = [_wide(_response(call, candidates.layer_change(layer, option))) for option in options]
        if len(layer.parts) == 1:
            shares = _whole(gradients, responses, sample_dim, num_samples)[:, None]
        else:
            starts = [(candidates.parts[part].rows or (0, 0))[0] for part in layer.parts]
            split = _by_vocabulary if isinstance(call.module, nn.Embedding) else _by_channel
            shares = torch.stack([split(call, gradients, own, sample_dim, num_samples, starts) for own in responses])
        for option, share in zip(options, shares.cpu().numpy(), strict=True):
            for part, own in zip(layer.parts, share, strict=True):
                if option < len(candidates.transforms[part]):
                    effects[candidates.offsets[part] + option] += own


def _wide(values: Tensor) -> Tensor:
    """For sums of many products: in half precision these would be lost below its least number."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _whole(gradients: list[Tensor], responses: list[Tensor], sample_dim: int, num_samples: int) -> Tensor:
    """The products of all options and probes per sample: ``(options, samples, probes)``."""
    others = [dim for dim in range(gradients[0].ndim) if dim != sample_dim]
    order = [sample_dim, *sorted(others, key=lambda dim: -gradients[0].stride()[dim])]  # as in memory: no copies
    left, right = (
        [value.permute(order).reshape(num_samples, -1) for value in values] for values in (responses, gradients)
    )
    return _products(left, right)


def _products(left: list[Tensor], right: list[Tensor]) -> Tensor:
    """All products per sample of two lists of ``(samples, m)``: ``(len(left), samples, len(right))``."""
    chunks = []
    for start in range(0, len(left[0]), CHUNK):  # small stacks stay in the cache
        rows = slice(start, start + CHUNK)
        stacked = (torch.stack([value[rows] for value in side], dim=1) for side in (left, right))
        chunks.append(torch.bmm(next(stacked), next(stacked).mT))
    return torch.cat(chunks).transpose(0, 1)


def _sample_dim(output: Tensor, num_samples: int) -> int:
    """Which dimension of a layer's output counts samples (the first may hold several rows per sample, in order).

    Raises:
        ModelError: none does.
    """
    if output.shape[0] % num_samples == 0:
        return 0
    if output.ndim > 1 and output.shape[1] == num_samples:
        return 1
    raise ModelError(
        f"a layer's output of shape {tuple(output.shape)} has no dimension for the {num_samples} samples; "
        "use method='direct'"
    )


def _by_sample(values: Tensor, sample_dim: int, num_samples: int) -> Tensor:
    """A layer's output as ``(samples, everything else)``."""
    return values.movedim(sample_dim, 0).reshape(num_samples, -1)


def _by_channel(
    call: _Call, gradients: list[Tensor], response: Tensor, sample_dim: int, num_samples: int, starts: list[int]
) -> Tensor:
    """The products split by the parts that the output's channels belong to: ``(parts, samples, probes)``."""
    dim = layers.channel_dim(call.module, response)

    def channels_first(values: Tensor) -> Tensor:
        moved = values.movedim((dim, sample_dim), (0, 1))
        return moved.reshape(moved.shape[0], num_samples, -1)

    right = channels_first(response)
    per_channel = torch.stack([(channels_first(value) * right).sum(-1) for value in gradients], dim=-1)
    bounds = torch.tensor(starts[1:], device=response.device)
    owner = torch.bucketize(torch.arange(len(per_channel), device=response.device), bounds, right=True)
    return per_channel.new_zeros(len(starts), *per_channel.shape[1:]).index_add_(0, owner, per_channel)


def _by_vocabulary(
    call: _Call, gradients: list[Tensor], response: Tensor, sample_dim: int, num_samples: int, starts: list[int]
) -> Tensor:
    """The products split by the parts that the looked-up entries belong to: ``(parts, samples, probes)``."""
    ids: Tensor = call.args[0] if call.args else call.kwargs["input"]
    bounds = torch.tensor(starts[1:], device=ids.device)
    owner = _by_sample(torch.bucketize(ids, bounds, right=True), sample_dim, num_samples)
    products = [_by_sample((value * response).sum(-1), sample_dim, num_samples) for value in gradients]
    rows = torch.arange(num_samples, device=ids.device)[:, None].expand_as(owner)
    share = response.new_zeros(len(starts), num_samples, len(gradients))
    return share.index_put_((owner, rows), torch.stack(products, dim=-1), accumulate=True)


def _check_use(
    output: Tensor,
    probe: Tensor,
    candidates: Candidates,
    weights: list[nn.Parameter],
    recorder: _Recorder,
    handles: list[Tensor],
) -> None:
    """Compare the recorded calls' view of one option with the weight's own gradient.

    Raises:
        ModelError: they differ: the weight is also used outside its module's calls.
    """
    own = torch.autograd.grad(output, weights, grad_outputs=probe, retain_graph=True, allow_unused=True)
    seen = _gradients(output, probe, handles, keep=True)
    position = 0
    for layer, gradient in zip(candidates.layers, own, strict=True):
        change = candidates.layer_change(layer, max(candidates.changing(layer), default=0))
        expected = 0.0 if gradient is None else float((gradient * change).sum())
        size = 0.0 if gradient is None else float(gradient.norm() * change.norm())
        found = 0.0
        for path in layer.modules:
            for call in recorder.calls.get(path, []):
                with torch.no_grad():
                    found += float((seen[position] * _response(call, change)).sum())
                position += 1
        if abs(found - expected) > USE_TOLERANCE * size:
            raise ModelError(
                f"the weight of {layer.modules[0]!r} is also used outside its module's calls, which method='fisher' "
                "does not see; use method='direct'"
            )
