"""Disk, network and rough time of each stage, from the layouts on disk, the traffic of a step, and measured rates.

Disk is exact but for edges that coincide, which are dropped. Network is what passes between hosts, storage not counted.
Rates are those of one core of a 2-core machine; times are rough, and those of a GPU are not known.
"""

import math
from dataclasses import dataclass

from rbm_dist.config.run import Config
from rbm_dist.graph.smooth import smooths
from rbm_dist.graph.soft_rows import dtype_beside, layout
from rbm_dist.serve.specialisation import LOADED_NODES
from rbm_dist.sources.facts import SourceFacts
from rbm_dist.stages import plan_memory as memory
from rbm_dist.train.kmeans import STARTS, sample_rows

# benchmarks/results/shards.json: edges per second, 100 features, checksums included.
_SOURCE_EDGES, _SHUFFLED_EDGES = 4.0e6, 10e6
_STREAMED_EDGES = 35e6  # of a pass of the streaming partitioner
_KAMINPAR_S = {"fast": 0.3e-6, "default": 0.5e-6, "terapart": 0.75e-6}  # per edge, of 2 to 57 M edges
_SAMPLED_EDGES = 12.4e6  # benchmarks/results/sampling.json
# Seconds per byte of a sampled edge's input, gathered and aggregated, and how much longer training takes: one core,
# 300,000 nodes of degree 30, 100 features, hidden 128.
_INPUT_S, _BACKWARD = 1.5e-9, 1.4
# What a sample of the teacher, and a step of a student, plain or with experts, take however small they are.
_SAMPLE_S, _STEP_S, _ROUTED_STEP_S = 5e-3, 5e-3, 17e-3
_START_S = 6.0  # CPU seconds of a process that imports torch, PyG and the stages
_FLOPS, _EXPERT_FLOPS = 19e9, 12e9  # of a student's step, all included; MLPs, and mixtures
_START_S, _LLOYD_S = 5e-9, 2e-9  # per row, centre and column: k-means of a sample from one start; of all rows
_PROPAGATED_BYTES = 1e9  # per second, gathered and written
# Edges between parts: KaMinPar and the streaming partitioner on real graphs and planted ones (assumed before a run).
CUT_SHARE = {"kaminpar": 0.25, "streaming": 0.35, "random": 1.0}


@dataclass(frozen=True)
class Costs:
    """`source()` and so on: bytes written, kept, mapped and sent. `seconds`: by stage."""

    config: Config
    facts: SourceFacts
    hosts: int
    cores: int

    def seconds(self, stage: str) -> float:
        """Rough, on so many cores."""
        return _START_S + float(getattr(self, f"_{stage}_s")())

    # ------------------------------------------------------------------------------------------ source, partition
    def source(self) -> tuple[float, ...]:
        nodes, edges = self.facts.num_nodes, self.facts.num_edges
        kept = self._graph(4)
        work = (12 * edges + (8 + self.facts.id_bytes) * nodes) if self.facts.streamed else 0  # runs, and their merges
        return kept + work, kept, 16 * edges, 0

    def partition(self) -> tuple[float, ...]:
        kept = self._graph({"float32": 4, "float16": 2, "int8": 1}[self.config.partition.features])
        return kept + self._graph(4) + 8 * self.facts.num_nodes, kept, self._graph(4), 0

    def _graph(self, value: int) -> float:
        """The arrays of a graph whose features take so many bytes each."""
        facts = self.facts
        feat = value * facts.num_nodes * facts.num_features
        if facts.nonzeros is not None:
            feat = 8 * facts.nonzeros + 4 * facts.num_nodes
        return 25 * facts.num_nodes + 4 * facts.num_edges + feat

    def _source_s(self) -> float:
        return self.facts.num_edges / _SOURCE_EDGES / self._at_once(self.facts.edge_pieces)

    def _partition_s(self) -> float:
        facts, settings = self.facts, self.config.partition
        shuffled = facts.num_edges / _SHUFFLED_EDGES / self._at_once(settings.num_parts)
        if settings.method == "kaminpar":
            return _KAMINPAR_S[settings.preset] * facts.num_edges + shuffled
        passes = settings.passes + 1 if settings.method == "streaming" else 0
        return (passes + 1) * facts.num_edges / _STREAMED_EDGES + shuffled

    def _at_once(self, tasks: float) -> int:
        return max(1, min(self.cores, math.ceil(tasks)))

    # --------------------------------------------------------------------------------------- teacher, soft labels
    def teacher(self) -> tuple[float, ...]:
        if self.config.teacher.external is not None:
            return 0, 0, self._predictions(), 0
        model = 4 * memory.teacher_parameters(self.config, self.facts)
        checkpoints = self._checkpoints(self.config.teacher.epochs)
        if self.config.teacher.reads_hops:
            hops = self._hops() + model
            return hops + 4 * model * checkpoints, model + 4 * model * self._kept(checkpoints), self._graph(0) + hops, 0
        rows, edges, steps = self._teacher_samples()
        sent = self._rows_sent(rows, edges) + 2 * (self.hosts - 1) * model * steps  # and gradients, around a ring
        return model + 4 * model * checkpoints, model + 4 * model * self._kept(checkpoints), self._graph(4), sent

    def soft_labels(self) -> tuple[float, ...]:
        written, kept, mapped, sent = self._taught()
        if not smooths(self.config.soft_labels):
            return written, kept, mapped, sent
        # What the teacher says, the start of smoothing and its last two arrays, of which `soft` is the very last.
        array, steps = 4.0 * self.facts.num_nodes * self.facts.num_classes, self.config.soft_labels.smooth.steps
        alive = array * min(steps + 1, 4) - min(array, self.facts.num_nodes * self._soft_row()) * (steps > 2)
        return written + alive, kept, max(mapped, self._graph(0) + alive), sent + self._between_hosts(self._smoothed())

    def _taught(self) -> tuple[float, ...]:
        """What asking the teacher takes."""
        facts, settings, config = self.facts, self.config.soft_labels, self.config
        beside = settings.entropy_change + settings.hidden * config.teacher.hidden
        row = self._soft_row() + dtype_beside(settings.store).itemsize * beside
        kept = written = facts.num_nodes * row
        if config.teacher.external is not None:
            return written, kept, kept + self._predictions(), 0
        if config.teacher.reads_hops:
            return written + self._hops(), kept, self._hops(), 0
        if settings.inference == "exact":  # the layers between, once more with noise
            inner = len(config.teacher.fanout) - (config.teacher.jumping_knowledge == "none")
            layers = inner * config.teacher.hidden
            noisy = settings.entropy_change * (layers + facts.num_classes)
            written += 4 * facts.num_nodes * (layers + noisy)
            kept = written if settings.keep_layers else kept
        rows, edges = self._inferred()
        return written, kept, self._graph(4), self._rows_sent(rows, edges)

    def _soft_row(self) -> int:
        """Bytes of a node's soft labels as they are stored."""
        settings = self.config.soft_labels
        dtype, width = layout(settings.store, settings.top_m, self.facts.num_classes)
        return dtype.itemsize * width

    def _hops(self) -> float:
        """Bytes of features over hops, there until soft labels are."""
        return 4.0 * self.config.teacher.hops * self.facts.num_nodes * self.facts.num_features

    def _predictions(self) -> float:
        """Bytes of the files of a teacher from elsewhere, if they are float32."""
        external = self.config.teacher.external
        return 0 if external is None else 4.0 * len(external.paths) * self.facts.num_nodes * self.facts.num_classes

    def _teacher_samples(self) -> tuple[float, float, int]:
        """Nodes and edges that are sampled in all epochs, and the optimiser's steps."""
        teacher, facts, parts = self.config.teacher, self.facts, self.config.partition.num_parts
        rows = edges = 0.0
        for count in (facts.num_train, facts.num_val):
            steps = max(1, -(-count // teacher.batch_size))
            per_step = memory.sampled(facts, memory.seeds_of_sample(self.config, count), teacher.fanout)
            rows, edges = rows + steps * parts * per_step[0], edges + steps * parts * per_step[1]
        steps = max(1, -(-facts.num_train // teacher.batch_size))
        return teacher.epochs * rows, teacher.epochs * edges, teacher.epochs * steps

    def _inferred(self) -> tuple[float, float]:
        settings, facts, config = self.config.soft_labels, self.facts, self.config
        passes = settings.passes + settings.hidden + settings.entropy_change
        if settings.inference == "exact":
            layers = len(config.teacher.fanout) * (1 + settings.entropy_change)
            return layers * facts.num_edges, layers * facts.num_edges
        seeds = min(settings.batch_size, facts.num_nodes)
        rows, edges, _ = memory.sampled(facts, seeds, settings.fanout or config.teacher.fanout)
        batches = passes * facts.num_nodes / seeds
        return batches * rows, batches * edges

    def _rows_sent(self, rows: float, edges: float) -> float:
        """Feature rows and edges from other hosts' parts, less what the cache holds if rows were drawn alike."""
        row = memory.feature_bytes(self.facts)
        remote = (1 - 1 / self.hosts) * CUT_SHARE[self.config.partition.method]
        cached = min(1.0, 1e6 * self.config.cluster.cache_mb / (row * self.facts.num_nodes))
        return remote * (rows * row * (1 - cached) + 16 * edges)

    def _edges_s(self, edges: float) -> float:
        return edges * (1 / _SAMPLED_EDGES + _INPUT_S * memory.feature_bytes(self.facts))

    def _teacher_s(self) -> float:
        config, facts = self.config, self.facts
        if config.teacher.external is not None:
            return self._predictions() / _PROPAGATED_BYTES
        if config.teacher.reads_hops:
            gathered = 4.0 * config.teacher.hops * facts.num_edges * facts.num_features
            rows = config.teacher.epochs * (3 * facts.num_train + facts.num_val)
            products = 2 * rows * memory.teacher_parameters(config, facts)
            return (gathered / _PROPAGATED_BYTES + products / _FLOPS) / self._workers(config.cluster.most_workers)
        _, edges, steps = self._teacher_samples()
        samples = steps * self.config.partition.num_parts * (1 + self.facts.num_val / max(self.facts.num_train, 1))
        spent = _BACKWARD * self._edges_s(edges) + _SAMPLE_S * samples
        return spent / self._workers(self.config.cluster.most_workers)

    def _smoothed(self) -> float:
        """Bytes that are gathered to smooth soft labels."""
        settings = self.config.soft_labels.smooth
        passes = {"none": 0, "appnp": 1, "correct_and_smooth": 2}[settings.method] * settings.steps
        return 4.0 * self.facts.num_edges * self.facts.num_classes * passes

    def _soft_labels_s(self) -> float:
        smoothed = self._smoothed() / _PROPAGATED_BYTES / self._at_once(self.config.partition.num_parts)
        return self._taught_s() + smoothed

    def _taught_s(self) -> float:
        if self.config.teacher.external is not None:
            return self._predictions() / _PROPAGATED_BYTES
        if self.config.teacher.reads_hops:
            products = 2 * self.facts.num_nodes * memory.teacher_parameters(self.config, self.facts)
            return products / _FLOPS / self._workers(self.config.cluster.inference_workers)
        return self._edges_s(self._inferred()[1]) / self._workers(self.config.cluster.inference_workers)

    def _workers(self, count: int) -> int:
        return max(1, min(count, self.cores, self.config.partition.num_parts))

    # -------------------------------------------------------------------------------- encodings, student, evaluate
    def encodings(self) -> tuple[float, ...]:
        settings, facts = self.config.encodings, self.facts
        written = kept = 0
        if settings.positional != "none":
            width = 4 * facts.num_nodes * settings.positional_dim
            kept += width
            written += width * (settings.hops + 3 if settings.positional == "fastrp" else 2)
        if settings.label_propagation:
            width = 4 * facts.num_nodes * facts.num_classes
            kept += width
            written += width * (settings.folds * (settings.iterations + 1) + 2)
        return written, kept, self._graph(0) + written, self._between_hosts(self._gathered())

    def _between_hosts(self, gathered: float) -> float:
        """Of rows that are gathered along all edges, the bytes that another host has."""
        return (1 - 1 / self.hosts) * CUT_SHARE[self.config.partition.method] * gathered

    def _gathered(self) -> float:
        settings, facts = self.config.encodings, self.facts
        fastrp = settings.hops * settings.positional_dim if settings.positional == "fastrp" else 0
        labels = settings.iterations * settings.folds * facts.num_classes if settings.label_propagation else 0
        return 4.0 * facts.num_edges * (fastrp + labels)

    def _encodings_s(self) -> float:
        return self._gathered() / _PROPAGATED_BYTES / self._at_once(self.config.partition.num_parts)

    def student(self) -> tuple[float, ...]:
        config, facts, settings = self.config, self.facts, self.config.student
        written = kept = sent = 0.0
        steps = settings.epochs * -(-facts.num_nodes // settings.batch_size)
        for kind in settings.models:
            model = 4 * memory.student_parameters(config, facts, kind)
            checkpoints = self._checkpoints(settings.epochs)
            each = (5 if settings.average else 4) * model  # with Adam's two and the best
            written, kept = written + model + each * checkpoints, kept + model + each * self._kept(checkpoints)
            shared = 4 * memory.student_parameters(config, facts, "mlp") if kind in ("rbm", "moe") else model
            sent += 2 * (self.hosts - 1) * shared * steps
            if kind in ("rbm", "moe"):
                sent += self._routed(kind)
        mapped = 4 * facts.num_nodes * (memory.input_width(config, facts) + facts.num_classes)
        return written, kept, mapped, sent

    def _routed(self, kind: str) -> float:
        """Rows to the experts of other hosts and back, forward and backward: once per worker, not per expert."""
        config, settings = self.config, self.config.student
        group = config.cluster.expert_parallel
        if group == "auto" or group == 1 or self.hosts == 1:  # by default each worker has all, if they fit
            return 0.0
        copies = group * (1 - (1 - 1 / group) ** settings.top_k) * (1 - 1 / self.hosts)
        epochs = settings.epochs - (settings.pretrain_epochs if kind == "rbm" else 0)
        width = sum(d + o for d, o in memory.layer_widths(config, self.facts, kind))
        return 2 * 4 * copies * epochs * self.facts.num_nodes * width

    def _student_s(self) -> float:
        config, facts, settings = self.config, self.facts, self.config.student
        total = 0.0
        for kind in settings.models:
            products = sum(d * o for d, o in memory.layer_widths(config, facts, kind))
            plain, mixed = settings.epochs, 0
            if kind in ("rbm", "moe"):
                plain = settings.pretrain_epochs if kind == "rbm" else 0
                mixed = settings.epochs - plain
            plain *= settings.ensemble_size if kind == "ensemble" else 1
            total += 6 * products * facts.num_nodes * (plain / _FLOPS + mixed * settings.top_k / _EXPERT_FLOPS)
            each = -(-facts.num_nodes // settings.batch_size)
            total += each * (plain * _STEP_S + mixed * _ROUTED_STEP_S)
        total /= self._workers(config.cluster.most_workers)
        if "rbm" in settings.models:
            sums = settings.num_experts * sum(memory.routed_widths(config, facts))
            rows = min(settings.kmeans_rows, facts.num_nodes)
            starts = math.ceil(STARTS / self._workers(config.cluster.most_workers))
            total += _START_S * sample_rows(rows, settings.num_experts) * sums * starts
            total += _LLOYD_S * rows * sums / self._workers(config.cluster.most_workers)
        return total

    def evaluate(self) -> tuple[float, ...]:
        mapped = 4 * self.facts.num_nodes * (self.facts.num_features + self.facts.num_classes)
        return 0, 0, mapped, 0

    def _evaluate_s(self) -> float:
        config, facts, settings = self.config, self.facts, self.config.student
        timed = 0.5 * 2 * (1 + len(settings.models))  # latencies
        for kind in settings.models:
            products = sum(d * o for d, o in memory.layer_widths(config, facts, kind))
            often = 1
            if kind == "rbm":  # as it is served, with all experts, and with permuted memories; averaged
                in_one = settings.top_k > 1 and settings.num_experts <= 4 * settings.top_k
                often = 1 + 3 * (settings.num_experts if in_one else settings.top_k)
            timed += 2 * products * often * facts.num_evaluated / _FLOPS
            if kind == "rbm":
                timed += 2 * products * settings.top_k * min(facts.num_nodes, LOADED_NODES) / _FLOPS
        return timed

    def _kept(self, checkpoints: int) -> int:
        return min(checkpoints, self.config.cluster.keep_checkpoints + 1)  # and the best

    def _checkpoints(self, epochs: int) -> int:
        return math.ceil(epochs / self.config.cluster.checkpoint_every)
