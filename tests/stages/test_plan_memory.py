"""The estimates of memory and disk against what the stages' own functions take, each in a fresh process."""

import contextlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rbm_dist import storage
from rbm_dist.config.run import Config
from rbm_dist.graph.feature_hops import add_hops
from rbm_dist.graph.partition import memory_needed
from rbm_dist.graph.store import GraphStore
from rbm_dist.models.teacher import build_teacher
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.serve.artifact import empty_student, save_student, save_weights
from rbm_dist.sources.facts import source_facts
from rbm_dist.stages import evaluate, plan_memory
from rbm_dist.stages.external_teacher import look_at_external
from rbm_dist.stages.local import MetricsRecorder, over_parts_here
from rbm_dist.stages.partition import write_graph
from rbm_dist.stages.plan_cost import Costs
from rbm_dist.stages.run import Run
from rbm_dist.stages.soft_labels import reset_soft_labels, write_soft_labels
from rbm_dist.stages.source import below, over_here, stage_source
from rbm_dist.stages.student import train_students
from rbm_dist.stages.teacher import train_teacher
from tests.stages.held import held

SHARE, NOISE = 0.25, 30e6  # of what is measured; what the allocator keeps or finds at hand
TINY = {"num_nodes": 4000, "degree": 8, "num_communities": 47, "num_classes": 47}


def configured(url: Path, source: dict[str, Any], **sections: dict[str, Any]) -> Config:
    cluster = {"train_workers": 1, "inference_workers": 1, "memory_store": "in_process", "checkpoint_every": 1}
    partition = {"method": "streaming", "num_parts": 4, "passes": 0} | sections.pop("partition", {})
    return Config.model_validate(
        {"run_dir": str(url), "source": {"kind": "synthetic", **source}, "partition": partition, "cluster": cluster}
        | sections
    )


def make_graph(config: Config, over: Callable = over_here) -> None:
    url = config.run_dir
    files = below(stage_source(config, f"{url}/source", over), "source")
    write_graph(config, f"{url}/source", files, f"{url}/graph", over)


def soften(url: str) -> None:
    """Soft labels without a teacher."""
    store = GraphStore.open(f"{url}/graph")
    files = []
    for part in range(store.num_parts):
        soft = np.random.default_rng(part).random((len(store.ids(part)), store.num_classes), np.float32)
        files.append(
            store.write_part("soft", part, np.dtype(np.float32), soft.shape[1:], [soft / soft.sum(1)[:, None]])
        )
    store.publish("soft", files)


def untrained(config: Config) -> None:
    """A teacher and an RbM that have learned nothing."""
    store = GraphStore.open(f"{config.run_dir}/graph")
    save_weights(
        f"{config.run_dir}/teacher/model.safetensors", build_teacher(config, store.num_features, store.num_classes)
    )
    settings = config.student
    facts = {
        "kind": "rbm", "inputs": ["feat"], "num_features": store.num_features, "num_classes": store.num_classes,
        "hidden": settings.hidden, "num_layers": settings.num_layers, "norm": settings.norm,
        "num_experts": settings.num_experts, "top_k": settings.top_k, "routing": settings.routing,
        "routing_temperature": 1.0, "input_attention": False, "ensemble_size": 3,
    }  # fmt: skip
    save_student(f"{config.run_dir}/student/rbm", empty_student(**facts), facts)


def teach(config: Config) -> None:
    train_teacher(Mesh.single(), MetricsRecorder(), config, f"{config.run_dir}/graph", f"{config.run_dir}/teacher")


class EnoughError(Exception):
    """So many batches tell how much memory they take."""


class FewBatches(MetricsRecorder):
    def add(self, loop: str, amount: int, total: int, unit: str) -> None:
        self.left = getattr(self, "left", 8) - 1
        if not self.left:
            raise EnoughError


def infer(config: Config) -> None:
    with contextlib.suppress(EnoughError):
        write_soft_labels(Run(config, config.run_dir, FewBatches()), over_parts_here)


def study(config: Config) -> None:
    url = f"{config.run_dir}/student-{config.student.models[0]}-{config.student.kmeans_rows}"
    train_students(Mesh.single(), MetricsRecorder(), config, f"{config.run_dir}/graph", url)


def check(what: str, estimate: float, measured: int) -> None:
    assert abs(estimate - measured) <= SHARE * measured + NOISE, f"{what}: {estimate:,.0f}, measured {measured:,}"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where warming up happens."""
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """A graph for what trains: few edges, many features."""
    source = {
        "num_nodes": 200_000, "degree": 16, "num_communities": 80, "num_features": 128, "train_share": 0.03,
        "val_share": 0.01,
    }  # fmt: skip
    url = tmp_path_factory.mktemp("wide")
    make_graph(configured(url, source))
    return source, str(url)


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(
            {"num_nodes": 500_000, "degree": 48.0, "num_communities": 200, "num_features": 32},
            marks=pytest.mark.slow,
            id="dense",
        ),
        pytest.param({"num_nodes": 900_000, "degree": 10.0, "num_communities": 360, "num_features": 8}, id="large"),
    ],
)
def test_source_and_partition(source: dict[str, Any], tmp_path: Path, tiny: Path) -> None:
    config, measured = configured(tmp_path, source), {}
    (tmp_path / "graph").mkdir()

    def over(unit: str, function: Callable[..., Any], arguments: list[tuple]) -> list[Any]:
        warm = configured(tiny / f"{tmp_path.name}-{len(measured)}", TINY)
        results, measured[unit] = held([(make_graph, (warm,))], [(function, each) for each in arguments])
        return results

    make_graph(config, over)
    facts = source_facts(config.source, config.seed)
    estimates = {
        "node tables": plan_memory.node_task(config, facts),
        "edge pieces": plan_memory.sort_task(config, facts),
        "merges": plan_memory.merge_task(facts),
        "feature pieces": plan_memory.feature_task(config, facts),
        "assignment": plan_memory.assign_task(config, facts),
        "chunks": plan_memory.chunk_task(facts),
        "parts": plan_memory.part_task(config, facts),
    }
    for unit, estimate in estimates.items():
        check(unit, estimate, measured[unit])
    costs = Costs(config, facts, 1, 1)
    for kept, folder in ((costs.source()[1], "source"), (costs.partition()[1], "graph")):
        on_disk = sum(file.stat().st_size for file in (tmp_path / folder).rglob("*.npy"))
        assert on_disk <= kept <= 1.1 * on_disk, folder


def other(conv: str) -> Any:
    return pytest.param({"batch_size": 2048, "conv": conv}, marks=pytest.mark.slow, id=conv)


@pytest.mark.parametrize(
    "settings",  # batches of 6,000 nodes: others are ahead, as is counted
    [
        {"batch_size": 2048},
        {"batch_size": 4096},
        *map(other, ("gat", "gatv2", "sage_max")),
    ],
)
def test_teacher(wide: tuple[dict[str, Any], str], tiny: Path, settings: dict[str, Any]) -> None:
    source, url = wide
    warm = configured(tiny / "-".join(map(str, settings.values())), source | TINY, teacher=settings | {"epochs": 1})
    make_graph(warm)
    config = configured(Path(url), source, teacher=settings | {"epochs": 1})
    storage.remove(f"{url}/teacher")
    _, measured = held([(teach, (warm,))], [(teach, (config,))])
    check("teacher", plan_memory.teacher_worker(config, source_facts(config.source, 0)), measured)


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 2048},
        {"batch_size": 1024, "fanout": [15, 20]},
        {"batch_size": 512, "inference": "exact"},
        pytest.param({"batch_size": 8192, "inference": "exact", "conv": "gat"}, id="gat, exact"),
        *map(other, ("gat", "gatv2", "sage_max")),
    ],
)
def test_soft_labels(wide: tuple[dict[str, Any], str], tiny: Path, settings: dict[str, Any]) -> None:
    source, url = wide
    conv = settings.get("conv", "sage")
    settings = {name: value for name, value in settings.items() if name != "conv"}
    warm = configured(tiny / f"soft-{conv}-{settings['batch_size']}", source | TINY, teacher={"conv": conv})
    config = configured(Path(url), source, soft_labels=settings, teacher={"conv": conv})
    make_graph(warm)
    for each in (warm, config):
        untrained(each)
        reset_soft_labels(each.run_dir)
    _, measured = held([(infer, (warm,))], [(infer, (config,))])
    check("soft labels", plan_memory.inference_actor(config, source_facts(config.source, 0)), measured)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """A graph for teachers that read rows: few edges, many labels, in one part."""
    source = {
        "num_nodes": 80_000, "degree": 4, "num_communities": 250, "num_classes": 250, "num_features": 256,
        "train_share": 0.8, "val_share": 0.1, "test_share": 0.1,
    }  # fmt: skip
    url = tmp_path_factory.mktemp("labelled")
    make_graph(configured(url, source, partition={"num_parts": 1}))
    return source, str(url)


@pytest.mark.slow
def test_sign(labelled: tuple[dict[str, Any], str], tiny: Path) -> None:
    source, url = labelled
    sections = {"partition": {"num_parts": 1}, "teacher": {"model": "sign", "epochs": 1, "batch_size": 4096}}
    warm = configured(tiny / "sign", source | TINY, **sections)
    make_graph(warm)
    config, measured = configured(Path(url), source, **sections), {}
    facts = source_facts(config.source, 0)
    for what, function in (("hops", average), ("teacher", teach), ("soft labels", infer)):
        _, measured[what] = held([(function, (warm,))], [(function, (config,))])
    check("feature hops", plan_memory.hop_task(config, facts), measured["hops"])
    check("teacher", plan_memory.teacher_worker(config, facts), measured["teacher"])
    check("soft labels", plan_memory.inference_actor(config, facts), measured["soft labels"])


def average(config: Config) -> None:
    add_hops(GraphStore.open(f"{config.run_dir}/graph"), config.teacher.hops)


@pytest.mark.slow
@pytest.mark.parametrize("rows", ["nodes", "ids"])
def test_external_teacher(labelled: tuple[dict[str, Any], str], tiny: Path, rows: str) -> None:
    source, url = labelled
    name = "rows.parquet" if rows == "ids" else "rows.npy"

    def of(folder: Path, given: dict[str, Any]) -> Config:
        external = {"paths": [f"{folder}/{name}"], "kind": "logits", "rows": rows}
        teacher = {"external": external, "calibrate": True}
        return configured(folder, given, partition={"num_parts": 1}, teacher=teacher)

    warm, config = of(tiny / f"external-{rows}", source | TINY), of(Path(url), source)
    make_graph(warm)
    for each in (warm, config):
        reset_soft_labels(each.run_dir)
        save_predictions(each)
    facts = source_facts(config.source, 0)
    for what, function, estimate in (
        ("look at predictions", look, plan_memory.external_look),
        ("soft labels", infer, plan_memory.inference_actor),
    ):
        _, measured = held([(function, (warm,))], [(function, (config,))])
        check(what, estimate(config, facts), measured)


def save_predictions(config: Config) -> None:
    """What the labels say, with noise."""
    external, store = config.teacher.external, GraphStore.open(f"{config.run_dir}/graph")
    assert external is not None
    orig, label, split = (store.array(name, 0) for name in ("orig_id", "label", "split"))
    order = np.argsort(orig) if external.rows == "nodes" else np.lexsort((orig, split))
    rows = np.random.default_rng(0).random((store.num_nodes, store.num_classes), np.float32)
    rows[np.arange(len(order)), label[order]] += 1
    if external.rows == "ids":
        table = pa.table({"id": orig[order]} | {f"{c}": rows[:, c] for c in range(rows.shape[1])})
        pq.write_table(table, external.paths[0])
    else:
        np.save(external.paths[0], rows)


def look(config: Config) -> None:
    look_at_external(config, f"{config.run_dir}/graph", f"{config.run_dir}/teacher")


@pytest.mark.slow
def test_evaluate(wide: tuple[dict[str, Any], str], tiny: Path) -> None:
    source, url = wide
    warm, config = (configured(each, source, student={"models": ["rbm"]}) for each in (tiny / "evaluate", Path(url)))
    make_graph(configured(tiny / "evaluate", source | TINY))
    for each in (warm, config):
        untrained(each)
        soften(each.run_dir)
    facts = source_facts(config.source, 0)
    fit, count, summed = (
        [(function, (each,)) for each in (warm, config)] for function in (fit_baselines, count_parts, sum_and_time)
    )
    fitting, counting, timing = (held(calls[:1], calls[1:])[1] for calls in (fit, count, summed))
    check("evaluation task", plan_memory.evaluation_task(config, facts), max(fitting, timing))
    check("evaluation actor", plan_memory.evaluation_actor(config, facts), counting)


def fit_baselines(config: Config) -> None:
    fitted = evaluate.fit_baselines(config, f"{config.run_dir}/graph")
    Path(config.run_dir, "fitted").write_bytes(pickle.dumps(fitted))


def count_parts(config: Config) -> None:
    fitted = pickle.loads(Path(config.run_dir, "fitted").read_bytes())
    counter = evaluate.make_counter(config, config.run_dir, fitted, MetricsRecorder())
    for part in range(config.partition.num_parts):
        counter(part)


def sum_and_time(config: Config) -> None:
    work = Path(config.run_dir, "evaluate", evaluate.WORK)
    counts = [json.loads(path.read_text()) for path in sorted(work.iterdir())]
    evaluate.figures_of(config, config.run_dir, counts)


@pytest.mark.parametrize(
    "settings",
    [
        {"models": ["mlp"], "batch_size": 60_000},
        {"models": ["rbm"], "batch_size": 20_000, "kmeans_rows": 1000},
        {"models": ["rbm"], "batch_size": 2048, "kmeans_rows": 60_000, "num_experts": 2, "top_k": 1},
    ],
    ids=["mlp", "step", "k-means"],
)
def test_student(wide: tuple[dict[str, Any], str], tiny: Path, settings: dict[str, Any]) -> None:
    source, url = wide
    settings = {"epochs": 2, "pretrain_epochs": 1, **settings}
    name = f"student-{settings['models'][0]}-{settings['batch_size']}"
    warm = configured(tiny / name, source | TINY, student=settings | {"batch_size": 512, "kmeans_rows": 500})
    make_graph(warm)
    config = configured(Path(url), source, student=settings)
    for each in (warm, config):
        soften(each.run_dir)
    _, measured = held([(study, (warm,))], [(study, (config,))])
    check("student", plan_memory.student_worker(config, source_facts(config.source, 0)), measured)


@pytest.mark.parametrize(
    ("num_nodes", "degree", "num_parts"),
    [(300_000, 30.0, 8), pytest.param(500_000, 12.0, 64, marks=pytest.mark.slow)],
)
def test_kaminpar(num_nodes: int, degree: float, num_parts: int, tmp_path: Path) -> None:
    """Its own process, which here is the one that is watched."""
    source = {"num_nodes": num_nodes, "degree": degree, "num_communities": num_nodes // 2500, "num_features": 1}
    config = configured(tmp_path, source, partition={"method": "kaminpar", "num_parts": num_parts})
    stage_source(config, f"{tmp_path}/source", over_here)
    for preset in ("fast", "default", "terapart"):
        settings = config.partition.model_copy(update={"preset": preset})
        _, measured = held([], [(solve, (f"{tmp_path}/source", settings.model_dump()))])
        num_edges = storage.read_json(f"{tmp_path}/source/source.json")["num_edges"]
        needed = memory_needed(settings, num_nodes, num_edges, symmetric=True)
        assert 0.75 * needed - NOISE <= measured <= 1.25 * needed + NOISE, f"{preset}: {needed:,}, {measured:,}"


def solve(url: str, settings: dict[str, Any]) -> None:
    """Partition in this process."""
    import kaminpar

    from rbm_dist.config.run import PartitionConfig
    from rbm_dist.graph.csc import Csc
    from rbm_dist.graph.partition import _write_parhip

    config = PartitionConfig(**settings)
    path = Path(url) / "graph.parhip"
    csc = Csc(*(np.load(f"{url}/{name}.npy", mmap_mode="r") for name in ("indptr", "indices")))
    with open(path, "wb") as stream:
        _write_parhip(stream, csc, "nodes", True)
    graph = kaminpar.load_graph(str(path), kaminpar.GraphFileFormat.PARHIP, config.preset == "terapart")
    kaminpar.reseed(0)
    solver = kaminpar.KaMinPar(1, kaminpar.context_by_name(config.preset))
    np.asarray(solver.compute_partition(graph, config.num_parts, config.imbalance), np.int32)
