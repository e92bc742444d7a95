"""The package graph of a handful of stanzas, written out by hand, and what people are told where there are none."""

import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks import debian_graph
from benchmarks.debian_graph import Package, edges, features, labels, nodes, parse
from rbm_dist.config.source import TablesConfig
from rbm_dist.sources.tables import open_tables

AVAILABLE = """\
Package: zsh
Architecture: amd64
Depends: libc6 (>= 2.34), libc6 (<< 3), python3:any (>= 3.9~), perl:any | awk
Pre-Depends: dpkg
Recommends: mail-agent | exim4 | nowhere,
 editor [linux-any]
Suggests: zsh, zsh-doc
Section: shells
Description: shell with lots of features
Description-md5: 11

Package: libc6
Architecture: amd64
Section: universe/libs
Provides: libc6-2.36 (= 2.36), zsh-doc
Description: GNU C Library

Package: libc6
Architecture: i386
Section: libs
Depends: dpkg
Description: GNU C Library of another architecture

Package: python3
Section: non-free-firmware/python
Recommends: libc6-2.36
Description: interpréteur für Σ
Description-md5: 22

Package: postfix
Provides: mail-agent (= 1), editor
Section: mail
Description: MTA

Package: exim4
Provides: mail-agent
Section: mail
Description: MTA

Package: dpkg
Description: package management
"""

TRANSLATIONS = """\
Package: zsh
Description-md5: 11
Description-en: shell with lots of features
 Zsh is a UNIX command interpreter.
 .
 It is naïve.

Package: other
Description-md5: 33
Description-en: another package
"""


def packages(sections: list[str | None]) -> list[Package]:
    return [Package(f"p{row:04}", section, f"about {section}", [], []) for row, section in enumerate(sections)]


def test_packages_are_those_of_the_stanzas() -> None:
    found = parse(AVAILABLE, TRANSLATIONS)
    assert [(package.name, package.section) for package in found] == [
        ("dpkg", None), ("exim4", "mail"), ("libc6", "libs"), ("postfix", "mail"), ("python3", "python"),
        ("zsh", "shells"),
    ]  # fmt: skip
    described = {package.name: package.description for package in found}
    assert described["python3"] == "interpréteur für Σ"
    assert described["libc6"] == "GNU C Library"
    assert described["zsh"].splitlines() == [
        "shell with lots of features", " Zsh is a UNIX command interpreter.", " .", " It is naïve.",
    ]  # fmt: skip


def test_edges_lead_to_packages_or_to_the_first_provider_by_name() -> None:
    assert [tuple(edge.values()) for edge in edges(parse(AVAILABLE, TRANSLATIONS)).to_pylist()] == [
        ("python3", "libc6"),  # provides libc6-2.36
        ("zsh", "dpkg"),
        ("zsh", "libc6"),
        ("zsh", "libc6"),  # once per mention
        ("zsh", "python3"),
        ("zsh", "exim4"),  # mail-agent, which postfix provides too
        ("zsh", "exim4"),  # itself
        ("zsh", "postfix"),  # editor
        ("zsh", "libc6"),  # zsh-doc
    ]


def test_small_sections_are_no_classes() -> None:
    given = packages(["libs"] * 15 + ["zope"] * 14 + [None] * 20)
    assert labels(given) == ["libs"] * 15 + [None] * 34


def test_features_tell_words_apart() -> None:
    words = ["alpha g++", "beta g++", "gamma +1.2 the", "delta", "epsilon x", "zeta rare"] * 20
    words[5] = "42"
    feat_NF = features(words, 6, seed=0)
    assert feat_NF.dtype == np.float32
    assert not feat_NF[5].any()
    assert np.allclose(np.linalg.norm(np.delete(feat_NF, 5, axis=0), axis=1), 1, atol=1e-5)
    assert np.allclose(feat_NF[0], feat_NF[6], atol=1e-5)
    assert np.allclose(feat_NF[3] @ feat_NF[2], 0, atol=1e-5)
    assert np.array_equal(feat_NF, features(words, 6, seed=0))


def test_the_tables_are_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian_graph, "FEATURES", 4)
    sections = ["libs", "net", "doc", "perl", "ruby", "games"]
    stanzas = [
        f"Package: {section}{row:02}\nSection: {section}\nDepends: {section}00\nDescription: about {section}\n"
        for section in sections
        for row in range(20)
    ]
    # The classes are large enough, but for one.
    stanzas += ["Package: odd\nSection: zope\nDepends: libs01\nDescription: about libs\n"]
    monkeypatch.setattr(debian_graph, "read_apt", lambda: ("\n".join(stanzas), ""))
    assert debian_graph.main([str(tmp_path / "out")]) == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["edges.parquet", "nodes.parquet"]
    table = pq.read_table(tmp_path / "out" / "nodes.parquet").to_pylist()
    assert [row["id"] for row in table if row["split"] is None] == ["odd"]
    source = open_tables(
        TablesConfig(nodes=f"{tmp_path}/out/nodes.parquet", edges=f"{tmp_path}/out/edges.parquet"),
        f"{tmp_path}/scratch",
    )
    assert source.num_nodes == 121
    assert source.num_classes == 6


def test_the_split_is_drawn_with_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian_graph, "FEATURES", 4)
    given = packages(["libs", "net", "doc", "perl", "ruby", "games"] * 200)
    first, again, other = (nodes(given, seed)["split"].to_pylist() for seed in (0, 0, 1))
    assert first == again != other
    shares = [first.count(name) / 1200 for name in ("train", "val", "test")]
    assert np.allclose(shares, [0.5, 0.15, 0.35], atol=0.05)


def command(folder: Path, name: str, prints: str) -> None:
    file = folder / name
    file.write_text(f"#!/bin/sh\n{prints}\n")
    file.chmod(0o755)


def test_without_apt_or_its_lists_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    out = tmp_path / "out"
    assert debian_graph.main([str(out)]) == 2
    assert capsys.readouterr().err == (
        "error: apt-get: not found; the graph is made of apt's lists, on Debian or Ubuntu\n"
    )
    for printed in ("", "echo Packages /var/lib/apt/lists/a_Packages"):
        command(tmp_path, "apt-get", printed)
        assert debian_graph.main([str(out)]) == 2
        assert capsys.readouterr().err == (
            "error: apt has no package lists with long descriptions on this machine; get them, as root, with: "
            "apt-get -o Acquire::Languages=en update\n"
        )
    command(tmp_path, "apt-get", "echo 'E: broken lock' >&2; exit 100")
    assert debian_graph.main([str(out)]) == 2
    assert "E: broken lock" in capsys.readouterr().err
    monkeypatch.setattr(debian_graph, "read_apt", lambda: (AVAILABLE, TRANSLATIONS))
    assert debian_graph.main([str(out)]) == 2
    assert "the 6 packages that apt knows do not have 128 words in common" in capsys.readouterr().err
    assert not out.exists()
