"""A medium-sized real graph, made on any Debian or Ubuntu machine from what apt knows: which package names which.

    sudo apt-get -o Acquire::Languages=en update   # package lists with long descriptions
    pip install python-debian
    python -m benchmarks.debian_graph FOLDER [--seed 0]

FOLDER gets `nodes.parquet` and `edges.parquet`, as configs/debian.yaml reads them. A node is a package that apt could
install, from every archive in its sources and in the version it would take, in the order of the names.

- `id`: the name. `label`: the section without its component (`universe/libs` is libs); none for a package without
  section, or of a section of fewer than 15 packages.
- `split`: 50 % train, 15 % val, 35 % test, drawn with the seed; none without a label.
- `feat`: 128 numbers of norm 1, the truncated SVD of the TF-IDF words of the long English description (the short one,
  where there is no other): words of 5 packages to 20 % of them, with 1 + log of their number in a description, without
  English stop words. All zero for a description without such words.
- an edge: from a package to each that its Pre-Depends, Depends, Recommends or Suggests names, all alternatives
  included, once per mention; a name that only other packages provide stands for the first of these by name; what nobody
  provides and a package itself are left out.

Debian 12 (main, amd64, with updates and security): 63,666 packages of 58 sections, 340,851 edges; half a minute.
"""

import argparse
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize

from rbm_dist.errors import InputError
from rbm_dist.storage import atomic_writer

RELATIONS = ("pre-depends", "depends", "recommends", "suggests")
SMALLEST_CLASS = 15
FEATURES = 128
UPDATE = "apt-get -o Acquire::Languages=en update"


@dataclass(frozen=True)
class Package:
    name: str
    section: str | None  # without its component
    description: str
    related: list[str]  # names in its relations, in their order
    provides: list[str]


def apt(*command: str) -> str:
    """What a command of apt's prints. Raises `InputError` where there is no apt, or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, check=True, encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise InputError(f"{command[0]}: not found; the graph is made of apt's lists, on Debian or Ubuntu") from None
    except subprocess.CalledProcessError as error:
        raise InputError(f"{' '.join(command)}: {error.stderr.strip() or f'exit code {error.returncode}'}") from None
    return done.stdout


def read_apt() -> tuple[str, str]:
    """The stanzas of all packages, each in the version that apt would install, and those of long descriptions."""
    targets = apt(
        "apt-get", "-o", "Acquire::Languages=en", "indextargets", "--format", "$(CREATED_BY) $(FILENAME)"
    ).splitlines()
    lists = [line.partition(" ")[::2] for line in targets]
    long = [file for kind, file in lists if kind == "Translations"]
    if not long or "Packages" not in dict(lists):
        raise InputError(
            f"apt has no package lists with long descriptions on this machine; get them, as root, with: {UPDATE}"
        )
    unpacked = [apt("/usr/lib/apt/apt-helper", "cat-file", file) for file in long]
    return apt("apt-cache", "dumpavail"), "\n\n".join(unpacked)


def parse(available: str, translations: str) -> list[Package]:
    """Packages in the order of their names; of several of a name, such as those of other architectures, the first."""
    try:
        from debian.deb822 import Deb822, Packages
    except ImportError:
        raise InputError("the python-debian package reads apt's lists: pip install python-debian") from None
    long: dict[str, str] = {}
    for stanza in Deb822.iter_paragraphs(translations):
        if "Description-en" in stanza:
            long.setdefault(stanza["Description-md5"], stanza["Description-en"])
    found: dict[str, Package] = {}
    for stanza in Packages.iter_paragraphs(available, use_apt_pkg=False):
        if stanza["Package"] not in found:
            found[stanza["Package"]] = Package(
                stanza["Package"],
                stanza.get("Section", "").rpartition("/")[2] or None,
                long.get(stanza.get("Description-md5", ""), stanza.get("Description", "")),
                [name for relation in RELATIONS for name in _names(stanza, relation)],
                _names(stanza, "provides"),
            )
    return [found[name] for name in sorted(found)]


def _names(stanza: Any, relation: str) -> list[str]:
    """The names in one relation, without versions and architectures, alternatives one after another."""
    return [one["name"] for alternatives in stanza.relations[relation] for one in alternatives]


def edges(packages: list[Package]) -> pa.Table:
    there = {package.name for package in packages}
    provider: dict[str, str] = {}
    for package in packages:
        for name in package.provides:
            provider.setdefault(name, package.name)
    ends = []
    for package in packages:
        named = [name if name in there else provider.get(name) for name in package.related]
        ends += [(package.name, name) for name in named if name not in (None, package.name)]
    src, dst = zip(*ends, strict=True) if ends else ((), ())
    return pa.table({"src": pa.array(src, pa.string()), "dst": pa.array(dst, pa.string())})


def labels(packages: list[Package]) -> list[str | None]:
    sizes = Counter(package.section for package in packages)
    return [package.section if sizes[package.section] >= SMALLEST_CLASS else None for package in packages]


def features(descriptions: list[str], width: int, seed: int) -> np.ndarray:
    """Rows of norm 1, or 0 where a description has no word that counts: float32 [packages, width]."""
    # A word: letters, and + for g++ and libstdc++. Numbers are mostly versions.
    words = TfidfVectorizer(
        token_pattern=r"[a-z][a-z+]+", min_df=5, max_df=0.2, stop_words="english", sublinear_tf=True, dtype=np.float32
    )
    try:
        return normalize(TruncatedSVD(width, random_state=seed).fit_transform(words.fit_transform(descriptions)))
    except ValueError as error:
        raise InputError(
            f"the {len(descriptions):,} packages that apt knows do not have {width} words in common ({error}); "
            "the distribution's own archive belongs in its sources"
        ) from None


def nodes(packages: list[Package], seed: int) -> pa.Table:
    label_N = labels(packages)
    drawn_N = np.digitize(np.random.default_rng(seed).random(len(packages)), [0.5, 0.65])
    split_N = [
        ("train", "val", "test")[drawn] if label else None for drawn, label in zip(drawn_N, label_N, strict=True)
    ]
    feat_NF = features([package.description for package in packages], FEATURES, seed)
    return pa.table(
        {
            "id": [package.name for package in packages],
            "label": pa.array(label_N, pa.string()),
            "split": pa.array(split_N, pa.string()),
            "feat": pa.FixedSizeListArray.from_arrays(feat_NF.ravel(), FEATURES),
        }
    )


def write(folder: Path, seed: int) -> str:
    """Both tables into a folder, none before both are made; what they hold in words."""
    packages = parse(*read_apt())
    tables = {"nodes": nodes(packages, seed), "edges": edges(packages)}
    for name, table in tables.items():
        with atomic_writer(str(folder.absolute() / f"{name}.parquet")) as stream:
            buffer = pa.BufferOutputStream()
            pq.write_table(table, buffer)
            stream.write(buffer.getvalue())
    unlabelled = tables["nodes"]["label"].null_count
    return (
        f"{len(packages):,} packages of {len(tables['nodes']['label'].unique().drop_null()):,} sections, "
        f"{unlabelled:,} without label; {len(tables['edges']):,} edges: {folder}/nodes.parquet, {folder}/edges.parquet"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.debian_graph", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the SVD")
    given = parser.parse_args(arguments)
    try:
        print(write(given.folder, given.seed))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
