"""What a task of `rbm-dist predict` is given: a file of new nodes, or a part of a run's graph, and how it is predicted.

Jobs travel to other processes; what they open (a student, a graph) is opened once in each.
"""

from collections.abc import Generator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import pyarrow as pa

from rbm_dist import storage
from rbm_dist.errors import InputError
from rbm_dist.serve.loaded import LoadedStudent, load
from rbm_dist.serve.prediction_files import Predictions
from rbm_dist.serve.tables import NodeTable, predictions
from rbm_dist.serve.unseen import Encoder, NewEdges, encodings_of, open_known

if TYPE_CHECKING:
    from rbm_dist.graph.store import GraphStore
    from rbm_dist.serve.network import Network, Networks

Chunks: TypeAlias = Generator[Predictions, None, None]


class Job(Protocol):
    """One file or part, as a task is given it."""

    @property
    def stamp(self) -> list[Any]:
        """What tells it from one that was there before."""
        ...

    @property
    def rows(self) -> int:
        """About, where it is not known before it is read."""
        ...

    def chunks(self, first_row: int = 0) -> Chunks:
        """Its predictions, in order. first_row: the number of its first row, where ids are row numbers."""
        ...

    def id_type(self) -> pa.DataType:
        """The type of ids in its predictions."""
        ...

    def student(self) -> LoadedStudent:
        """Whose predictions they are."""
        ...


@dataclass(frozen=True)
class TableJob:
    """A file of new nodes."""

    model: str
    kind: str
    digest: str
    table: NodeTable
    run: str | None = None  # whose graph edges lead to
    edges: NewEdges | None = None

    @property
    def stamp(self) -> list[Any]:
        return list(self.table.stamp)

    @property
    def rows(self) -> int:
        return self.table.rows

    def id_type(self) -> pa.DataType:
        return self.table.written_id

    def student(self) -> LoadedStudent:
        return _student(self.model, self.kind, self.digest)

    def chunks(self, first_row: int = 0) -> Chunks:
        student = self.student()
        encode = None
        if self.run is not None and self.edges is not None:
            encode = Encoder(
                known_graph(self.run, self.model, self.kind, self.digest), self.edges, encodings_of(student.model)
            )
        return predictions(student, self.table, encode, first_row)


@dataclass(frozen=True)
class PartJob:
    """A part of a run's graph."""

    run: str
    kind: str
    digest: str
    part: int
    rows: int
    stamp: list[Any]

    def id_type(self) -> pa.DataType:
        from rbm_dist.serve.predictor import id_type

        return id_type(opened_graph(self.run, self.kind)[2])

    def student(self) -> LoadedStudent:
        return _student(self.run, self.kind, self.digest)

    def chunks(self, first_row: int = 0) -> Chunks:
        from rbm_dist.serve.predictor import predict

        return predict(*opened_graph(self.run, self.kind), [self.part])


@lru_cache(1)
def _student(model: str, kind: str, digest: str) -> LoadedStudent:
    found = load(model, kind)
    if found.digest != digest:
        raise InputError(f"{model}: the student was changed while it was at work; start again")
    return found


@lru_cache(1)
def known_graph(run: str, model: str, kind: str, digest: str) -> "GraphStore":
    """The graph that edges of new nodes lead to."""
    return open_known(run, _student(model, kind, digest).model)


@lru_cache(1)
def opened_graph(run: str, kind: str) -> tuple["Network | Networks", tuple[str, ...], "GraphStore"]:
    """The network of a run's student, its inputs, and the graph."""
    from rbm_dist.graph.store import GraphStore
    from rbm_dist.serve.from_run import read_run
    from rbm_dist.serve.network import network_of

    model, tensors = read_run(run, kind)
    network = network_of(model.network.model_dump(), tensors, few=1)
    return network, model.network.inputs, GraphStore.open(storage.join(run, "graph"))
