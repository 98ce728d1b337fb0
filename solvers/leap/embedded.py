"""The form of a problem for a quantum processor: a QUBO at the dual's prices, with a chain of qubits per variable.

A gauge (spin-reversal transform) flips the signs of some variables of the model, whole chains at a time, so that chains
stay ferromagnetic. This changes no energy, but averages out errors of the processor that prefer a sign.
"""

import collections
import functools
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import dimod
import numpy as np
from dwave.cloud.coders import decode_qp_numpy, encode_problem_as_qp
from numpy.typing import NDArray

from formulations import Problem
from solvers.bounds.duality import dual_bound
from solvers.leap.connection import Connection
from solvers.leap.device import Device
from solvers.leap.estimate import Estimate
from solvers.leap.forms import PRICES_S, BqmForm, Samples, bqm_samples
from solvers.leap.processor_options import refusals

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from dwave.embedding import embed_bqm, unembed_sampleset
    from dwave.embedding.chain_strength import uniform_torque_compensation


class EmbeddedForm(BqmForm):
    """A QUBO on a processor.

    Its record has the encoding, the prices, the chain of qubits of every variable, and the factor of their strength.
    """

    problem_type = "ising"
    limits: ClassVar = {"qubits": "num_qubits"}

    @classmethod
    def first(
        cls, problem: Problem, remote: Any, options: Mapping[str, Any], seconds: float = math.inf
    ) -> "EmbeddedForm":
        """Encode with priced budgets, because slack bits would couple all variables; embed in at most ``seconds``."""
        end = time.perf_counter() + seconds
        form = cls.priced(problem, options, seconds)
        form.embed(Device(remote.name, remote.properties), options, end - time.perf_counter())
        form.record["strength"] = options.get("chain_strength", 1.0)
        return form

    def embed(self, device: Device, options: Mapping[str, Any], seconds: float) -> None:
        """Record the chains of the given embedding, or of one that is found in at most ``seconds``."""
        bqm = self.encoded.bqm
        with self.phase("embed_s"):
            if (own := options.get("embedding")) is not None:
                chains = device.placed(own, bqm)
            else:
                chains = device.embed(bqm, Path(options["jobs"]), seconds)
        self.record["chains"] = [chains[v] for v in range(len(chains))]

    @classmethod
    def priced(cls, problem: Problem, options: Mapping[str, Any], seconds: float = math.inf) -> "EmbeddedForm":
        """Encode without chains, for which no processor is needed."""
        form = cls(problem, {"encoding": options["encoding"]})
        with form.phase("tune_s"):
            form.record["prices"] = dual_bound(problem, time_limit=min(seconds, PRICES_S)).prices
        return form

    @functools.cached_property
    def source(self) -> dimod.BinaryQuadraticModel:
        """The model in spins."""
        return self.encoded.bqm.change_vartype(dimod.SPIN, inplace=False)

    @functools.cached_property
    def chains(self) -> dict[int, list[int]]:
        """Map from each variable to its qubits."""
        return dict(enumerate(self.record["chains"]))

    @functools.cached_property
    def chain_strength(self) -> float:
        """Chain strength derived from the couplings (uniform torque compensation), times the record's factor."""
        return float(self.record.get("strength", 1.0) * uniform_torque_compensation(self.source, self.chains))

    def signs(self, gauge: int) -> NDArray[np.int8]:
        """Return the sign of each variable in a gauge, ``(variables,)``; the first gauge flips none."""
        signs = np.random.default_rng(gauge).choice(np.array([-1, 1], dtype=np.int8), size=len(self.chains))
        return signs if gauge else np.ones_like(signs)

    def on_device(self, properties: Mapping[str, Any], gauge: int = 0) -> dimod.BinaryQuadraticModel:
        """Return the model in a gauge on the qubits of a processor with these properties."""
        adjacency: dict[int, set[int]] = {qubit: set() for qubit in properties["qubits"]}
        for u, v in properties["couplers"]:
            adjacency[u].add(v)
            adjacency[v].add(u)
        source = self.source.copy()
        for v in np.flatnonzero(self.signs(gauge) < 0).tolist():
            source.flip_variable(v)
        return embed_bqm(source, self.chains, adjacency, chain_strength=self.chain_strength)

    def data(self, remote: Any, gauge: int = 0) -> dict[str, Any]:
        """Return the model in a gauge as the data of a submission."""
        linear, quadratic, _ = self.on_device(remote.properties, gauge).to_ising()
        return dict(encode_problem_as_qp(remote, linear, quadratic))

    def sizes(self) -> dict[str, int]:
        """Return the number of qubits in use."""
        return {"qubits": sum(len(chain) for chain in self.chains.values())}

    def min_time_s(self, properties: Mapping[str, Any]) -> float:  # noqa: ARG002
        """Return 0: a processor has no minimum time."""
        return 0.0

    def decode(self, answers: Sequence[Any], connection: Connection) -> Samples:  # noqa: ARG002
        """Decode chains by majority vote, then the bits as for any QUBO; one answer per gauge, whose times add up."""
        sampled, timing_us = [], collections.Counter[str]()
        for answer in answers:
            decoded = decode_qp_numpy({"type": "ising", "answer": answer.model_dump(mode="json")}, return_matrix=True)
            active = decoded["active_variables"]
            read = dimod.SampleSet.from_samples(
                (decoded["solutions"][:, active], active),
                energy=decoded["energies"],
                num_occurrences=decoded["num_occurrences"],
                vartype=dimod.SPIN,
            )
            sampled.append(read)
            timing_us.update({name: float(value) for name, value in answer.timing.items()})
        return self.unembedded(sampled, timing_us)

    def unembedded(self, sampled: Sequence[dimod.SampleSet], timing_us: Mapping[str, float]) -> Samples:
        """Decode samples of qubits (one set per gauge) to choices, one per read, with statistics of broken chains."""
        plain = []
        for gauge, read in enumerate(sampled):
            sign = {qubit: sign for v, sign in enumerate(self.signs(gauge)) for qubit in self.chains[v]}
            undone = read.record.sample * np.array([sign[qubit] for qubit in read.variables], dtype=np.int8)
            plain.append(dimod.SampleSet.from_samples((undone, read.variables), read.vartype, **_vectors(read)))
        samples = unembed_sampleset(dimod.concatenate(plain), self.chains, self.source, chain_break_fraction=True)
        reads = np.repeat(np.arange(len(samples.record)), samples.record.num_occurrences)
        samples = dimod.SampleSet(samples.record[reads], samples.variables, {}, samples.vartype)
        samples.record.num_occurrences[:] = 1
        samples.change_vartype(dimod.BINARY)
        lengths = [len(chain) for chain in self.chains.values()]
        return bqm_samples(
            self.encoded,
            samples,
            timing_us,
            chain_strength=self.chain_strength,
            chain_breaks=float(samples.record.chain_break_fraction.mean()),
            longest_chain=max(lengths),
            qubits=sum(lengths),
            variables=len(lengths),
        )


def _vectors(sampled: dimod.SampleSet) -> dict[str, Any]:
    return {"energy": sampled.record.energy, "num_occurrences": sampled.record.num_occurrences}


def access_time(
    qubits: int, remote: Any, submissions: Sequence[Mapping[str, Any]], time_limit: float | None, *, calls: int = 1
) -> Estimate:
    """Estimate ``calls`` runs on the processor ``remote``, which are charged by the time on the processor.

    Args:
        qubits: number of qubits in use.
        remote: a solver with ``name``, ``properties`` and ``estimate_qpu_access_time``, as in ``dwave.cloud``.
        submissions: result of `QuantumProcessor.submissions`; all of them are one run.
        time_limit: maximum time of one run in seconds, or None.
        calls: number of runs.
    """
    seconds = 1e-6 * sum(float(remote.estimate_qpu_access_time(num_qubits=qubits, **each)) for each in submissions)
    why = refusals(submissions, remote.properties)
    if time_limit is not None and seconds > time_limit:
        why.append(f"it would run for {seconds:.3g} s, the time limit is {time_limit:g} s; use fewer reads")
    rate = remote.properties.get("quota_conversion_rate")
    return Estimate(
        remote=remote.name,
        problem_type=EmbeddedForm.problem_type,
        sizes={"qubits": (qubits, remote.properties.get(EmbeddedForm.limits["qubits"]))},
        min_time_s=seconds,
        max_time_s=None,
        time_limit_s=seconds,
        charge_s=calls * seconds,
        quota_s=calls * seconds / rate if rate else None,
        refusal=f"solver {remote.name!r} cannot solve this problem: " + "; ".join(why) if why else "",
    )
