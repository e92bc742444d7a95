"""What `model.json` of an exported student says: a versioned format, checked when it is read.

Everything that stands between a user's row and the network is in it or, as arrays, in `model.safetensors` beside it.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rbm_dist import storage
from rbm_dist.errors import InputError

FORMAT, VERSION = "rbm-dist student", 1
JSON, WEIGHTS, ONNX, CARD = "model.json", "model.safetensors", "model.onnx", "README.md"
FILES = (WEIGHTS, ONNX, CARD, JSON)
"""The files of an exported student, in the order in which they are written."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Column(_Part):
    """A column of a user's table that gives features, and how; as `sources.node_columns.Feature`."""

    name: str
    how: Literal["number", "text", "bool", "list", "one_hot", "hashed"]
    type: str = Field(description="what it was in the table that was learned from, for people")
    width: int = Field(gt=0, description="features that it gives")
    values: tuple[str, ...] = Field((), description="of one_hot: what each of the features stands for")


class Features(_Part):
    """How a user's row becomes the numbers that are scaled."""

    columns: tuple[Column, ...] = Field(min_length=1)
    named: bool = Field(description="whether the columns are the user's; else all of it is one list, `feat`")
    missing: bool = Field(description="whether NaN is a missing value; else it is refused")
    na_values: tuple[str, ...] = ()
    thousands: str | None = None
    decimal: str = "."
    rows: Literal["", "sum", "length"] = Field(description="how a row is scaled once its columns are")

    @property
    def width(self) -> int:
        """Features before `missing_indicator` adds its own."""
        return sum(column.width for column in self.columns)


class NodeId(_Part):
    """The caller's ids in the table that was learned from."""

    column: str | None = Field(description="null: ids are row numbers")
    kind: Literal["integer", "unsigned", "text", "bytes"]
    arrow: str
    read_as: Literal["auto", "integer", "text"] = "auto"


class NetworkFacts(_Part):
    """What to build: the arguments of `serve.artifact.empty_student`."""

    kind: Literal["mlp", "ensemble", "moe", "rbm"]
    inputs: tuple[str, ...]
    num_features: int
    hidden: int
    num_classes: int
    num_layers: int
    norm: str
    num_experts: int
    top_k: int
    routing: str
    routing_temperature: float
    input_attention: bool
    ensemble_size: int


class ModelFile(_Part):
    """All of `model.json`."""

    format: Literal["rbm-dist student"] = "rbm-dist student"
    version: Literal[1] = 1
    name: str = Field(description="of the student in its run, such as rbm")
    rbm_dist: str = Field(description="the version that wrote it")
    network: NetworkFacts
    class_names: tuple[str, ...] | None = Field(description="null: classes are numbers")
    inputs: dict[str, int] = Field(description="what the network is given, `feat` as the user has it: widths")
    features: Features
    id: NodeId
    made_from: dict[str, Any] = Field(description="the run, its graph, and what of it was measured")
    compressed: dict[str, Any] | None = Field(None, description="how, and what it cost on validation")
    files: dict[str, storage.FileInfo] = Field({}, description="size and checksum of the files beside it")

    @property
    def num_classes(self) -> int:
        return self.network.num_classes


def read(url: str) -> ModelFile:
    """Read `model.json` below a folder. Raises `InputError` if it is not there, damaged, or of another version."""
    path = storage.join(url, JSON)
    found = storage.read_json(path)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise InputError(f"{path}: is not that of an exported student; make one: rbm-dist export RUN --out FOLDER")
    if found.get("version") != VERSION:
        raise InputError(
            f"{path}: of version {found.get('version')}, this rbm-dist reads {VERSION}; export the student again"
        )
    try:
        return ModelFile.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; the file was changed, or written by another "
            "version"
        ) from None
