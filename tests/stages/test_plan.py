"""Plans: what fits and what does not, which key is named, and figures that can be computed by hand."""

from pathlib import Path
from typing import Any

import pytest

from rbm_dist.config.run import Config
from rbm_dist.sources.facts import SourceFacts, source_facts
from rbm_dist.stages import local
from rbm_dist.stages.plan import Hosts, Plan, make_plan, peak_disk, these_hosts
from rbm_dist.stages.plan_cost import Costs

GIB = 2**30
PAPERS = SourceFacts(111_059_956, 2 * 1_615_685_872, 128, 172, 1_207_179, 125_265, True, 7, 7)
SMALL = SourceFacts(1000, 8000, 16, 4, 100, 50, True)


def planned(facts: SourceFacts, memory: float = 64, hosts: int = 1, disk: int | None = None, **sections: Any) -> Plan:
    config = Config.model_validate({"run_dir": "run", **sections})
    return make_plan(config, facts, Hosts(hosts, round(memory * GIB), 8, 0, disk))


def test_a_small_graph_fits() -> None:
    plan = planned(SMALL, memory=16)
    assert plan.problems == []
    assert [stage.name for stage in plan.stages] == [
        "source", "partition", "teacher", "soft_labels", "student", "evaluate",
    ]  # fmt: skip
    assert (plan.parts, plan.hosts_wanted, plan.workers) == (4, 1, 8)


def test_encodings_are_planned_where_they_are_configured() -> None:
    plan = planned(SMALL, encodings={"positional": "fastrp", "hops": 2, "positional_dim": 8})
    stage = next(stage for stage in plan.stages if stage.name == "encodings")
    assert stage.kept == 4 * 8 * 1000
    assert stage.written == 5 * stage.kept  # the projection, two hops, their sum, and with unseen nodes


def test_sign_averages_features_before_it_trains() -> None:
    stage = next(stage for stage in planned(SMALL, teacher={"model": "sign"}).stages if stage.name == "teacher")
    hops, training = ({process.kind: process for process in step} for step in stage.steps)
    assert hops["hop task"].count == 4
    assert hops["hop task"].held == 4 * 250 * 16 * 4, "four copies of a part's features"
    assert "teacher worker" in training


def test_a_partitioner_that_does_not_fit_is_named_with_what_would() -> None:
    (problem,) = planned(PAPERS, memory=24).problems
    assert problem.startswith("partition: needs ")
    assert "assignment task" in problem
    assert "partition.method: streaming" in problem
    assert "terapart" not in problem  # it does not fit either
    assert planned(PAPERS, memory=24, partition={"method": "streaming"}).problems == []
    (problem,) = planned(PAPERS, memory=66).problems
    assert "a run does not begin it" in problem
    assert "set partition.preset: terapart or set partition.method: streaming" in problem
    assert planned(PAPERS, memory=66, partition={"preset": "terapart"}).problems == []


def test_served_parts_and_their_cache_are_counted() -> None:
    def of(stage: str, cluster: dict[str, int]) -> list[tuple[str, int]]:
        (plan,) = [
            each
            for each in planned(PAPERS, hosts=4, cluster=cluster, partition={"num_parts": 16}).stages
            if each.name == stage
        ]
        return [(process.kind, process.count) for process in plan.worst if process.count]

    def held(cluster: dict[str, int]) -> int:
        teacher = planned(PAPERS, hosts=4, cluster=cluster, partition={"num_parts": 16}).stages[2]
        return next(process.held for process in teacher.worst if process.kind == "teacher worker")

    served = {"train_workers": 8, "inference_workers": 8, "shard_servers": 8}
    assert ("shard server", 2) in of("teacher", served)
    assert ("shard server", 2) in of("evaluate", served)
    assert ("shard server", 2) not in of("partition", served)
    cached = held({**served, "cache_mb": 1000}) - held(served)
    assert cached == 10**9 + 2 * PAPERS.num_nodes


def test_training_that_does_not_fit_names_keys_that_were_tried() -> None:
    student = {"batch_size": 2**19, "hidden": 1024}
    problems = planned(PAPERS, memory=24, partition={"method": "streaming"}, student=student).problems
    assert [problem.partition(":")[0] for problem in problems] == ["student"]
    assert "set student.batch_size: 131072" in problems[0]
    student["batch_size"] //= 4
    assert planned(PAPERS, memory=24, partition={"method": "streaming"}, student=student).problems == []


def test_more_hosts_are_advised_where_they_help() -> None:
    cluster = {"train_workers": 32, "inference_workers": 8}
    settings = {"partition": {"method": "streaming", "num_parts": 32}, "cluster": cluster}
    plan = planned(PAPERS, memory=24, **settings)
    assert plan.problems
    assert plan.hosts_wanted is not None
    assert plan.hosts_wanted > 1
    assert planned(PAPERS, memory=24, hosts=plan.hosts_wanted, **settings).problems == []
    assert planned(PAPERS, memory=1, **settings).hosts_wanted is None


def test_a_disk_that_is_too_small() -> None:
    needed = peak_disk(planned(PAPERS, partition={"method": "streaming"}).stages)
    assert planned(PAPERS, disk=needed, partition={"method": "streaming"}).problems == []
    (problem,) = planned(PAPERS, disk=needed - 1, partition={"method": "streaming"}).problems
    assert problem.startswith("student: the run directory needs 222 GB of disk, 222 GB are free; set run_dir")
    assert "partition.features: int8" in problem


def test_gpus_and_parts_that_are_not_there() -> None:
    problems = planned(SMALL, cluster={"use_gpu": True}, partition={"num_parts": 2000}).problems
    assert problems == [
        "GPUs: 2 worker(s) want one each, there are 0; set cluster.train_workers and cluster.inference_workers, or "
        "cluster.use_gpu: false",
        "partition.num_parts: 2000 parts for 1,000 node(s)",
    ]


def test_one_host_sends_nothing() -> None:
    assert all(stage.network == 0 for stage in planned(PAPERS).stages)
    sending = [stage.name for stage in planned(PAPERS, hosts=4, cluster={"train_workers": 4}).stages if stage.network]
    assert sending == ["teacher", "soft_labels", "student"]


def test_what_routed_rows_send() -> None:
    config = Config.model_validate(
        {
            "run_dir": "run", "cluster": {"train_workers": 2, "expert_parallel": 2},
            "student": {
                "models": ["rbm"], "epochs": 3, "pretrain_epochs": 1, "hidden": 8, "top_k": 1, "batch_size": 100,
            },
        }
    )  # fmt: skip
    # One copy of each row; half of the experts are on the other host. Inputs there and outputs back, and gradients.
    rows = 2 * 1000 / 2 * 2 * 4 * (16 + 8 + 8 + 4)
    gradients = 2 * 4 * (16 * 8 + 8 + 8 * 4 + 4) * 3 * 10
    assert Costs(config, SMALL, 2, 2).student()[3] == rows + gradients
    assert Costs(config, SMALL, 1, 2).student()[3] == 0


def test_time_falls_with_cores_and_features_in_less_space() -> None:
    slow, fast = (Costs(Config(run_dir="run"), PAPERS, 1, cores) for cores in (1, 16))
    assert fast.seconds("source") < slow.seconds("source") / 6
    int8 = Config.model_validate({"run_dir": "run", "partition": {"features": "int8"}})
    saved = slow.partition()[1] - Costs(int8, PAPERS, 1, 1).partition()[1]
    assert saved == 3 * PAPERS.num_nodes * PAPERS.num_features


def test_these_hosts_are_this_machine_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = these_hosts(str(tmp_path / "not" / "there"), 1, None, None, 0)
    assert hosts.memory > 0
    assert hosts.cores > 0
    assert hosts.disk
    monkeypatch.setenv("RBM_DIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RBM_DIST_CACHE_GB", "3")
    assert these_hosts("memory://run", 2, 3.5, 7, 1) == Hosts(2, round(3.5 * GIB), 7, 1, None, 3 * 10**9)


@pytest.mark.parametrize("model", ["mlp", "mlp_x4", "ensemble", "moe", "rbm"])
def test_every_student_can_be_planned(model: str) -> None:
    stages = planned(SMALL, student={"models": [model]}).stages
    assert all(stage.memory > 0 and stage.seconds > 0 for stage in stages)


def test_disk_is_what_a_small_run_takes(tmp_path: Path) -> None:
    config = Config.model_validate(
        {
            "run_dir": "run",
            "source": {
                "kind": "synthetic", "num_nodes": 20_000, "num_features": 200, "degree": 6, "num_communities": 47,
            },
            "partition": {"method": "streaming", "num_parts": 2, "passes": 0},
            "teacher": {"epochs": 1, "fanout": [3, 3]},
            "soft_labels": {"hidden": True, "store": "float16"},
            "encodings": {"positional": "fastrp", "hops": 1, "label_propagation": True, "iterations": 1, "folds": 2},
            "student": {"models": ["rbm"], "epochs": 2, "pretrain_epochs": 1, "batch_size": 4000, "kmeans_rows": 500},
        }
    )  # fmt: skip
    local.prepare(config, str(tmp_path / "made"))
    local.train(config, str(tmp_path / "made"), str(tmp_path / "student"))
    made = tmp_path / "made"
    added = {"soft_labels": ["soft", "hidden"], "encodings": ["pos", "prop"]}
    taken = {
        stage: sum(path.stat().st_size for name in names for path in made.glob(f"graph/*/{name}.npy"))
        for stage, names in added.items()
    }
    taken["teacher"] = sum(path.stat().st_size for path in (made / "teacher").rglob("*.safetensors"))
    graph = sum(path.stat().st_size for path in (made / "graph").rglob("*.npy"))
    taken["partition"] = graph - taken["soft_labels"] - taken["encodings"]
    experts = [path for path in (tmp_path / "student/rbm").rglob("*.safetensors") if "pretrain" not in str(path)]
    taken["student"] = sum(path.stat().st_size for path in experts)
    costs = Costs(config.model_copy(update={"cluster": local._IN_PROCESS}), source_facts(config.source, 0), 1, 1)
    for stage, size in taken.items():
        _, kept, _, _ = getattr(costs, stage)()
        assert kept == pytest.approx(size, rel=0.1), stage


def test_the_cache_of_a_run_on_object_storage_is_counted() -> None:
    config = Config.model_validate({"run_dir": "s3://bucket/run", "partition": {"method": "streaming"}})
    plan = make_plan(config, PAPERS, Hosts(4, 64 * GIB, 8, 0, None, 20 * 10**9))
    edges = 4 * PAPERS.num_edges + 12 * PAPERS.num_nodes
    teacher = next(stage for stage in plan.stages if stage.name == "teacher")
    assert plan.cached == max(edges, *(stage.mapped for stage in plan.stages[2:]))
    (problem,) = [each for each in plan.problems if each.startswith("teacher")]
    assert f"{teacher.mapped / 1e9:,.2f} GB of run_dir in each host's cache, which may have 20.00 GB" in problem
    assert "or set cluster.shard_servers" in problem
    served = config.model_copy(update={"cluster": config.cluster.model_copy(update={"shard_servers": 4})})
    problems = make_plan(served, PAPERS, Hosts(4, 64 * GIB, 8, 0, None, 20 * 10**9)).problems
    assert not [each for each in problems if each.startswith("teacher")], "each host has a quarter"
    assert make_plan(config, PAPERS, Hosts(4, 64 * GIB, 8)).cached is None
