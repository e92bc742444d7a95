"""Smaller students against the ones they were made from, and against the same change made in torch."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.numpy import save as save_tensors

from rbm_dist.cli import main
from rbm_dist.errors import InputError, RunError
from rbm_dist.models.student import rbm_to_mlp
from rbm_dist.moe.routing import route
from rbm_dist.serve import format as format_
from rbm_dist.serve.compress import Student, compress, expert_shares, in_float32, in_int8, merged, pruned
from rbm_dist.serve.export import export, torch_student
from rbm_dist.serve.loaded import NativeEngine, load
from rbm_dist.serve.network import network_of
from rbm_dist.serve.validation import Labelled, from_graph, from_table
from tests.serve.exported import exported
from tests.serve.reference import class_probabilities
from tests.small_graph import small_graph, write_graph

KINDS = [
    ("mlp", {}), ("ensemble", {}), ("moe", {}), ("rbm", {}), ("rbm", {"routing": "input", "top_k": 1}),
    ("rbm", {"input_attention": True}),
]  # fmt: skip


def rows_of(count: int, width: int = 4) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, width)).astype(np.float32)


def logits(student: Student, rows: np.ndarray, few: int = 1) -> np.ndarray:
    model, tensors = student
    return network_of(model.network.model_dump(), tensors, few).logits(rows)


def labelled_as(student: Student, count: int = 200) -> Labelled:
    """Rows with the classes that a student gives them."""
    rows = rows_of(count)
    return Labelled(rows, logits(student, rows).argmax(1))


@pytest.mark.parametrize(("kind", "changes"), KINDS)
@pytest.mark.parametrize("few", [0, 10**9])
def test_int8_computes_what_its_rounded_weights_say(kind: str, changes: dict, few: int) -> None:
    model, tensors = exported(kind, **changes)
    small = in_int8(model, tensors)
    full = in_float32(small[1])
    assert full.keys() == tensors.keys()
    for name, weight in tensors.items():
        if weight.ndim < 2 or "weight" not in name:
            assert full[name] is weight, "memories, biases and norms are untouched"
        else:  # half a step, of a hundred-and-twenty-seventh of the largest in its row
            rows = weight if name.endswith("weight_LDO") else weight.T
            step = np.abs(rows).max(-1, keepdims=True) / 127
            apart = np.abs(full[name] - weight) if rows is weight else np.abs(full[name] - weight).T
            assert (apart <= step * 0.5001).all()
    rows = rows_of(70)
    expected = torch_student(model, full)(torch.from_numpy(rows))[0].detach().numpy()
    np.testing.assert_allclose(logits(small, rows, few), expected, rtol=1e-4, atol=2e-5)


def test_int8_of_one_row_follows_the_formulas() -> None:
    model, tensors = exported(routing="input", top_k=1)
    small = in_int8(model, tensors)
    rows = rows_of(20)
    expected = class_probabilities(torch_student(model, in_float32(small[1])), rows)
    found = logits(small, rows, few=10**9)
    np.testing.assert_allclose(torch.from_numpy(found).softmax(1).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("engine", ["native", "onnx"])
def test_an_int8_folder_answers_by_both_engines_with_the_experts_of_float32(tmp_path: Path, engine: str) -> None:
    student = exported(num_experts=16, top_k=1, routing="input", hidden=64)
    export(str(tmp_path / "full"), *student)
    compress(str(tmp_path / "int8"), student, in_int8(*student), labelled_as(student), max_loss=3)
    before, after = load(str(tmp_path / "full")), load(str(tmp_path / "int8"), engine=engine)  # type: ignore[arg-type]
    for count in (1, 90):
        rows = rows_of(count) * 2 + 3
        assert np.abs(after.predict(rows).probabilities - before.predict(rows).probabilities).max() < 0.05
        for one, other in zip(before.explain(rows), after.explain(rows), strict=True):
            assert [each["experts"] for each in one["memories"]] == [each["experts"] for each in other["memories"]]
    for name in ("model.safetensors", "model.onnx"):
        size, was = ((tmp_path / folder / name).stat().st_size for folder in ("int8", "full"))
        assert size < 0.4 * was, "a quarter for matrices of any size; these are small"
    assert after.digest != before.digest


def test_int8_needs_no_torch(tmp_path: Path) -> None:
    student = exported()
    compress(str(tmp_path), student, in_int8(*student), labelled_as(student), max_loss=5)
    code = (
        "import sys; sys.modules['torch'] = None; import rbm_dist; "
        f"print(len(rbm_dist.load({str(tmp_path)!r}).predict([[1.0, 2, 3, 4]]).classes))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"


def test_pruning_none_changes_nothing() -> None:
    student = exported()
    small = pruned(*student, 6, rows_of(50))
    np.testing.assert_array_equal(logits(small, rows_of(30)), logits(student, rows_of(30)))


@pytest.mark.parametrize(
    ("routing", "changes"), [("input", {"top_k": 1}), ("layers", {}), ("layers", {"input_attention": True})]
)
def test_rows_of_a_pruned_expert_go_to_the_next_nearest(routing: str, changes: dict) -> None:
    model, tensors = exported(routing=routing, **changes)
    rows = rows_of(60)
    smaller, left = pruned(model, tensors, 3, rows)
    assert smaller.network.num_experts == 3
    for layer in range(3):
        memory = tensors.get(f"layers.{layer}.memory_ED")
        kept_weights = left[f"layers.{layer}.experts.weight_LDO"]
        kept = [
            next(e for e in range(6) if np.array_equal(each, tensors[f"layers.{layer}.experts.weight_LDO"][e]))
            for each in kept_weights
        ]
        share_E = expert_shares(model, tensors, rows)
        share_E = share_E.sum(0) if routing == "input" else share_E[layer]
        assert kept == sorted(np.argsort(-share_E)[:3])
        if memory is not None and layer == 0:
            by_all = route(torch.from_numpy(rows), torch.from_numpy(memory), 6, 1.0).experts_Bk.numpy()
            expected = [[kept.index(e) for e in order if e in kept][: model.network.top_k] for order in by_all]
            found = network_of(smaller.network.model_dump(), left).routings(rows)[0].expert_Bk
            np.testing.assert_array_equal(found, expected)


def test_an_experts_share_is_its_weighed_output() -> None:
    model, tensors = exported(routing="input", top_k=2, num_layers=2)
    rows = rows_of(40)
    found = expert_shares(model, tensors, rows)
    routing = network_of(model.network.model_dump(), tensors).routings(rows)[0]
    expected = np.zeros(6)
    for x, experts, weights in zip(rows, routing.expert_Bk, routing.weight_Bk, strict=True):
        for e, weight in zip(experts, weights, strict=True):
            out = x @ tensors["layers.0.experts.weight_LDO"][e] + tensors["layers.0.experts.bias_LO"][e]
            expected[e] += weight * np.linalg.norm(out)
    np.testing.assert_allclose(found[0], expected / expected.sum(), rtol=1e-4)
    np.testing.assert_allclose(found.sum(1), 1)


def test_an_expert_without_rows_goes_first() -> None:
    model, tensors = exported(routing="input", top_k=1)
    memory = np.abs(tensors["layers.0.memory_ED"])
    memory[2] *= -1
    rows = np.abs(rows_of(50))  # none of which is near it
    tensors["layers.0.memory_ED"] = memory
    smaller = pruned(model, tensors, 5, rows)
    np.testing.assert_array_equal(logits(smaller, rows), logits((model, tensors), rows))


def test_one_expert_is_left_and_written_in_int8(tmp_path: Path) -> None:
    student = exported(routing="input", top_k=1)
    labelled = labelled_as(student)
    small = in_int8(*pruned(*student, 1, labelled.rows_BD))
    compress(str(tmp_path), student, small, labelled, max_loss=100)
    rows = rows_of(5)
    answers = [load(str(tmp_path), engine=engine).predict(rows).probabilities for engine in ("native", "onnx")]  # type: ignore[arg-type]
    np.testing.assert_allclose(*answers, atol=1e-5)


def test_merging_gives_the_mlp_of_the_mean() -> None:
    model, tensors = exported(input_attention=True)
    small = merged(model, tensors)
    assert small[0].network.kind == "mlp"
    rows = rows_of(30)
    expected = rbm_to_mlp(torch_student(model, tensors))(torch.from_numpy(rows))[0].detach().numpy()
    np.testing.assert_allclose(logits(small, rows), expected, rtol=1e-4, atol=2e-5)


def test_what_is_measured_is_written_down(tmp_path: Path) -> None:
    student = exported(routing="input", top_k=1)
    labelled = labelled_as(student)
    small = pruned(*student, 3, labelled.rows_BD)
    made = compress(str(tmp_path), student, small, labelled, max_loss=100)
    said = json.loads((tmp_path / "model.json").read_text())["compressed"]
    assert said == json.loads(json.dumps(made.compressed))
    assert (said["method"], said["rows"]) == ("pruned to 3 experts", 200)
    assert said["before"]["val"] == 1
    assert said["after"]["val"] == np.mean(logits(small, labelled.rows_BD).argmax(1) == labelled.label_B)
    assert said["after"]["bytes"] == (tmp_path / "model.safetensors").stat().st_size
    # 4 → 32 → 32 → 3, and a row compared with 6 memories, or 3.
    assert (
        said["before"]["multiply_adds"] - 4 * 6 == said["after"]["multiply_adds"] - 4 * 3 == 4 * 32 + 32 * 32 + 32 * 3
    )
    assert said["after"]["us"].keys() == {"1", "1024"}
    card = (tmp_path / "README.md").read_text()
    assert "| compressed: pruned to 3 experts | before | after |" in card
    assert "| accuracy, 200 validation rows | 100.00 % |" in card


def test_a_student_that_would_lose_too_much_is_not_written(tmp_path: Path) -> None:
    student = exported()
    labelled = labelled_as(student)
    small = merged(*student)
    lost = 100 * (1 - labelled.accuracy(network_of(small[0].network.model_dump(), small[1])))
    assert lost > 1
    with pytest.raises(RunError, match=rf"100.00 % before: {lost:.2f} points lost, more than 0.5 \(--max-loss\)"):
        compress(str(tmp_path / "small"), student, small, labelled, max_loss=0.5)
    assert not (tmp_path / "small").exists()


def test_int8_comes_last() -> None:
    student = exported()
    small = pruned(*student, 3, rows_of(50))
    both = in_int8(*small)
    assert (both[0].compressed or {})["method"] == "pruned to 3 experts, int8"
    for change in (in_int8, merged, lambda *each: pruned(*each, 2, rows_of(50))):
        with pytest.raises(InputError, match="is in int8 already"):
            change(*both)


@pytest.mark.parametrize(
    ("kind", "keep", "said"),
    [("mlp", 2, "is no RbM with experts"), ("rbm", 1, r"between 2 \(per row\) and 6"), ("rbm", 7, "and 6 experts")],
)
def test_what_cannot_be_pruned(kind: str, keep: int, said: str) -> None:
    with pytest.raises(InputError, match=said):
        pruned(*exported(kind), keep, rows_of(50))


def test_labelled_rows_of_a_graph_are_its_validation_nodes(tmp_path: Path) -> None:
    graph = small_graph(num_nodes=90, num_features=4, num_classes=3)
    store = write_graph(str(tmp_path), graph, np.random.default_rng(0).integers(0, 3, 90).astype(np.int32))
    model, _ = exported(class_names=None)
    labelled = from_graph(store, model)
    val = np.flatnonzero(graph.split == 1)
    feat = np.concatenate(list(graph.feat_chunks()))
    order = np.lexsort(labelled.rows_BD.T), np.lexsort(feat[val].T)
    np.testing.assert_array_equal(labelled.rows_BD[order[0]], feat[val][order[1]])
    np.testing.assert_array_equal(labelled.label_B[order[0]], graph.label[val][order[1]])
    with pytest.raises(InputError, match="another graph than the student's"):
        from_graph(store, exported()[0])


NAMES = ("cat", "dog", "owl")


def csv_of(path: Path, rows: np.ndarray, labels: list[str]) -> str:
    lines = [f"{','.join(map(str, row))},{label}" for row, label in zip(rows.tolist(), labels, strict=True)]
    path.write_text("\n".join(["x0,x1,x2,x3,label", *lines]) + "\n")
    return str(path)


def test_labelled_rows_of_a_table(tmp_path: Path) -> None:
    model, tensors = exported()
    rows = rows_of(4)
    labelled = from_table(csv_of(tmp_path / "rows.csv", rows, ["dog", "", "owl", "cat"]), "label", model, tensors)
    assert labelled.label_B.tolist() == [1, 2, 0]
    scaled = NativeEngine(model, tensors).scaled({"feat": rows[[0, 2, 3]]})
    np.testing.assert_allclose(labelled.rows_BD, scaled, rtol=1e-6)
    numbered, _ = exported(class_names=None)
    table = csv_of(tmp_path / "numbers.csv", rows, ["1", "", "2", "0"])
    assert from_table(table, "label", numbered, tensors).label_B.tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    ("labels", "column", "said"),
    [
        (["dog", "emu"], "label", "class 'emu' is unknown to the student, whose classes are cat, dog, owl"),
        (["", ""], "label", "no row has a class in column 'label'"),
        (["dog", "owl"], "kind", "no column 'kind' of classes"),
    ],
)
def test_tables_without_classes_are_refused(tmp_path: Path, labels: list[str], column: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        from_table(csv_of(tmp_path / "rows.csv", rows_of(2), labels), column, *exported())


def test_a_student_with_encodings_needs_its_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="learned from encodings, too, which no table has; give --run"):
        from_table(str(tmp_path), "label", *exported(inputs=("feat", "prop")))


Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`rbm-dist compress` in this process: its exit code, and what it says on one line."""

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["rbm-dist", "compress", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        return int(end.value.code or 0), " ".join((said.out + said.err).split())

    return call


def test_the_command(command: Command, tmp_path: Path) -> None:
    student = exported(routing="input", top_k=1)
    export(str(tmp_path / "full"), *student)
    rows = rows_of(300) * 2 + 3
    table = csv_of(tmp_path / "rows.csv", rows, load(str(tmp_path / "full")).predict(rows).classes.tolist())
    code, said = command(tmp_path / "full", "--out", tmp_path / "small", "--int8", "--nodes", table, "--max-loss", 5)
    assert code == 0, said
    assert "accuracy, 300 validation rows" in said
    assert "bytes of weights" in said
    model = format_.read(str(tmp_path / "small"))
    assert load_file(tmp_path / "small" / "model.safetensors")["layers.0.experts.weight_LDO"].dtype == np.int8
    assert (model.compressed or {})["before"]["bytes"] == len(save_tensors(student[1]))
    code, said = command(tmp_path / "full", "--out", tmp_path / "none", "--merge", "--nodes", table, "--max-loss", 0)
    assert code == 1
    assert "points lost, more than 0 (--max-loss); nothing was written" in said
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--nodes", "x.csv"], "one of --int8, --prune N and --merge"),
        (["--int8", "--merge", "--nodes", "x.csv"], "one of --int8, --prune N and --merge"),
        (["--int8"], "the run that the student is of"),
        (["--int8", "--run", "x", "--nodes", "x.csv"], "the run that the student is of"),
    ],
)
def test_what_the_command_needs(command: Command, tmp_path: Path, options: list[str], said: str) -> None:
    code, found = command(tmp_path / "full", "--out", tmp_path / "small", *options)
    assert code == 2
    assert said in found


def test_a_damaged_folder_is_refused(command: Command, tmp_path: Path) -> None:
    student = exported()
    export(str(tmp_path / "full"), *student)
    weights = tmp_path / "full" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    table = csv_of(tmp_path / "rows.csv", rows_of(3), ["dog", "owl", "cat"])
    code, said = command(tmp_path / "full", "--out", tmp_path / "small", "--int8", "--nodes", table)
    assert code == 2
    assert "damaged or of another version" in said
    assert not (tmp_path / "small").exists()


def test_a_student_is_not_written_over_itself(command: Command, tmp_path: Path) -> None:
    export(str(tmp_path), *exported())
    code, said = command(tmp_path, "--out", tmp_path, "--int8", "--nodes", "x.csv")
    assert code == 2
    assert "is the student itself" in said
