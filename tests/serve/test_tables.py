"""Tables of new nodes in every form, against `rbm_dist.load(…).predict` of the same rows as a pandas frame."""

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

import rbm_dist
from rbm_dist import storage
from rbm_dist.cli import main
from rbm_dist.serve.export import export
from rbm_dist.serve.format import Column, Features, ModelFile, NetworkFacts, NodeId
from tests.patience import patient
from tests.serve.reference import random_student
from tests.sources.table_input import put, save

ROOT = Path(__file__).parents[2]
ROWS = 70
GRAPH = dict.fromkeys(("num_nodes", "num_edges", "num_features", "num_classes"), 1)


def columns() -> dict[str, Any]:
    """New nodes: numbers, a list, a category, missing values, and columns that the student does not know."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=ROWS)
    x[3] = np.nan
    return {
        "id": [f"n{row:03d}" for row in range(ROWS)], "unknown": rng.random(ROWS), "x": x,
        "count": rng.integers(0, 9, ROWS), "emb": list(rng.normal(size=(ROWS, 2)).astype(np.float32)),
        "colour": np.array(["red", "green", "blue"])[rng.integers(0, 3, ROWS)],
    }  # fmt: skip


def write_model(url: str, missing: bool = True, id_: NodeId | None = None) -> str:
    """An exported student of those columns with random weights."""
    student, facts = random_student("rbm", num_features=6, num_classes=3)
    tensors = {name: tensor.numpy() for name, tensor in student.state_dict().items()}
    tensors["scaling.columns"] = np.stack([np.full(6, 0.5), np.full(6, 0.1), np.full(6, 2.0)])
    tensors["scaling.indicators"] = np.empty(0, np.int64)
    found = (
        Column(name="x", how="number", type="double", width=1),
        Column(name="count", how="number", type="int64", width=1),
        Column(name="emb", how="list", type="list of float", width=2),
        Column(name="colour", how="one_hot", type="text", width=2, values=("green", "red")),
    )
    model = ModelFile(
        name="rbm", rbm_dist="0", network=NetworkFacts.model_validate(facts), class_names=("a", "b", "c"),
        inputs={"feat": 6}, features=Features(columns=found, named=True, missing=missing, rows=""),
        id=id_ or NodeId(column="id", kind="text", arrow="string"),
        made_from={"run": "random", "graph": GRAPH},
    )  # fmt: skip
    export(url, model, tensors)
    return url


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(f"{tmp_path_factory.mktemp('student')}/student")


Predict = Callable[..., tuple[int, str]]


@pytest.fixture
def predict(model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Predict:
    """The command in this process: exit code, and all that it says."""

    def call(nodes: str, out: str, *more: str, student: str = model) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["rbm-dist", "predict", student, "--nodes", nodes, "--out", out, *more])
        with pytest.raises(SystemExit) as end:
            main()
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        return int(end.value.code or 0), " ".join((shown.out + shown.err).split())

    return call


def expected(model: str, table: dict[str, Any]) -> np.ndarray:
    return rbm_dist.load(model).predict(pd.DataFrame({**table, "emb": list(table["emb"])})).probabilities


def spread(table: dict[str, Any]) -> dict[str, Any]:
    """As text can hold it: a column for each value of a list."""
    emb = np.stack(table["emb"])
    rest = {name: column for name, column in table.items() if name != "emb"}
    return {**rest, "emb[0]": emb[:, 0], "emb[1]": emb[:, 1]}


def read(url: str) -> pa.Table:
    fs, path = storage.filesystem(url)
    with fs.open(path, "rb") as stream:
        return pq.read_table(stream) if url.endswith(".parquet") else pa.csv.read_csv(stream)


def probabilities(found: pa.Table) -> np.ndarray:
    if "probability" in found.column_names:
        return np.stack(found["probability"].to_pylist())
    return np.stack([found[f"probability[{k}]"].to_numpy() for k in range(3)], axis=1)


@pytest.mark.parametrize("out", ["out.parquet", "out.csv"])
@pytest.mark.parametrize("suffix", ["parquet", "csv", "csv.gz"])
def test_every_format_gives_what_a_frame_gives(predict: Predict, model: str, url: str, suffix: str, out: str) -> None:
    table = columns()
    save(f"{url}/nodes.{suffix}", table if suffix == "parquet" else spread(table), row_group_size=16)
    code, said = predict(f"{url}/nodes.{suffix}", f"{url}/{out}")
    assert code == 0, said
    assert "1 columns are not the student's" in said
    assert f"{ROWS} predictions of rbm" in said
    found = read(f"{url}/{out}")
    assert found["node_id"].to_pylist() == table["id"]
    np.testing.assert_allclose(probabilities(found), expected(model, table), atol=1e-6)
    best = expected(model, table).argmax(1)
    assert found["class"].to_pylist() == best.tolist()
    assert found["class_name"].to_pylist() == [("a", "b", "c")[each] for each in best]


def test_columns_in_another_order_make_no_difference(predict: Predict, model: str, tmp_path: Path) -> None:
    table = columns()
    save(f"{tmp_path}/nodes.parquet", dict(reversed(table.items())))
    assert predict(f"{tmp_path}/nodes.parquet", f"{tmp_path}/out.parquet")[0] == 0
    np.testing.assert_allclose(probabilities(read(f"{tmp_path}/out.parquet")), expected(model, table), atol=1e-6)


@pytest.mark.parametrize(
    "ids",
    [
        pa.array(range(ROWS), pa.int16()), pa.array([2**64 - 1 - row for row in range(ROWS)], pa.uint64()),
        pa.array([uuid.UUID(int=row).bytes for row in range(ROWS)], pa.uuid()),
        pa.array([bytes([row]) for row in range(ROWS)], pa.binary()), pa.array(map(str, range(ROWS))),
    ],
    ids=lambda ids: str(ids.type),
)  # fmt: skip
def test_ids_come_back_in_their_type(predict: Predict, tmp_path: Path, ids: pa.Array) -> None:
    save(f"{tmp_path}/nodes.parquet", {**columns(), "id": ids})
    for out in ("out.parquet", "out.csv"):
        assert predict(f"{tmp_path}/nodes.parquet", f"{tmp_path}/{out}")[0] == 0
    found = read(f"{tmp_path}/out.parquet")["node_id"].combine_chunks()
    assert found.type == ids.type
    assert found.to_pylist() == ids.to_pylist()
    as_text = [each.hex() if isinstance(each, bytes) else str(each) for each in ids.to_pylist()]
    lines = (tmp_path / "out.csv").read_text().splitlines()[1:]
    assert [line.split(",")[0].strip('"') for line in lines] == as_text


def test_ids_of_text_files_are_what_they_were_in_training(predict: Predict, tmp_path: Path) -> None:
    integers = write_model(f"{tmp_path}/integers", id_=NodeId(column="id", kind="integer", arrow="int32"))
    nodes, out = f"{tmp_path}/nodes.csv", f"{tmp_path}/out.parquet"
    save(nodes, {**spread(columns()), "id": range(ROWS)})
    assert predict(nodes, out, student=integers)[0] == 0
    assert read(out)["node_id"].type == pa.int64()
    save(nodes, {**spread(columns()), "id": [*map(str, range(ROWS - 1)), "guest-1"]})
    code, said = predict(nodes, out, student=integers)
    assert code == 2
    assert (
        f"nodes.csv: row {ROWS - 1}, column id: ids are integers, as in training; found 'guest-1' (--id-type: text"
        in said
    )
    assert predict(nodes, out, "--id-type", "text", student=integers)[0] == 0
    assert read(out)["node_id"].to_pylist()[-1] == "guest-1"


def test_without_a_column_of_ids_rows_are_numbered(predict: Predict, tmp_path: Path) -> None:
    table = columns()
    names = table.pop("id")
    for file, rows in enumerate((slice(0, 30), slice(30, None))):
        save(f"{tmp_path}/in/{file}.parquet", {name: column[rows] for name, column in table.items()})
    code, said = predict(f"{tmp_path}/in", f"{tmp_path}/out.parquet")
    assert code == 2
    assert "0.parquet: no column 'id' of node ids; name another (--id), or number rows (--row-numbers)" in said
    assert predict(f"{tmp_path}/in", f"{tmp_path}/out.parquet", "--row-numbers")[0] == 0
    assert read(f"{tmp_path}/out.parquet")["node_id"].to_pylist() == list(range(ROWS)), "through all that is joined"
    assert predict(f"{tmp_path}/in", f"{tmp_path}/out/", "--row-numbers")[0] == 0
    assert read(f"{tmp_path}/out/1.parquet")["node_id"].to_pylist() == list(range(40)), "of its own file"
    save(f"{tmp_path}/named.parquet", {**table, "name": names})
    assert predict(f"{tmp_path}/named.parquet", f"{tmp_path}/out.parquet", "--id", "name")[0] == 0
    assert read(f"{tmp_path}/out.parquet")["node_id"].to_pylist() == names


def test_the_most_probable_classes(predict: Predict, model: str, tmp_path: Path) -> None:
    table = columns()
    save(f"{tmp_path}/nodes.parquet", table)
    assert predict(f"{tmp_path}/nodes.parquet", f"{tmp_path}/out.parquet", "--top-k", "2")[0] == 0
    found = read(f"{tmp_path}/out.parquet")
    assert found.column_names == [
        "node_id", "class", "class_name", "top_classes", "top_class_names", "top_probabilities",
    ]  # fmt: skip
    wanted = expected(model, table)
    order = np.argsort(-wanted, axis=1)[:, :2]
    assert found["top_classes"].to_pylist() == order.tolist()
    assert found["top_class_names"].to_pylist() == [["abc"[each] for each in row] for row in order]
    highest = np.take_along_axis(wanted, order, axis=1)
    np.testing.assert_allclose(np.stack(found["top_probabilities"].to_pylist()), highest, atol=1e-6)
    assert predict(f"{tmp_path}/nodes.parquet", f"{tmp_path}/out.csv", "--top-k", "2")[0] == 0
    assert read(f"{tmp_path}/out.csv").column_names[3:] == [
        f"{name}[{k}]" for name in ("top_classes", "top_class_names", "top_probabilities") for k in range(2)
    ]


def without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda table: table.pop(name)


def replaced(name: str, values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda table: table.update({name: values})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without("count"), "nodes.parquet: no column 'count'"),
        (replaced("count", ["many"] * ROWS), "nodes.parquet: column 'count': numbers expected, found string"),
        (replaced("emb", [[1.0, 2.0]] * 40 + [[1.0]] * 30), "nodes.parquet: row 40, column emb: a list of 1 features"),
        (replaced("x", [1.0] * 50 + [np.inf] * 20), "row 50, column x: the feature is infinite or beyond float32"),
        (replaced("id", ["n"] * 60 + [None] * 10), "nodes.parquet: row 60, column id: the id is missing"),
        (replaced("id", [True] * ROWS), "column 'id': integers, text or binary expected as ids, found bool"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named_and_nothing_is_written(
    predict: Predict, tmp_path: Path, spoil: Callable[[dict[str, Any]], None], message: str
) -> None:
    table = columns()
    spoil(table)
    save(f"{tmp_path}/in/nodes.parquet", table, row_group_size=30)
    for out in ("out.parquet", "folder/"):
        code, said = predict(f"{tmp_path}/in/nodes.parquet", f"{tmp_path}/{out}")
        assert code == 2
        assert message in said
    assert not list(tmp_path.rglob("*.parquet*"))[1:], "the input alone"


def test_missing_values_are_refused_if_the_student_knows_none(predict: Predict, tmp_path: Path) -> None:
    strict = write_model(f"{tmp_path}/strict", missing=False)
    save(f"{tmp_path}/nodes.parquet", columns())
    code, said = predict(f"{tmp_path}/nodes.parquet", f"{tmp_path}/out.parquet", student=strict)
    assert code == 2
    assert "nodes.parquet: row 3, column x: the feature is missing or NaN, and the student was trained without" in said


def test_other_ways_of_writing_text(predict: Predict, model: str, tmp_path: Path) -> None:
    table = {**columns(), "id": [f"é{row}" for row in range(ROWS)]}
    pd.DataFrame(spread(table)).to_csv(tmp_path / "nodes.txt", sep="|", encoding="latin-1", index=False)
    nodes, out = f"{tmp_path}/nodes.txt", f"{tmp_path}/out.parquet"
    code, said = predict(nodes, out)
    assert code == 2
    assert "--encoding" in said
    assert "source." not in said
    assert predict(nodes, out, "--encoding", "latin-1", "--delimiter", "pipe")[0] == 0
    assert read(out)["node_id"].to_pylist() == table["id"]
    np.testing.assert_allclose(probabilities(read(out)), expected(model, table), atol=1e-6)


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_a_table_without_rows(predict: Predict, tmp_path: Path, suffix: str) -> None:
    table = columns()
    empty = pa.table(table if suffix == "parquet" else spread(table)).slice(0, 0)
    sink = pa.BufferOutputStream()
    (pq.write_table if suffix == "parquet" else pa.csv.write_csv)(empty, sink)
    put(f"{tmp_path}/nodes.{suffix}", sink.getvalue().to_pybytes())
    code, said = predict(f"{tmp_path}/nodes.{suffix}", f"{tmp_path}/out.parquet")
    assert code == 0, said
    assert read(f"{tmp_path}/out.parquet").num_rows == 0
    assert read(f"{tmp_path}/out.parquet").column_names == ["node_id", "class", "class_name", "probability"]
    put(f"{tmp_path}/none.{suffix}", b"")
    code, said = predict(f"{tmp_path}/none.{suffix}", f"{tmp_path}/out.parquet")
    assert code == 2
    assert "the file is empty (--nodes)" in said


def write_parts(url: str) -> dict[str, Any]:
    """Files of which two have one name, below folders that say a column."""
    table = columns()
    for day, rows in (("1", slice(0, 30)), ("2", slice(30, None))):
        save(f"{url}/in/day={day}/part-0.parquet", {name: column[rows] for name, column in table.items()})
    return table


def test_a_folder_has_a_file_for_each_input(predict: Predict, model: str, url: str) -> None:
    table = write_parts(url)
    assert predict(f"{url}/in", f"{url}/out/")[0] == 0
    found = pa.concat_tables([read(f"{url}/out/day={day}/part-0.parquet") for day in (1, 2)])
    assert found["node_id"].to_pylist() == table["id"]
    np.testing.assert_allclose(probabilities(found), expected(model, table), atol=1e-6)
    made = storage.read_json(f"{url}/out/predictions.json")
    assert made["model"] == {"name": "rbm", "digest": rbm_dist.load(model).digest}
    assert {name: entry["rows"] for name, entry in made["files"].items()} == {
        "day=1/part-0.parquet": 30, "day=2/part-0.parquet": 40,
    }  # fmt: skip
    fs, path = storage.filesystem(f"{url}/out")
    assert len(fs.find(path)) == 3, "nothing else is left"
    assert predict(f"{url}/in/day=*/*.parquet", f"{url}/joined.csv")[0] == 0
    assert read(f"{url}/joined.csv")["node_id"].to_pylist() == table["id"]


def test_the_same_command_again_does_what_is_new(predict: Predict, tmp_path: Path) -> None:
    write_parts(str(tmp_path))
    arguments = (f"{tmp_path}/in", f"{tmp_path}/out/")
    assert predict(*arguments)[0] == 0
    first = tmp_path / "out/day=1/part-0.parquet"
    before = first.stat().st_mtime_ns
    save(f"{tmp_path}/in/day=3/part-0.parquet", columns())
    code, said = predict(*arguments)
    assert code == 0
    assert "2 of 3 files: done before" in said
    assert first.stat().st_mtime_ns == before
    assert read(f"{tmp_path}/out/day=3/part-0.parquet").num_rows == ROWS
    first.unlink()
    assert predict(*arguments)[0] == 0
    assert first.exists()


def test_other_predictions_are_refused_unless_they_may_go(predict: Predict, tmp_path: Path) -> None:
    write_parts(str(tmp_path))
    arguments = (f"{tmp_path}/in", f"{tmp_path}/out/")
    assert predict(*arguments)[0] == 0
    other = write_model(f"{tmp_path}/other", id_=NodeId(column=None, kind="integer", arrow="int64"))
    code, said = predict(*arguments, "--top-k", "1")
    assert code == 2
    assert "options.top_k: None there, 1 now" in said
    save(f"{tmp_path}/in/day=1/part-0.parquet", columns())
    code, said = predict(*arguments)
    assert code == 2
    assert "in/day=1/part-0.parquet was changed" in said
    assert predict(*arguments, "--overwrite")[0] == 0
    assert read(f"{tmp_path}/out/day=1/part-0.parquet").num_rows == ROWS
    assert predict(*arguments, "--top-k", "1", "--overwrite", student=other)[0] == 0
    assert "top_classes" in read(f"{tmp_path}/out/day=2/part-0.parquet").column_names


def test_what_is_not_predictions_is_not_written_over(predict: Predict, tmp_path: Path) -> None:
    save(f"{tmp_path}/nodes.parquet", columns())
    for name in ("mine.parquet", "mine.csv", "folder/nodes.parquet"):
        put(f"{tmp_path}/{name}", b"mine")
        code, said = predict(f"{tmp_path}/nodes.parquet", f"{tmp_path}/{name.replace('nodes.parquet', '')}")
        assert code == 2
        assert "is there" in said
        assert (tmp_path / name).read_bytes() == b"mine"
    for out in ("x.feather", "x.parquet/y.json"):
        assert predict(f"{tmp_path}/nodes.parquet", f"{tmp_path}/{out}")[0] == 2
    assert predict(f"{tmp_path}/nodes.parquet", f"{tmp_path}/x.csv", "--format", "parquet")[0] == 2


def test_arrays_of_features(predict: Predict, tmp_path: Path) -> None:
    """A graph whose features have no names; its new nodes in a folder of npy, whose ids are optional."""
    student, facts = random_student("mlp", num_features=4, num_classes=3)
    tensors = {name: tensor.numpy() for name, tensor in student.state_dict().items()}
    tensors |= {"scaling.columns": np.repeat([[0.0], [0.0], [1.0]], 4, 1), "scaling.indicators": np.empty(0, np.int64)}
    unnamed = ModelFile(
        name="rbm", rbm_dist="0", network=NetworkFacts.model_validate(facts), class_names=None, inputs={"feat": 4},
        features=Features(columns=(Column(name="feat", how="list", type="numbers", width=4),), named=False,
                          missing=False, rows=""),
        id=NodeId(column=None, kind="integer", arrow="int64"),
        made_from={"run": "random", "graph": GRAPH},
    )  # fmt: skip
    export(f"{tmp_path}/student", unnamed, tensors)
    feat = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    storage.write_array(f"{tmp_path}/in/feat-0.npy", feat[:5])
    storage.write_array(f"{tmp_path}/in/feat-1.npy", feat[5:])
    storage.write_array(f"{tmp_path}/in/id.npy", np.arange(9) * 10)
    code, said = predict(f"{tmp_path}/in", f"{tmp_path}/out.parquet", "--id", "id", student=f"{tmp_path}/student")
    assert code == 0, said
    found = read(f"{tmp_path}/out.parquet")
    assert found["node_id"].to_pylist() == list(range(0, 90, 10))
    wanted = rbm_dist.load(f"{tmp_path}/student").predict(feat).probabilities
    np.testing.assert_allclose(probabilities(found), wanted, atol=1e-6)
    assert predict(f"{tmp_path}/in", f"{tmp_path}/out.parquet", student=f"{tmp_path}/student")[0] == 0
    assert read(f"{tmp_path}/out.parquet")["node_id"].to_pylist() == list(range(9))


def test_it_needs_neither_torch_nor_ray(model: str, tmp_path: Path) -> None:
    save(f"{tmp_path}/nodes.parquet", columns())
    blocked = "import sys; sys.modules['torch'] = sys.modules['ray'] = None; from rbm_dist.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", blocked, "predict", model, "--nodes", "nodes.parquet", "--out", "out/"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=patient(120), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert read(f"{tmp_path}/out/nodes.parquet").num_rows == ROWS


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_what_was_cut_off_goes_on(model: str, tmp_path: Path, sent: signal.Signals) -> None:
    table = pa.concat_tables([pa.table(columns())] * 4000)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=20_000)
    for file in range(6):
        put(f"{tmp_path}/in/{file}.parquet", sink.getvalue().to_pybytes())
    command = [
        sys.executable,
        "-m",
        "rbm_dist",
        "predict",
        model,
        "--nodes",
        f"{tmp_path}/in",
        "--out",
        f"{tmp_path}/out/",
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    first = tmp_path / "out/0.parquet"
    while not (tmp_path / "out/_work/0.parquet.json").exists():
        assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
    process.send_signal(sent)
    process.communicate(timeout=patient(60))
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}.get(sent, -sent)
    there = list((tmp_path / "out").glob("*.parquet"))
    assert 0 < len(there) < 6
    assert all(pq.read_metadata(path).num_rows == table.num_rows for path in there), "whole or not there"
    if sent != signal.SIGKILL:
        assert not list((tmp_path / "out").rglob("*.tmp-*"))
    before = first.stat().st_mtime_ns
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=patient(120), check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *(f"{file}.parquet" for file in range(6)), "predictions.json",
    ]  # fmt: skip
    made = json.loads((tmp_path / "out/predictions.json").read_text())
    assert [entry["rows"] for entry in made["files"].values()] == [table.num_rows] * 6
    assert first.stat().st_mtime_ns == before, "what was done is kept"
