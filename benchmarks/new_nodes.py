"""Nodes that arrive after a run, each with its edges: what students say of them without the graph, with encodings made
of those of their neighbours, after an update of the run, and after a run of the whole graph from scratch.

    python -m benchmarks.new_nodes GRAPH.npz [--seeds 3] [--share 0.1] [--json FILE]

Of a real graph (the form of source.kind: npz) a share of the nodes is taken out, with their edges, and comes later,
unlabelled. A row is a student's accuracy on them, in %, mean over the seeds; its ratio is to the student of features
alone that nobody updated. Runs are those of the command line on a local Ray cluster: minutes per seed.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.report import Row, show
from rbm_dist.graph.splits import split_per_class
from rbm_dist.sources.npz import read_npz

_STUDENTS = {
    "features": ["student.inputs=[feat]"],
    "features and encodings": [
        "student.inputs=[feat, pos, prop]", "encodings.positional=fastrp", "encodings.label_propagation=true",
    ],
}  # fmt: skip


def measure(graph: str, share: float, seed: int, folder: Path) -> dict[str, float]:
    """Accuracies on the nodes that come later, in %."""
    label = _write_tables(graph, share, seed, folder)
    found = {}
    for name, inputs in _STUDENTS.items():
        base, whole, after = (folder / f"{name}-{which}" for which in ("base", "whole", "after"))
        common = ["partition.num_parts=4", "soft_labels.inference=exact", "student.models=[mlp, rbm]", f"seed={seed}"]
        for run, nodes in ((base, "old"), (whole, "all")):
            source = [f"source.nodes={folder}/{nodes}-nodes.parquet", f"source.edges={folder}/{nodes}-edges.parquet"]
            _command("run", str(folder / "config.yaml"), f"run_dir={run}", *source, *common, *inputs)
        new = ["--add-nodes", f"{folder}/new-nodes.parquet", "--add-edges", f"{folder}/new-edges.parquet"]
        _command("update", str(base), "--out", str(after), *new, "--anew-above", "1")
        edges = [] if name == "features" else ["--edges", f"{folder}/new-edges.parquet"]
        for kind in ("mlp", "rbm"):
            out, model = folder / f"{name}-{kind}.parquet", ["--model", kind]
            _command("predict", str(base), "--nodes", f"{folder}/new-nodes.parquet", *edges, "--out", str(out), *model)
            found[f"{kind}, {name}: as it was"] = _accuracy(out, label)
            for run, what in ((after, "updated"), (whole, "from scratch")):
                _command("predict", str(run), "--out", str(run / f"{kind}.parquet"), *model)
                found[f"{kind}, {name}: {what}"] = _accuracy(run / f"{kind}.parquet", label)
    return found


def _write_tables(graph: str, share: float, seed: int, folder: Path) -> dict[int, int]:
    """Tables of the nodes and edges that are there, that come later, and of all; gives the labels of the later ones."""
    given = read_npz(graph, None)
    label, feat = given.label, np.asarray(given.attr.todense(), np.float32)
    split = split_per_class(label, 20, 30, seed)
    names = np.array(["train", "val", "test", ""])[split]
    test = np.flatnonzero(split == 2)
    later = np.random.default_rng(seed).choice(test, round(share * len(label)), replace=False)
    is_later = np.isin(np.arange(len(label)), later)
    links = given.adj.tocoo()
    late_edge = is_later[links.row] | is_later[links.col]
    nodes = {"old": ~is_later, "new": is_later, "all": np.ones(len(label), bool)}
    edges = {"old": ~late_edge, "new": late_edge, "all": np.ones(links.nnz, bool)}
    for which, chosen in nodes.items():
        at = np.flatnonzero(chosen)
        rows = pa.FixedSizeListArray.from_arrays(feat[at].reshape(-1), feat.shape[1])
        table = {"id": at, "x": rows}
        if which != "new":  # of which nobody knows the class
            table |= {"label": np.where(is_later[at], -1, label[at]), "split": np.where(is_later[at], "", names[at])}
        pq.write_table(pa.table(table), folder / f"{which}-nodes.parquet")
        some = edges[which]
        pq.write_table(pa.table({"src": links.row[some], "dst": links.col[some]}), folder / f"{which}-edges.parquet")
    (folder / "config.yaml").write_text("run_dir: runs\nsource: {kind: tables, nodes: x, edges: x}\n")
    return {int(node): int(label[node]) for node in later}


def _accuracy(predictions: Path, label: dict[int, int]) -> float:
    table = pq.read_table(predictions, columns=["node_id", "class"])
    found = dict(zip(table["node_id"].to_pylist(), table["class"].to_pylist(), strict=True))
    return 100 * sum(found[node] == cls for node, cls in label.items()) / len(label)


def _command(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "rbm_dist", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"rbm-dist {' '.join(arguments)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def _main() -> None:
    parser = argparse.ArgumentParser(description="nodes that arrive after a run")
    parser.add_argument("graph")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--share", type=float, default=0.1, help="of all nodes: those that come later")
    parser.add_argument("--json", type=Path, help="write the rows there")
    arguments = parser.parse_args()
    by_seed = []
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as folder:
            by_seed.append(measure(arguments.graph, arguments.share, seed, Path(folder)))
    mean = {name: float(np.mean([each[name] for each in by_seed])) for name in by_seed[0]}
    spread = {name: float(np.std([each[name] for each in by_seed])) for name in mean}
    first = {kind: mean[f"{kind}, features: as it was"] for kind in ("mlp", "rbm")}
    rows = [Row(f"{name} (± {spread[name]:.1f})", mean[name], "%", mean[name] / first[name[:3]], None) for name in mean]
    show(f"Nodes that came later: {Path(arguments.graph).stem}, {arguments.seeds} seeds", rows, arguments.json)


if __name__ == "__main__":
    _main()
