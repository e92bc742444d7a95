"""The section `teacher`: a GNN, a network on rows over hops, or predictions from elsewhere."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rbm_dist.config.fields import Fanout, Fraction, Positive, Rate, Section, Weight
from rbm_dist.config.training import TrainingConfig


class ExternalTeacherConfig(Section):
    """Predictions that a model elsewhere made for the nodes, in place of a teacher that is trained here."""

    paths: tuple[str, ...] = Field(
        min_length=1,
        description="files of predictions, [rows, classes] each: .npy, .npz, .pt, .parquet, plain numbers",
    )
    kind: Literal["logits", "probabilities", "log_probabilities"] = Field(description="what the numbers are")
    combine: Literal["mean", "best"] = Field(
        "mean",
        description="what several files say of a node; mean: of their probabilities; best: what the surest of them "
        "says, after each was calibrated on validation labels",
    )
    rows: Literal["nodes", "splits", "ids"] = Field(
        "nodes",
        description="whose the rows are; nodes: of the caller's nodes in their order; splits: of the training, then "
        "the validation, then the test nodes, each in their order; ids: see `ids`",
    )
    ids: str | None = Field(None, description=".npy file of the node id of each row, integers or text")
    id_column: str = Field("id", description="of Parquet files: the column of the node id of each row, for rows: ids")
    array: str | None = Field(None, description="its name in .npz and .pt files that hold several")
    dtype: Literal["float16", "float32", "float64"] | None = Field(
        None, description="of files of numbers without a header, row after row"
    )
    missing: Literal["refuse", "labels"] = Field(
        "refuse", description="nodes without a row; labels: training nodes learn from their labels, others not at all"
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.combine == "best" and len(self.paths) == 1:
            raise ValueError("teacher.external.combine: best is of several teacher.external.paths; remove it")
        parquet = all(path.endswith((".parquet", ".pq")) for path in self.paths)
        if self.ids is not None and self.rows != "ids":
            raise ValueError(f"teacher.external.ids: means nothing with rows: {self.rows}; set rows: ids")
        if self.rows == "ids" and self.ids is None and not parquet:
            raise ValueError(
                "teacher.external.rows: ids needs teacher.external.ids, or Parquet files with a column of them"
            )
        return self


MEAN = "sage"
"""The convolution that averages in-neighbours, which the store does in exact inference."""
GCN = "gcn"
"""The convolution that knows the in-degrees of all nodes it reads."""
TEACHERS = {"external": "external", "sgc": "SGC", "sign": "SIGN", "sagn": "SAGN"}
"""Teachers that have no convolutions, and what people call them."""
CONVS = {MEAN: "GraphSAGE", "sage_max": "GraphSAGE, max", GCN: "GCN", "gat": "GAT", "gatv2": "GATv2"}
"""Convolutions by name, and what people call them."""


class Arguments(BaseModel):
    """What a class of the user's is made with: any names, plain values."""

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[str, bool | int | float | str]


class TeacherConfig(TrainingConfig):
    """A GNN, one layer per entry of `fanout`; or `external`."""

    external: ExternalTeacherConfig | None = Field(
        None,
        description="predictions of a model elsewhere; nothing is trained, and other keys but calibrate mean nothing",
    )
    model: Literal["gnn", "sgc", "sign", "sagn"] = Field(
        "gnn",
        description="gnn: layers over sampled neighbourhoods; the others: features averaged over 0, 1, … `hops` hops, "
        "once, and a network on these rows, which samples nothing; sgc: a linear map of the last (Wu et al., 2019); "
        "sign: all side by side (Frasca et al., 2020); sagn: each node weighs them (Sun et al., 2021)",
    )
    hops: Positive = Field(3, description="of sgc, sign and sagn")
    conv: str = Field(
        MEAN,
        description="sage | sage_max | gcn | gat | gatv2, or module:Class of any layer that is made and called as "
        "PyG's are: Class(inputs, outputs, **arguments)((x_sources, x_destinations), edge_index)",
    )
    heads: Positive = Field(4, description="of gat and gatv2; divides hidden")
    arguments: Arguments = Field(Arguments(), description="further ones of module:Class, by name")
    residual: bool = Field(False, description="inner layers add their input, mapped where widths differ")
    jumping_knowledge: Literal["none", "max", "cat"] = Field(
        "none",
        description="max, cat: classes are told from the states after all layers, their largest or side by side, by a "
        "linear map (Xu et al., 2018); none: by the last layer",
    )
    hidden: Positive = 128
    sampler: Literal["numba", "pyg_lib", "torch_sparse"] = Field(
        "numba", description="the sampling kernel of all stages"
    )
    fanout: Fanout = (10, 10)
    norm: Literal["layer", "none"] = Field("none", description="between the layers, before ReLU")
    dropout: Fraction = 0.5
    lr: Rate = 0.01
    weight_decay: Weight | None = Field(None, description="default: 0.3 / training nodes, less the more labels speak")
    epochs: Positive = 100
    batch_size: Positive = Field(512, description="training nodes per optimiser step, over all workers")
    select: Literal["loss", "accuracy"] = Field("loss", description="what the kept epoch is best at, on validation")
    patience: Positive | None = Field(None, description="stop after so many epochs without a better one")
    calibrate: bool = Field(False, description="divide the logits by the temperature that fits validation best")

    @property
    def fits_temperatures(self) -> bool:
        """Whether predictions from elsewhere are calibrated: also where they compete in confidence."""
        return self.external is not None and (self.calibrate or self.external.combine == "best")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.conv not in CONVS and not all(self.conv.partition(":")):
            raise ValueError(f"teacher.conv: '{self.conv}' is none of {', '.join(CONVS)}, nor of the form module:Class")
        if self.conv in ("gat", "gatv2") and self.hidden % self.heads:
            raise ValueError(f"teacher.heads: {self.heads} does not divide teacher.hidden: {self.hidden}")
        if self.conv in CONVS and self.arguments.model_dump():
            raise ValueError(f"teacher.arguments: are for a module:Class as teacher.conv, not for {self.conv}")
        return self

    @property
    def reads_hops(self) -> bool:
        """Whether it is a network on features averaged over hops, if it is trained here."""
        return self.model != "gnn"

    @property
    def is_gnn(self) -> bool:
        """Whether it is trained here and has layers that read neighbourhoods."""
        return self.external is None and self.model == "gnn"
