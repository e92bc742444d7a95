"""Figures of a run, counted part by part: against one pass over the whole graph, and with other hosts' parts away."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rbm_dist.config.load import load
from rbm_dist.config.run import Config
from rbm_dist.graph.splits import TEST
from rbm_dist.graph.store import GraphStore
from rbm_dist.serve.accuracy import hits, student_accuracy
from rbm_dist.serve.artifact import load_mixture, load_student
from rbm_dist.serve.specialisation import mixture_figures
from rbm_dist.stages import evaluate
from rbm_dist.stages.local import MetricsRecorder
from tests.stages.conftest import SHORT, kill_once, rbm_dist

EVALUATE = ["evaluate", "configs/quickstart.yaml", *SHORT]


def results(run: Path) -> dict[str, Any]:
    """Without what is measured in time."""
    found = json.loads((run / "results.json").read_text())
    return {key: value for key, value in found.items() if key not in ("latency_us", "seconds")}


def config_of(run: Path) -> Config:
    return load(run / "config.json", [])


@pytest.fixture
def unevaluated(copied_run: Path) -> Path:
    """The finished run, but for its last stage."""
    shutil.rmtree(copied_run / "evaluate")
    (copied_run / "results.json").unlink()
    return copied_run


def test_figures_are_those_of_one_pass_over_the_whole_graph(finished_run: Path) -> None:
    found, store = results(finished_run), GraphStore.open(f"{finished_run}/graph")
    mixture, merged = load_mixture(f"{finished_run}/student/rbm")
    assert found["students"]["rbm"].pop("mixture") == {"merged": merged, **mixture_figures(mixture, store)}
    for kind, accuracy in found["students"].items():
        assert accuracy == student_accuracy(load_student(f"{finished_run}/student/{kind}"), store)
    soft, label = (store.gather(name, np.arange(store.num_nodes)) for name in ("soft", "label"))
    test = store.gather("split", np.arange(store.num_nodes)) == TEST
    assert found["teacher"]["test"] == np.mean((soft.argmax(1) == label)[test])
    baselines = evaluate.baseline_classes(store, evaluate.fit_baselines(config_of(finished_run), store.url))
    assert found["baselines"] == {name: hits(store, classes).accuracy() for name, classes in baselines.items()}


def test_a_part_is_counted_and_models_are_timed_where_no_other_part_is(unevaluated: Path) -> None:
    run, config, recorder = str(unevaluated), config_of(unevaluated), MetricsRecorder()
    baselines = evaluate.fit_baselines(config, f"{run}/graph")
    whole = [evaluate.make_counter(config, run, baselines, recorder)(part) for part in range(4)]
    shutil.rmtree(unevaluated / "evaluate")
    shutil.copytree(unevaluated / "graph", unevaluated / "all")
    for part in range(4):
        shutil.rmtree(unevaluated / "graph")
        shutil.copytree(unevaluated / "all", unevaluated / "graph")
        for other in {0, 1, 2, 3} - {part}:
            shutil.rmtree(unevaluated / f"graph/part-{other:05d}")
        assert evaluate.make_counter(config, run, baselines, recorder)(part) == whole[part]
        if part == 0:
            figures = evaluate.figures_of(config, run, whole)
    assert figures["latency_us"].keys() == {"teacher", "mlp", "rbm"}


def test_a_part_that_is_counted_is_not_counted_again(unevaluated: Path) -> None:
    run, config, recorder = str(unevaluated), config_of(unevaluated), MetricsRecorder()
    baselines = evaluate.fit_baselines(config, f"{run}/graph")
    counter = evaluate.make_counter(config, run, baselines, recorder)
    counted, kept = counter(1), unevaluated / "evaluate/work/part-00001.json"
    kept.write_text(json.dumps(counted | {"experts": "kept"}))
    assert counter(1) == counted | {"experts": "kept"}


@pytest.mark.slow
def test_killed_among_its_parts_it_goes_on(finished_run: Path, unevaluated: Path) -> None:
    work = unevaluated / "evaluate" / "work"
    kill_once(lambda: any(work.glob("part-*.json")), *EVALUATE, f"run_dir={unevaluated}")
    assert not (unevaluated / "results.json").exists()
    done = rbm_dist(*EVALUATE, f"run_dir={unevaluated}")
    assert done.returncode == 0, done.stderr
    assert "went on from where it was" in done.stdout
    assert results(unevaluated) == results(finished_run)
    assert not work.exists()
