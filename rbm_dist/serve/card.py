"""The model card of an exported student: what it is, what it was learned from, how good it is, how it is asked."""

from rbm_dist.report.compression_table import compression_rows
from rbm_dist.report.table import NAMES
from rbm_dist.serve.format import Column, ModelFile

_SHOWN = 40


def model_card(model: ModelFile) -> str:
    """Markdown."""
    network, made = model.network, model.made_from
    graph = made["graph"]
    what = NAMES.get(model.name, model.name) + (", merged into an MLP" if made.get("merged") else "")
    lines = [
        "---", "library_name: rbm-dist", "pipeline_tag: tabular-classification", "---", "",
        f"# {what}", "",
        f"A graph-free student, distilled from a graph neural network by rbm-dist {model.rbm_dist} (run",
        f"`{made['run']}`): a node's own row in, its class out.",
        "",
        f"- **Network**: {_network(model)}",
        f"- **Learned from**: a graph of {graph['num_nodes']:,} nodes and {graph['num_edges']:,} edges",
        f"- **Classes**: {model.num_classes}"
        + (f": {_listed(model.class_names)}" if model.class_names else ", numbered from 0"),
        f"- **Inputs**: {', '.join(f'`{name}` ({width:,})' for name, width in model.inputs.items())}",
        "",
    ]  # fmt: skip
    if "accuracy" in made:
        this = "before it was compressed" if model.compressed else "this student"
        splits = [split for split, value in made["accuracy"].items() if value is not None]
        lines += ["| accuracy | " + " | ".join(splits) + " |", "|---|" + "---|" * len(splits)]
        for name, figures in ((this, made["accuracy"]), ("its teacher", made["teacher_accuracy"])):
            shown = (f"{100 * figures[split]:.1f} %" if figures.get(split) is not None else "–" for split in splits)
            lines.append(f"| {name} | {' | '.join(shown)} |")
        lines.append("")
    if model.compressed:
        lines += [f"| compressed: {model.compressed['method']} | before | after |", "|---|---:|---:|"]
        lines += [f"| {' | '.join(row)} |" for row in compression_rows(model.compressed)] + [""]
    lines += ["## Columns", "", *_columns(model), "", "## Use", "", *_use(model), ""]
    assert network.inputs
    return "\n".join(lines)


def _network(model: ModelFile) -> str:
    network = model.network
    shape = f"{network.num_layers} layers, width {network.hidden}"
    if network.kind in ("rbm", "moe"):
        where = "once, on the input" if network.routing == "input" and network.kind == "rbm" else "in each layer"
        return f"{shape}, {network.num_experts} experts, {network.top_k} per row, chosen {where}"
    return shape + (f", {network.ensemble_size} of them" if network.kind == "ensemble" else "")


def _columns(model: ModelFile) -> list[str]:
    features = model.features
    if not features.named:
        return [f"The features had no names: rows of {features.width:,} numbers, in the order of the graph's features."]
    lines = ["| column | read as | features |", "|---|---|---|"]
    lines += [f"| `{column.name}` | {_how(column)} | {column.width:,} |" for column in features.columns[:_SHOWN]]
    if len(features.columns) > _SHOWN:
        lines.append(f"| and {len(features.columns) - _SHOWN:,} more, see `model.json` | | |")
    missing = "A missing value becomes what it was in training." if features.missing else "Missing values are refused."
    return [*lines, "", f"Columns are found by name. {missing}"]


def _how(column: Column) -> str:
    words = {
        "number": "number", "text": "number as text", "bool": "true or false", "list": "list of numbers",
        "one_hot": f"one of {_listed(column.values)}", "hashed": "text, hashed",
    }  # fmt: skip
    return words[column.how]


def _use(model: ModelFile) -> list[str]:
    encodings = "".join(f", {name}=…" for name in model.inputs if name != "feat")
    return [
        "```python",
        "import rbm_dist",
        "",
        'student = rbm_dist.load("this/folder")',
        "# rows: an array, an Arrow table, a pandas frame or records",
        f"classes, probabilities = student.predict(rows{encodings})",
        "```",
        "`rbm-dist predict this/folder --nodes new.parquet --out predictions.parquet` answers for tables,",
        "`rbm-dist serve this/folder` over HTTP. `model.onnx` takes the same rows in any ONNX runtime:",
        "normalisation is in it.",
    ]


def _listed(names: tuple[str, ...]) -> str:
    shown = ", ".join(name.replace("|", "\\|").replace("`", "'") for name in names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else "")
