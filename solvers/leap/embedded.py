"""The form of a problem for a quantum processor: a QUBO at the dual's prices, with a chain of qubits per variable."""

import functools
import math
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import dimod
import numpy as np
from dwave.cloud.coders import decode_qp_numpy, encode_problem_as_qp

from formulations import Problem
from solvers.bounds.duality import dual_bound
from solvers.leap.connection import Connection
from solvers.leap.device import Device
from solvers.leap.estimate import Estimate
from solvers.leap.forms import PRICES_S, BqmForm, Samples, bqm_samples

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from dwave.embedding import embed_bqm, unembed_sampleset
    from dwave.embedding.chain_strength import uniform_torque_compensation


class EmbeddedForm(BqmForm):
    """A QUBO on a processor. Its record has the encoding, the prices, and the chain of qubits of every variable."""

    problem_type = "ising"
    limits: ClassVar = {"qubits": "num_qubits"}

    @classmethod
    def first(
        cls, problem: Problem, remote: Any, options: Mapping[str, Any], seconds: float = math.inf
    ) -> "EmbeddedForm":
        """Encode with priced budgets, because slack bits would couple all variables; embed in at most ``seconds``."""
        end = time.perf_counter() + seconds
        form = cls.priced(problem, options, seconds)
        bqm = form.encoded.bqm
        chains = Device(remote.name, remote.properties).embed(bqm, Path(options["jobs"]), end - time.perf_counter())
        form.record["chains"] = [chains[v] for v in range(len(chains))]
        return form

    @classmethod
    def priced(cls, problem: Problem, options: Mapping[str, Any], seconds: float = math.inf) -> "EmbeddedForm":
        """Encode without chains, for which no processor is needed."""
        prices = dual_bound(problem, time_limit=min(seconds, PRICES_S)).prices
        return cls(problem, {"encoding": options["encoding"], "prices": prices})

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
        """Chain strength derived from the couplings (uniform torque compensation)."""
        return float(uniform_torque_compensation(self.source, self.chains))

    def on_device(self, properties: Mapping[str, Any]) -> dimod.BinaryQuadraticModel:
        """Return the model on the qubits of a processor with these properties."""
        adjacency: dict[int, set[int]] = {qubit: set() for qubit in properties["qubits"]}
        for u, v in properties["couplers"]:
            adjacency[u].add(v)
            adjacency[v].add(u)
        return embed_bqm(self.source, self.chains, adjacency, chain_strength=self.chain_strength)

    def data(self, remote: Any) -> dict[str, Any]:
        """Return the model as the data of a submission."""
        linear, quadratic, _ = self.on_device(remote.properties).to_ising()
        return dict(encode_problem_as_qp(remote, linear, quadratic))

    def sizes(self) -> dict[str, int]:
        """Return the number of qubits in use."""
        return {"qubits": sum(len(chain) for chain in self.chains.values())}

    def min_time_s(self, properties: Mapping[str, Any]) -> float:  # noqa: ARG002
        """Return 0: a processor has no minimum time."""
        return 0.0

    def decode(self, answer: Any, connection: Connection) -> Samples:  # noqa: ARG002
        """Decode chains by majority vote, then the bits as for any QUBO."""
        decoded = decode_qp_numpy({"type": "ising", "answer": answer.model_dump(mode="json")}, return_matrix=True)
        active = decoded["active_variables"]
        sampled = dimod.SampleSet.from_samples(
            (decoded["solutions"][:, active], active),
            energy=decoded["energies"],
            num_occurrences=decoded["num_occurrences"],
            vartype=dimod.SPIN,
        )
        return self.unembedded(sampled, {name: float(value) for name, value in answer.timing.items()})

    def unembedded(self, sampled: dimod.SampleSet, timing_us: Mapping[str, float]) -> Samples:
        """Decode samples of qubits to choices, one per read, with statistics of broken chains."""
        samples = unembed_sampleset(sampled, self.chains, self.source, chain_break_fraction=True)
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


def access_time(
    qubits: int, remote: Any, parameters: Mapping[str, Any], time_limit: float | None, *, calls: int = 1
) -> Estimate:
    """Estimate ``calls`` runs on the processor ``remote``, which are charged by the time on the processor.

    Args:
        qubits: number of qubits in use.
        remote: a solver with ``name``, ``properties`` and ``estimate_qpu_access_time``, as in ``dwave.cloud``.
        parameters: result of `QuantumProcessor.parameters`.
        time_limit: maximum time of one run in seconds, or None.
        calls: number of runs.
    """
    seconds = 1e-6 * float(remote.estimate_qpu_access_time(num_qubits=qubits, **parameters))
    least, most = remote.properties.get("num_reads_range", (1, parameters["num_reads"]))
    why = []
    if not least <= parameters["num_reads"] <= most:
        why.append(f"num_reads={parameters['num_reads']}, it takes {least} to {most}")
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
