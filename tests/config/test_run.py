"""Configuration: what is accepted, and a message naming file, key and reason for what is not."""

import json
import math
import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from rbm_dist.config.load import flatten, load, locations
from rbm_dist.config.run import Config
from rbm_dist.config.source import DigitsConfig
from rbm_dist.errors import InputError
from rbm_dist.parallel.mesh import Mesh

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with the one key that has no default."""
    file = tmp_path / "run.yaml"
    file.write_text("run_dir: runs/a\n")
    return file


def refusal(path: Path, text: str | None = None, overrides: list[str] | None = None) -> str:
    """The message with which a configuration is refused."""
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError) as caught:
        load(path, overrides)
    return str(caught.value)


def test_one_key_is_enough(path: Path) -> None:
    config = load(path)
    assert config.run_dir == f"{os.getcwd()}/runs/a"
    assert config.source == DigitsConfig()
    assert config == Config(run_dir=f"{os.getcwd()}/runs/a")


@pytest.mark.parametrize("name", sorted(file.name for file in CONFIGS.glob("*.yaml")))
def test_every_configuration_that_is_shipped_loads(name: str) -> None:
    given = yaml.safe_load((CONFIGS / name).read_text())
    kind = given.get("source", {}).get("kind", "digits")
    inputs = {"npz": ["source.path=/data/graph.npz"], "tables": ["source.nodes=/data/n", "source.edges=/data/e"]}
    config = load(CONFIGS / name, inputs.get(kind, []))
    assert config.run_dir == os.path.abspath(given["run_dir"])
    assert config.source.kind == kind


def test_the_schema_that_is_shipped_is_current() -> None:
    shipped = json.loads((CONFIGS / "schema.json").read_text())
    assert shipped == Config.model_json_schema(), "write it anew: rbm-dist config --schema > configs/schema.json"


def test_editors_see_the_same_errors_by_the_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    validator = jsonschema.Draft202012Validator(json.loads((CONFIGS / "schema.json").read_text()))
    good = {"run_dir": "a", "teacher": {"fanout": [5, -1]}, "source": {"kind": "digits", "neighbors": 3}}
    assert validator.is_valid(good)
    for name, section in (("student", {"top_q": 3}), ("teacher", {"lr": 0}), ("source", {"kind": "csv"}), ("seed", -1)):
        assert not validator.is_valid(good | {name: section})
    assert not validator.is_valid({"seed": 3})


# What is written down comes back.


def test_a_dump_round_trips(path: Path) -> None:
    overrides = [
        "teacher.lr=1e-7",
        "teacher.fanout=[5, -1, 0]",
        "student.models=[rbm]",
        "source.kind=npz",
        "source.path=a.npz",
    ]
    config = load(path, overrides)
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load(path) == config
    path.write_text(json.dumps(config.model_dump(mode="json")))
    assert load(path) == config


def test_flat_keys_set_the_same_values(path: Path) -> None:
    config = load(path, ["teacher.lr=0.5", "cluster.train_workers=3"])
    flat = flatten(config.model_dump(mode="json"))
    assert (flat["teacher.lr"], flat["cluster.train_workers"]) == (0.5, 3)
    assert load(path, [f"{key}={json.dumps(value)}" for key, value in flat.items()]) == config


@pytest.mark.parametrize("text", ["1e-7", "1E-7", "1.0e-7", "0.0000001", "'1e-7'"])
def test_a_small_number_is_a_number_however_it_is_written(path: Path, text: str) -> None:
    path.write_text(f"run_dir: a\nteacher:\n  lr: {text}\n")
    assert load(path).teacher.lr == 1e-7
    assert load(path, [f"student.lr={text}"]).student.lr == 1e-7


# Where files are.


@pytest.mark.parametrize(
    ("source", "key"),
    [
        ("{kind: npz, path: HERE}", "path"),
        ("{kind: pyg, path: HERE}", "path"),
        ("{kind: pyg, dataset: a.B, arguments: {root: HERE, name: a}}", "arguments.root"),
        ("{kind: ogb, name: ogbn-arxiv, root: HERE}", "root"),
        ("{kind: tables, nodes: HERE, edges: /e.csv}", "nodes"),
        ("{kind: tables, nodes: /n.csv, edges: HERE}", "edges"),
    ],
)
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a/b", "{here}/a/b"),
        ("./b/", "{here}/b"),
        ("part-[0-9]*/e?.csv", "{here}/part-[0-9]*/e?.csv"),
        ("~/a", "{home}/a"),
        ("file://a/b", "{here}/a/b"),
        ("/a/*.csv", "/a/*.csv"),
        ("s3://bucket/a/*.csv", "s3://bucket/a/*.csv"),
        ("no-such-scheme://a", "no-such-scheme://a"),
    ],
)
def test_local_paths_are_absolute(
    path: Path, source: str, key: str, given: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, home = path.parent / "here", path.parent / "home"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    config = load(path, [f"source={source.replace('HERE', json.dumps(given))}", f"run_dir={given}"])
    expected = expected.format(here=here, home=home)
    assert flatten(config.model_dump())[f"source.{key}"] == expected == config.run_dir == locations(config)["run_dir"]
    assert locations(config)[f"source.{key}"] == expected


def test_a_path_that_is_a_default_is_absolute(path: Path) -> None:
    config = load(path, ["source.kind=ogb", "source.name=ogbn-arxiv"])
    assert locations(config)["source.root"] == f"{os.getcwd()}/dataset"
    assert (
        load(
            path,
            [f"{key}={value}" for key, value in locations(config).items()]
            + ["source.kind=ogb"]
            + ["source.name=ogbn-arxiv"],
        )
        == config
    )


# Overrides.


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("seed=7", "seed", 7),
        ("run_dir=s3://bucket/a=b", "run_dir", "s3://bucket/a=b"),
        ("student.num_experts=16", "student.num_experts", 16),
        (" student.num_experts =16", "student.num_experts", 16),
        ("teacher.fanout=[15, 10, 5]", "teacher.fanout", [15, 10, 5]),
        ("student.models=[mlp]", "student.models", ["mlp"]),
        ("cluster.use_gpu=true", "cluster.use_gpu", True),
        ("teacher.patience=null", "teacher.patience", None),
        ("source={kind: digits, neighbors: 3}", "source.neighbors", 3),
    ],
)
def test_an_override_is_a_yaml_value(path: Path, override: str, key: str, value: Any) -> None:
    assert flatten(load(path, [override]).model_dump(mode="json"))[key] == value


def test_overrides_win_over_the_file_and_later_over_earlier(path: Path) -> None:
    path.write_text("run_dir: a\nteacher: {lr: 0.5, epochs: 3}\n")
    config = load(path, ["teacher.lr=0.25", "teacher.lr=0.125"])
    assert (config.teacher.lr, config.teacher.epochs) == (0.125, 3)


@pytest.mark.parametrize("override", ["x", "=3", "a..b=1", ".seed=1", "", "seed"])
def test_a_malformed_override_is_shown(path: Path, override: str) -> None:
    assert refusal(path, overrides=[override]).startswith(f"command line: '{override}' is not of the form key=value")


@pytest.mark.parametrize("value", ["[[", "{a: ", "'a", "2024-13-45", "[" * 5000])
def test_an_override_that_is_no_yaml_is_shown(path: Path, value: str) -> None:
    message = refusal(path, overrides=[f"teacher.lr={value}"])
    assert message == f"command line: teacher.lr: '{value}' is not a YAML value"


def test_one_part_has_one_worker_unless_more_are_asked_for(path: Path) -> None:
    path.write_text("run_dir: a\npartition: {num_parts: 1}\n")
    assert load(path).cluster.train_workers == load(path).cluster.inference_workers == 1
    assert load(path, ["partition.num_parts=2"]).cluster.train_workers == 2
    with pytest.raises(InputError, match="1 part"):
        load(path, ["cluster.train_workers=2"])


def test_an_override_below_a_value_is_refused(path: Path) -> None:
    message = refusal(path, "run_dir: a\nseed: 3\n", ["seed.x=3"])
    assert message == "command line: seed.x: 'seed' is a value, not a section"


def test_a_bad_override_says_that_it_came_from_the_command_line(path: Path) -> None:
    assert refusal(path, overrides=["teacher.lr=-1"]).startswith(f"{path} (and the command line): teacher.lr: ")
    assert refusal(path, overrides=["teacher.fanout=[3, x]"]).startswith(
        f"{path} (and the command line): teacher.fanout.1: "
    )
    assert refusal(path, "run_dir: a\nteacher: {lr: -1}\n", ["seed=3"]).startswith(f"{path}: teacher.lr: ")


# Refusals.


@pytest.mark.parametrize(
    ("text", "key", "reason"),
    [
        ("stduent: {}", "stduent", "unknown key"),
        ("student: {top_q: 3}", "student.top_q", "unknown key"),
        ("source: {kind: digits, path: a.npz}", "source.path", "unknown key"),
        ("source: {kind: npz}", "source.path", "missing"),
        ("source: {neighbors: 3}", "source", "kind is missing; it is one of digits, npz, regions"),
        ("source: {kind: csv}", "source", "kind is 'csv'; it is one of digits, npz, regions"),
        ("source: digits", "source", "found 'digits'"),
        ("source: {kind: npz, path: 3}", "source.path", "valid string, found 3"),
        ("source: {kind: npz, path: a, num_classes: 0}", "source.num_classes", "found 0"),
        ("source: {kind: digits, unseen_share: 1.0}", "source.unseen_share", "less than 1, found 1.0"),
        ("source: {kind: regions, homophily: 2}", "source.homophily", "less than or equal to 1, found 2"),
        ("student: {krd: {bins: 0}}", "student.krd.bins", "found 0"),
        ("student: {adversarial: {epsilon: 0}}", "student.adversarial.epsilon", "greater than 0"),
        ("encodings: {folds: 1}", "encodings.folds", "greater than or equal to 2, found 1"),
        (
            "source: {kind: digits, normalize: max}",
            "source.normalize",
            "'column' or 'none', found 'max'",
        ),
        ("seed: two", "seed", "valid integer.*found 'two'"),
        ("seed: -1", "seed", "greater than or equal to 0, found -1"),
        ("seed: 2147483648", "seed", "less than 2147483648"),
        ("seed: 1.5", "seed", "found 1.5"),
        ("seed: true", "seed", "should be a number, found True"),
        ("teacher: {lr: true}", "teacher.lr", "should be a number, found True"),
        ("teacher: {lr: fast}", "teacher.lr", "valid number.*found 'fast'"),
        ("teacher: {lr: 0}", "teacher.lr", "greater than 0, found 0"),
        ("teacher: {lr: .inf}", "teacher.lr", "finite number, found inf"),
        ("teacher: {lr: .nan}", "teacher.lr", "finite number, found nan"),
        ("teacher: {lr: [0.1]}", "teacher.lr", r"valid number, found \[0.1\]"),
        ("teacher: {dropout: 1.0}", "teacher.dropout", "less than 1, found 1.0"),
        ("teacher: {weight_decay: -0.1}", "teacher.weight_decay", "greater than or equal to 0"),
        ("teacher: {epochs: 0}", "teacher.epochs", "greater than or equal to 1, found 0"),
        ("teacher: {fanout: []}", "teacher.fanout", r"at least 1 item.*found \[\]"),
        ("teacher: {fanout: [5, -2]}", "teacher.fanout.1", "greater than or equal to -1, found -2"),
        ("teacher: {fanout: 5}", "teacher.fanout", "valid tuple, found 5"),
        ("teacher: {fanout: [5, true]}", "teacher.fanout.1", "should be a number, found True"),
        ("teacher: 3", "teacher", "found 3"),
        ("teacher:", "teacher", "found None"),
        ("partition: {method: metis}", "partition.method", "'streaming' or 'random', found 'metis'"),
        ("partition: {num_parts: 0}", "partition.num_parts", "found 0"),
        ("partition: {imbalance: 0}", "partition.imbalance", "greater than 0"),
        ("soft_labels: {inference: full}", "soft_labels.inference", "'sampled' or 'exact', found 'full'"),
        ("student: {models: []}", "student.models", "at least 1 item"),
        ("student: {models: [gcn]}", "student.models.0", "'moe' or 'rbm', found 'gcn'"),
        ("student: {label_weight: 1.1}", "student.label_weight", "less than or equal to 1"),
        ("cluster: {use_gpu: maybe}", "cluster.use_gpu", "valid boolean.*found 'maybe'"),
        ("teacher: {sampler: dgl}", "teacher.sampler", "found 'dgl'"),
        ("cluster: {max_failures: -1}", "cluster.max_failures", "found -1"),
        ("cluster: {silence_timeout_s: 0}", "cluster.silence_timeout_s", "greater than 0"),
        ("3: x", "3", "Keys should be strings"),
    ],
)
def test_a_wrong_value_is_refused_by_its_key(path: Path, text: str, key: str, reason: str) -> None:
    path.write_text(f"run_dir: a\n{text}\n")
    start = f"{path}: {key}: "
    with pytest.raises(InputError, match=reason) as caught:
        load(path)
    assert str(caught.value).startswith(start)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("student: {top_k: 17}", "student.top_k: 17 > num_experts: 16"),
        ("student: {epochs: 30}", "student.pretrain_epochs: 30 >= epochs: 30"),
        ("student: {models: [mlp, rbm, mlp]}", "student.models: mlp, rbm, mlp names a model twice"),
        (
            "cluster: {precision: bf16}",
            "cluster.precision: bf16 is for GPUs (cluster.use_gpu: true); on CPUs set float32, or auto",
        ),
        (
            "soft_labels: {entropy_change: true, store: top_m}",
            "soft_labels.entropy_change: needs soft_labels.store: float32 or float16, not top_m",
        ),
        (
            "cluster: {train_workers: 4, expert_parallel: 3}",
            "cluster.expert_parallel: 3 does not divide train_workers: 4",
        ),
        (
            "cluster: {train_workers: 64}",
            "partition.num_parts: 4 part(s) for cluster.train_workers: 64, 60 of which would have nothing to do; "
            "set num_parts to at least 64, or train_workers to at most 4",
        ),
        (
            "cluster: {inference_workers: 5}",
            "partition.num_parts: 4 part(s) for cluster.inference_workers: 5, 1 of which would have nothing to do",
        ),
        (
            "cluster: {train_workers: 64, expert_parallel: 64}\npartition: {num_parts: 64}",
            "cluster.expert_parallel: 64 workers share student.num_experts: 16, and some would have none; "
            "set it to 16, or to 1",
        ),
        (  # two each: none is left for the fourth
            "cluster: {train_workers: 4, expert_parallel: 4}\nstudent: {num_experts: 5}",
            "cluster.expert_parallel: 4 workers share student.num_experts: 5, and some would have none; set it to 2",
        ),
        ("soft_labels: {fanout: [5]}", "soft_labels.fanout: 1 layers, but teacher.fanout has 2"),
        (
            "soft_labels: {inference: exact, fanout: [5, 5]}",
            "soft_labels.fanout: exact inference takes every neighbour",
        ),
        (
            "soft_labels: {keep_layers: true}",
            "soft_labels.keep_layers: only exact inference of a GNN that is trained here goes layer by layer",
        ),
        (
            "soft_labels: {keep_layers: true, inference: exact}\nteacher: {model: sign}",
            "soft_labels.keep_layers: only exact inference of a GNN that is trained here goes layer by layer",
        ),
        ("update: {run: runs/a}", "update: nothing has changed; name add_nodes, add_edges, drop_edges or features"),
        (
            "update: {run: runs/a, add_edges: e.csv}\nencodings: {positional: deepwalk}",
            "encodings.positional: deepwalk would place all nodes elsewhere",
        ),
        (
            "update: {run: runs/a, add_edges: e.csv}\nteacher: {external: {paths: [a.npy], kind: logits}}",
            "teacher.external: has nothing to say of an updated graph",
        ),
        ("student: {inputs: [feat, pos, feat]}", "student.inputs: feat, pos, feat names an array twice"),
        ("student: {inputs: [feat, pos]}", "student.inputs: 'pos' needs encodings.positional"),
        ("student: {inputs: [prop]}", "student.inputs: 'prop' needs encodings.label_propagation"),
        ("student: {objective: krd}", "student.objective: krd needs soft_labels.entropy_change: true"),
        ("student: {similarity: 0.1}", "student.similarity: needs soft_labels.hidden: true"),
        (
            "soft_labels: {hidden: true}\nteacher: {fanout: [5]}",
            "soft_labels.hidden: a teacher of one layer (teacher.fanout) has no hidden states",
        ),
    ],
)
def test_an_impossible_combination_is_refused(path: Path, text: str, message: str) -> None:
    assert refusal(path, f"run_dir: a\n{text}\n").startswith(f"{path}: {message}")


def test_an_mlp_alone_needs_no_pretraining(path: Path) -> None:
    assert load(path, ["student.models=[mlp]", "student.epochs=3"]).student.epochs == 3


def test_every_error_is_reported_at_once(path: Path) -> None:
    message = refusal(path, "seed: -1\nteacher: {lr: 0, epoch: 3}\n")
    for key in ("run_dir", "seed", "teacher.lr", "teacher.epoch"):
        assert f"{path}: {key}: " in message
    assert len(message.splitlines()) == 4


@pytest.mark.parametrize("value", ["", "''", "3", "null"])
def test_a_run_needs_a_place(path: Path, value: str) -> None:
    assert refusal(path, f"run_dir: {value}\n").startswith(f"{path}: run_dir: ")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: b: c", "mapping values are not allowed here"),
        ("run_dir: *a", "undefined alias"),
        ("run_dir: 2024-13-45", "month must be in 1..12"),
        ("run_dir: !!python/object:os.system {}", "could not determine a constructor"),
        ("? [a]\n: 3", "unhashable key"),
        ("\x00", "special characters are not allowed"),
        ("a: " + "[" * 5000, "recursion"),
    ],
)
def test_bad_yaml_is_refused(path: Path, text: str, reason: str) -> None:
    message = refusal(path, text)
    assert message.startswith(f"{path}: not valid YAML: ")
    assert reason in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("run_dir: a\nteacher: {epochs: 7}\nseed: 1\nteacher: {lr: 64}\n", ["teacher: given twice (lines 2 and 4)"]),
        ("run_dir: a\nteacher:\n  lr: 1\n  'lr': 1\n", ["teacher.lr: given twice (lines 3 and 4)"]),
        ("teacher: {lr: 1, epochs: 1, lr: 2}\n", ["teacher.lr: given twice (line 1)"]),
        ("a: [{b: 1, b: 2}]\nseed: 1\nseed: 2\nseed: 3\n", [
            "a.0.b: given twice (line 1)", "seed: given twice (lines 2 and 3)", "seed: given twice (lines 2 and 4)",
        ]),
    ],
)  # fmt: skip
def test_a_key_that_is_given_twice_is_refused(path: Path, text: str, messages: list[str]) -> None:
    assert refusal(path, text).splitlines() == [f"{path}: {message}" for message in messages]


def test_on_the_command_line_too(path: Path) -> None:
    message = refusal(path, overrides=["source={kind: digits, neighbors: 3, neighbors: 4}"])
    assert message == "command line: source: neighbors: given twice (line 1)"


def test_a_merged_key_may_be_overridden(path: Path) -> None:
    path.write_text("run_dir: a\nsoft_labels: &a {batch_size: 3}\nteacher: {<<: *a, lr: 1, batch_size: 4}\n")
    assert (load(path).teacher.batch_size, load(path).soft_labels.batch_size) == (4, 3)


@pytest.mark.parametrize(
    ("text", "kind"), [("- a\n- b", "list"), ("[]", "list"), ("text", "str"), ("0", "int"), ("false", "bool")]
)
def test_what_is_no_mapping_is_refused(path: Path, text: str, kind: str) -> None:
    assert refusal(path, text) == f"{path}: a configuration is a mapping of keys to values, found {kind}"


def test_an_empty_file_misses_its_one_key(path: Path) -> None:
    assert refusal(path, "") == f"{path}: run_dir: missing; set it in the file or on the command line"
    assert load(path, ["run_dir=/a"]).run_dir == "/a"


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    assert (
        refusal(tmp_path / "no.yaml") == f"{tmp_path}/no.yaml: cannot read the configuration: No such file or directory"
    )
    assert refusal(tmp_path) == f"{tmp_path}: cannot read the configuration: Is a directory"
    (tmp_path / "latin.yaml").write_bytes("run_dir: é".encode("latin-1"))
    assert "latin.yaml: cannot read the configuration: 'utf-8' codec" in refusal(tmp_path / "latin.yaml")


def test_a_configuration_cannot_be_changed(path: Path) -> None:
    config = load(path)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]
    assert hash(config) == hash(load(path))
    assert math.isfinite(config.teacher.lr)


@pytest.mark.parametrize(("workers", "experts"), [(1, 1), (2, 8), (6, 8), (8, 8), (64, 8), (12, 7), (7, 3), (16, 16)])
def test_refused_is_just_what_leaves_a_worker_without_an_expert(workers: int, experts: int) -> None:
    tree = {"run_dir": "a", "partition": {"num_parts": max(workers, 2)}, "student": {"num_experts": experts}}
    assert Config.model_validate(tree).cluster.expert_parallel == "auto"
    for group in range(1, workers + 1):
        mesh = replace(Mesh.single(), expert_parallel=group)
        each = [len(replace(mesh, rank=rank).local_experts(experts)) for rank in range(group)]
        assert sum(each) == experts
        good = workers % group == 0 and min(each) > 0
        cluster = {"cluster": {"train_workers": workers, "expert_parallel": group}}
        with nullcontext() if good else pytest.raises(ValueError, match=r"does not divide|would have none"):
            Config.model_validate(tree | cluster)


def test_workers_without_experts_matter_only_where_there_are_any() -> None:
    tree = {"run_dir": "a", "student": {"models": ["mlp"], "num_experts": 3}, "cluster": {"train_workers": 4}}
    tree["cluster"]["expert_parallel"] = 4
    assert Config.model_validate(tree).cluster.expert_parallel == 4
