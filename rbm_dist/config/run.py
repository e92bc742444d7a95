"""The whole configuration of a run as typed, validated models.

The section `cluster` says how a run is carried out; all other sections say what is computed, and are part of a run's
identity.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from rbm_dist.config.fields import NUMBER, Count, Fanout, Fraction, Positive, Rate, Section, Share, Weight
from rbm_dist.config.source import DigitsConfig, SourceConfig
from rbm_dist.config.teacher import TeacherConfig
from rbm_dist.config.training import TrainingConfig
from rbm_dist.config.update import UpdateConfig


class PartitionConfig(Section):
    method: Literal["kaminpar", "streaming", "random"] = Field(
        "kaminpar", description="kaminpar: in memory, fewest edges cut; streaming: passes over the graph on disk"
    )
    num_parts: Positive = 4
    imbalance: Annotated[float, Field(gt=0, le=1), NUMBER] = Field(
        0.03, description="how far a part may exceed the mean size"
    )
    balance: Literal["nodes", "edges", "both"] = Field(
        "nodes", description="what a part's size is: its nodes, its in-edges, or half of each"
    )
    preset: Literal["fast", "default", "terapart"] = Field(
        "fast", description="of kaminpar; terapart: a compressed graph, for less memory"
    )
    passes: Count = Field(5, description="of streaming: passes over the graph after the first")
    features: Literal["float32", "float16", "int8"] = Field(
        "float32", description="how dense features are stored; int8: with a scale per column"
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.method == "random" and self.balance != "nodes":
            raise ValueError(f"partition.balance: random parts balance nodes, not {self.balance}; use another method")
        return self


class SmoothConfig(Section):
    """Smoothing of soft labels over edges, before students learn from them."""

    method: Literal["none", "appnp", "correct_and_smooth"] = Field(
        "none",
        description="appnp: with those of the neighbours; correct_and_smooth: also with what the teacher gets wrong on "
        "training nodes, and their labels; needs a graph whose neighbours mostly agree ([teachers.md](teachers.md))",
    )
    steps: Positive = Field(10, description="passes over all edges; correct_and_smooth makes as many before")
    damping: Fraction = Field(0.5, description="what a step keeps of the neighbours; 0: correct alone")


class SoftLabelsConfig(Section):
    inference: Literal["sampled", "exact"] = Field(
        "sampled", description="sampled: mini-batches of sampled neighbours; exact: layer by layer, all neighbours"
    )
    fanout: Fanout | None = Field(None, description="default: the teacher's; only for sampled inference")
    passes: Positive = Field(1, description="samples of each node's neighbours that are averaged; of sampled inference")
    batch_size: Positive = 1024
    entropy_change: bool = Field(
        False, description="also store how the teacher's entropy changes under feature noise; `student.objective: krd`"
    )
    hidden: bool = Field(False, description="also store the teacher's last hidden states; for `student.similarity`")
    store: Literal["float32", "float16", "top_m"] = Field(
        "float32",
        description="how probabilities are stored; top_m: those of the likeliest classes, in 4 bytes each; with either "
        "of the latter hidden states and entropy changes are float16",
    )
    top_m: Positive = Field(8, description="classes that top_m keeps; the others share the rest evenly")
    keep_layers: bool = Field(
        False,
        description="keep the states after each of the teacher's layers, so that `rbm-dist update` need not compute "
        "them anew; of exact inference",
    )
    smooth: SmoothConfig = SmoothConfig()


class EncodingsConfig(Section):
    """What a node's surroundings say, as further inputs of the student."""

    positional: Literal["none", "fastrp", "deepwalk"] = Field(
        "none", description="fastrp: propagated random projections, for any size; deepwalk: graphs that fit in memory"
    )
    positional_dim: Positive = 64
    hops: Positive = Field(8, description="fastrp: powers of the transition matrix")
    label_propagation: bool = Field(False, description="propagated training labels, a node's own left out (CoHOp)")
    damping: Fraction = Field(0.9, description="label propagation: what a step keeps of the neighbours")
    iterations: Positive = Field(10, description="steps of label propagation")
    folds: Annotated[int, Field(ge=2), NUMBER] = Field(
        5, description="training labels are left out in so many groups, each for its own nodes"
    )


class KrdConfig(Section):
    """Reliable sampling (Wu et al., 2023): a neighbour j teaches with probability `1 − δ_j^q`."""

    neighbours: Literal["agreeing", "all"] = Field(
        "agreeing",
        description="who can teach; agreeing: neighbours that have the node's class by the teacher, and nodes weigh "
        "the same; all: as published, every neighbour, and a node weighs as much as it has teachers",
    )
    fanout: Annotated[int, Field(ge=-1), NUMBER] = Field(-1, description="in-neighbours that can teach a node; -1: all")
    initial_power: Rate = Field(1.0, description="q before it is fitted")
    momentum: Fraction = Field(0.9, description="what a fit keeps of the power before")
    min_update_epoch: Count = Field(10, description="the first epoch after which q is fitted")
    bins: Positive = Field(50, description="of the histogram of δ that q is fitted to")


class AdversarialConfig(Section):
    """Feature noise that raises the loss most (PGD), as further training rows (NOSMOG)."""

    weight: Weight = Field(0.0, description="of the loss on the noisy rows; 0: none")
    epsilon: Rate = Field(0.01, description="largest change of a feature")
    steps: Positive = 5


class StudentConfig(TrainingConfig):
    models: tuple[Literal["mlp", "mlp_x2", "mlp_x4", "mlp_x8", "ensemble", "moe", "rbm"], ...] = Field(
        ("mlp", "rbm"), min_length=1
    )
    inputs: tuple[Literal["feat", "pos", "prop"], ...] = Field(
        ("feat",), min_length=1, description="arrays of a node that are joined to its input"
    )
    objective: Literal["kd", "krd"] = Field(
        "kd", description="kd: a node's own soft labels; krd: reliable neighbours' too"
    )
    krd: KrdConfig = KrdConfig()
    similarity: Weight = Field(0.0, description="weight of the similarity between hidden states and the teacher's")
    adversarial: AdversarialConfig = AdversarialConfig()
    hidden: Positive = 128
    num_layers: Positive = 2
    norm: Literal["layer", "batch", "none"] = "layer"
    dropout: Fraction = 0.1
    lr: Rate = 0.005
    weight_decay: Weight = 1e-4
    epochs: Positive = Field(120, description="passes over the nodes, pre-training included")
    patience: Positive | None = Field(None, description="stop a phase after so many epochs without a better one")
    hold_out_validation: bool = Field(
        False, description="no distillation on validation nodes, so that they tell how nodes fare that arrive later"
    )
    batch_size: Positive = Field(512, description="nodes per optimiser step, over all workers")
    average: Fraction = Field(
        0.98, description="decay of a moving average of the weights, used in place of them; 0: none"
    )
    temperature: Rate = Field(1.0, description="softens teacher and student alike")
    label_weight: Share = Field(0.0, description="share of the true labels in the loss")
    ensemble_size: Positive = Field(3, description="members of the ensemble of MLPs")
    num_experts: Positive = Field(16, description="accuracy against their number at equal cost: results.md")
    top_k: Positive = Field(1, description="experts per row, k: what each adds to the cost of an MLP")
    routing: Literal["input", "layers"] = Field(
        "input",
        description="input: one memory of the student's input chooses the experts of all layers; layers: a memory per "
        "layer, of its own input, as published",
    )
    routing_temperature: Rate = Field(1.0, description="divides the cosines before the softmax over the k chosen")
    input_attention: bool = Field(False, description="a learned scale of the input per expert")
    merge_tolerance: Share | None = Field(
        0.005,
        description="validation accuracy that averaging the experts of each layer into one may cost for the RbM to be "
        "served as the MLP that this gives; null: never",
    )
    reseed_after: Positive | None = Field(None, description="steps without a row after which an expert starts anew")
    pretrain_epochs: Positive = Field(30, description="epochs in which the RbM is still one plain network")
    kmeans_rows: Positive = Field(100_000, description="rows that the memories are initialised from, at most")
    ema_decay: Share = Field(0.9, description="of the routing memory; 1: it stays where k-means put it")
    commitment: Weight = 0.05
    self_similarity: Weight = 0.01
    load_balance: Weight = 0.01

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.top_k > self.num_experts:
            raise ValueError(f"student.top_k: {self.top_k} > num_experts: {self.num_experts}")
        if len(set(self.models)) < len(self.models):
            raise ValueError(f"student.models: {', '.join(self.models)} names a model twice")
        if len(set(self.inputs)) < len(self.inputs):
            raise ValueError(f"student.inputs: {', '.join(self.inputs)} names an array twice")
        if "rbm" in self.models and self.pretrain_epochs >= self.epochs:
            raise ValueError(f"student.pretrain_epochs: {self.pretrain_epochs} >= epochs: {self.epochs}")
        return self


class ClusterConfig(Section):
    """How the run is carried out; changes nothing in what it computes, but `precision` what is rounded."""

    train_workers: Positive | tuple[Positive, Positive] = Field(
        2,
        description="training workers; of a graph in one part: 1. [fewest, most]: a group shrinks when hosts are lost, "
        "and grows when hosts come",
    )
    inference_workers: Positive = Field(2, description="actors that predict part by part; of a graph in one part: 1")
    use_gpu: bool = Field(False, description="one GPU per training and inference worker")
    precision: Literal["auto", "float32", "bf16"] = Field(
        "auto",
        description="of students' products on GPUs; auto: bf16 where the GPU has it, weights and sums in float32; "
        "float32: without TF32",
    )
    expert_parallel: Positive | Literal["auto"] = Field(
        "auto",
        description="workers that share a set of experts; divides train_workers. 1: all experts on each; auto: that, "
        "unless they do not fit or, at the measured rate of the network, rows are far less to send than gradients",
    )
    exchange_precision: Literal["auto", "float32", "bf16"] = Field(
        "auto", description="of rows on their way to experts on other workers, and back; auto: that of their products"
    )
    memory_store: Literal["actor", "in_process"] = Field(
        "in_process",
        description="where the routing memory lives: a copy per worker kept equal by all-reduce, or one Ray actor",
    )
    shard_servers: Count = Field(
        0, description="actors that serve the parts to workers on other hosts; 0: every worker maps all parts itself"
    )
    cache_mb: Count = Field(
        0, description="megabytes of other hosts' feature rows that a worker keeps, those sampled most often"
    )
    checkpoint_every: Positive = Field(5, description="epochs between checkpoints")
    checkpoint_minutes: Rate | None = Field(
        10.0, description="minutes after which there is one in the middle of an epoch too; null: none by time"
    )
    checkpoint_steps: Positive | None = Field(None, description="optimiser steps between further checkpoints")
    keep_checkpoints: Positive = Field(2, description="the last checkpoints of a loop that are kept, beside the best")
    max_failures: Count = Field(3, description="times that lost workers are replaced")
    start_timeout_s: Rate = Field(
        600.0, description="longest wait, in seconds, for workers to start: for hosts, CPUs and GPUs to be there"
    )
    silence_timeout_s: Rate = Field(60.0, description="longest time, in seconds, without a sign of life of a worker")
    collective_timeout_s: Rate = Field(
        300.0, description="longest wait, in seconds, of a training worker for the others, for a batch, or for a server"
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.precision == "bf16" and not self.use_gpu:
            raise ValueError(
                "cluster.precision: bf16 is for GPUs (cluster.use_gpu: true); on CPUs set float32, or auto"
            )
        if self.fewest_workers > self.most_workers:
            raise ValueError(f"cluster.train_workers: {self.fewest_workers} at least is more than {self.most_workers}")
        for workers in {self.fewest_workers, self.most_workers}:
            if workers % self.workers_per_set:
                raise ValueError(
                    f"cluster.expert_parallel: {self.expert_parallel} does not divide train_workers: {workers}"
                )
        return self

    @property
    def fewest_workers(self) -> int:
        return self.train_workers if isinstance(self.train_workers, int) else self.train_workers[0]

    @property
    def most_workers(self) -> int:
        return self.train_workers if isinstance(self.train_workers, int) else self.train_workers[1]

    @property
    def workers_per_set(self) -> int:
        """Training workers come in multiples of this number."""
        return 1 if self.expert_parallel == "auto" else self.expert_parallel

    @property
    def worker_resources(self) -> dict[str, float]:
        """What a training or inference worker takes of Ray."""
        return {"CPU": 1.0} | ({"GPU": 1.0} if self.use_gpu else {})

    def group_size(self, room: int) -> int:
        """How many workers a group has where there is room for so many: whole sets of experts."""
        return min(room, self.most_workers) // self.workers_per_set * self.workers_per_set


class Config(Section):
    """A whole run."""

    run_dir: str = Field(min_length=1, description="where everything is written; any fsspec URL")
    seed: Annotated[int, Field(ge=0, lt=2**31), NUMBER] = 0
    source: Annotated[SourceConfig, Field(discriminator="kind")] = DigitsConfig()
    partition: PartitionConfig = PartitionConfig()
    teacher: TeacherConfig = TeacherConfig()
    soft_labels: SoftLabelsConfig = SoftLabelsConfig()
    encodings: EncodingsConfig = EncodingsConfig()
    student: StudentConfig = StudentConfig()
    cluster: ClusterConfig = ClusterConfig()
    update: UpdateConfig | None = Field(None, description="what has changed since another run; see `rbm-dist update`")

    @model_validator(mode="before")
    @classmethod
    def _one_worker_for_one_part(cls, tree: Any) -> Any:
        # Nobody asked for second workers that would have nothing to do.
        if (
            isinstance(tree, dict)
            and isinstance(tree.get("partition"), dict)
            and tree["partition"].get("num_parts") == 1
        ):
            cluster = tree.get("cluster", {})
            if isinstance(cluster, dict):
                return {**tree, "cluster": {"train_workers": 1, "inference_workers": 1} | cluster}
        return tree

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.teacher.external is not None:
            for name in ("entropy_change", "hidden"):
                if getattr(self.soft_labels, name):
                    raise ValueError(f"soft_labels.{name}: needs a teacher that is trained here, not teacher.external")
        if self.teacher.reads_hops and self.soft_labels.entropy_change:
            raise ValueError("soft_labels.entropy_change: needs teacher.model: gnn, whose features can be made noisy")
        if self.teacher.model == "sgc" and self.soft_labels.hidden:
            raise ValueError("soft_labels.hidden: teacher.model: sgc is a linear map, and has no hidden states")
        fanout = self.soft_labels.fanout
        if fanout is not None and len(fanout) != len(self.teacher.fanout):
            raise ValueError(
                f"soft_labels.fanout: {len(fanout)} layers, but teacher.fanout has {len(self.teacher.fanout)}"
            )
        if self.soft_labels.inference == "exact" and fanout is not None:
            raise ValueError("soft_labels.fanout: exact inference takes every neighbour; remove it or use 'sampled'")
        if self.soft_labels.keep_layers and (self.soft_labels.inference != "exact" or not self.teacher.is_gnn):
            raise ValueError(
                "soft_labels.keep_layers: only exact inference of a GNN that is trained here goes layer by layer "
                "(soft_labels.inference: exact)"
            )
        if self.update is not None:
            if self.teacher.external is not None:
                raise ValueError(
                    "teacher.external: has nothing to say of an updated graph; make a run of the new graph"
                )
            if self.encodings.positional == "deepwalk":
                raise ValueError(
                    "encodings.positional: deepwalk would place all nodes elsewhere, and students would know none of "
                    "them; use fastrp, or make a run of the new graph"
                )
        if self.cluster.shard_servers and self.teacher.sampler != "numba":
            raise ValueError(
                f"teacher.sampler: {self.teacher.sampler} needs all parts on every host; use numba, "
                "or cluster.shard_servers: 0"
            )
        if self.student.objective == "krd" and not self.soft_labels.entropy_change:
            raise ValueError("student.objective: krd needs soft_labels.entropy_change: true")
        if self.soft_labels.entropy_change and self.soft_labels.store == "top_m":
            raise ValueError("soft_labels.entropy_change: needs soft_labels.store: float32 or float16, not top_m")
        if self.soft_labels.smooth.method != "none":
            if self.soft_labels.entropy_change:
                raise ValueError(
                    "soft_labels.smooth: soft_labels.entropy_change (student.objective: krd) is that of the teacher's "
                    "own soft labels; set soft_labels.smooth.method: none, or do without entropy_change"
                )
            if self.teacher.external is not None and self.teacher.external.missing == "labels":
                raise ValueError(
                    "soft_labels.smooth: needs a prediction for every node; set soft_labels.smooth.method: none, or "
                    "teacher.external.missing: refuse"
                )
        if self.student.similarity > 0 and not self.soft_labels.hidden:
            raise ValueError("student.similarity: needs soft_labels.hidden: true")
        if self.soft_labels.hidden and len(self.teacher.fanout) < 2:
            raise ValueError("soft_labels.hidden: a teacher of one layer (teacher.fanout) has no hidden states")
        parts = self.partition.num_parts
        wanted = {"train_workers": self.cluster.most_workers, "inference_workers": self.cluster.inference_workers}
        for name, workers in wanted.items():
            if workers > parts:
                raise ValueError(
                    f"partition.num_parts: {parts} part(s) for cluster.{name}: {workers}, "
                    f"{workers - parts} of which would have nothing to do; "
                    f"set num_parts to at least {workers}, or {name} to at most {parts}"
                )
        experts, group = self.student.num_experts, self.cluster.workers_per_set
        most = _with_an_expert_each(group, experts)
        if most < group and {"rbm", "moe"} & set(self.student.models):
            raise ValueError(
                f"cluster.expert_parallel: {group} workers share student.num_experts: {experts}, and some would have "
                f"none; set it to {most}, or to 1"
            )
        made = {"feat": True, "pos": self.encodings.positional != "none", "prop": self.encodings.label_propagation}
        for name in self.student.inputs:
            if not made[name]:
                key = {"pos": "positional", "prop": "label_propagation"}[name]
                raise ValueError(f"student.inputs: '{name}' needs encodings.{key}")
        return self


def each_has_experts(workers: int, experts: int) -> bool:
    """Whether shards of equal size leave none of the workers that share a set of experts without one."""
    return -(-experts // -(-experts // workers)) == workers


def _with_an_expert_each(workers: int, experts: int) -> int:
    """The largest group of workers, of those that divide them, in which each has experts."""
    groups = (group for group in range(workers, 0, -1) if workers % group == 0)
    return next(group for group in groups if each_has_experts(group, experts))
