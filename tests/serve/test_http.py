"""The endpoints of a running server: answers are the student's own, and whatever cannot be answered is refused."""

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rbm_dist
from rbm_dist.serve.export import export
from tests.patience import patient
from tests.serve.exported import MIXED, exported
from tests.serve.served import Served, served, tensor

pytest.importorskip("fastapi", reason="rbm-dist[serve] is not installed")

ROW = {"age": 31.5, "emb": [1, 2.5, -3], "colour": "red", "member": True, "price": "2,5"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = {
        "plain": exported(),
        "mixed": exported(columns=MIXED, missing=True),
        "placed": exported("moe", inputs=("feat", "pos", "prop"), class_names=None),
    }
    urls = {name: str(tmp_path_factory.mktemp(name)) for name in made}
    for name, (model, tensors) in made.items():
        export(urls[name], model, tensors)
    return urls


@pytest.fixture(scope="module")
def server(folders: dict[str, str]) -> Iterator[Served]:
    named = [f"{name}={url}" for name, url in folders.items()]
    with served(*named, "--max-rows", "300", "--max-body", "100000") as running:
        yield running


def drawn(rows: int, width: int = 4) -> np.ndarray:
    return np.random.default_rng(rows).standard_normal((rows, width)).astype(np.float32)


def test_health_and_metadata(server: Served, folders: dict[str, str]) -> None:
    student = rbm_dist.load(folders["placed"])
    assert server.ask("GET", "/v2")[1]["extensions"] == ["binary_tensor_data"]
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/plain/ready"):
        assert server.ask("GET", path)[0] == 200
    status, said = server.ask("GET", f"/v2/models/placed/versions/{student.digest}")
    assert (status, said["versions"]) == (200, [student.digest])
    assert {each["name"]: each["shape"] for each in said["inputs"]} == {
        "feat": [-1, 4], "pos": [-1, 6], "prop": [-1, 3],
    }  # fmt: skip
    assert [each["name"] for each in said["outputs"]] == ["probabilities", "class"]  # its classes have no names


@pytest.mark.parametrize("rows", [1, 3, 300])
@pytest.mark.parametrize("binary", [True, False])
def test_tritonclient_gets_the_students_own_answers(
    server: Served, folders: dict[str, str], rows: int, binary: bool
) -> None:
    triton = pytest.importorskip("tritonclient.http", reason="tritonclient is not installed")
    client = triton.InferenceServerClient(f"127.0.0.1:{server.port}")
    asked = triton.InferInput("feat", [rows, 4], "FP32")
    asked.set_data_from_numpy(drawn(rows), binary_data=binary)
    names = ("probabilities", "class", "class_name")
    outputs = None if binary else [triton.InferRequestedOutput(name, binary_data=False) for name in names]
    found = client.infer("plain", [asked], request_id="me", outputs=outputs)
    classes, probability_BC = rbm_dist.load(folders["plain"]).predict(drawn(rows))
    np.testing.assert_array_equal(found.as_numpy("probabilities"), probability_BC)
    np.testing.assert_array_equal(found.as_numpy("class"), probability_BC.argmax(1))
    names_B = found.as_numpy("class_name")
    assert [name.decode() if binary else name for name in names_B] == classes.tolist()
    assert found.get_response()["id"] == "me"


def test_several_inputs_and_chosen_outputs(server: Served, folders: dict[str, str]) -> None:
    inputs = {"feat": drawn(5), "pos": drawn(5, 6), "prop": drawn(5, 3)}
    tensors = [tensor(name, rows.tolist()) for name, rows in inputs.items()]
    tensors[1]["data"] = inputs["pos"].tolist()  # rows as lists, which the protocol allows
    body = {"inputs": tensors, "outputs": [{"name": "class"}]}
    status, said = server.ask("POST", "/v2/models/placed/infer", body)
    expected = rbm_dist.load(folders["placed"]).predict(inputs["feat"], pos=inputs["pos"], prop=inputs["prop"]).classes
    assert status == 200
    assert [(each["name"], each["data"]) for each in said["outputs"]] == [("class", expected.tolist())]


def test_rows_by_column_names(server: Served, folders: dict[str, str]) -> None:
    student = rbm_dist.load(folders["mixed"])
    rows = [ROW, {**ROW, "age": None, "colour": "violet", "more": 1}]
    status, said = server.ask("POST", "/predict?model=mixed", {"rows": rows, "top_k": 2, "explain": True})
    assert status == 200
    classes, probability_BC = student.predict(rows)
    explained = student.explain(rows)
    for row, each in enumerate(said["predictions"]):
        best = probability_BC[row].argsort()[::-1][:2]
        assert (each["class"], each["class_name"]) == (best[0], classes[row])
        assert [one["class"] for one in each["top"]] == best.tolist()
        np.testing.assert_allclose([one["probability"] for one in each["top"]], probability_BC[row][best])
        assert each["memories"] == explained[row]["memories"]
    bare = server.ask("POST", "/predict?model=mixed", rows)[1]
    assert [each["class"] for each in bare["predictions"]] == [each["class"] for each in said["predictions"]]
    assert "top" not in bare["predictions"][0]


def test_the_first_model_is_the_default_and_rows_may_be_lists(server: Served, folders: dict[str, str]) -> None:
    said = server.ask("POST", "/predict", {"rows": drawn(2).tolist()})[1]
    expected = rbm_dist.load(folders["plain"]).predict(drawn(2)).classes
    assert [each["class_name"] for each in said["predictions"]] == expected.tolist()


def infer(**changes: Any) -> dict[str, Any]:
    return {"inputs": [tensor("feat", [[1, 2, 3, 4]]) | changes]}


def binary(size: Any, data: bytes, shape: Any = (1, 4)) -> tuple[bytes, dict[str, str]]:
    body = {"name": "feat", "datatype": "FP32", "shape": shape, "parameters": {"binary_data_size": size}}
    head = json.dumps({"inputs": [body]}).encode()
    return head + data, {"Inference-Header-Content-Length": str(len(head))}


INFER, PREDICT = "/v2/models/plain/infer", "/predict?model=mixed"
FLOATS = drawn(1).tobytes()
MALFORMED: dict[str, tuple[str, Any, dict[str, str], int, str]] = {
    "no JSON": (INFER, b"{", {}, 400, "JSON"),
    "no UTF-8": (INFER, b'"\xff"', {}, 400, "JSON"),
    "nothing": (INFER, b"", {}, 400, "JSON"),
    "a list": (INFER, [], {}, 400, "inputs"),
    "endless nesting": (INFER, b"[" * 50_000, {}, 400, "depth"),
    "NaN": (INFER, json.dumps(infer(data=[1, 2, 3, float("nan")])).encode(), {}, 400, "JSON"),
    "Infinity": (PREDICT, json.dumps([{**ROW, "age": float("inf")}]).encode(), {}, 400, "JSON"),
    "beyond float32": (INFER, infer(data=[1, 2, 3, 1e300]), {}, 400, "beyond float32"),
    "beyond all floats": (INFER, b'{"inputs": [1e999]}', {}, 400, "JSON"),
    "text": (INFER, infer(data=[1, 2, 3, "4"]), {}, 400, "found text"),
    "null": (INFER, infer(data=[1, 2, 3, None]), {}, 400, "found nothing"),
    "a truth value": (INFER, infer(data=[1, 2, 3, True]), {}, 400, "true or false"),
    "another width": (INFER, infer(shape=[1, 5]), {}, 400, "shape"),
    "other axes": (INFER, infer(shape=[4]), {}, 400, "shape"),
    "a negative length": (INFER, infer(shape=[-1, 4]), {}, 400, "shape"),
    "a length of truth": (INFER, infer(shape=[True, 4]), {}, 400, "shape"),
    "an enormous shape": (INFER, infer(shape=[2**62, 4]), {}, 413, "--max-rows"),
    "too little data": (INFER, infer(data=[1, 2, 3]), {}, 400, "found 3"),
    "ragged rows": (INFER, infer(shape=[2, 4], data=[[1, 2, 3, 4], [1]]), {}, 400, "row 1"),
    "no data": (INFER, infer(data=None), {}, 400, "a list of numbers"),
    "another type": (INFER, infer(datatype="FP64"), {}, 400, "FP32"),
    "an unknown input": (INFER, infer(name="x"), {}, 400, "unknown"),
    "an input twice": (INFER, {"inputs": infer()["inputs"] * 2}, {}, 400, "twice"),
    "no input": (INFER, {"inputs": []}, {}, 400, "missing"),
    "no object": (INFER, {"inputs": [3]}, {}, 400, "object"),
    "an unknown output": (INFER, infer() | {"outputs": [{"name": "x"}]}, {}, 400, "unknown"),
    "an id that is none": (INFER, infer() | {"id": 3}, {}, 400, "id"),
    "parameters that are none": (INFER, infer(parameters=[]), {}, 400, "parameters"),
    "NaN in binary": (INFER, *binary(16, np.full(4, np.nan, "<f4").tobytes()), 400, "NaN"),
    "another binary size": (INFER, *binary(12, FLOATS[:12]), 400, "binary_data_size 16"),
    "a size that is none": (INFER, *binary("16", FLOATS), 400, "binary_data_size 16"),
    "too few bytes": (INFER, *binary(16, FLOATS[:15]), 400, "has 15 left"),
    "too many bytes": (INFER, *binary(16, FLOATS + b"x"), 400, "1 bytes follow"),
    "a header beyond the body": (INFER, b"{}", {"Inference-Header-Content-Length": "9"}, 400, "2 bytes"),
    "a header length that is none": (INFER, b"{}", {"Inference-Header-Content-Length": "-1"}, 400, "bytes expected"),
    "too many rows": (INFER, *binary(4816, drawn(301).tobytes(), [301, 4]), 413, "301"),
    "too large a body": (PREDICT, b" " * 100_001, {}, 413, "--max-body"),
    "a compressed body": (INFER, b"x", {"Content-Encoding": "gzip"}, 415, "compressed"),
    "an unknown model": ("/v2/models/x/infer", infer(), {}, 404, "plain"),
    "an unknown version": ("/v2/models/plain/versions/1/infer", infer(), {}, 404, "version"),
    "an unknown model by name": ("/predict?model=x", [ROW], {}, 404, "plain"),
    "an unknown path": ("/v2/x", infer(), {}, 404, "Not Found"),
    "no rows": (PREDICT, {"rows": []}, {}, 400, "no rows"),
    "an unknown key": (PREDICT, {"rows": [ROW], "topk": 1}, {}, 400, "topk"),
    "none of the best": (PREDICT, {"rows": [ROW], "top_k": 0}, {}, 400, "top_k"),
    "a column that is missing": (PREDICT, [{"age": 1}], {}, 400, "no column 'emb'"),
    "a number as text": (PREDICT, [ROW, {**ROW, "age": "3"}], {}, 400, "row 1, column age"),
    "a list that is too short": (PREDICT, [{**ROW, "emb": [1]}], {}, 400, "emb"),
    "a list of objects": (PREDICT, [{**ROW, "emb": [{}, {}, {}]}], {}, 400, "emb"),
    "a row that is none": (PREDICT, [3], {}, 400, "row 0"),
    "rows of two kinds": (PREDICT, [ROW, [1]], {}, 400, "row 1"),
    "rows of lists and objects": ("/predict", [[1, 2, 3, 4], ROW], {}, 400, "row 1"),
    "an encoding it does not have": (PREDICT, {"rows": [ROW], "pos": [[1.0]]}, {}, 400, "pos"),
    "an encoding that is missing": ("/predict?model=placed", [[1, 2, 3, 4]], {}, 400, "pos"),
    "half a character": (PREDICT, b'[{"\\ud800": 1}]', {}, 400, "JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_requests_are_refused_with_a_reason(server: Served, case: str) -> None:
    path, body, headers, expected, reason = MALFORMED[case]
    status, said = server.ask("POST", path, body, headers)
    assert (status, list(said)) == (expected, ["error"])
    assert reason in said["error"]


def test_a_body_without_length_is_limited_as_well(server: Served) -> None:
    chunks = iter([b" " * 60_000] * 2)
    status, said = server.ask("POST", PREDICT, chunked(chunks), {"Transfer-Encoding": "chunked"})
    assert (status, "--max-body" in said["error"]) == (413, True)


@pytest.mark.parametrize("length", ["abc", "-5", "1, 2"])
def test_a_length_that_is_none_is_refused(server: Served, length: str) -> None:
    with socket.create_connection(("127.0.0.1", server.port), patient(10)) as connection:
        connection.sendall(f"POST {INFER} HTTP/1.1\r\nHost: here\r\nContent-Length: {length}\r\n\r\n".encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 400 ")


def chunked(chunks: Iterator[bytes]) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"


def test_many_at_once_get_each_their_own(server: Served, folders: dict[str, str]) -> None:
    student = rbm_dist.load(folders["plain"])

    def ask(i: int) -> None:
        x = drawn(1 + i % 250)
        body = {"inputs": [tensor("feat", x.tolist())]}
        if i % 10 == 0:  # and one that is at fault spoils no one else's
            body["inputs"][0]["data"][-1] = 1e300
        status, said = server.ask("POST", INFER, body)
        if i % 10 == 0:
            assert (status, f"row {len(x) - 1}," in said["error"]) == (400, True)
            return
        found = np.array(said["outputs"][0]["data"], np.float32).reshape(len(x), 3)
        np.testing.assert_allclose(found, student.probabilities(student.read(x)), atol=1e-6)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(400)))


def test_metrics_documentation_and_log(server: Served) -> None:
    server.ask("POST", INFER, infer() | {"id": "counted"})
    text = server.raw("GET", "/metrics")[2].decode()
    assert 'rbm_dist_requests_total{model="plain",status="200"}' in text
    assert 'rbm_dist_batch_rows_bucket{le="1.0",model="plain"}' in text
    described = server.ask("GET", "/openapi.json")[1]["paths"]["/predict"]["post"]
    assert "rows" in described["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert b"swagger" in server.raw("GET", "/docs")[2]
    (line,) = [line for line in server.lines if line.get("id") == "counted"]
    assert (line["method"], line["path"], line["status"], line["rows"]) == ("POST", INFER, 200, 1)


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    from rbm_dist.errors import InputError
    from rbm_dist.serve.repository import named

    for name in ("a", "b"):
        export(str(tmp_path / name), *exported())
    with pytest.raises(InputError, match="a second model named rbm"):
        named([str(tmp_path / "a"), str(tmp_path / "b")])
    assert list(named([f"x={tmp_path / 'a'}", str(tmp_path / "b")])) == ["x", "rbm"]
    with pytest.raises(InputError, match="no exported student there"):
        named([str(tmp_path)])
