"""The files of a source: which they are, for every kind, and what is said of the first that is another."""

import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from rbm_dist import storage
from rbm_dist.config.source import SourceConfig, SourceSection
from rbm_dist.errors import InputError
from rbm_dist.sources import inputs


def config(**source: Any) -> SourceSection:
    return TypeAdapter(SourceConfig).validate_python(source)


def put(url: str, content: bytes = b"1") -> str:
    with storage.atomic_writer(url) as stream:
        stream.write(content)
    return url


@pytest.mark.parametrize("kind", ["npz", "pyg"])
def test_of_one_file(url: str, kind: str) -> None:
    source = config(kind=kind, path=f"{url}/a.npz")
    assert not inputs.are_there(source)
    with pytest.raises(InputError, match=rf"^{url}/a\.npz: no such file \(source\.path\)$"):
        inputs.input_files(source)
    put(f"{url}/a.npz")
    assert inputs.are_there(source)
    assert inputs.input_files(source) == {"source.path": [storage.stamp(f"{url}/a.npz")]}


@pytest.mark.parametrize("edges", ["edges", "edges/", "edges/e-*.csv"])
def test_of_tables(url: str, edges: str) -> None:
    source = config(kind="tables", nodes=f"{url}/nodes.csv", edges=f"{url}/{edges}")
    assert not inputs.are_there(source)
    files = [put(f"{url}/edges/e-{index}.csv") for index in (2, 10)]
    assert inputs.are_there(source), "the edges are"
    put(f"{url}/nodes.csv")
    found = inputs.input_files(source)
    assert {key: [Path(file).name for file, *_ in stamps] for key, stamps in found.items()} == {
        "source.nodes": ["nodes.csv"], "source.edges": ["e-2.csv", "e-10.csv"],
    }  # fmt: skip
    assert inputs.change(found, inputs.input_files(source)) is None
    put(files[1], b"changed")
    changed = inputs.change(found, inputs.input_files(source))
    assert changed is not None
    assert changed.endswith("/edges/e-10.csv has 7 bytes, had 1 (source.edges)")
    storage.remove(files[1])
    assert "e-10.csv is no longer there (source.edges)" in str(inputs.change(found, inputs.input_files(source)))
    found = inputs.input_files(source)
    put(f"{url}/edges/e-3.csv")
    assert "e-3.csv was not there (source.edges)" in str(inputs.change(found, inputs.input_files(source)))


def test_of_ogb(tmp_path: Path) -> None:
    source = config(kind="ogb", name="ogbn-arxiv", root=str(tmp_path))
    assert not inputs.are_there(source)
    raw = ("edge", "node-feat", "node-label", "num-node-list", "num-edge-list")
    names = [f"raw/{name}.csv.gz" for name in raw] + [
        f"split/time/{name}.csv.gz" for name in ("train", "valid", "test")
    ]
    files = [put(f"{tmp_path}/ogbn_arxiv/{name}") for name in names]
    assert inputs.are_there(source)
    assert inputs.input_files(source) == {"source.root": [storage.stamp(file) for file in files]}


@pytest.mark.parametrize("source", [
    {"kind": "digits"}, {"kind": "regions"}, {"kind": "synthetic"}, {"kind": "pyg", "dataset": "a.B"},
])  # fmt: skip
def test_what_is_made_has_none(source: dict[str, Any]) -> None:
    assert inputs.input_files(config(**source)) == {}


def test_the_same_files_elsewhere_are_the_same(tmp_path: Path) -> None:
    def files(folder: str) -> dict[str, inputs.Stamps]:
        return inputs.input_files(
            config(kind="tables", nodes=f"{tmp_path}/{folder}/*/p.csv", edges=f"{tmp_path}/e.csv")
        )

    put(f"{tmp_path}/e.csv")
    for name in ("a/1/p.csv", "a/2/p.csv"):
        put(f"{tmp_path}/{name}", name.encode())
    then = files("a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert inputs.change(then, files("b")) is None
    os.utime(tmp_path / "b" / "2" / "p.csv", (0, 0))
    assert f"{tmp_path}/b/2/p.csv is of 1970-01-01 " in str(inputs.change(then, files("b")))
