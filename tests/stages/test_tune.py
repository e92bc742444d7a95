"""Searches on a real Ray cluster: what is tried, what is chosen and by what, and what goes on after a kill."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from ray.exceptions import ActorDiedError

from rbm_dist import cli
from rbm_dist.config.load import load
from rbm_dist.config.run import Config
from rbm_dist.config.tune import Search, load_search
from rbm_dist.errors import InputError, RunError
from rbm_dist.graph.splits import TEST, VAL
from rbm_dist.graph.store import GraphStore
from rbm_dist.report.tune import best, search_table
from rbm_dist.runtime import search as search_
from rbm_dist.runtime.search import Draws
from rbm_dist.stages import local
from rbm_dist.stages import tune as tune_
from rbm_dist.stages.trials import differing_keys
from tests.patience import patient
from tests.stages.conftest import kill_once, rbm_dist

CONFIG = """
run_dir: {folder}/run
source: {{kind: digits, normalize: none}}
partition: {{num_parts: 1}}
teacher: {{epochs: 3}}
student: {{epochs: 6, pretrain_epochs: 3, hidden: 16, models: [mlp]}}
"""
# Of the MLP's learning rates one is such that its training cannot succeed, of the RbM's choices some are impossible.
SPACE = f"""
trials: 3
timeout_s: {patient(300)}
space: {{student.objective: [kd, krd]}}
students:
  MLP: {{space: {{student.lr: [1.0e+30, 0.01, 0.03]}}}}
  RbM:
    set: {{student.models: [rbm]}}
    space: {{student.lr: {{log: [0.002, 0.02]}}, student.num_experts: [2, 4], student.top_k: [1, 3]}}
"""


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """A configuration and a space, as files."""
    return write(tmp_path, SPACE)


def write(folder: Path, space: str) -> tuple[str, str]:
    paths = folder / "config.yaml", folder / "space.yaml"
    for path, text in zip(paths, (CONFIG.format(folder=folder), space), strict=True):
        path.write_text(text)
    return str(paths[0]), str(paths[1])


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Exit code, output and errors of `rbm-dist tune` in this process, which must not start a cluster."""
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("nothing is to be computed"))

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rbm-dist", "tune", *arguments])
        monkeypatch.setenv("COLUMNS", "300")
        try:
            cli.main()
        except SystemExit as caught:
            return int(caught.code or 0), *capsys.readouterr()
        return 0, *capsys.readouterr()

    return run


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((folder / "run-tune" / "trials").rglob("*.json"))]


def test_a_search_tries_counts_chooses_and_is_done(
    files: tuple[str, str], tmp_path: Path, one_thread: None, here: Callable[..., tuple[int, str, str]]
) -> None:
    done = rbm_dist("tune", *files, "--jobs", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    output = " ".join(done.stdout.split())
    assert "of the draws are impossible and will be drawn again, such as: student.top_k: 3 > num_experts: 2" in output
    assert "MLP, trial 2 failed: student mlp: not finite in epoch 0" in output
    assert "test" not in output.lower().replace(str(tmp_path).lower(), "")
    assert "Configuration for experiment" not in output, "Tune's own output"

    # As many trials of each; the impossible draws are none of them.
    run = tmp_path / "run-tune"
    rows = pq.read_table(run / "trials.parquet").to_pylist()
    assert [(row["student"], row["trial"]) for row in rows] == [(name, n) for name in ("MLP", "RbM") for n in range(3)]
    assert [row["state"] for row in rows] == ["done", "done", "failed"] + ["done"] * 3
    assert all(row["student.top_k"] <= row["student.num_experts"] for row in rows[3:])
    assert not [name for name in rows[0] if "test" in name or "unseen" in name]
    assert list((run / "prepared").iterdir()) == []

    # Each is the accuracy on validation of what one run after the other in this process trains.
    search = load_search(*files)
    kept = {(row["student"], row["trial"]): row["settings"] for row in rows_of(tmp_path)}
    accuracies = {}
    for candidate in search.candidates:
        for number in range(3):
            if candidate.name == "MLP" and number == 2:
                continue
            config = candidate.config(kept[candidate.name, number])
            local.prepare(config, str(tmp_path / "alone"))
            student = str(tmp_path / f"{candidate.name}-{number}")
            figures = local.train(config, str(tmp_path / "alone"), student)
            accuracies[candidate.name, number] = figures["val"]
    assert {(row["student"], row["trial"]): row["val"] for row in rows if row["state"] == "done"} == accuracies

    # The best is the highest of these, as a file that is a run's.
    student, number = max(accuracies, key=lambda trial: accuracies[trial])
    chosen, theirs = load(run / "best.yaml"), load(run / f"best-{student}.yaml")
    assert chosen == theirs
    assert chosen.student == next(each for each in search.candidates if each.name == student).config(
        kept[student, number]
    ).student  # fmt: skip
    assert chosen.cluster == search.config.cluster
    assert chosen.run_dir == f"{run}/runs/{student}"
    shown = yaml.safe_load(
        done.stdout[done.stdout.index("differs from") :].split("\n", 1)[1].rpartition("best.yaml")[0]
    )
    assert shown["student"].items() <= chosen.student.model_dump(mode="json").items()
    assert shown["soft_labels"] == {"entropy_change": True}

    # The same command again has nothing to do; another search is refused, unless it is to begin anew.
    assert here(*files)[0] == 0
    code, _, errors = here(*files, "teacher.epochs=4", "student.hidden=8")
    assert code == 2
    assert errors.startswith(f"error: {run}: these trials were made by another search:")
    assert "MLP: student.hidden: 16 there, 8 now" in errors
    assert "RbM: teacher.epochs: 3 there, 4 now" in errors
    assert len(rows_of(tmp_path)) == 6


@pytest.mark.slow
def test_a_search_goes_on_after_a_kill(tmp_path: Path) -> None:
    files = write(tmp_path, SPACE.replace("trials: 3", "trials: 6"))
    kill_once(lambda: len(rows_of(tmp_path)) >= 3, "tune", *files, "--jobs", "1")
    trials = tmp_path / "run-tune" / "trials"
    first = {path: path.stat().st_mtime_ns for path in trials.rglob("*.json")}
    assert 3 <= len(first) < 12

    done = rbm_dist("tune", *files)
    assert done.returncode == 0, done.stdout + done.stderr
    second = {path: path.stat().st_mtime_ns for path in trials.rglob("*.json")}
    assert first.items() <= second.items()
    assert len(second) == 12
    # What is drawn does not depend on the kill.
    drawn = [(row["student"], row["trial"], row["settings"]) for row in rows_of(tmp_path)]
    for candidate in load_search(*files).candidates:
        draws = Draws(candidate, 0, list(range(6)), [], tpe=False)
        for number in range(6):
            assert (candidate.name, number, draws.suggest(str(number))["settings"]) in drawn


@pytest.mark.slow
def test_trials_with_teachers_and_seeds_of_their_own_and_some_stopped(tmp_path: Path) -> None:
    space = """
    trials: 6
    scheduler: asha
    grace_epochs: 2
    seeds: 2
    space: {student.lr: {log: [0.00001, 0.03]}, teacher.lr: {log: [0.005, 0.02]}}
    """
    files = write(tmp_path, space)
    done = rbm_dist("tune", *files, "--jobs", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(tmp_path)
    assert len(rows) == 6
    finished, stopped = ([row for row in rows if row["state"] == state] for state in ("done", "stopped"))
    assert len(finished) + len(stopped) == 6
    assert stopped
    assert all(2 <= row["epochs"] < 6 and row["val"] is None for row in stopped)
    assert all(row["val"] == pytest.approx(np.mean(row["val_by_seed"])) for row in finished)
    assert all(len(row["val_by_seed"]) == 2 for row in finished)
    assert list((tmp_path / "run-tune" / "prepared").iterdir()) == []
    chosen = load(tmp_path / "run-tune" / "best.yaml")
    settings = max(finished, key=lambda row: row["val"])["settings"]
    assert (chosen.student.lr, chosen.teacher.lr) == (settings["student.lr"], settings["teacher.lr"])


@pytest.mark.slow
def test_where_all_trials_fail_the_search_ends(tmp_path: Path) -> None:
    files = write(tmp_path, "trials: 9\nspace: {student.lr: [1.0e+30, 2.0e+30]}")
    done = rbm_dist("tune", *files)
    assert done.returncode == 2
    assert "mlp: the first trials all failed; the last: student mlp: not finite in epoch 0" in done.stderr
    assert not (tmp_path / "run-tune" / "trials").exists(), "they would be tried again"


def test_labels_of_test_nodes_change_nothing(tmp_path: Path) -> None:
    config = load_search(*write(tmp_path, SPACE)).candidates[0].config({"student.lr": 0.01, "student.objective": "kd"})
    url = tmp_path / "prepared"
    local.prepare(config, str(url))
    epochs: list[dict[str, Any]] = []
    before = local.train_and_validate(config, str(url), str(tmp_path / "a"), epochs.append)
    assert [row for row in epochs[0] if "test" in row or "unseen" in row] == []
    store = GraphStore.open(str(url / "graph"))
    (label,) = (url / "graph").rglob("label.npy")
    changed = np.where(store.array("split", 0) == TEST, 0, store.array("label", 0))
    assert (changed != store.array("label", 0)).sum() > 500
    np.save(label, changed)
    assert np.array_equal(GraphStore.open(str(url / "graph")).array("label", 0), changed)
    after = local.train_and_validate(config, str(url), str(tmp_path / "b"))
    assert {**after, "seconds": 0} == {**before, "seconds": 0}
    rows = int((store.array("split", 0) == VAL).sum())
    assert before["val"] * rows == pytest.approx(round(before["val"] * rows))


def one(tmp_path: Path, space: str) -> Search:
    return load_search(*write(tmp_path, space))


def test_a_draw_belongs_to_its_seed_student_and_trial(files: tuple[str, str]) -> None:
    rbm = load_search(*files).candidates[1]

    def drawn(numbers: list[int], seed: int = 0) -> list[dict[str, Any]]:
        draws = Draws(rbm, seed, numbers, [], tpe=False)
        return [draws.suggest(str(number)) for number in numbers]

    all_of_them = drawn(list(range(30)))
    assert all_of_them[20:] == drawn(list(range(20, 30)))
    assert len({each["settings"]["student.lr"] for each in all_of_them + drawn(list(range(30)), seed=1)}) == 60
    for each in all_of_them:
        rbm.config(each["settings"])
    assert {each["settings"]["student.top_k"] for each in all_of_them} == {1, 3}


def test_tpe_is_told_what_was_done(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    search = one(
        tmp_path, "trials: 1\nspace: {student.lr: {log: [0.0001, 0.1]}, student.inputs: [[feat], [feat, prop]]}"
    )
    (mlp,) = search.candidates
    done = [
        {"settings": {"student.lr": lr, "student.inputs": inputs}, "val": val, "state": "done"}
        for lr, val in zip(np.geomspace(0.0001, 0.1, 20), [0.1] * 15 + [0.9] * 5, strict=True)
        for inputs in (["feat"], ["feat", "prop"])
    ]
    drawn = [Draws(mlp, seed, [0], done, tpe=True).suggest("a")["settings"] for seed in range(10)]
    assert np.median([each["student.lr"] for each in drawn]) > 0.01, "where the accuracy was high"
    assert all(each["student.inputs"] in (["feat"], ["feat", "prop"]) for each in drawn)


def test_tpe_without_its_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="search: tpe needs optuna: pip install"):
        search_.refuse_missing_library(tpe=True)


def test_asha_remembers_the_trials_before() -> None:
    done = [{"trial": n, "curve": [0.8, 0.8, 0.8 + n / 100]} for n in range(4)]
    for curve, expected in (([0.1, 0.1, 0.1], "STOP"), ([0.9, 0.9, 0.9], "CONTINUE")):
        scheduler = search_._asha(3, done)
        trial = type("Trial", (), {"trial_id": "new"})()
        scheduler.on_trial_add(None, trial)
        said = [
            scheduler.on_trial_result(None, trial, {"epoch": epoch, "val_accuracy": value})
            for epoch, value in enumerate(curve, start=1)
        ]
        assert said == ["CONTINUE", "CONTINUE", expected]


def test_a_trial_that_is_lost_or_stuck_ends_the_search() -> None:
    class Stuck:
        config: ClassVar = {"trial": 7}
        status = "RUNNING"

        def get_pickled_error(self) -> Exception:
            return ActorDiedError()

    follower = search_._Follower(lambda *_: None, timeout_s=1e-9)
    with pytest.raises(RunError, match=r"no trial came to an end for 1e-09 s \(timeout_s\); at work: 7"):
        follower.on_step_end(0, [Stuck()])
    follower.on_trial_error(0, [], Stuck())
    with pytest.raises(RunError, match=r"^trial 7: ActorDiedError"):
        follower.on_step_end(0, [])


def test_a_graph_is_made_once_and_forgotten_where_no_other_trial_needs_it(tmp_path: Path) -> None:
    asked: list[str] = []

    class Task:
        def remote(self, config: Config, url: str) -> object:
            Path(url).mkdir()
            asked.append(url)
            return object()

    preparer = tune_._Preparer.__new__(tune_._Preparer)
    preparer._url, preparer._begun, preparer._prepare = str(tmp_path), {}, Task()
    config = Config(run_dir="none")
    other = config.model_copy(update={"seed": 1})
    assert preparer.begin(config) == preparer.begin(config.model_copy(update={"run_dir": "other"}))
    assert preparer.begin(config) != preparer.begin(other)
    assert len(asked) == 2
    preparer.forget(config)
    assert [path for path in map(Path, asked) if path.exists()] == [Path(asked[1])]


def test_a_folder_of_other_files_is_refused(
    files: tuple[str, str], tmp_path: Path, here: Callable[..., tuple[int, str, str]]
) -> None:
    mine = tmp_path / "run-tune" / "best.yaml"
    mine.parent.mkdir()
    mine.write_text("mine")
    code, _, errors = here(*files, "--overwrite")
    assert (code, mine.read_text()) == (2, "mine")
    assert f"{mine.parent}: holds best.yaml, but no tune.json of a search. Set another run_dir in SPACE" in errors
    assert [path.name for path in mine.parent.iterdir()] == ["best.yaml"]


def test_a_space_without_a_possible_draw_is_refused(tmp_path: Path, here: Callable[..., tuple[int, str, str]]) -> None:
    code, _, errors = here(*write(tmp_path, "trials: 1\nspace: {student.num_experts: [1, 2], student.top_k: [3, 4]}"))
    assert code == 2
    assert "mlp: of 200 draws from its space none is possible: student.top_k: " in errors
    assert not (tmp_path / "run-tune").exists()


def test_what_was_searched_otherwise_goes_if_it_may(files: tuple[str, str], tmp_path: Path) -> None:
    def begin(space: str, overwrite: bool) -> None:
        tune_.begin(one(tmp_path, space), overwrite)

    begin(SPACE.replace("RbM", "MoE"), False)
    begin(SPACE.replace("[1, 3]", "[1, 2]"), False)  # while there are no trials, nothing is lost
    begin(SPACE, False)
    trials = tmp_path / "run-tune" / "trials"
    for name in ("MLP/trial-0.json", "RbM/trial-1.json", "MLP/notes.txt"):
        (trials / name).parent.mkdir(parents=True, exist_ok=True)
        (trials / name).touch()
    changed = SPACE.replace("[1.0e+30, 0.01, 0.03]", "[0.02]")
    with pytest.raises(InputError, match=r"MLP: space.student.lr: \[1e\+30, 0.01, 0.03\] there, \[0.02\] now"):
        begin(changed, False)
    begin(changed, True)
    assert sorted(path.name for path in trials.rglob("*.*")) == ["notes.txt", "trial-1.json"]
    begin(changed, False)
    assert json.loads((trials.parent / "tune.json").read_text())["students"].keys() == {"MoE", "MLP", "RbM"}


def test_the_best_is_the_highest_of_those_that_were_done(files: tuple[str, str]) -> None:
    def row(trial: int, state: str, val: float | None, curve: list[float]) -> dict[str, Any]:
        settings = {"student.lr": 0.0123456, "student.objective": "kd"}
        return {
            "student": "MLP", "trial": trial, "state": state, "val": val, "curve": curve, "multiply_adds": 1234,
            "settings": settings,
        }  # fmt: skip

    rows = [row(0, "done", 0.5, []), row(1, "done", 0.7, []), row(2, "stopped", None, [0.9]), row(3, "done", 0.7, [])]
    rows.append(row(4, "failed", None, []))
    assert (chosen := best(rows)) is rows[1]
    assert best(rows[4:]) is None
    table = search_table(rows, ["MLP", "RbM"], 6, 1)
    cells = [list(column.cells) for column in table.columns]
    assert [cell[0] for cell in cells] == [
        "MLP", "5 of 6, 1 stopped, 1 failed", "70.0", "1.23 k", "lr 0.01235, objective kd",
    ]  # fmt: skip
    assert [cell[1] for cell in cells] == ["RbM", "0 of 6", "–", "–", "–"]
    assert differing_keys(load_search(*files), chosen) == {
        "soft_labels": {"entropy_change": True}, "student": {"lr": 0.0123456},
    }  # fmt: skip
