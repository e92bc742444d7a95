"""Teachers from elsewhere: every format and order gives each node its own row, and what does not fit is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy.special import log_softmax, softmax

from rbm_dist.config.teacher import ExternalTeacherConfig
from rbm_dist.errors import InputError
from rbm_dist.graph.splits import NO_SPLIT, TEST, TRAIN, VAL
from rbm_dist.graph.store import GraphStore
from rbm_dist.train.external_teacher import ExternalTeacher
from tests.small_graph import small_graph, write_graph

NODES, CLASSES = 240, 5


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> GraphStore:
    """A graph in four parts that share nodes out at random, so that no order survives."""
    part_N = np.random.default_rng(5).integers(0, 4, NODES).astype(np.int32)
    return write_graph(str(tmp_path_factory.mktemp("graph")), small_graph(), part_N)


def predictions() -> np.ndarray:
    """Of each node, in the caller's order: right for two thirds."""
    rng = np.random.default_rng(7)
    logits = rng.normal(size=(NODES, CLASSES))
    sure = rng.random(NODES) < 0.67
    logits[sure, small_graph().label[sure]] += 3
    exp = np.exp(logits)
    return exp / exp.sum(1, keepdims=True)


def teacher(store: GraphStore, *paths: Path, **settings: Any) -> ExternalTeacher:
    given = {"paths": [str(path) for path in paths], "kind": "probabilities"} | settings
    return ExternalTeacher(ExternalTeacherConfig.model_validate(given), store)


def everyone(store: GraphStore) -> tuple[np.ndarray, np.ndarray]:
    """All nodes, and their places in the caller's order."""
    ids = np.random.default_rng(1).permutation(NODES)
    return ids, store.gather("orig_id", ids)


def saved(folder: Path, kind: str, rows: np.ndarray) -> tuple[Path, dict[str, Any]]:
    """Rows in a file of some kind, and how to say so."""
    path = folder / f"rows.{kind.split()[0]}"
    match kind:
        case "npy":
            np.save(path, rows.astype(np.float32))
        case "npz":
            np.savez(path, other=np.zeros(3), soft=rows)
            return path, {"array": "soft"}
        case "pt":
            torch.save(torch.from_numpy(rows), path)
        case "pt of several":
            torch.save({"epoch": 7, "pred": torch.from_numpy(rows).to(torch.bfloat16)}, path)
        case "bin":
            path.write_bytes(rows.astype(np.float16).tobytes())
            return path, {"dtype": "float16"}
        case "parquet":
            pq.write_table(pa.table({f"class_{c}": rows[:, c] for c in range(rows.shape[1])}), path)
        case "parquet of lists":
            pq.write_table(pa.table({"soft": rows.tolist()}), path)
    return path, {}


KINDS = ["npy", "npz", "pt", "pt of several", "bin", "parquet", "parquet of lists"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_each_node_its_row(store: GraphStore, tmp_path: Path, kind: str) -> None:
    expected = predictions()
    path, settings = saved(tmp_path, kind, expected)
    found = teacher(store, path, **settings)
    assert found.check()["with_rows"] == NODES
    ids, place = everyone(store)
    rough = 0.01 if "several" in kind or kind == "bin" else 1e-6
    np.testing.assert_allclose(found.probabilities(ids), expected[place], atol=rough)
    assert found.probabilities(ids).dtype == np.float32
    assert found.taught(ids).all()


@pytest.mark.parametrize(("kind", "made"), [("logits", lambda p: np.log(p) + 4), ("log_probabilities", np.log)])
def test_logits_and_their_likes_become_probabilities(store: GraphStore, tmp_path: Path, kind: str, made: Any) -> None:
    np.save(tmp_path / "rows.npy", made(predictions()))
    ids, place = everyone(store)
    found = teacher(store, tmp_path / "rows.npy", kind=kind).probabilities(ids)
    np.testing.assert_allclose(found, predictions()[place], atol=1e-6)


def test_an_impossible_class_may_have_a_log_probability_of_minus_infinity(store: GraphStore, tmp_path: Path) -> None:
    certain = np.eye(CLASSES)[small_graph().label]
    with np.errstate(divide="ignore"):
        np.save(tmp_path / "rows.npy", np.log(certain))
    ids, place = everyone(store)
    np.testing.assert_array_equal(
        teacher(store, tmp_path / "rows.npy", kind="log_probabilities").probabilities(ids), certain[place]
    )


def test_rows_one_split_after_the_other(store: GraphStore, tmp_path: Path) -> None:
    split = small_graph().split
    order = np.concatenate([np.flatnonzero(split == code) for code in (TRAIN, VAL, TEST)])
    np.save(tmp_path / "rows.npy", predictions()[order])
    ids, place = everyone(store)
    found = teacher(store, tmp_path / "rows.npy", rows="splits")
    assert found.check()["accuracy"][0] > 0.6
    np.testing.assert_allclose(found.probabilities(ids), predictions()[place], atol=1e-6)


@pytest.mark.parametrize("where", ["a file", "a column"])
def test_rows_by_id(store: GraphStore, tmp_path: Path, where: str) -> None:
    order = np.random.default_rng(2).permutation(NODES)[: NODES - 40]
    rows, settings = predictions()[order], {"rows": "ids", "missing": "labels"}
    if where == "a file":
        np.save(tmp_path / "rows.npy", rows)
        np.save(tmp_path / "ids.npy", order)
        found = teacher(store, tmp_path / "rows.npy", ids=str(tmp_path / "ids.npy"), **settings)
    else:
        table = pa.table({"node": order, **{f"c{c}": rows[:, c] for c in range(CLASSES)}})
        pq.write_table(table, tmp_path / "rows.parquet")
        found = teacher(store, tmp_path / "rows.parquet", id_column="node", **settings)
    assert found.check()["with_rows"] == NODES - 40
    ids, place = everyone(store)
    has_row = np.isin(place, order)
    soft = found.probabilities(ids)
    np.testing.assert_allclose(soft[has_row], predictions()[place[has_row]], atol=1e-6)
    graph = small_graph()
    train = ~has_row & (graph.split[place] == TRAIN)
    assert train.any()
    np.testing.assert_array_equal(soft[train], np.eye(CLASSES)[graph.label[place[train]]])
    left_out = ~has_row & ~train
    assert left_out.any()
    assert not soft[left_out].any()
    np.testing.assert_array_equal(found.taught(ids), ~left_out)


def test_several_are_averaged(store: GraphStore, tmp_path: Path) -> None:
    first, second = predictions(), np.roll(predictions(), 1, axis=1) * 0.2 + 0.8 * predictions()
    np.save(tmp_path / "a.npy", first)
    np.save(tmp_path / "b.npy", second)
    found = teacher(store, tmp_path / "a.npy", tmp_path / "b.npy")
    assert len(found.check()["accuracy"]) == 2
    ids, place = everyone(store)
    np.testing.assert_allclose(found.probabilities(ids), ((first + second) / 2)[place], atol=1e-6)


def test_of_several_those_count_that_have_the_node(store: GraphStore, tmp_path: Path) -> None:
    rows, shares = predictions(), {"a": np.arange(0, 160), "b": np.arange(80, 240)}
    for name, nodes in shares.items():
        given = rows[nodes] if name == "a" else 0.5 * rows[nodes] + 0.1
        columns = {f"c{c}": given[:, c] for c in range(CLASSES)}
        pq.write_table(pa.table({"id": nodes, **columns}), tmp_path / f"{name}.parquet")
    found = teacher(store, tmp_path / "a.parquet", tmp_path / "b.parquet", rows="ids")
    assert found.check()["with_rows"] == NODES
    softer = 0.5 * rows + 0.1
    expected = np.where(np.arange(NODES)[:, None] < 80, rows, softer)
    expected[80:160] = (rows[80:160] + softer[80:160]) / 2
    ids, place = everyone(store)
    np.testing.assert_allclose(found.probabilities(ids), expected[place], atol=1e-6)


def best_of_many(log_NC: np.ndarray) -> float:
    """The temperature of the least loss on validation, of a fine grid; of predictions in the caller's order."""
    graph = small_graph()
    val = np.flatnonzero(graph.split == VAL)
    grid = np.geomspace(0.05, 20, 3001)
    losses = [-log_softmax(log_NC[val] / t, axis=1)[np.arange(len(val)), graph.label[val]].mean() for t in grid]
    return float(grid[np.argmin(losses)])


def calibrated(store: GraphStore, *paths: Path, **settings: Any) -> tuple[list[float], ExternalTeacher]:
    config = ExternalTeacherConfig.model_validate({"paths": [str(path) for path in paths], "kind": "logits"} | settings)
    temperatures = ExternalTeacher(config, store).fit_temperatures()
    return temperatures, ExternalTeacher(config, store, temperatures)


@pytest.mark.parametrize("kind", ["logits", "probabilities", "log_probabilities"])
@pytest.mark.parametrize("sureness", [0.3, 1, 4])
def test_the_temperature_fits_validation_best_and_undoes_what_scales_logits(
    store: GraphStore, tmp_path: Path, kind: str, sureness: float
) -> None:
    given = log_softmax(sureness * np.log(predictions()), axis=1)
    np.save(tmp_path / "rows.npy", {"logits": given - 3, "probabilities": np.exp(given)}.get(kind, given))
    (temperature,), found = calibrated(store, tmp_path / "rows.npy", kind=kind)
    expected = best_of_many(np.log(predictions()))
    assert temperature == pytest.approx(sureness * expected, rel=5e-3)
    assert abs(temperature - 1) > 0.05, "there was something to calibrate"
    ids, place = everyone(store)
    likely = softmax(np.log(predictions()) / expected, axis=1)[place]
    np.testing.assert_allclose(found.probabilities(ids), likely, atol=5e-3)


def test_a_teacher_that_float16_made_certain_becomes_as_sure_as_it_is_right(store: GraphStore, tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.eye(CLASSES)[predictions().argmax(1)].astype(np.float16))
    _, found = calibrated(store, tmp_path / "rows.npy", kind="probabilities")
    val = np.flatnonzero(store.gather("split", np.arange(NODES)) == VAL)
    soft = found.probabilities(val)
    right = (soft.argmax(1) == store.gather("label", val)).mean()
    assert 0.5 < right < 0.95
    np.testing.assert_allclose(soft.max(1), right, atol=5e-3)


def test_the_best_is_the_surest_after_calibration(store: GraphStore, tmp_path: Path) -> None:
    """The louder of two teachers is right less often."""
    rng, label = np.random.default_rng(3), small_graph().label
    quiet = 0.5 * (np.log(predictions()) + np.eye(CLASSES)[label])
    loud = 6 * (rng.normal(size=(NODES, CLASSES)) + 0.8 * np.eye(CLASSES)[label])
    given, paths = {"quiet": quiet, "loud": loud}, [tmp_path / "quiet.npy", tmp_path / "loud.npy"]
    for name, rows in given.items():
        np.save(tmp_path / f"{name}.npy", rows)
    temperatures, found = calibrated(store, *paths, combine="best")
    assert temperatures[0] < 1 < temperatures[1]
    soft_2NC = np.stack([softmax(rows / best_of_many(rows), axis=1) for rows in given.values()])
    surest = soft_2NC.max(2).argmax(0)
    as_given = np.stack([softmax(rows, axis=1) for rows in given.values()]).max(2).argmax(0)
    assert 0.2 < (surest != as_given).mean() < 0.95
    expected = soft_2NC[surest, np.arange(NODES)]
    ids, place = everyone(store)
    clear = np.abs(np.diff(soft_2NC.max(2), axis=0)[0])[place] > 0.01  # the grid is not exact
    np.testing.assert_allclose(found.probabilities(ids)[clear], expected[place][clear], atol=5e-3)
    assert clear.mean() > 0.9


def test_the_best_is_of_the_files_that_have_the_node(store: GraphStore, tmp_path: Path) -> None:
    rows, shares = predictions(), {"a": np.arange(0, 160), "b": np.arange(80, 240)}
    for name, nodes in shares.items():
        pq.write_table(pa.table({"id": nodes, "soft": rows[nodes].tolist()}), tmp_path / f"{name}.parquet")
    files = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    settings = {"paths": [str(path) for path in files], "kind": "probabilities", "rows": "ids", "combine": "best"}
    found = ExternalTeacher(ExternalTeacherConfig.model_validate(settings), store, [1.0, 2.0])
    ids, place = everyone(store)
    softer = np.sqrt(rows) / np.sqrt(rows).sum(1, keepdims=True)
    expected = np.where(np.arange(NODES)[:, None] < 160, rows, softer)
    np.testing.assert_allclose(found.probabilities(ids), expected[place], atol=1e-6)


def test_without_validation_nodes_nothing_is_calibrated(store: GraphStore, tmp_path: Path) -> None:
    train = np.flatnonzero(small_graph().split == TRAIN)
    np.save(tmp_path / "rows.npy", predictions()[train])
    np.save(tmp_path / "ids.npy", train)
    found = teacher(store, tmp_path / "rows.npy", rows="ids", ids=str(tmp_path / "ids.npy"), missing="labels")
    with pytest.raises(InputError, match=r"rows.npy: no validation node has a row, .*teacher.calibrate\)$"):
        found.fit_temperatures()


def nan_in(row: int) -> np.ndarray:
    rows = predictions()
    rows[row, 2] = np.nan
    return rows


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (predictions()[:-1], {}, r"239 rows; nodes are numbered from 0 to 239, .* \(teacher.external.rows\)$"),
        (np.concatenate([predictions()] * 2), {}, r"480 rows; nodes are numbered from 0 to 239"),
        (predictions()[:-1], {"rows": "splits"}, r"239 rows; training, validation and test nodes are 240"),
        (predictions()[:, :4], {}, r"4 columns; the graph has 5 classes$"),
        (predictions().argmax(1), {}, r"this is int64 of shape \[240\]; classes are not enough"),
        (np.random.default_rng(0).permutation(predictions()), {}, r"the rows seem to be in another order"),
        (np.roll(predictions(), 1, axis=1), {}, r"or the classes in another$"),
        (np.full((NODES, CLASSES), 0.2), {}, r"the rows seem to be in another order"),
        (np.log(predictions()), {}, r"is not of probabilities: they sum to -.* Is the file of logits\?"),
        (predictions(), {"kind": "log_probabilities"}, r"is not of log-probabilities: .*probabilities or logits\?"),
        (nan_in(int(np.flatnonzero(small_graph().split == TRAIN)[0])), {"kind": "logits"}, "not finite"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    store: GraphStore, tmp_path: Path, rows: np.ndarray, settings: dict[str, Any], message: str
) -> None:
    np.save(tmp_path / "rows.npy", rows)
    with pytest.raises(InputError, match=message):
        teacher(store, tmp_path / "rows.npy", **settings).check()


def test_a_nan_of_a_node_without_a_label_is_found_too(store: GraphStore, tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", nan_in(int(np.flatnonzero(small_graph().split == TEST)[0])))
    found = teacher(store, tmp_path / "rows.npy")
    found.check()
    with pytest.raises(InputError, match=r"rows.npy: row \d+ has numbers that are not finite"):
        found.probabilities(everyone(store)[0])


def test_nodes_without_a_row_are_refused_unless_labels_may_speak_for_them(store: GraphStore, tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", predictions()[:200])
    np.save(tmp_path / "ids.npy", np.arange(200))
    found = teacher(store, tmp_path / "rows.npy", rows="ids", ids=str(tmp_path / "ids.npy"))
    with pytest.raises(InputError, match=r"40 of 240 nodes have no row, such as 2\d\d\. .*missing: labels"):
        found.check()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.arange(239), "239 ids for 240 rows"),
        (np.zeros(240, int), "the node id 0 is also that of .*ids are given once"),
        (np.linspace(0, 1, 240), "ids are integers or text"),
    ],
)
def test_ids_that_are_none_are_refused(store: GraphStore, tmp_path: Path, ids: np.ndarray, message: str) -> None:
    np.save(tmp_path / "rows.npy", predictions())
    np.save(tmp_path / "ids.npy", ids)
    with pytest.raises(InputError, match=message):
        teacher(store, tmp_path / "rows.npy", rows="ids", ids=str(tmp_path / "ids.npy"))


@pytest.mark.parametrize(
    ("name", "content", "settings", "message"),
    [
        ("rows.npy", None, {}, "no such file"),
        ("rows.npy", b"nonsense", {}, "not a whole .npy array"),
        ("rows.npz", b"nonsense", {}, r"cannot be read: .*\(teacher.external.paths\)$"),
        ("rows.pt", b"nonsense", {}, "cannot be read"),
        ("rows.parquet", b"nonsense", {}, "cannot be read"),
        ("rows.csv", b"0.1,0.9", {}, "predictions are read from .npy"),
        ("rows.bin", b"12345678", {"dtype": "float16"}, "8 bytes are no whole number of rows of 5 float16"),
    ],
)
def test_files_that_are_none_are_refused(
    store: GraphStore, tmp_path: Path, name: str, content: bytes | None, settings: dict[str, Any], message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        teacher(store, tmp_path / name, **settings)


def test_no_code_runs_from_a_file(store: GraphStore, tmp_path: Path) -> None:
    from tests.pickle_trap import Trap

    torch.save({"pred": Trap(tmp_path / "sprung")}, tmp_path / "rows.pt")
    with pytest.raises(InputError, match="cannot be read"):
        teacher(store, tmp_path / "rows.pt")
    assert not (tmp_path / "sprung").exists()


def test_several_arrays_want_a_name(store: GraphStore, tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", a=predictions(), b=predictions())
    with pytest.raises(InputError, match=r"several arrays; say which \(teacher.external.array\); found a, b"):
        teacher(store, tmp_path / "rows.npz")
    with pytest.raises(InputError, match=r"no array 'c' \(teacher.external.array\); found a, b"):
        teacher(store, tmp_path / "rows.npz", array="c")


def test_no_split_has_no_row(store: GraphStore) -> None:
    assert NO_SPLIT not in small_graph().split, "so that 240 rows are all nodes above"
