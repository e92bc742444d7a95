"""Experiments: how the parts of a cell are merged; a message naming file, key, reason and run for what is refused."""

import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rbm_dist.config.experiment import PREPARED, Trial, load_experiment, merge
from rbm_dist.config.run import Config
from rbm_dist.config.source import NpzConfig, TablesConfig
from rbm_dist.errors import InputError

EXPERIMENTS = Path(__file__).parents[2] / "configs" / "experiments"
SMALL = """
run_dir: runs/small
data_dir: /data
seeds: 2
base: {student: {dropout: 0.1, lr: 0.1, weight_decay: 0.1, hidden: 10, epochs: 50}}
datasets:
  digits: {source: {kind: digits}, student: {lr: 0.2, weight_decay: 0.2, hidden: 20, epochs: 51}}
  cora: {source: {kind: npz, path: cora.npz}}
settings:
  transductive: {student: {weight_decay: 0.3, hidden: 30, epochs: 52}}
  inductive: {source: {unseen_share: 0.2}}
students:
  GLNN: {student: {models: [mlp], hidden: 40, epochs: 53}}
  RbM: {objectives: [KD], student: {models: [rbm]}}
objectives:
  KD: {student: {epochs: 54}}
  KRD: {student: {objective: krd}, soft_labels: {entropy_change: true}}
tuned:
  - {dataset: cora, student: GLNN, set: {student: {temperature: 3}}}
  - {objective: KD, setting: inductive, set: {student: {temperature: 4}}}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "experiment.yaml"
    file.write_text(SMALL)
    return file


def trials(path: Path, *overrides: str) -> dict[str, Trial]:
    return {trial.id: trial for trial in load_experiment(path, list(overrides))[1]}


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_experiment(path, list(overrides))
    return str(caught.value)


def test_the_cells_are_the_product_less_what_a_student_leaves_out(path: Path) -> None:
    methods = [("GLNN", "KD"), ("GLNN", "KRD"), ("RbM", "KD")]
    expected = [
        f"{dataset}/{setting}/{student}/{objective}/seed-{seed}"
        for seed in (0, 1)
        for dataset in ("digits", "cora")
        for setting in ("transductive", "inductive")
        for student, objective in methods
    ]
    assert list(trials(path)) == expected


def test_the_later_part_wins(path: Path) -> None:
    student = trials(path)["digits/transductive/GLNN/KD/seed-0"].config.student
    assert (student.dropout, student.lr, student.weight_decay) == (0.1, 0.2, 0.3)  # base, dataset, setting
    assert (student.hidden, student.epochs) == (40, 54)  # student, objective
    assert trials(path)["digits/transductive/GLNN/KRD/seed-0"].config.student.epochs == 53


def test_a_cell_is_what_a_person_would_have_written(path: Path) -> None:
    found = trials(path)["cora/inductive/GLNN/KRD/seed-1"].config
    assert found == Config.model_validate(
        {
            "run_dir": f"{os.getcwd()}/runs/small",
            "seed": 1,
            "source": {"kind": "npz", "path": "/data/cora.npz", "unseen_share": 0.2},
            "soft_labels": {"entropy_change": True},
            "student": {
                "models": ["mlp"], "dropout": 0.1, "lr": 0.1, "weight_decay": 0.1, "hidden": 40, "epochs": 53,
                "objective": "krd", "temperature": 3,
            },
            "cluster": {"train_workers": 1, "inference_workers": 1},
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("cell", "temperature"),
    [
        ("digits/transductive/GLNN/KD", 1),
        ("cora/transductive/GLNN/KD", 3),
        ("cora/inductive/GLNN/KRD", 3),
        ("cora/inductive/GLNN/KD", 4),  # both match: the later
        ("digits/inductive/RbM/KD", 4),
    ],
)
def test_tuned_values_reach_the_cells_they_match(path: Path, cell: str, temperature: float) -> None:
    assert trials(path)[f"{cell}/seed-0"].config.student.temperature == temperature


def test_students_share_a_graph_unless_they_need_another(path: Path) -> None:
    found = trials(path)
    glnn, krd, rbm = (found[f"digits/inductive/{name}/seed-0"] for name in ("GLNN/KD", "GLNN/KRD", "RbM/KD"))
    assert glnn.prepared_hash == rbm.prepared_hash != krd.prepared_hash
    assert len({glnn.config_hash, rbm.config_hash, krd.config_hash}) == 3
    others = (found["digits/inductive/GLNN/KD/seed-1"], found["digits/transductive/GLNN/KD/seed-0"])
    assert glnn.prepared_hash not in {other.prepared_hash for other in others}


@pytest.mark.parametrize("section", PREPARED)
def test_the_hashes_cover_what_decides_the_result(path: Path, section: str) -> None:
    override = {
        "seed": "seeds=[3]", "source": "base.source.train_per_class=5", "partition": "base.partition.num_parts=3",
        "teacher": "base.teacher.lr=0.5", "soft_labels": "base.soft_labels.hidden=true",
        "encodings": "base.encodings.hops=2",
    }[section]  # fmt: skip
    before, after = (next(iter(trials(path, *given).values())) for given in ([], [override]))
    assert before.prepared_hash != after.prepared_hash
    assert before.config_hash != after.config_hash


def test_where_the_results_lie_is_no_part_of_the_hashes(path: Path) -> None:
    before, after = (next(iter(trials(path, *given).values())) for given in ([], ["run_dir=elsewhere", "timeout_s=3"]))
    assert (before.config_hash, before.prepared_hash) == (after.config_hash, after.prepared_hash)


@pytest.mark.parametrize(
    ("data_dir", "given", "expected"),
    [
        ("/data", "cora.npz", "/data/cora.npz"),
        ("s3://bucket/data/", "cora.npz", "s3://bucket/data/cora.npz"),
        ("/data", "/other/cora.npz", "/other/cora.npz"),
        ("/data", "s3://bucket/cora.npz", "s3://bucket/cora.npz"),
    ],
)
def test_relative_paths_start_at_the_data_directory(path: Path, data_dir: str, given: str, expected: str) -> None:
    found = trials(path, f"data_dir={data_dir}", f"datasets.cora.source.path={given}")
    source = found["cora/transductive/RbM/KD/seed-0"].config.source
    assert isinstance(source, NpzConfig)
    assert source.path == expected


def test_tables_start_at_the_data_directory(path: Path) -> None:
    found = trials(
        path, "datasets={t: {source: {kind: tables, nodes: t/nodes.csv, edges: /other/edges.csv}}}", "tuned=[]"
    )
    source = found["t/transductive/RbM/KD/seed-0"].config.source
    assert isinstance(source, TablesConfig)
    assert (source.nodes, source.edges) == ("/data/t/nodes.csv", "/other/edges.csv")


def test_paths_are_absolute_and_the_hashes_are_of_those_that_were_given(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = set()
    for name in ("a", "b"):
        (folder := path.parent / name).mkdir()
        monkeypatch.chdir(folder)
        experiment, _ = load_experiment(path, ["data_dir=d"])
        assert (experiment.run_dir, experiment.data_dir) == (f"{folder}/runs/small", f"{folder}/d")
        trial = trials(path, "data_dir=d")["cora/transductive/RbM/KD/seed-0"]
        assert isinstance(trial.config.source, NpzConfig)
        assert trial.config.source.path == f"{folder}/d/cora.npz"
        hashes.add((trial.config_hash, trial.prepared_hash))
    assert len(hashes) == 1, "results are known again where the project was moved"


def test_seeds_are_a_number_or_a_list(path: Path) -> None:
    assert load_experiment(path, ["seeds=3"])[0].seeds == (0, 1, 2)
    assert load_experiment(path, ["seeds=[5, 2]"])[0].seeds == (5, 2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("base.student.lr=-1", "student.lr: .*greater than 0, found -1 .in cora × transductive × GLNN × KD and 5 more"),
        ("students.RbM.student.top_q=3", "student.top_q: unknown key .in digits × transductive × RbM × KD and 3 more"),
        ("objectives.KRD.soft_labels=null", "soft_labels: .*found None .in digits × transductive × GLNN × KRD"),
        ("settings.inductive.source.unseen_share=1", "source.unseen_share: .*found 1 .in digits × inductive × GLNN"),
        ("students.RbM.student.pretrain_epochs=60", "student.pretrain_epochs: 60 >= epochs: 54 .in digits × "),
        ("students.GLNN.student.models=[mlp, moe]", "student.models: a run trains one student, found mlp, moe .in"),
        ("base.seed=3", "base: seed is not a section"),
        ("datasets.cora.run_dir=a", "datasets.cora: run_dir is not a section"),
        ("students.RbM.cluster={}", "students.RbM: cluster is not a section"),
        ("students.RbM.objectives=[PKD]", "students.RbM.objectives: no objective is named 'PKD'; there are KD, KRD"),
        ("tuned=[{student: rbm, set: {}}]", "tuned.0.student: no student is named 'rbm'; there are GLNN, RbM"),
        ("tuned=[{student: RbM}]", "tuned.0.set: missing"),
        ("tuned=[{studnet: RbM, set: {}}]", "tuned.0.studnet: unknown key"),
        ("seeds=0", "seeds: .*at least 1 item"),
        ("seeds=[1, 1]", "seeds: A seed occurs twice"),
        ("seeds=-1", "seeds: "),
        ("seeds=true", "seeds: .*found True"),
        ("datasets={}", "datasets: .*at least 1 item"),
        ("datasets.a/b={}", "datasets.a/b.*should match pattern"),
        ("settings.transductive=3", "settings.transductive: .*found 3"),
        ("data=3", "data: unknown key"),
    ],
)
def test_what_cannot_be_run_is_refused_by_its_key(path: Path, override: str, message: str) -> None:
    found = refusal(path, override)
    assert found.startswith(str(path))
    with pytest.raises(InputError, match=message):
        load_experiment(path, [override])
    assert "\n" not in found


def test_files_that_cannot_be_read_are_named(path: Path) -> None:
    assert refusal(path.with_name("no.yaml")).endswith(
        "no.yaml: cannot read the configuration: No such file or directory"
    )
    path.write_text("a: b: c")
    assert refusal(path).startswith(f"{path}: not valid YAML: ")
    path.write_text("- a")
    assert refusal(path) == f"{path}: a configuration is a mapping of keys to values, found list"
    path.write_text("datasets: {a: {}}")
    assert "students: missing" in refusal(path)


def test_a_key_that_is_given_twice_is_refused(path: Path) -> None:
    path.write_text(SMALL.replace("  digits: {", "  cora: {}\n  digits: {"))
    assert refusal(path) == f"{path}: datasets.cora: given twice (lines 7 and 9)"


trees = st.recursive(st.integers(), lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3)).filter(
    lambda tree: isinstance(tree, dict)
)


@given(trees, trees, trees)
def test_merging_is_laying_one_over_the_other(a: dict, b: dict, c: dict) -> None:
    before = yaml.safe_dump([a, b, c])
    assert merge(a, {}) == a == merge({}, a) == merge(a, a)
    assert merge(a, b, c) == merge(merge(a, b), c)
    assert merge(a, b) == {key: over(a, b, key) for key in a.keys() | b.keys()}
    assert yaml.safe_dump([a, b, c]) == before


def over(a: dict, b: dict, key: str) -> object:
    if isinstance(a.get(key), dict) and isinstance(b.get(key), dict):
        return merge(a[key], b[key])
    return b.get(key, a.get(key))


@pytest.mark.parametrize("name", sorted(file.name for file in EXPERIMENTS.glob("*.yaml")))
def test_every_experiment_that_is_shipped_loads(name: str) -> None:
    experiment, found = load_experiment(EXPERIMENTS / name)
    assert {trial.dataset for trial in found} == set(experiment.datasets)
    assert len(found) == len({trial.id for trial in found})
