"""What a run will take, before anything runs: disk, memory, network and rough time of each stage, and whether it fits.

Pure functions of a configuration, the size of its source and the hosts. Memory of one host is, at a stage's worst step,
the base of each process there and what it holds (`plan_memory.py`). Mapped files come on top while there is room.
"""

import math
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rbm_dist import storage
from rbm_dist.config.run import Config
from rbm_dist.cpus import usable_cpus
from rbm_dist.graph.encodings import arrays
from rbm_dist.graph.partition import available_memory, most_memory_needed
from rbm_dist.graph.smooth import smooths
from rbm_dist.sources.edges import MERGED_EDGES
from rbm_dist.sources.facts import SourceFacts
from rbm_dist.stages import plan_cost, plan_memory

# Anonymous memory of processes that have done nothing yet (Ray 2.60, torch 2.13 on CPU), measured.
TASK_BASE, STORE_BASE, MODEL_BASE, DRIVER_BASE = 120_000_000, 265_000_000, 380_000_000, 355_000_000
RAY_BASE = 320_000_000  # of Ray's own processes on the head
OBJECT_STORE = 128 << 20  # shared memory, of a cluster that the run starts
_PART_BYTES = 2 << 30  # of arrays: what a part should have at most
_MOST_HOSTS = 256


@dataclass(frozen=True)
class Hosts:
    """The machines, all alike. Memory and disk in bytes.

    disk: what is free for the run directory, None if unknown. cache: what each may keep of a run directory on object
    storage, None if it is elsewhere.
    """

    count: int
    memory: int
    cores: int
    gpus: int = 0
    disk: int | None = None
    cache: int | None = None


@dataclass(frozen=True)
class Process:
    """Processes of one kind that work at the same time on one host; `base` and `held` are bytes of each."""

    kind: str
    count: int
    base: int
    held: int


@dataclass(frozen=True)
class StagePlan:
    """One stage. Bytes and seconds; `steps` follow each other, `mapped` can be given back when memory is short."""

    name: str
    steps: list[list[Process]]
    written: int
    kept: int  # of what was written, when the stage is done
    mapped: int
    network: int
    seconds: float

    @property
    def worst(self) -> list[Process]:
        """The processes of the step that takes most memory."""
        return max(self.steps, key=_memory)

    @property
    def memory(self) -> int:
        """What a host needs at the peak."""
        return _memory(self.worst)


@dataclass(frozen=True)
class Plan:
    """The stages of a run, what would not fit, and what is advised."""

    facts: SourceFacts
    hosts: Hosts
    stages: list[StagePlan]
    problems: list[str]
    parts: int
    hosts_wanted: int | None  # None: no number of such hosts would do
    workers: int
    cached: int | None  # bytes that each host would fetch into its cache and use at once; None: nothing is fetched

    def as_json(self) -> dict[str, Any]:
        """What `--json` writes and the table shows; `disk`: the most that the run directory holds at any time."""
        stages = [
            {name: value for name, value in asdict(stage).items() if name != "steps"}
            | {"memory": stage.memory, "processes": [asdict(process) for process in stage.worst]}
            for stage in self.stages
        ]
        return {**asdict(self), "stages": stages, "disk": peak_disk(self.stages)}


def these_hosts(run_dir: str, count: int, memory_gib: float | None, cores: int | None, gpus: int) -> Hosts:
    """Hosts of a person's figures; where one is None, it is this machine's. Disk: as far as it can be asked."""
    disk = cache = None
    if not storage.is_local(run_dir):
        cache = storage.budget()
    else:
        folder = Path(storage.absolute(run_dir))
        disk = shutil.disk_usage(next(each for each in (folder, *folder.parents) if each.exists())).free
    memory = available_memory() if memory_gib is None else round(memory_gib * 2**30)
    return Hosts(count, memory, cores or usable_cpus(), gpus, disk, cache)


def make_plan(config: Config, facts: SourceFacts, hosts: Hosts) -> Plan:
    """The plan of a configuration on these hosts."""
    stages = plan_stages(config, facts, hosts)
    wanted = next((count for count in _counts(hosts) if _fits(config, facts, replace(hosts, count=count))), None)
    at_most = hosts.gpus if config.cluster.use_gpu else hosts.cores
    workers = max(1, at_most) * (wanted or hosts.count)
    size = stages[1].kept
    # Two for each worker, so that parts can be dealt out evenly; no more than there are nodes.
    parts = min(max(2 * config.cluster.most_workers, -(-size // _PART_BYTES), 4), facts.num_nodes)
    cached = None if hosts.cache is None else max(_cached(config, facts, hosts, stage) for stage in stages)
    return Plan(facts, hosts, stages, _problems(config, facts, hosts, stages), parts, wanted, workers, cached)


def plan_stages(config: Config, facts: SourceFacts, hosts: Hosts) -> list[StagePlan]:
    """The stages that a run would have, in order."""
    cluster, parts = config.cluster, config.partition.num_parts
    local = hosts.count == 1
    slots = max(hosts.cores, cluster.most_workers, cluster.inference_workers) + 1 if local else hosts.cores
    head = [Process("driver and Ray", 1, DRIVER_BASE + RAY_BASE, OBJECT_STORE)]
    cost = plan_cost.Costs(config, facts, hosts.count, hosts.count * hosts.cores)
    used = 0

    def tasks(kind: str, number: float, held: float) -> list[Process]:
        nonlocal used
        count = min(slots, math.ceil(number / hosts.count))
        used = max(used, count)
        return [*head, Process(kind, count, TASK_BASE, round(held)), *idle(count)]

    def workers(kind: str, number: int, held: float) -> list[Process]:
        count = math.ceil(number / hosts.count)
        return [*head, Process(kind, count, MODEL_BASE, round(held)), *idle(count)]

    def served(step: list[Process]) -> list[Process]:
        number = min(cluster.shard_servers, parts)
        return [*step, Process("shard server", math.ceil(number / hosts.count), TASK_BASE, 0)]

    def idle(count: int) -> list[Process]:
        # Ray keeps the processes of past tasks, up to one per core.
        return [Process("idle worker", max(0, used - count), TASK_BASE, 0)]

    def stage(name: str, steps: list[list[Process]]) -> StagePlan:
        written, kept, mapped, network = (round(each) for each in getattr(cost, name)())
        return StagePlan(name, steps, written, kept, mapped, network, cost.seconds(name))

    memory = plan_memory
    if facts.streamed:
        steps = [
            tasks("node table task", 1, memory.node_task(config, facts)),
            tasks("sorting task", facts.edge_pieces, memory.sort_task(config, facts)),
            tasks("merging task", facts.num_edges / MERGED_EDGES, memory.merge_task(facts)),
            tasks("feature task", facts.feat_pieces, memory.feature_task(config, facts)),
        ]
    else:
        steps = [tasks("source task", 1, memory.whole_source(facts))]
    stages = [stage("source", steps)]
    chunks = max(facts.num_nodes / memory.CHUNK_ROWS, facts.num_edges / memory.CHUNK_EDGES)
    steps = [
        tasks("assignment task", 1, memory.assign_task(config, facts)),
        tasks("chunk task", chunks, memory.chunk_task(facts)),
        tasks("part task", parts, memory.part_task(config, facts)),
    ]
    stages.append(stage("partition", steps))
    hot = 0 if local else memory.hot_rows(config, facts)
    if config.teacher.external is not None:
        stages.append(stage("teacher", [tasks("look at predictions", 1, memory.external_look(config, facts))]))
    else:
        steps = [workers("teacher worker", cluster.most_workers, memory.teacher_worker(config, facts) + hot)]
        if config.teacher.reads_hops:
            steps.insert(0, tasks("hop task", parts, memory.hop_task(config, facts)))
        stages.append(stage("teacher", list(map(served, steps))))
    actors, hot = min(cluster.inference_workers, parts), 0 if config.soft_labels.inference == "exact" else hot
    actor = workers("inference actor", actors, memory.inference_actor(config, facts) + hot)
    steps = [served(actor)]
    if smooths(config.soft_labels):
        steps.append(served(tasks("smoothing task", parts, memory.smoothing_task(config, facts))))
    stages.append(stage("soft_labels", steps))
    if arrays(config.encodings):
        stages.append(stage("encodings", [served(tasks("encoding task", parts, memory.encoding_task(config, facts)))]))
    student = workers("student worker", cluster.most_workers, memory.student_worker(config, facts))
    if "rbm" in config.student.models and cluster.memory_store == "actor":
        student.append(Process("memory store", 1, STORE_BASE, 0))
    stages.append(stage("student", [served(student)]))
    steps = [
        served(workers("evaluation task", 1, memory.evaluation_task(config, facts))),
        served(workers("evaluation actor", actors, memory.evaluation_actor(config, facts))),
    ]
    stages.append(stage("evaluate", steps))
    return stages


def peak_disk(stages: list[StagePlan]) -> int:
    """The most that some stages, one after another, have on disk."""
    kept, peak = 0, 0
    for stage in stages:
        peak = max(peak, kept + stage.written)
        kept += stage.kept
    return peak


def _cached(config: Config, facts: SourceFacts, hosts: Hosts, stage: StagePlan) -> int:
    """What a host has mapped of remote files while a stage is at work; the rest is read in slices."""
    if stage.name == "source":
        return facts.num_nodes  # the splits
    if stage.name == "partition":
        return 4 * facts.num_edges + 12 * facts.num_nodes  # edges, and the nodes' new ids
    servers = config.cluster.shard_servers
    return stage.mapped // min(servers, hosts.count) if servers and stage.name != "evaluate" else stage.mapped


def _memory(step: list[Process]) -> int:
    return sum(process.count * (process.base + process.held) for process in step)


def _counts(hosts: Hosts) -> list[int]:
    return [count for count in range(1, _MOST_HOSTS + 1) if count & (count - 1) == 0 or count == hosts.count]


def _fits(config: Config, facts: SourceFacts, hosts: Hosts) -> bool:
    return all(stage.memory <= hosts.memory for stage in plan_stages(config, facts, hosts))


def _problems(config: Config, facts: SourceFacts, hosts: Hosts, stages: list[StagePlan]) -> list[str]:
    problems = []
    for stage in stages:
        if stage.memory > hosts.memory:
            largest = max(stage.worst, key=lambda process: process.count * (process.base + process.held))
            keys = " or ".join(_advice(stage.name, largest, config, facts, hosts))
            problems.append(
                f"{stage.name}: needs {gigabytes(stage.memory)} of memory per host, there are "
                f"{gigabytes(hosts.memory)}; most of it for {largest.count} × {largest.kind} "
                f"({gigabytes(largest.base + largest.held)} each); {keys or 'use hosts with more memory'}"
            )
    if not _begins(config, facts, hosts) and not any(each.startswith("partition:") for each in problems):
        others = [f"set {name}" for name, other in _partitioners(config).items() if _begins(other, facts, hosts)]
        problems.append(
            f"partition: a run does not begin it where there are {gigabytes(hosts.memory)}, as a graph of few, large "
            f"communities takes {gigabytes(_most(config, facts))}; {' or '.join(others) or 'use more memory'}"
        )
    disk = peak_disk(stages)
    if hosts.disk is not None and disk > hosts.disk:
        at = max(stages, key=lambda stage: peak_disk(stages[: stages.index(stage) + 1]))
        int8 = _with(config, "partition", features="int8")
        less = peak_disk(plan_stages(int8, facts, hosts)) <= hosts.disk
        problems.append(
            f"{at.name}: the run directory needs {gigabytes(disk)} of disk, {gigabytes(hosts.disk)} are free; "
            f"set run_dir to another disk{' or partition.features: int8' * less}"
        )
    for stage in stages if hosts.cache is not None else ():
        needed = _cached(config, facts, hosts, stage)
        if hosts.cache is not None and needed > hosts.cache:
            problems.append(
                f"{stage.name}: needs {gigabytes(needed)} of run_dir in each host's cache, which may have "
                f"{gigabytes(hosts.cache)}; set RBM_DIST_CACHE to a larger disk, raise RBM_DIST_CACHE_GB"
                f"{', or set cluster.shard_servers' * (not config.cluster.shard_servers)}"
            )
    wanted = max(config.cluster.most_workers, config.cluster.inference_workers)
    if config.cluster.use_gpu and wanted > hosts.count * hosts.gpus:
        problems.append(
            f"GPUs: {wanted} worker(s) want one each, there are {hosts.count * hosts.gpus}; set "
            "cluster.train_workers and cluster.inference_workers, or cluster.use_gpu: false"
        )
    if config.partition.num_parts > facts.num_nodes:
        problems.append(f"partition.num_parts: {config.partition.num_parts} parts for {facts.num_nodes:,} node(s)")
    return problems


def _advice(stage: str, process: Process, config: Config, facts: SourceFacts, hosts: Hosts) -> list[str]:
    """Keys that make a stage fit, each tried."""

    tries: dict[str, Config] = {}
    if stage == "partition":
        tries = {name: other for name, other in _partitioners(config).items() if _begins(other, facts, hosts)}
    if stage == "partition" and process.kind == "part task":
        parts = 4 * config.partition.num_parts
        tries[f"partition.num_parts: {parts}"] = _with(config, "partition", num_parts=parts)
    if stage in ("teacher", "student"):
        smaller = max(1, config.cluster.most_workers // 2)
        tries[f"cluster.train_workers: {smaller}"] = _with(config, "cluster", train_workers=smaller)
        batch = max(1, getattr(config, stage).batch_size // 4)
        tries[f"{stage}.batch_size: {batch}"] = _with(config, stage, batch_size=batch)
    if stage == "soft_labels":
        batch, fewer = max(1, config.soft_labels.batch_size // 4), max(1, config.cluster.inference_workers // 2)
        tries[f"soft_labels.batch_size: {batch}"] = _with(config, "soft_labels", batch_size=batch)
        tries[f"cluster.inference_workers: {fewer}"] = _with(config, "cluster", inference_workers=fewer)
    good = [f"set {name}" for name, other in tries.items() if _stage_fits(stage, other, facts, hosts)]
    if not good and process.count > 1 and process.base + process.held < hosts.memory / 2:
        good = ["use more hosts, or a Ray cluster that is told of fewer CPUs per host (--address)"]
    return good


def _with(config: Config, section: str, **changes: object) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=changes)})


def _partitioners(config: Config) -> dict[str, Config]:
    """Other ways to partition, by their keys."""
    if config.partition.method != "kaminpar":
        return {}
    return {
        "partition.preset: terapart": _with(config, "partition", preset="terapart"),
        "partition.method: streaming": _with(config, "partition", method="streaming"),
    }


def _most(config: Config, facts: SourceFacts) -> int:
    symmetric = plan_memory.symmetric(config)
    return most_memory_needed(config.partition, facts.num_nodes, facts.num_edges, symmetric)


def _begins(config: Config, facts: SourceFacts, hosts: Hosts) -> bool:
    """Whether a run would begin to partition, with all memory of a host free."""
    return config.partition.num_parts == 1 or _most(config, facts) <= hosts.memory


def _stage_fits(name: str, config: Config, facts: SourceFacts, hosts: Hosts) -> bool:
    return all(stage.memory <= hosts.memory for stage in plan_stages(config, facts, hosts) if stage.name == name)


def gigabytes(size: float) -> str:
    """Bytes for people."""
    return f"{size / 1e9:,.2f} GB" if size < 1e11 else f"{size / 1e9:,.0f} GB"
