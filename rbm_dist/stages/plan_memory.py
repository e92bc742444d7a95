"""What each kind of process holds at its peak: bytes of anonymous memory over its base, as formulas of what it does.

N nodes, E directed edges, F features, C classes, P parts. Each formula follows the arrays that are alive at the worst
line of the code that it names. Tests compare them with measurements.
"""

import itertools
import math

from rbm_dist.config.run import Config
from rbm_dist.config.source import OgbConfig, SyntheticConfig, TablesConfig
from rbm_dist.config.teacher import GCN, MEAN
from rbm_dist.graph import partition
from rbm_dist.graph.propagate import _BYTES as PROPAGATED_BYTES
from rbm_dist.graph.shuffle import _CHUNK_EDGES as CHUNK_EDGES
from rbm_dist.graph.shuffle import _CHUNK_ROWS as CHUNK_ROWS
from rbm_dist.parallel.training_checkpoints import copies_of_parameters
from rbm_dist.sources.edges import MERGED_EDGES, RUN_EDGES
from rbm_dist.sources.facts import SourceFacts
from rbm_dist.stages.baselines import SAMPLED_ROWS, SAMPLED_VALUES
from rbm_dist.stages.soft_labels import GATHERED_EDGES, rows_at_a_time
from rbm_dist.train.kmeans import sample_rows

_ALIVE = 4  # sampled batches: the consumer's last, its next, one that is ready and one in the making (`Prefetch`)
# Measured on degrees that follow a power law: samples repeat nodes as often as if half of the nodes had all edges, and
# a node that was found over an edge has twice the mean degree.
_ATTRACTING, _FOUND = 0.5, 2.0
_PREDICTED_ROWS = 65_536
_TIMED_ROWS = 1024


def sampled(facts: SourceFacts, seeds: int, fanout: tuple[int, ...]) -> tuple[float, float, float]:
    """Expected nodes and edges of a sampled neighbourhood, and its nodes but those of the last hop."""
    degree, attracting = facts.num_edges / facts.num_nodes, max(1.0, _ATTRACTING * facts.num_nodes)
    nodes, frontier, edges, inner = float(seeds), float(seeds), 0.0, float(seeds)
    for width in fanout:
        inner = nodes
        # A skewed degree is often below the fan-out even where its mean is not.
        edges += frontier * (degree if width < 0 else -width * math.expm1(-degree / width) if width else 0)
        found = attracting * -math.expm1(-(seeds + edges) / attracting)
        found = min(max(found, nodes), facts.num_nodes)
        nodes, frontier = found, found - nodes
        degree = _FOUND * facts.num_edges / facts.num_nodes
    return nodes, edges, inner


def feature_bytes(facts: SourceFacts) -> float:
    """Of a node's features in memory."""
    if facts.nonzeros is None:
        return 4.0 * facts.num_features
    return 32 * facts.nonzeros / facts.num_nodes  # value, 64-bit column and row, and scipy's own


def input_width(config: Config, facts: SourceFacts) -> int:
    """Columns of a student's input."""
    widths = {"feat": facts.num_features, "pos": config.encodings.positional_dim, "prop": facts.num_classes}
    return sum(widths[name] for name in config.student.inputs)


# ------------------------------------------------------------------------------------------- source and partition
def whole_source(facts: SourceFacts) -> float:
    """`source.read`: the edges as scipy builds a CSC of them, features in float64 and float32."""
    values = facts.nonzeros or facts.num_nodes * facts.num_features
    return 40 * facts.num_edges + 32 * values


def node_task(config: Config, facts: SourceFacts) -> float:
    """`_stage_nodes`: label, split and id of every node."""
    match config.source:
        case SyntheticConfig():
            per_node = 18
        case OgbConfig():
            per_node = 25  # labels as given, without NaN, and as integers
        case TablesConfig():
            per_node = 80 + facts.id_bytes
        case _:
            per_node = 34
    return per_node * facts.num_nodes


def sort_task(config: Config, facts: SourceFacts) -> float:
    """`edges.write_runs`: the chunks, both ends in 64 bits, those kept, and the words of either direction."""
    held = 8 if isinstance(config.source, SyntheticConfig) else 16  # ids of the chunks: 32 or 64 bits
    run = min(RUN_EDGES, facts.edge_piece, _given(config, facts))
    return (57 + held if config.source.symmetric else 49 + held) * run


def merge_task(facts: SourceFacts) -> float:
    """`edges.merge`: words, their copy without duplicates, and which those are."""
    return 17 * min(MERGED_EDGES, facts.num_edges)


def feature_task(config: Config, facts: SourceFacts) -> float:
    """`_stage_feat`: a few copies of a chunk of rows."""
    values = 2**21 if isinstance(config.source, TablesConfig) else max(2**20, 2**13 * facts.num_features)
    return 16 * values


def assign_task(config: Config, facts: SourceFacts) -> float:
    """`assign_parts`: the partitioner, or then the parts, the new ids and the readers of every node."""
    needed = 0
    if config.partition.num_parts > 1:
        needed = partition.memory_needed(config.partition, facts.num_nodes, facts.num_edges, symmetric(config))
    return max(needed, 16 * facts.num_nodes)


def symmetric(config: Config) -> bool:
    """Whether the graph has the reverse of every edge. An unseen node's edges lead to it, not from it."""
    return config.source.symmetric and not config.source.unseen_share


def chunk_task(facts: SourceFacts) -> float:
    """`shuffle.spill_chunk`: edges as sorted 64-bit words, or rows of features in another order."""
    rows = min(CHUNK_ROWS, facts.num_nodes)
    edges = min(CHUNK_EDGES, rows * facts.num_edges / facts.num_nodes)
    return max(32 * edges, 4 * edges + rows * (feature_bytes(facts) + 33))


def part_task(config: Config, facts: SourceFacts) -> float:
    """`shuffle.write_part`: the degrees of a part's nodes and their sums; the rest passes through mapped."""
    return 24 * facts.num_nodes / config.partition.num_parts * (1 + config.partition.imbalance)


# --------------------------------------------------------------------------------------------- teacher, soft labels
def _batch(facts: SourceFacts, nodes: float, edges: float) -> float:
    """`SampledRows`: inputs and ids of the nodes, both ends of the edges."""
    return nodes * (feature_bytes(facts) + 8) + 16 * edges


def seeds_of_sample(config: Config, count: int) -> int:
    """Seeds that are sampled together where `count` nodes are gone through: what a part gives to a step."""
    steps = max(1, -(-count // config.teacher.batch_size))
    return max(1, round(count / steps / config.partition.num_parts))


def teacher_worker(config: Config, facts: SourceFacts) -> float:
    """`train_teacher`: positions of the sampler, training and validation nodes, batches ahead, and the messages."""
    teacher = config.teacher
    if teacher.reads_hops:
        rows = min(teacher.batch_size, max(facts.num_train, facts.num_val))
        return hop_rows(config, facts, rows / config.cluster.most_workers, states=4)
    seeds = max(seeds_of_sample(config, count) for count in (facts.num_train, facts.num_val))
    nodes, edges, inner = sampled(facts, seeds, teacher.fanout)
    messages = _messages(config, facts, nodes, edges, inner, training=True)
    states = 4 * inner * (facts.num_features + (4 + 2 * (teacher.norm != "none")) * teacher.hidden)
    ids = 8 * 2 * (facts.num_train + facts.num_val) / config.cluster.most_workers
    model = 4 * copies_of_parameters(average=False) * teacher_parameters(config, facts)
    return 4 * facts.num_nodes + ids + _ALIVE * _batch(facts, nodes, edges) + messages + states + model


def hot_rows(config: Config, facts: SourceFacts) -> float:
    """`fill_hot`: the rows that a worker keeps of other hosts' nodes, and how often each node came up."""
    if not config.cluster.shard_servers or not config.cluster.cache_mb or facts.nonzeros is not None:
        return 0
    return min(1e6 * config.cluster.cache_mb, facts.num_nodes * feature_bytes(facts)) + 2 * facts.num_nodes


def inference_actor(config: Config, facts: SourceFacts) -> float:
    """`soft_labels._make_worker`: positions of the sampler, batches ahead, and the messages of a layer."""
    if config.teacher.external is not None:
        return external_rows(config, facts)
    if config.teacher.reads_hops:
        rows = rows_at_a_time((config.teacher.hops + 1) * facts.num_features)
        return hop_rows(config, facts, min(rows, facts.num_nodes / config.partition.num_parts), states=2)
    settings, fanout = config.soft_labels, config.soft_labels.fanout
    part = math.ceil(facts.num_nodes / config.partition.num_parts)
    seeds = min(settings.batch_size, part)
    if settings.inference == "exact":
        averaged = _averaged(config, facts, part) if config.teacher.conv == MEAN else 0
        if averaged and facts.nonzeros is None and not settings.entropy_change:
            return averaged
        # A layer is gathered.
        seeds = min(seeds, max(1, math.floor(GATHERED_EDGES * facts.num_nodes / facts.num_edges)))
        nodes, edges, inner = sampled(facts, seeds, (-1,))
    else:
        averaged = 0
        nodes, edges, inner = sampled(facts, seeds, fanout or config.teacher.fanout)
    noise = 0.0
    if settings.entropy_change:  # `keyed_normal`: two uniform draws and their hashes
        noise = 6 * 4 * nodes * facts.num_features
    computed = max(_inferred(config, facts, nodes, edges, inner), noise)
    passes = settings.passes if settings.inference == "sampled" else 1
    return max(averaged, 4 * facts.num_nodes + _ALIVE * passes * _batch(facts, nodes, edges) + computed)


def _averaged(config: Config, facts: SourceFacts, part: int) -> float:
    """`soft_labels._exact_layer`: batches of means and own states; of one the states, and what is being averaged."""
    hidden = config.teacher.hidden
    width = max(hidden, facts.num_features if facts.nonzeros is None else 0)
    rows, degree = min(rows_at_a_time(width), part), facts.num_edges / facts.num_nodes
    edges = min(PROPAGATED_BYTES / (4 * width), rows * degree)
    states = 4 * rows * (2 + (config.teacher.norm != "none")) * hidden
    return _ALIVE * 2 * 4 * rows * width + states + edges * (4 * width + 40)  # rows of distinct sources, sorted ids


def _messages(
    config: Config, facts: SourceFacts, nodes: float, edges: float, inner: float, training: bool
) -> float:  # fmt: skip
    """What the first layer holds of a sample's edges and nodes."""
    teacher = config.teacher
    if teacher.conv in (MEAN, "sage_max", GCN):
        mapped = teacher.conv == GCN or (teacher.conv == MEAN and facts.num_features > teacher.hidden)
        narrow = teacher.hidden if mapped else facts.num_features
        return 4 * narrow * (edges + mapped * nodes) * (1 + mapped * training)  # gradients, if of mapped inputs
    # Attention, also of each node to itself: mapped inputs; over an edge as they are and weighed; six of scores.
    sent = (4 if teacher.conv == "gatv2" else 2) * teacher.hidden + 6 * teacher.heads  # its scores are of both ends
    return 4 * (sent * (edges + inner) * (1 + training) + teacher.hidden * nodes * (1 + 3 * training))


def hop_task(config: Config, facts: SourceFacts) -> float:
    """`feature_hops._mean`: a batch of means, the one before, their sums, and rows gathered or sums divided."""
    return 4 * min(PROPAGATED_BYTES, 4 * facts.num_features * facts.num_nodes / config.partition.num_parts)


def hop_rows(config: Config, facts: SourceFacts, rows: float, states: int) -> float:
    """`HopRows` of some batches, one of them with so many copies of what the network makes of it."""
    hops, hidden = config.teacher.hops + 1, config.teacher.hidden
    model = 4 * copies_of_parameters(average=False) * teacher_parameters(config, facts)
    return 4 * rows * (_ALIVE * hops * facts.num_features + states * (hops + 1) * hidden) + model


def external_look(config: Config, facts: SourceFacts) -> float:
    """`ExternalTeacher.check`: of labelled nodes a file's rows and their softmax; `fit_temperatures`: as asking it."""
    row, per_part = 8 * facts.num_classes, facts.num_nodes / config.partition.num_parts
    labelled = (facts.num_train + facts.num_val) / facts.num_nodes
    held = 3.5 * labelled * min(PROPAGATED_BYTES, row * per_part)
    if config.teacher.fits_temperatures:
        held = max(held, 5 * min(PROPAGATED_BYTES, row * facts.num_val)) + 24 * facts.num_val
    return held + _predictions(config, facts)


def external_rows(config: Config, facts: SourceFacts) -> float:
    """`ExternalTeacher.probabilities`: what was combined so far, a file's rows, three of their softmax."""
    rows = min(rows_at_a_time(facts.num_classes), facts.num_nodes / config.partition.num_parts)
    return 5 * 8 * facts.num_classes * rows + _predictions(config, facts)


def _predictions(config: Config, facts: SourceFacts) -> float:
    """`ExternalTeacher`: files that cannot be mapped, if of float32, and where rows are of those not in order."""
    external = config.teacher.external
    assert external is not None
    whole = sum(not path.endswith((".npy", ".pt", ".pth")) and external.dtype is None for path in external.paths)
    order = {"nodes": 0, "splits": 8 + 9 + 16, "ids": 8 + 12 + 38}[external.rows]  # kept, and while it is made
    return facts.num_nodes * (whole * 4 * facts.num_classes + order)


def _inferred(config: Config, facts: SourceFacts, nodes: float, edges: float, inner: float) -> float:
    """What the teacher makes of a sample: the messages of a layer and the states."""
    hidden = config.teacher.hidden
    messages = _messages(config, facts, nodes, edges, inner, training=False)
    return messages + 4 * inner * (facts.num_features + (2 + (config.teacher.norm != "none")) * hidden)


def encoding_task(config: Config, facts: SourceFacts) -> float:
    """`propagate`: gathered rows, their sums, means and scaled copies, each in bounded batches."""
    settings, needs = config.encodings, [0.0]
    per_part = facts.num_nodes / config.partition.num_parts
    if settings.positional == "deepwalk":  # the graph, and two vectors and a dictionary entry per node
        needs.append(8 * facts.num_edges + facts.num_nodes * (12 * settings.positional_dim + 500))
    if settings.positional == "fastrp":
        needs.append(5 * min(PROPAGATED_BYTES, 4 * settings.positional_dim * per_part))
    if settings.label_propagation:
        needs.append(5 * min(PROPAGATED_BYTES, 4 * settings.folds * facts.num_classes * per_part))
    return max(needs)


def smoothing_task(config: Config, facts: SourceFacts) -> float:
    """`smooth`: gathered rows, their means, the rows that they are mixed with and those as they are stored."""
    per_part = facts.num_nodes / config.partition.num_parts
    return 4 * min(PROPAGATED_BYTES, 4 * facts.num_classes * per_part)


# --------------------------------------------------------------------------------------------- student, evaluate
def layer_widths(config: Config, facts: SourceFacts, kind: str) -> list[tuple[int, int]]:
    """Inputs and outputs of a student's layers."""
    hidden = config.student.hidden * (int(kind.removeprefix("mlp_x")) if kind.startswith("mlp_x") else 1)
    widths = [input_width(config, facts), *[hidden] * (config.student.num_layers - 1), facts.num_classes]
    return list(itertools.pairwise(widths))


def student_worker(config: Config, facts: SourceFacts) -> float:
    """`train_students`: ids of this rank's nodes, twice in another order; then k-means, or batches ahead and a step."""
    settings, workers = config.student, config.cluster.most_workers
    ids = 8 * (3 * facts.num_nodes + facts.num_val) / workers
    rows = min(settings.batch_size, facts.num_nodes) / workers
    read = layer_widths(config, facts, "mlp")[0][0] + facts.num_classes  # KRD's pairs have more
    ids += 4 * rows * read * (_ALIVE - 1)
    steps = []
    for kind in settings.models:
        widths = layer_widths(config, facts, kind)
        floats = sum(3 * d + 4 * o for d, o in widths)  # as it came, dropout, with it; outputs and their gradients
        if kind in ("rbm", "moe"):  # a row goes to k experts: a copy with dropout, what they make of it, and gradients
            floats = sum(2 * settings.top_k * (d + o) + 2 * d + 4 * o for d, o in widths)
        states = copies_of_parameters(settings.average > 0)
        steps.append(4 * rows * floats + 4 * states * student_parameters(config, facts, kind))
    if "rbm" in settings.models:
        inputs = [d for d, _ in layer_widths(config, facts, "rbm")]
        kept = min(settings.kmeans_rows, facts.num_nodes)
        # All layers' inputs of its rows, one scaled; of the sample its own rows, all, and scikit-learn's copies.
        steps.append(4 * kept / workers * (sum(inputs) + max(inputs)))
        steps[-1] += 4 * 4 * sample_rows(kept, settings.num_experts) * max(inputs)
        if settings.merge_tolerance is not None:  # its experts and their average, on validation
            steps.append(4 * min(_PREDICTED_ROWS, facts.num_val) * _predicted_floats(config, facts, "rbm"))
    return ids + max(steps)


def evaluation_actor(config: Config, facts: SourceFacts) -> float:
    """`evaluate.make_counter`: predictions of so many rows, by dispatch and with all experts in one product."""
    rows = min(_PREDICTED_ROWS, facts.num_nodes / config.partition.num_parts)
    return 4 * rows * max(_predicted_floats(config, facts, kind) for kind in config.student.models)


def evaluation_task(config: Config, facts: SourceFacts) -> float:
    """`evaluate.fit_baselines`: the regression; or `figures_of`: a part's sources and positions, a timed batch."""
    fitted = min(SAMPLED_ROWS, facts.num_train)
    values = fitted * feature_bytes(facts) / 4 if facts.nonzeros else min(fitted * facts.num_features, SAMPLED_VALUES)
    regression = 20 * values + 40 * fitted * facts.num_classes  # as stored, in float64, scaled; of a row, by class
    part = facts.num_nodes / config.partition.num_parts
    nodes, edges, inner = sampled(facts, min(_TIMED_ROWS, math.ceil(part)), config.teacher.fanout)
    nodes = min(nodes, part)
    timed = 4 * (part + facts.num_edges / config.partition.num_parts) + _batch(facts, nodes, edges)
    return max(16 * facts.num_train + regression, timed + _inferred(config, facts, nodes, edges, inner))


def _predicted_floats(config: Config, facts: SourceFacts, kind: str) -> int:
    """Numbers that one row takes while it is predicted."""
    settings, floats = config.student, []
    for d, o in layer_widths(config, facts, kind):
        floats.append(d + 3 * o)
        if kind == "rbm":
            floats.append(2 * d + settings.top_k * (d + 4 * o))
            if settings.top_k > 1 and settings.num_experts <= 4 * settings.top_k:
                floats.append(d + (settings.num_experts + 3) * o)
    return max(floats)


def routed_widths(config: Config, facts: SourceFacts) -> list[int]:
    """Input widths of the layers of an RbM that have a memory."""
    inputs = [d for d, _ in layer_widths(config, facts, "rbm")]
    return inputs if config.student.routing == "layers" else inputs[:1]


def teacher_parameters(config: Config, facts: SourceFacts) -> int:
    """Numbers in the teacher."""
    hidden = config.teacher.hidden
    layers, jumping = len(config.teacher.fanout), config.teacher.jumping_knowledge
    widths = [facts.num_features, *[hidden] * (layers - 1), facts.num_classes if jumping == "none" else hidden]
    if config.teacher.model == "sgc":
        return facts.num_features * facts.num_classes
    if config.teacher.reads_hops:
        hops, sagn = config.teacher.hops + 1, config.teacher.model == "sagn"
        joined = hidden * hidden * (1 if sagn else hops) + sagn * hidden * facts.num_features
        return hops * hidden * (facts.num_features + 1) + joined + hidden * facts.num_classes
    maps = 1 if config.teacher.conv in ("gat", GCN) else 2  # of sources and destinations
    head = {"none": 0, "max": 1, "cat": layers}[jumping] * hidden * facts.num_classes
    return head + sum((maps + config.teacher.residual) * d * o + 3 * o for d, o in itertools.pairwise(widths))


def student_parameters(config: Config, facts: SourceFacts, kind: str) -> int:
    """Numbers in a student, memories included."""
    settings, total = config.student, 0
    experts = settings.num_experts if kind in ("rbm", "moe") else 1
    for d, o in layer_widths(config, facts, kind):
        total += experts * (d * o + o)
    if kind == "rbm":
        total += experts * sum(routed_widths(config, facts))
    return total * (settings.ensemble_size if kind == "ensemble" else 1)


def _given(config: Config, facts: SourceFacts) -> float:
    return facts.num_edges / (2 if config.source.symmetric else 1)
