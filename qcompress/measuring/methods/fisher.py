"""Effects by linearisation: a few backward passes serve all options of all parts.

To first order, the change ``J_v`` of the output by option v follows from the change that the option makes at its own
layer: for a probe ``a`` of the output's shape
``a·J_v(s) = ⟨∂(a·output)/∂(layer output), layer(input; ΔW_v)⟩`` for sample s. Outputs with few numbers are probed one
by one, which gives ``J_v`` itself; others by random probes of the loss's Hessian. The loss increase of any choice is
then ``½·Σ_s Σ_k (Σ_v effect_v)² / N``: a Gram matrix, from as many backward passes as there are probes.

Every batch also tests whether the linearisation is valid (`qcompress.measuring.methods.evidence`). The options of a
layer for which it is not are evaluated one by one instead, with the same probes.
"""

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qcompress.measuring.candidates import Layer
from qcompress.measuring.effects import Effects, curvature_points, exact_effects, option_costs, softened_costs
from qcompress.measuring.methods import convolved, evidence
from qcompress.measuring.methods.calls import Call, Recorder, response
from qcompress.measuring.methods.direct import Direct
from qcompress.measuring.methods.gradient_check import widened
from qcompress.measuring.methods.moves import Moves
from qcompress.measuring.methods.norms import quick_norms
from qcompress.measuring.methods.products import Place, shares
from qcompress.measuring.methods.stacks import effects_of_stacks
from qcompress.model import forward as forwards
from qcompress.model import layers
from qcompress.model.batches import as_float32
from qcompress.model.parts import NOT_LINEAR

MAX_PROBES = 16  # each probe costs one backward pass
CHUNK = 16  # options whose responses are held at the same time


@dataclass(slots=True)
class _Run:
    """One recorded pass: its outputs, their probes, and every call's gradients, one per probe."""

    point: Tensor
    probes: list[Tensor]
    calls: list[list[Call]]  # by layer
    gradients: list[list[list[Tensor]]]  # by layer, call and probe
    places: list[list[Place | None]]  # by layer and call


class Fisher:
    """Effects of batches by linearisation, and by direct evaluation where the linearisation is not valid.

    Args:
        direct: evaluator of single options; also provides the model, its options, the loss and the forward.
        tried: names of parts to evaluate directly from the start, and why.

    Attributes:
        reasons: index into the candidates' layers → why its options are evaluated one by one.
    """

    def __init__(self, direct: Direct, tried: Mapping[str, str] | None = None) -> None:
        self._direct, self._model, self._candidates = direct, direct.model, direct.candidates
        self._loss, self._forward = direct.loss, direct.forward
        self.reasons: dict[int, str] = {}
        self._stacks: set[int] = set()
        self._check_due = False
        for index, layer in enumerate(self._candidates.layers):
            for part in layer.parts:
                if reason := (tried or {}).get(self._candidates.parts[part].name):
                    self.reasons[index] = reason
            if (
                len(layer.parts) > 1
                and layer.site(self._model).is_layer
                and not layers.same_rows(map(self._model.get_submodule, layer.modules))
            ):
                self.reasons[index] = "blocks of a weight shared by layers of different kinds"
            if layer.site(self._model).num_matrices > 1 and self.reasons.get(index, NOT_LINEAR) == NOT_LINEAR:
                self._check_due |= index in self.reasons  # as the survey found; later batches get what remains
                self.reasons[index] = NOT_LINEAR
                self._stacks.add(index)

    @property
    def tried(self) -> dict[str, str]:
        """Names of the parts whose options were evaluated one by one, and why."""
        candidates = self._candidates
        return {
            candidates.parts[part].name: self.reasons[index]
            for index in sorted(self.reasons.keys() - self._stacks)
            for part in candidates.layers[index].parts
        }

    def batch_effects(self, batch: Any, generator: torch.Generator, reference: Tensor | None = None) -> Effects:
        """Compute the costs and effects of all options on a batch.

        Args:
            batch: a batch of the data.
            generator: generator for random probes.
            reference: outputs of the original, if the model is not the original.
        """
        loss, candidates = self._loss, self._candidates
        run = self._recorded(batch, generator, reference)
        point, num_samples = run.point, len(run.point)
        small = point[0].numel() <= MAX_PROBES
        effects = np.zeros((candidates.num_options, num_samples, len(run.probes)), dtype=np.float32)
        with torch.no_grad():
            self._add_linear(effects, batch, run, generator)
            self._add_stacks(effects, batch, run)
            risen = self._add_tried(effects, batch, run.probes, reference)
            if small:
                changes = torch.from_numpy(effects).to(point)
                if len(run.probes) < point[0].numel():
                    changes = torch.nn.functional.pad(changes, (0, 1))  # relative to the last class, see `_units`
                changes = changes.reshape(len(effects), *point.shape)
                cost = option_costs(loss, changes, point, batch, reference)
                cost[list(risen)] = list(risen.values())
                points = curvature_points(loss, changes, point, cost, candidates) if reference is None else [point]
                softened = softened_costs(loss, changes, point, batch, reference)
                return Effects(cost, exact_effects(loss, changes, points, batch), num_samples, softened)
        first_order = np.zeros(candidates.num_options)
        if loss.gradient(point, batch, reference) is not None:
            first_order = effects[:, :, -1].sum(axis=1, dtype=np.float64)
            effects = effects[:, :, :-1]
        cost = first_order + 0.5 * np.square(effects, dtype=np.float64).sum(axis=(1, 2))
        cost[list(risen)] = list(risen.values())
        return Effects(cost, [effects.reshape(candidates.num_options, -1)], num_samples)

    def _recorded(self, batch: Any, generator: torch.Generator, reference: Tensor | None) -> _Run:
        """Run the batch, compute all gradients, and note the layers for which they are not sufficient."""
        candidates, recorder = self._candidates, Recorder()
        linear = [layer for index, layer in enumerate(candidates.layers) if index not in self.reasons]
        weights = [layer.site(self._model).weight for layer in candidates.layers]
        for weight in weights:
            weight.requires_grad_(True)
        try:
            try:
                with (
                    torch.enable_grad(),
                    quick_norms(self._model),
                    recorder.recording(self._model, [p for layer in linear for p in layer.modules]),
                ):
                    output = forwards.run(self._model, batch, self._forward)
                run, elsewhere = self._differentiated(output, batch, recorder, weights, generator, reference)
            except RuntimeError as error:
                if forwards.is_out_of_memory(error):
                    raise
                with torch.no_grad():
                    output = forwards.run(self._model, batch, self._forward)  # raises if the model itself is at fault
                self._try_all(evidence.without_gradients(error))
                recorder = Recorder()
                run, elsewhere = self._differentiated(output, batch, recorder, weights, generator, reference)
        finally:
            for weight in weights:
                weight.requires_grad_(False)
        self._judge(run, elsewhere, recorder)
        return run

    def _differentiated(
        self,
        output: Tensor,
        batch: Any,
        recorder: Recorder,
        weights: list[nn.Parameter],
        generator: torch.Generator,
        reference: Tensor | None,
    ) -> tuple[_Run, list[bool]]:
        """Return the run and, by layer, whether a gradient reaches its weight other than by its calls."""
        point = output.detach()
        numbers = point[0].numel()
        if numbers <= MAX_PROBES:
            probes = _units(point, relative=self._loss.ignores_shifts(point))
        else:
            probes = list(self._loss.probes(point, batch, generator))
            if (slope := self._loss.gradient(point, batch, reference)) is not None:
                probes.append(slope)
        calls = [
            [call for call in recorder.of(layer.modules) if call.output.numel()] for layer in self._candidates.layers
        ]
        handles = [call.handle for layer_calls in calls for call in layer_calls if call.handle is not None]
        by_probe = [_gradients(output, probe, handles) for probe in probes]
        mix = torch.randn(len(probes), generator=generator).tolist()
        factors = evidence.sample_factors(len(point), generator).to(point)
        scaled = _mixed(mix, probes) * factors.reshape(-1, *[1] * (point.ndim - 1))
        by_sample = _gradients(output, scaled, [*handles, *weights])
        elsewhere = [grad is not None and bool(grad.to_dense().any()) for grad in by_sample[len(handles) :]]
        position = 0
        gradients, places = [], []
        for layer_calls in calls:
            per_call, layer_places = [], []
            for call in layer_calls:
                if call.handle is None:
                    call_grads = [torch.zeros_like(call.output)] * (len(probes) + 1)
                else:
                    call_grads = [_filled(grads[position], call.output) for grads in (*by_probe, by_sample)]
                    position += 1
                per_call.append(call_grads[:-1])
                base = _mixed(mix, call_grads[:-1])
                layer_places.append(evidence.place_of(call, base, call_grads[-1], factors))
            gradients.append(per_call)
            places.append(layer_places)
        return _Run(point, probes, calls, gradients, places), elsewhere

    def _judge(self, run: _Run, elsewhere: list[bool], recorder: Recorder) -> None:
        """Note the layers whose calls do not capture all effects of their weight."""
        for index, layer in enumerate(self._candidates.layers):
            if index in self.reasons:
                continue
            odd = [reason for path in layer.modules if (reason := recorder.odd.get(path))]
            if odd:
                self.reasons[index] = odd[0]
            elif elsewhere[index]:
                self.reasons[index] = "its weight is also used outside the layer's calls"
            elif None in run.places[index]:
                self.reasons[index] = "its output has numbers that several samples share"
            elif len(layer.parts) > 1 and not all(layers.is_plain(call.module) for call in run.calls[index]):
                self.reasons[index] = "blocks of a layer with a custom forward"

    def _add_linear(self, effects: NDArray[np.float32], batch: Any, run: _Run, generator: torch.Generator) -> None:
        """Add the effects of layers by their gradients, except those whose moves the outputs do not follow."""
        rounded = evidence.half(run.point) or any(
            evidence.half(call.output) for layer_calls in run.calls for call in layer_calls
        )
        moves = self._moves(batch, run, rounded=rounded)
        for index, layer in enumerate(self._candidates.layers):
            if index in self.reasons:
                continue
            move = moves.draw(index, layer.site(self._model).weight, generator)
            for call, gradients, place in zip(run.calls[index], run.gradients[index], run.places[index], strict=True):
                assert place is not None  # noqa: S101
                moves.predicted[index] += self._add_call(effects, layer, move, call, gradients, place)
        with widened(self._model) if rounded and not moves.rounded else contextlib.nullcontext():
            wrong = dict.fromkeys(moves.silent(), evidence.UNSEEN) if moves.silent_with_effect() else {}
            wrong |= dict.fromkeys(moves.misled(), evidence.MISLED)
        self.reasons |= wrong
        for index in wrong:
            for part in self._candidates.layers[index].parts:
                first = self._candidates.offsets[part]
                effects[first : first + len(self._candidates.transforms[part])] = 0.0

    def _moves(self, batch: Any, run: _Run, *, rounded: bool) -> Moves:
        """Return the moves to check; in float32 if a model of half precision runs so, as rounding hides small moves."""
        tolerance = evidence.tolerance(rounded=rounded)
        if rounded:
            with widened(self._model) as wide:
                given = as_float32(batch)
                try:
                    point = forwards.run(self._model, given, self._forward) if wide else None
                except Exception:  # any error of a model or forward that asks for half precision
                    point = None
            if point is not None and point.shape == run.point.shape and not evidence.half(point):
                again = partial(forwards.run, self._model, given, self._forward)
                return Moves(run=again, point=point, probes=run.probes, rounded=False, tolerance=tolerance)
        again = partial(forwards.run, self._model, batch, self._forward)
        return Moves(run=again, point=run.point, probes=run.probes, rounded=rounded, tolerance=tolerance)

    def _try_all(self, reason: str) -> None:
        for index in range(len(self._candidates.layers)):
            self.reasons.setdefault(index, reason)

    def _add_call(
        self,
        effects: NDArray[np.float32],
        layer: Layer,
        move: Tensor,
        call: Call,
        gradients: list[Tensor],
        place: Place,
    ) -> Tensor:
        """Add one call's share of every option of its layer; return ``(samples, probes)`` that of the move."""
        candidates, num_samples = self._candidates, effects.shape[1]
        starts = [(candidates.parts[part].rows or (0, 0))[0] for part in layer.parts]
        changing = candidates.changing(layer)
        of_move: Tensor | None = None
        for start in range(0, max(len(changing), 1), CHUNK):
            options = changing[start : start + CHUNK]
            rounding = [candidates.activations(layer, option) for option in options]
            changes: Iterator[Tensor] = map(partial(candidates.layer_change, layer), options)  # lazily: may be large
            if of_move is None:  # together with the first options, as every product stacks the gradients
                rounding, changes = [None, *rounding], itertools.chain([move], changes)
            plain = len(starts) == 1 and all(activations is None for activations in rounding)
            if plain and convolved.fits(call, gradients, len(rounding), place):
                products = convolved.shares_of_changes(call, gradients, list(changes), num_samples).cpu()
            else:
                responses = [response(call, *changed) for changed in zip(changes, rounding, strict=True)]
                products = shares(call, gradients, responses, place, num_samples, starts).cpu()
            if of_move is None:
                of_move, products = products[0].float().sum(0), products[1:]
            for option, by_part in zip(options, products.numpy(), strict=True):
                for part, share in zip(layer.parts, by_part, strict=True):
                    if option < len(candidates.transforms[part]):
                        effects[candidates.offsets[part] + option] += share
        assert of_move is not None  # noqa: S101
        return of_move

    def _add_stacks(self, effects: NDArray[np.float32], batch: Any, run: _Run) -> None:
        """Add the effects of matrices in stacks; those that gradients do not give are left to direct evaluation."""
        candidates = self._candidates
        parts = [part for index in sorted(self._stacks) for part in candidates.layers[index].parts]
        if not parts:
            return
        by_part, reason = effects_of_stacks(self._direct, parts, batch, run.point, run.probes, check=self._check_due)
        if by_part is None:
            self.reasons |= dict.fromkeys(self._stacks, reason)
            self._stacks.clear()
            return
        start = 0
        for part in parts:
            size, first = len(candidates.transforms[part]), candidates.offsets[part]
            effects[first : first + size] = by_part[start : start + size]
            start += size

    def _add_tried(
        self, effects: NDArray[np.float32], batch: Any, probes: list[Tensor], reference: Tensor | None
    ) -> dict[int, float]:
        """Set the results of direct evaluation; return flat option → loss increase of the batch."""
        tried = sorted(self.reasons.keys() - self._stacks)
        parts = [part for index in tried for part in self._candidates.layers[index].parts]
        risen: dict[int, float] = {}
        if not parts:
            return risen
        self._direct.record(batch)
        for part in parts:
            for flat, rises, change in self._direct.changes(part, batch, reference):
                risen[flat] = float(rises.sum())
                effects[flat] = (
                    torch.stack([_by_sample(probe * change).sum(1) for probe in probes], dim=1).cpu().numpy()
                )
        return risen


def _units(point: Tensor, *, relative: bool) -> list[Tensor]:
    """Return probes that give the numbers of each sample's output, or all but the last, relative to the last."""
    numbers = point[0].numel()
    units = torch.eye(numbers, dtype=point.dtype, device=point.device)
    if relative:
        units = units[:-1] - units[-1]
    return list(units.reshape(-1, 1, *point.shape[1:]).expand(-1, *point.shape))


def _gradients(output: Tensor, probe: Tensor, inputs: list[Tensor]) -> list[Tensor | None]:
    """Return the gradient of ``probe·output`` by every input; None where the output does not depend on it."""
    if not output.requires_grad or not inputs:
        return [None] * len(inputs)
    return list(torch.autograd.grad(output, inputs, grad_outputs=probe, retain_graph=True, allow_unused=True))


def _mixed(weights: list[float], values: list[Tensor]) -> Tensor:
    total = torch.zeros_like(values[0])
    for weight, value in zip(weights, values, strict=True):
        total.add_(value, alpha=weight)
    return total


def _filled(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


def _by_sample(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1)
