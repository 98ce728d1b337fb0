"""The graph of a quantum processor, and minor embeddings of models on it.

A variable becomes a chain of qubits. An embedding is found with a fixed seed and stored in a file named by the
couplings of the model and the processor. A sweep over budgets, whose models differ only in their numbers, therefore
always uses the same qubits.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import networkx as nx
from minorminer import busclique, find_embedding

from formulations.files import read_json, write_json
from solvers.errors import UnsupportedProblemError

Embedding = dict[int, list[int]]
"""Map from each variable to its chain of qubits."""

SEARCH_S = 60.0
"""Maximum time in seconds for the embedding of one model."""

DENSE = 0.5
"""Fraction of coupled pairs above which a model is embedded as if all pairs were coupled, which needs no search."""

NEARLY_COMPLETE, HOPELESS = 0.9, 1.5
"""No embedding is searched for if at least this fraction of the pairs is coupled and the model has more than this many
times the variables of the largest clique; a search rarely fits many more."""

WITHOUT_CHAINS = "clique"
"""An artificial topology in which all qubits are connected."""


class Device:
    """The working graph of a processor with the given solver properties."""

    def __init__(self, name: str, properties: Mapping[str, Any]) -> None:
        self.name, self.topology = name, properties["topology"]
        self.qubits = [int(qubit) for qubit in properties["qubits"]]
        self.couplers = [(int(u), int(v)) for u, v in properties["couplers"]]

    def graph(self) -> Any:
        """The graph as a networkx graph, with the coordinates of its topology if it has one."""
        if self.topology["type"] == WITHOUT_CHAINS:
            graph = nx.Graph(self.couplers)
            graph.add_nodes_from(self.qubits)
            return graph
        with warnings.catch_warnings():  # the graph library warns about deprecated parts
            warnings.simplefilter("ignore", DeprecationWarning)
            import dwave.graphs

        make = getattr(dwave.graphs, f"{self.topology['type']}_graph")
        return make(*self.topology["shape"], node_list=self.qubits, edge_list=self.couplers)

    def largest_clique(self) -> int:
        """Return the largest number of fully coupled variables that fit."""
        if self.topology["type"] == WITHOUT_CHAINS:
            return len(self.qubits)
        return len(busclique.busgraph_cache(self.graph()).largest_clique())

    def embed(self, bqm: Any, folder: Path, seconds: float = SEARCH_S) -> Embedding:
        """Return an embedding of ``bqm`` on the processor, which is stored in ``folder`` for later calls.

        A search that needs more than ``seconds`` is given up.

        Raises:
            UnsupportedProblemError: no embedding was found; the message says how large a model fits.
        """
        variables = list(range(bqm.num_variables))
        pairs = sorted((min(u, v), max(u, v)) for u, v in bqm.quadratic)
        text = json.dumps([len(variables), pairs, self.name, self.qubits, self.couplers])
        kept = folder / f"embedding-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
        if kept.exists():
            return {int(v): chain for v, chain in read_json(kept, "embedding").items()}
        embedding = self._found(variables, pairs, min(seconds, SEARCH_S))
        if not embedding:
            raise UnsupportedProblemError(
                f"no room was found on {self.name!r} for a model of {len(variables)} variables and {len(pairs)} "
                f"couplings: it has room for at most {self.largest_clique()} fully coupled variables; use fewer groups "
                "or options, more time, or solver 'qpu-decomposed', which sends parts"
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_json(kept, embedding)
        return embedding

    def _found(self, variables: list[int], pairs: list[tuple[int, int]], seconds: float) -> Embedding:
        if len(variables) > len(self.qubits):
            return {}
        graph = self.graph()
        density = 2 * len(pairs) / max(1, len(variables) * (len(variables) - 1))
        embedding: Any = {}
        if density > DENSE and self.topology["type"] != WITHOUT_CHAINS:
            # without its cache of cliques, minorminer runs out of memory on a Zephyr graph
            embedding = busclique.find_clique_embedding(variables, graph, use_cache=True)
        hopeless = density >= NEARLY_COMPLETE and len(variables) > HOPELESS * self.largest_clique()
        if not embedding and not hopeless:
            source = nx.Graph(pairs)
            source.add_nodes_from(variables)
            embedding = find_embedding(source, graph, random_seed=1, timeout=seconds)
        return {int(v): [int(qubit) for qubit in chain] for v, chain in embedding.items()}
