"""One pass over a node table for what is to be known of all nodes at once: ids, labels, split, and columns of text."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rbm_dist.config.source import TablesConfig
from rbm_dist.errors import InputError
from rbm_dist.graph.shards import IdType
from rbm_dist.sources import node_columns, node_ids, table_files
from rbm_dist.sources.node_columns import Classes, Feature, Labels
from rbm_dist.sources.pieces import At
from rbm_dist.sources.table_schema import NodeColumns
from rbm_dist.sources.text_columns import NO_NUMBER, TextColumn, Words

_INTEGER = r"^(0|-?[1-9][0-9]{0,18})$"  # as one writes it: neither zeros before it, nor a sign of +
_MOST_VALUES = 1000  # that a column may have to be made one feature each


@dataclass(frozen=True)
class Scanned:
    """What the pass found."""

    label: np.ndarray  # [N] int64, -1 where there is none
    classes: Classes
    split: np.ndarray | None  # [N] int8; None: the table has none
    id: np.ndarray | None  # [N] int64 or fixed-width bytes; None: ids are row numbers
    id_type: IdType


def words(config: TablesConfig) -> Words:
    """How a user's text says numbers."""
    return Words((*NO_NUMBER, *config.na_values), config.thousands, config.decimal)


class NodeScan:
    """Takes the batches of a node table in order, with the columns `columns.scanned`."""

    def __init__(self, config: TablesConfig, columns: NodeColumns):
        self._config, self._columns, self._words = config, columns, words(config)
        self._labels = Labels(config.unlabelled)
        self._splits: list[np.ndarray] = []
        self._ids: list[np.ndarray] = []
        self._id_type = columns.id_type or IdType("integer", "int64")  # of text, as long as all of it are integers
        self._text = {name: TextColumn(self._words) for name in columns.candidates}
        self._values: dict[str, set[str]] = {name: set() for name in columns.one_hot}

    def add(self, batch: pa.RecordBatch, at: At) -> None:
        """`at` says where a row of the batch is. Raises `InputError`."""
        columns = self._columns
        self._labels.add(batch.column(columns.label), columns.label, at)
        if columns.split:
            self._splits.append(node_columns.split(batch.column(columns.split), columns.split, at))
        elif columns.masks:
            masks = {name: batch.column(name) for name in columns.masks}
            self._splits.append(node_columns.split_of_mask_columns(masks, at))
        if columns.id:
            self._add_ids(batch.column(columns.id), columns.id, at)
        for name, text in self._text.items():
            text.add(batch.column(name), at)
        for name, values in self._values.items():
            values |= {each for each in pc.unique(batch.column(name)).to_pylist() if each}
            if len(values) > _MOST_VALUES:
                raise InputError(
                    f"{at(0)} and above, column {name}: more than {_MOST_VALUES:,} values, too many for one each; "
                    "use source.hashed for this column"
                )

    def _add_ids(self, column: pa.Array, name: str, at: At) -> None:
        undecided = self._columns.id_type is None and not self._id_type.is_named
        if undecided and not _all_integers(table_files.cast(column, pa.large_string())):
            self._id_type = IdType("text", "string")
            self._ids = [each.astype("S") for each in self._ids]  # as they were written
        ids, wrong = node_ids.from_arrow(column, self._id_type, name, at)
        if wrong is not None:
            row = int(wrong.argmax())
            raise InputError(
                f"{at(row)}, column {name}: {column[row].as_py()!r} is no whole number of 64 bits (source.id_type: "
                "text takes ids as they are written)"
            )
        self._ids.append(ids)

    def finish(self) -> Scanned:
        """All of it. Memory: what is given, twice."""
        label_N, classes = self._labels.finish()
        split_N = np.concatenate(self._splits) if self._splits else None
        id_N = np.concatenate(self._ids) if self._ids else None
        self._splits.clear()
        self._ids.clear()
        return Scanned(label_N, classes, split_N, id_N, self._id_type)

    def features(self, widths: dict[str, int]) -> tuple[list[Feature], list[tuple[str, str]]]:
        """The features, and columns that are left out with the reason. `widths`: of columns of lists.

        Raises `InputError` for text of which most is numbers, and for text where numbers were asked for.
        """
        columns, left_out = self._columns, list(self._columns.left_out)
        found: dict[str, Feature] = {}
        for name in columns.features:
            kind = columns.types[name]
            if table_files.is_list(kind):
                found[name] = Feature(name, "list", f"list of {kind.value_type}", widths[name])
            else:
                found[name] = Feature(name, "number", str(kind), 1)
        for name, text in self._text.items():
            if text.kind in ("number", "bool"):
                how = "bool" if text.kind == "bool" else "number" if text.plain else "text"
                found[name] = Feature(name, how, f"{text.kind} as text", 1)
            elif text.kind == "empty" and not columns.named:
                left_out.append((name, "no value in any row"))
            elif text.kind == "text" and not columns.named:
                left_out.append((name, f"text, such as '{_short(text.first)}'"))
            else:
                raise InputError(self._mixed(name, text))
        for name in columns.one_hot:
            values = tuple(sorted(self._values[name]))
            found[name] = Feature(name, "one_hot", "text", len(values), values)
        for name in columns.hashed:
            found[name] = Feature(name, "hashed", "text", self._config.hash_width)
        order = self._config.features or columns.types
        ordered = [found[name] for name in order if name in found]
        ordered += [
            found[name] for name in (*columns.one_hot, *columns.hashed) if name in found and found[name] not in ordered
        ]
        return ordered, left_out

    def _mixed(self, name: str, text: TextColumn) -> str:
        if text.no_number is None:
            return f"{self._config.nodes}: column {name}: no value in any row, but source.features asks for it"
        value, where = text.no_number
        if text.kind == "text":
            return (
                f"{where}, column {name}: a number expected (source.features), found '{_short(value)}'; text becomes "
                "features by source.one_hot or source.hashed"
            )
        advice = f"if it says that a number is missing, add it to source.na_values: ['{_short(value)}']"
        if "," in value:
            last = max(value.rindex(","), value.rfind("."))
            marks = "source.decimal=, or source.thousands=,"
            if "." in value:
                marks = "source.thousands=," if value[last] == "." else "source.decimal=, source.thousands=."
            advice = f"if that is a number, say what its marks are: {marks}"
        rest = "" if self._columns.named else ", or leave the column out: source.ignore"
        return (
            f"{where}, column {name}: '{_short(value)}' is no number, but most of the column's "
            f"{text.values:,} values look like numbers; {advice}{rest}"
        )


def _all_integers(text: pa.Array) -> bool:
    """Whether all of some text is integers of 64 bits, as one writes them."""
    if pc.all(pc.match_substring_regex(text, _INTEGER)).as_py() is False:
        return False
    try:
        text.cast(pa.int64())
    except pa.ArrowInvalid:
        return False
    return True


def _short(value: str | None) -> str:
    text = " ".join((value or "").split())
    return text if len(text) <= 40 else f"{text[:39]}…"
