"""Searches: what a trial's configuration is made of, and a message naming file, key and reason for what is refused."""

from pathlib import Path

import pytest

from rbm_dist.config.experiment import prepared_hash
from rbm_dist.config.run import Config
from rbm_dist.config.tune import Search, load_search
from rbm_dist.errors import InputError

ROOT = Path(__file__).parents[2]
CONFIG = """
run_dir: {folder}/run
source: {{kind: digits, normalize: none}}
student: {{models: [rbm], dropout: 0.2, num_experts: 4}}
"""
SPACE = """
trials: 5
space:
  student.lr: {log: [1e-3, 0.02]}
  student.dropout: [0.1, 0.3]
students:
  MLP: {set: {student.models: [mlp], student.dropout: 0.5}}
  RbM: {set: {student: {models: [rbm]}}, space: {student.top_k: {integer: [1, 6]}, student.objective: [kd, krd]}}
"""
ONE = "trials: 1\nspace: {{{}}}\n"


def search(folder: Path, space: str = SPACE, *overrides: str, config: str = CONFIG) -> Search:
    (folder / "config.yaml").write_text(config.format(folder=folder))
    (folder / "space.yaml").write_text(space)
    return load_search(folder / "config.yaml", folder / "space.yaml", list(overrides))


def refusal(folder: Path, space: str, *overrides: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        search(folder, space, *overrides)
    return str(caught.value).removeprefix(f"{folder}/").split("\n")


def test_a_trial_is_what_a_person_would_have_written(tmp_path: Path) -> None:
    mlp, rbm = search(tmp_path, SPACE, "student.hidden=16").candidates
    assert mlp.space.keys() == {"student.lr"}, "what a student sets is not searched"
    assert rbm.space.keys() == {"student.lr", "student.dropout", "student.top_k", "student.objective"}
    expected = {
        "run_dir": f"{tmp_path}/run",
        "source": {"kind": "digits", "normalize": "none"},
        "soft_labels": {"entropy_change": True},
        "student": {
            "models": ["rbm"], "dropout": 0.3, "num_experts": 4, "hidden": 16, "lr": 0.004, "top_k": 2,
            "objective": "krd",
        },
    }  # fmt: skip
    drawn = {"student.lr": 0.004, "student.dropout": 0.3, "student.top_k": 2, "student.objective": "krd"}
    assert rbm.config(drawn) == Config.model_validate(expected)
    with pytest.raises(InputError, match=r"^student\.top_k: 5 > num_experts: 4$"):
        rbm.config({**drawn, "student.top_k": 5})


def test_what_some_student_needs_is_prepared_once_for_all(tmp_path: Path) -> None:
    mlp, rbm = search(tmp_path).candidates
    hashes = {
        prepared_hash(mlp.config({"student.lr": 0.01})),
        prepared_hash(rbm.config({"student.lr": 0.02, "student.objective": "kd"})),
        prepared_hash(rbm.config({"student.lr": 0.02, "student.objective": "krd"})),
    }
    assert len(hashes) == 1
    assert mlp.shares_prepared
    assert rbm.shares_prepared


@pytest.mark.parametrize(
    ("space", "needed"),
    [
        ("student.similarity: {uniform: [0.0, 1.0]}", ("soft_labels", "hidden")),
        ("student.inputs: [[feat], [feat, prop]]", ("encodings", "label_propagation")),
        ("student.objective: [krd]", ("soft_labels", "entropy_change")),
    ],
)
def test_a_key_that_a_value_needs_is_set(tmp_path: Path, space: str, needed: tuple[str, str]) -> None:
    (rbm,) = search(tmp_path, ONE.format(space)).candidates
    assert rbm.base[needed[0]][needed[1]] is True
    assert getattr(getattr(search(tmp_path).config, needed[0]), needed[1]) is False


@pytest.mark.parametrize(
    ("space", "shares", "repeats"),
    [
        ("student.lr: [0.1]", True, True),
        ("teacher.hidden: [16, 32]", False, True),
        ("teacher.lr: {log: [0.001, 0.1]}, teacher.hidden: [16]", False, False),
    ],
)
def test_which_trials_share_a_graph(tmp_path: Path, space: str, shares: bool, repeats: bool) -> None:
    (rbm,) = search(tmp_path, ONE.format(space)).candidates
    assert (rbm.shares_prepared, rbm.repeats_prepared) == (shares, repeats)


def test_without_students_that_of_the_configuration_is_searched(tmp_path: Path) -> None:
    found = search(tmp_path, ONE.format("student.lr: [0.1]"), "seed=7")
    assert [each.name for each in found.candidates] == ["rbm"]
    assert (found.run_dir, found.seeds) == (f"{tmp_path}/run-tune", (7,))


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ("student.lr: 0.1", "space.student.lr: Either a list of values, or {uniform: [low, high]}, {log: …} or"),
        ("student.lr: []", "space.student.lr: Either a list of values"),
        ("student.lr: {log: [0, 1]}", "space.student.lr: A logarithmic scale has no 0 nor less"),
        ("student.lr: {uniform: [2, 1]}", "space.student.lr: The lower bound comes first, and is lower"),
        ("student.lr: {log: [1, 2], uniform: [1, 2]}", "space.student.lr: Name one of uniform, log and integer"),
        ("student.lr: {uni: [1, 2]}", "space.student.lr.uni: unknown key"),
        ("student.lr: {uniform: [true, 2]}", "space.student.lr.uniform.0: Input should be a number, found True"),
        ("student.lrr: [0.1]", "student.lrr: unknown key"),
        ("student.dropout: [0.1, 1.5]", "student.dropout: Input should be less than 1, found 1.5"),
        ("student.hidden: {uniform: [8, 64]}", "student.hidden: Input should be a valid integer"),
        ("source.train_per_class: [5]", "space: source.train_per_class: a search sets keys of teacher, soft_labels,"),
        ("seed: [5]", "space: seed: a search sets keys of"),
        ("", "space: no key is searched"),
        ("student.models: [[mlp, rbm]]", "student.models: a trial trains one student, found mlp, rbm; name one"),
    ],
)
def test_what_no_trial_could_have_is_refused(tmp_path: Path, space: str, message: str) -> None:
    assert refusal(tmp_path, ONE.format(space))[0].startswith(f"space.yaml: {message}")


def test_what_a_student_gets_wrong_is_refused_by_its_name(tmp_path: Path) -> None:
    both = "trials: 1\nstudents: {A: {set: {student.lr: 1, student.modles: [mlp]}, space: {student.lr: [0.1]}}}"
    assert refusal(tmp_path, both) == ["space.yaml: students.A: student.lr: is both set and searched"]
    wrong = "trials: 1\nspace: {student.lr: [0.1]}\nstudents: {A: {set: {student.modles: [mlp]}}}"
    assert refusal(tmp_path, wrong) == ["space.yaml: student.modles: unknown key (in student A)"]
    assert refusal(tmp_path, "space: {student.lr: [1]}") == ["space.yaml: trials: missing; set it in the file"]
    assert "trails: unknown key" in refusal(tmp_path, "trials: 1\ntrails: 3\nspace: {student.lr: [1]}")[0]


def test_a_wrong_configuration_is_named_as_such(tmp_path: Path) -> None:
    (message,) = refusal(tmp_path, SPACE, "student.lrr=3")
    assert message.startswith("config.yaml (and the command line): student.lrr: unknown key")


def test_the_identity_is_all_that_decides_a_trial(tmp_path: Path) -> None:
    def identities(*overrides: str, space: str = SPACE) -> list[dict[str, object]]:
        found = search(tmp_path, space, *overrides)
        return [found.identity(each) for each in found.candidates]

    before = identities()
    assert identities("run_dir=elsewhere", "cluster.train_workers=1", space=SPACE.replace("5", "50", 1)) == before
    assert identities("student.lr=0.5") == before, "a searched key's value in CONFIG is never used"
    for change in ("student.hidden=5", "teacher.lr=0.5", "source.train_per_class=5", "seed=3"):
        assert all(a != b for a, b in zip(identities(change), before, strict=True))
    mlp, rbm = identities(space=SPACE.replace("integer: [1, 6]", "integer: [1, 5]"))
    assert mlp == before[0]
    assert rbm["space.student.top_k"] == {"integer": [1, 5]}


def test_the_space_of_the_repository_gives_every_student_the_same_trials() -> None:
    found = load_search(
        ROOT / "configs" / "cora.yaml", ROOT / "configs" / "tune" / "students.yaml", ["source.path=cora.npz"]
    )
    assert [each.name for each in found.candidates] == ["MLP", "MLP x4", "MoE", "RbM"]
