"""The configuration of sources: where a graph comes from, a model for each kind."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from rbm_dist.config.fields import NUMBER, Count, Fraction, Positive, Rate, Section, Share, Weight

_DELIMITERS = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "pipe": "|", "space": " "}


def _delimiter(value: str) -> str:
    value = _DELIMITERS.get(value, value)
    if len(value) != 1:
        raise ValueError(f"one character or one of {', '.join(_DELIMITERS)}, found {value!r}")
    return value


Normalize = Literal["auto", "row", "column", "none"]
Column = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)]
"""The name of a column; without a header that is a number."""
Word = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) in (int, float) else value)]
"""A word of a table, also where YAML reads it as a number."""
Delimiter = Annotated[str, AfterValidator(_delimiter)]


class SourceSection(Section):
    """What every source has: how nodes are split when the input has no split, and how features are scaled."""

    train_per_class: Positive = 20
    val_per_class: Positive = 30
    normalize: Normalize = Field(
        "auto",
        description="auto: whatever the unit, see docs/sources.md; column: each has mean 0 and deviation 1 over the "
        "nodes that training sees; row: each node's features sum to 1 in magnitude",
    )
    missing: Literal["refuse", "mean", "zero"] = Field(
        "refuse", description="what a missing feature becomes: mean: that of its column, over nodes that training sees"
    )
    missing_indicator: bool = Field(
        False, description="a further feature for each column with missing values: 1 where it was missing"
    )
    unseen_share: Fraction = Field(
        0.0, description="inductive setting: share of the test nodes that training never sees, nor their edges"
    )

    @property
    def symmetric(self) -> bool:
        """Whether the reverse of every edge is an edge too, as long as no node is unseen."""
        return True


class GivenEdges(SourceSection):
    """A source whose edges are the caller's, in one direction or in both."""

    undirected: bool = Field(True, description="add the reverse of every edge")

    @property
    def symmetric(self) -> bool:
        return self.undirected


class DigitsConfig(SourceSection):
    """scikit-learn's 1,797 digit images as a graph of nearest neighbours; needs no file."""

    kind: Literal["digits"] = "digits"
    neighbors: Positive = Field(10, description="nearest neighbours that each image is linked to")


class NpzConfig(GivenEdges):
    """A sparse `.npz` graph: `adj_*` and `attr_*` in CSR, `labels`, and masks where a public split exists."""

    kind: Literal["npz"] = "npz"
    path: str = Field(description="the file; any fsspec URL")
    num_classes: Positive | None = Field(None, description="default: highest label + 1; every class must then occur")
    largest_component: bool = Field(False, description="keep only the largest connected component")


class RegionsConfig(SourceSection):
    """A synthetic graph: feature space falls into regions, each with its own linear rule from features to class."""

    kind: Literal["regions"] = "regions"
    num_nodes: Positive = 200_000
    num_features: Positive = 32
    num_classes: Positive = 8
    num_regions: Positive = Field(16, description="clusters of the feature space, each with a rule of its own")
    degree: Positive = Field(10, description="mean number of neighbours")
    homophily: Share = Field(0.8, description="share of the edges that join nodes of one class and region")
    noise: Weight = Field(0.3, le=100, description="standard deviation of the noise on a feature; the residual's is 1")


class SyntheticConfig(SourceSection):
    """A synthetic graph of any size, made piece by piece: planted communities and degrees that follow a power law."""

    kind: Literal["synthetic"] = "synthetic"
    num_nodes: Positive = 1_000_000
    num_features: Positive = 100
    num_classes: Annotated[int, Field(ge=2), NUMBER] = 47
    num_communities: Annotated[int, Field(ge=2), NUMBER] = Field(
        188, description="groups of linked nodes, uneven in size; each belongs to one class"
    )
    degree: Rate = Field(25.0, description="mean number of neighbours, before duplicates are dropped")
    power: Annotated[float, Field(gt=2, le=10), NUMBER] = Field(2.5, description="exponent of the degrees' power law")
    homophily: Share = Field(0.7, description="share of the edges that lie within a community")
    noise: Weight = Field(0.5, description="standard deviation of a feature's noise; a community's centre has norm 1")
    label_noise: Fraction = Field(0.0, description="share of the nodes whose label is that of another class")
    train_share: Share = Field(0.08, description="of all nodes; those in no split have no label")
    val_share: Share = 0.02
    test_share: Share = 0.9

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.num_communities < self.num_classes:
            raise ValueError(
                f"source.num_communities: {self.num_communities:,} for {self.num_classes:,} classes; each needs one"
            )
        total = self.train_share + self.val_share + self.test_share
        if total > 1 + 1e-9:
            raise ValueError(f"source: train_share, val_share and test_share add up to {total:g}, which is more than 1")
        return self


class OgbConfig(GivenEdges):
    """A node classification dataset of the Open Graph Benchmark, read from the folder that its archive holds."""

    kind: Literal["ogb"] = "ogb"
    name: str = Field(description="ogbn-arxiv, ogbn-products or ogbn-papers100M")
    root: str = Field("dataset", description="OGB's folder of datasets; any fsspec URL")


class PygConfig(GivenEdges):
    """A dataset of PyG with one graph: a class of datasets, or the file of a saved `Data`."""

    kind: Literal["pyg"] = "pyg"
    dataset: str | None = Field(None, description="class of the dataset, such as torch_geometric.datasets.Planetoid")
    arguments: dict[str, Any] = Field({}, description="what the class is called with")
    path: str | None = Field(None, description="in place of a dataset: a file that torch.save wrote; any fsspec URL")
    mask_column: Count = Field(0, description="which split, where the masks have a column for each of several")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if (self.dataset is None) == (self.path is None):
            raise ValueError("source: kind pyg needs either `dataset` or `path`")
        if self.path is not None and self.arguments:
            raise ValueError("source.arguments: are for a dataset; a saved file (source.path) takes none")
        return self


class TablesConfig(GivenEdges):
    """A node table and an edge list, in one or many files each: Parquet, text (CSV, TSV, …; also compressed) or npy."""

    kind: Literal["tables"] = "tables"
    nodes: str = Field(
        description="file, folder or pattern (`*`), any fsspec URL; npy: a folder of feat*.npy, label.npy and, where "
        "there are any, split.npy, the masks and id.npy"
    )
    edges: str = Field(description="file, folder or pattern; npy: arrays of shape [2, m] or [m, 2]")
    id: Column | None = Field("id", description="column of node ids; null: ids are row numbers")
    id_type: Literal["auto", "integer", "text"] = Field(
        "auto",
        description="what ids are compared as; auto: text, unless all are integers as one writes them",
    )
    label: Column = Field(
        "label", description="column of classes: integers from 0, or names, numbered in sorted order; see `unlabelled`"
    )
    unlabelled: tuple[Word, ...] = Field(
        ("", "-1", "None", "nan", "NaN", "<NA>", "null", "NULL"),
        description="what stands for no label, besides missing values; any other is a class",
    )
    split: Column | None = Field(
        "split",
        description="column of train, val, test or nothing; without it the booleans train_mask, val_mask and test_mask "
        "are the split, and without these one is drawn",
    )
    features: tuple[Column, ...] | None = Field(
        None, min_length=1, description="columns of numbers or of lists of numbers; default: all others that are"
    )
    ignore: tuple[Column, ...] = Field((), description="columns that are left out")
    one_hot: tuple[Column, ...] = Field((), description="columns of text that become a feature per value")
    hashed: tuple[Column, ...] = Field((), description="columns of text whose values are hashed to `hash_width` each")
    hash_width: Positive = 32
    src: Column = Field("src", description="column of the edges' sources, as node ids")
    dst: Column = Field("dst", description="column of the edges' destinations")
    unknown_nodes: Literal["refuse", "drop", "add"] = Field(
        "refuse",
        description="edges to nodes that are not in the node table: drop them, or add such nodes without label and "
        "features (`missing` says what these become)",
    )
    num_classes: Positive | None = Field(None, description="default: highest label + 1; every class must then occur")
    delimiter: Delimiter | None = Field(
        None, description="of text: a character, or `tab`, `comma`, `semicolon`, `pipe`, `space`; default: looked for"
    )
    header: bool | None = Field(
        None,
        description="of text: false: columns are named 0, 1, …; default: there is one, but for edge lists that begin "
        "with two numbers",
    )
    encoding: str = Field("utf8", description="of text")
    na_values: tuple[Word, ...] = Field((), description="of text: further words for a missing number, such as '?'")
    thousands: str | None = Field(
        None, min_length=1, max_length=1, description="of text: the mark between groups of digits, as in 1,234,567"
    )
    decimal: str = Field(".", min_length=1, max_length=1, description="of text: the mark before the fraction")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        made = [*(self.features or ()), *self.one_hot, *self.hashed]
        for names in ([self.id, self.label, self.split, *made, *self.ignore], [self.src, self.dst]):
            for name in names:
                if name is not None and names.count(name) > 1:
                    raise ValueError(f"source: column '{name}' is named for two things")
        if self.unknown_nodes == "add" and self.missing == "refuse":
            raise ValueError("source.unknown_nodes: added nodes have no features; set source.missing to mean or zero")
        return self


SourceConfig = (
    DigitsConfig | NpzConfig | RegionsConfig | SyntheticConfig | OgbConfig | PygConfig | TablesConfig
)  # fmt: skip
