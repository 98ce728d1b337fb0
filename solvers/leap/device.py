"""The graph of a quantum processor, and minor embeddings of models on it.

A variable becomes a chain of qubits. An embedding is found with a fixed seed and stored in a file named by the
couplings of the model and the processor. A sweep over budgets, whose models differ only in their numbers, therefore
always uses the same qubits.
"""

import functools
import hashlib
import json
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import networkx as nx
from minorminer import busclique, find_embedding
from minorminer.utils.diagnostic import verify_embedding
from minorminer.utils.exceptions import EmbeddingError

from formulations import FileFormatError
from formulations.files import read_json, write_json
from solvers.errors import InvalidOptionError, UnsupportedProblemError
from solvers.leap.processor_options import Embedding, embedding_of

SEARCH_S = 60.0
"""Maximum time in seconds for the embedding of one model."""

DENSE = 0.5
"""Fraction of coupled pairs above which a model is embedded as if all pairs were coupled, which needs no search."""

NEARLY_COMPLETE, HOPELESS = 0.9, 1.5
"""No embedding is searched for if at least this fraction of the pairs is coupled and the model has more than this many
times the variables of the largest clique; a search rarely fits many more."""

WITHOUT_CHAINS = "clique"
"""An artificial topology in which all qubits are connected."""


class NoRoomError(UnsupportedProblemError):
    """No embedding of the model on the processor was found."""


class NoTimeToEmbedError(UnsupportedProblemError):
    """The time limit ended the search for an embedding."""


class Device:
    """The working graph of a processor with the given solver properties."""

    def __init__(self, name: str, properties: Mapping[str, Any]) -> None:
        self.name, self.topology = name, properties["topology"]
        self.qubits = [int(qubit) for qubit in properties["qubits"]]
        self.couplers = [(int(u), int(v)) for u, v in properties["couplers"]]

    def graph(self) -> Any:
        """Return the graph as a networkx graph, with the coordinates of its topology if it has one."""
        if self.topology["type"] == WITHOUT_CHAINS:
            graph = nx.Graph(self.couplers)
            graph.add_nodes_from(self.qubits)
            return graph
        with warnings.catch_warnings():  # the graph library warns about deprecated parts
            warnings.simplefilter("ignore", DeprecationWarning)
            import dwave.graphs

        make = getattr(dwave.graphs, f"{self.topology['type']}_graph")
        return make(*self.topology["shape"], node_list=self.qubits, edge_list=self.couplers)

    @functools.cached_property
    def _cliques(self) -> Any:
        """Embeddings of complete graphs, from minorminer's cache on disk if it can be used."""
        graph = self.graph()
        try:
            cliques = busclique.busgraph_cache(graph)
            cliques.largest_clique()
        except Exception:  # the folder cannot be written, or a file in it is damaged (pickle raises any error)
            cliques = _Uncached(graph)
        return cliques

    def largest_clique(self) -> int:
        """Return the largest number of fully coupled variables that fit."""
        if self.topology["type"] == WITHOUT_CHAINS:
            return len(self.qubits)
        return len(self._cliques.largest_clique())

    def embed(self, bqm: Any, folder: Path, seconds: float = SEARCH_S) -> Embedding:
        """Return an embedding of ``bqm`` on the processor, which is stored in ``folder`` for later calls.

        A search that needs more than ``seconds`` is given up; models of up to `largest_clique` variables fit all the
        same.

        Raises:
            NoTimeToEmbedError: ``seconds`` were too short.
            NoRoomError: no embedding was found; the message says how large a model fits.
        """
        model = _graph(bqm)
        pairs = sorted((min(u, v), max(u, v)) for u, v in model.edges)
        text = json.dumps([len(model), pairs, self.name, self.qubits, self.couplers])
        kept = folder / f"embedding-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
        if stored := self._stored(kept, model):
            return stored
        embedding = self._found(model, min(max(seconds, 0.0), SEARCH_S))
        if not embedding:
            raise NoRoomError(
                f"no room was found on {self.name!r} for {_size(model)}: it has room for at most "
                f"{self.largest_clique()} fully coupled variables; use fewer groups or options, or solver "
                "'qpu-decomposed', which sends parts"
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_json(kept, embedding)
        return embedding

    def placed(self, chains: Embedding, bqm: Any = None) -> Embedding:
        """Return those of the given ``chains`` that belong to the variables of ``bqm``.

        Without ``bqm``, all variables of the chains are taken to be coupled with each other.

        Raises:
            InvalidOptionError: a chain is missing, overlaps another one or is not connected on this processor, or a
                coupling has no coupler.
        """
        model = nx.complete_graph(len(chains)) if bqm is None else _graph(bqm)
        if why := self._fault(chains, model):
            raise InvalidOptionError(f"option 'embedding' does not fit {_size(model)} on {self.name!r}: {why}")
        return {v: chains[v] for v in model}

    def _stored(self, kept: Path, model: Any) -> Embedding | None:
        """Return a stored embedding, or None if there is none, or a damaged one."""
        if not kept.exists():
            return None
        try:
            chains = embedding_of(read_json(kept, "embedding"))
        except (FileFormatError, InvalidOptionError):
            return None
        return None if self._fault(chains, model) else chains

    def _fault(self, chains: Embedding, model: Any) -> str:
        """Say why chains are not an embedding of a model on this processor; an empty string if they are."""
        if missing := [v for v in model if v not in chains]:
            return f"there is no chain for variable {missing[0]} (variables are numbered from 0)"
        graph = nx.Graph(self.couplers)
        graph.add_nodes_from(self.qubits)
        try:
            verify_embedding({v: chains[v] for v in model}, model, graph)
        except EmbeddingError as error:
            return str(error)
        return ""

    def _found(self, model: Any, seconds: float) -> Embedding:
        if len(model) > len(self.qubits):
            return {}
        density = nx.density(model)
        embedding: Any = self._as_clique(model) if density > DENSE else {}
        hopeless = density >= NEARLY_COMPLETE and len(model) > HOPELESS * self.largest_clique()
        if not embedding and not hopeless:
            begun = time.perf_counter()
            embedding = find_embedding(model, self.graph(), random_seed=1, timeout=seconds)
            spent = time.perf_counter() - begun
            embedding = embedding or self._as_clique(model)
            if not embedding and spent >= seconds < SEARCH_S:
                raise NoTimeToEmbedError(
                    f"the time limit left {seconds:.2g} s to embed {_size(model)} on {self.name!r}, which was too "
                    "short; use a longer one"
                )
        return {int(v): [int(qubit) for qubit in chain] for v, chain in embedding.items()}

    def _as_clique(self, model: Any) -> Any:
        """Return an embedding as if all variables were coupled, which needs no search; empty if it does not fit."""
        return {} if self.topology["type"] == WITHOUT_CHAINS else self._cliques.find_clique_embedding(sorted(model))


class _Uncached(busclique.busgraph_cache):  # type: ignore[misc]
    """Embeddings of complete graphs, computed without files."""

    def _fetch_cache(self, dirname: str, compute: Callable[[], Any], force_write: bool = False) -> Any:  # noqa: ARG002
        return compute()


def _graph(bqm: Any) -> Any:
    """Return the couplings of a model as a graph of its variables."""
    graph = nx.Graph(sorted((min(u, v), max(u, v)) for u, v in bqm.quadratic))
    graph.add_nodes_from(range(bqm.num_variables))
    return graph


def _size(model: Any) -> str:
    return f"a model of {len(model)} variables and {model.number_of_edges()} couplings"
