"""The configuration of an update: what has changed since a run, whose graph becomes a new version of itself."""

from typing import Literal, Self

from pydantic import Field, model_validator

from rbm_dist.config.fields import Count, Section, Share
from rbm_dist.config.source import Column


class UpdateConfig(Section):
    run: str = Field(min_length=1, description="the finished run that this one goes on from; it stays as it is")
    add_nodes: str | None = Field(None, description="nodes that are new: file, folder or pattern")
    add_edges: str | None = Field(None, description="edges that are new")
    drop_edges: str | None = Field(None, description="edges that are gone")
    features: str | None = Field(None, description="nodes of the graph whose features are others now, with all of them")
    id: Column | None = Field(None, description="column of node ids; default: as in training")
    label: Column | None = Field(None, description="column of new nodes' classes, where there is one; as in training")
    split: Column | None = Field(None, description="column of new nodes' split, where there is one; as in training")
    src: Column | None = Field(None, description="column of the edges' sources; default: as in training")
    dst: Column | None = Field(None, description="column of the edges' destinations; default: as in training")
    unknown_nodes: Literal["refuse", "drop"] = Field(
        "refuse", description="edges to ids that are neither new nodes nor the graph's"
    )
    epochs: Count = Field(
        5, description="that students are trained on, on changed nodes and as many others; 0: they stay as they are"
    )
    anew_above: Share = Field(
        0.1,
        description="share of the nodes that are new or have other features or in-edges, above which the teacher, and "
        "all that comes of it, is trained anew",
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if not (self.add_nodes or self.add_edges or self.drop_edges or self.features):
            raise ValueError("update: nothing has changed; name add_nodes, add_edges, drop_edges or features")
        return self
