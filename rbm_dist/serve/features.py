"""From what a user has (arrays, tables, records) to the numbers that an exported student scales: `[B, F]` float32.

Columns are found by name, whatever their order, and read as they were for training: `sources/node_columns.py` does it.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rbm_dist.errors import InputError
from rbm_dist.serve.format import Column, Features

if TYPE_CHECKING:
    import pyarrow as pa

_NAMES_IN_MESSAGES = 10
_ADVICE = (", and the student was trained without missing values (source.missing)", "; correct it")


class FeatureReader:
    """Reads the features of one student."""

    def __init__(self, features: Features):
        self.features = features
        self.names = [column.name for column in features.columns]
        self._numbers_only = all(column.how == "number" for column in features.columns)

    def from_array(self, rows: Any) -> np.ndarray:
        """Rows as numbers already, `[B, F]`, or one row `[F]`. Raises `InputError` for another shape or dtype."""
        rows_BF = np.asarray(rows.toarray() if hasattr(rows, "toarray") else rows)
        rows_BF = rows_BF[None] if rows_BF.ndim == 1 else rows_BF
        if rows_BF.dtype.kind not in "fiub":
            raise InputError(f"rows: numbers expected, found an array of {rows_BF.dtype}")
        if rows_BF.ndim != 2 or rows_BF.shape[1] != self.features.width:
            raise InputError(f"rows: shape [rows, {self.features.width}] expected, found {list(rows_BF.shape)}")
        with np.errstate(over="ignore"):  # what becomes infinite is refused where rows are scaled
            return np.ascontiguousarray(rows_BF, np.float32)

    def from_records(self, records: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Rows as mappings of column names to values, as JSON has them; other names are passed over.

        Raises `InputError` for a column that is not there, and for a value of another kind.
        """
        for row, record in enumerate(records):
            if not isinstance(record, Mapping):
                raise InputError(f"row {row}: a mapping of columns to values expected, found {_shown(record)}")
            missing = [name for name in self.names if name not in record]
            if missing:
                raise InputError(f"row {row}: no column '{missing[0]}'{_more(missing)}; {_found(list(record))}")
        if self._numbers_only:
            return self._numbers(records)
        import pyarrow as pa

        columns = {column.name: _records_column(column, records) for column in self.features.columns}
        return self.from_table(pa.table(columns))

    def from_table(self, table: "pa.Table | pa.RecordBatch") -> np.ndarray:
        """The rows of an Arrow table; other columns are passed over. Raises `InputError` as `column_types` does."""
        import pyarrow as pa

        from rbm_dist.sources import table_files

        table = pa.table(table) if isinstance(table, pa.RecordBatch) else table
        types = self.column_types(dict(zip(table.schema.names, table.schema.types, strict=True)), "rows", text=False)
        columns = [
            table_files.cast(table.column(name).combine_chunks(), kind) for name, kind in types.items()
        ]  # fmt: skip
        batch = pa.RecordBatch.from_arrays(columns, names=list(types))
        return self.from_batch(batch, lambda row: f"row {row}")

    def column_types(self, found: Mapping[str, "pa.DataType"], where: str, text: bool) -> dict[str, "pa.DataType"]:
        """What each column that is needed is to be read as. `text`: all of the file is text (CSV).

        A column of lists may also be there as one column per value, `name[0]`, `name[1]`, … Raises `InputError` for
        columns that are not there or are of another type; `where` says of what, for messages.
        """
        import pyarrow as pa

        types: dict[str, pa.DataType] = {}
        for column in self.features.columns:
            if column.how == "list" and column.name not in found:
                spread = [f"{column.name}[{k}]" for k in range(column.width)]
                if all(name in found for name in spread):
                    types |= {
                        name: pa.float64() if text else self._expected(found[name], name, where) for name in spread
                    }
                    continue
            if column.name not in found:
                absent = [each.name for each in self.features.columns if each.name not in found]
                raise InputError(f"{where}: no column '{absent[0]}'{_more(absent)}; {_found(list(found))}")
            types[column.name] = _read_as(column, found[column.name], where, text)
        return types

    @staticmethod
    def _expected(kind: "pa.DataType", name: str, where: str) -> "pa.DataType":
        from rbm_dist.sources import table_files

        if not table_files.is_number(table_files.plain(kind)):
            raise InputError(f"{where}: column '{name}': numbers expected, found {kind}")
        return table_files.plain(kind)

    def from_batch(self, batch: "pa.RecordBatch", at: Any) -> np.ndarray:
        """The rows of a batch of columns in the types that `column_types` gives. `at(row)` says where a row is."""
        from rbm_dist.sources import node_columns, table_files
        from rbm_dist.sources.node_columns import Feature
        from rbm_dist.sources.text_columns import NO_NUMBER, Words

        wanted = []
        for column in self.features.columns:
            if column.name not in batch.schema.names:
                spread = [f"{column.name}[{k}]" for k in range(column.width)]
                wanted += [Feature(name, "number", "", 1) for name in spread]
                continue
            kind, how = batch.schema.field(column.name).type, column.how
            if how in ("number", "text", "bool") and table_files.is_number(kind):
                how = "number"
            elif how == "number":
                how = "text"
            wanted.append(Feature(column.name, how, column.type, column.width, column.values))
        features = self.features
        words = Words((*NO_NUMBER, *features.na_values), features.thousands, features.decimal)
        return node_columns.features(batch, wanted, words, at, features.missing, _ADVICE)

    def _numbers(self, records: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Of records whose columns are all numbers: without Arrow, which a single row would wait for."""
        rows_BF = np.empty((len(records), len(self.names)), np.float64)
        for row, record in enumerate(records):
            for place, name in enumerate(self.names):
                value = record[name]
                if type(value) is float or type(value) is int or type(value) is bool:
                    try:
                        rows_BF[row, place] = value
                    except OverflowError:
                        rows_BF[row, place] = np.inf
                elif value is None:
                    rows_BF[row, place] = np.nan
                else:
                    raise InputError(f"row {row}, column {name}: a number expected, found {_shown(value)}")
        with np.errstate(over="ignore"):
            return rows_BF.astype(np.float32)


def _read_as(column: Column, kind: "pa.DataType", where: str, text: bool) -> "pa.DataType":
    import pyarrow as pa

    from rbm_dist.sources import table_files

    plain = table_files.plain(kind)
    number, string = table_files.is_number(plain), table_files.is_string(plain)
    if column.how in ("one_hot", "hashed"):
        if not (string or pa.types.is_integer(plain) or pa.types.is_boolean(plain) or pa.types.is_null(plain)):
            raise InputError(f"{where}: column '{column.name}': text expected, found {kind}")
        return pa.large_string()
    if column.how == "list":
        if text:
            raise InputError(
                f"{where}: column '{column.name}': text files hold no lists; write {column.width} columns, "
                f"{column.name}[0] to {column.name}[{column.width - 1}]"
            )
        if not (table_files.is_list(plain) and table_files.is_number(plain.value_type)):
            raise InputError(f"{where}: column '{column.name}': lists of {column.width} numbers expected, found {kind}")
        return plain
    if text or pa.types.is_null(plain):
        return pa.string() if text else pa.float64()
    if number or (string and column.how in ("text", "bool")):
        return plain
    expected = {"number": "numbers", "text": "numbers, or text that says some,", "bool": "true or false"}[column.how]
    raise InputError(f"{where}: column '{column.name}': {expected} expected, found {kind}")


def _records_column(column: Column, records: Sequence[Mapping[str, Any]]) -> "pa.Array":
    """One column of records, in the type that its values are to have."""
    import pyarrow as pa

    name = column.name
    kinds: dict[str, tuple[tuple[type, ...], str, pa.DataType]] = {
        "number": ((int, float), "a number", pa.float64()),
        "text": ((int, float, str), "a number", pa.large_string()),
        "bool": ((bool, str, int), "true or false", pa.large_string()),
        "list": ((list, tuple), f"a list of {column.width} numbers", pa.large_list(pa.float64())),
        "one_hot": ((str, int), "text", pa.large_string()),
        "hashed": ((str, int), "text", pa.large_string()),
    }
    allowed, expected, kind = kinds[column.how]
    values = [record[name] for record in records]
    for row, value in enumerate(values):
        if value is not None and not isinstance(value, allowed):
            raise InputError(f"row {row}, column {name}: {expected} expected, found {_shown(value)}")
    if pa.types.is_large_string(kind):
        # As a table's booleans are read: text where they are features themselves, else 0 and 1.
        flags = ("false", "true") if column.how == "bool" else ("0", "1")
        values = [flags[each] if isinstance(each, bool) else None if each is None else str(each) for each in values]
    try:
        return pa.array(values, kind)
    except (pa.ArrowException, OverflowError, TypeError):
        raise InputError(f"column {name}: {expected} expected in every row") from None


def _more(names: list[str]) -> str:
    return f" (nor {len(names) - 1:,} more)" if len(names) > 1 else ""


def _found(names: list[str]) -> str:
    shown = ", ".join(map(str, names[:_NAMES_IN_MESSAGES])) or "none"
    return f"columns found: {shown}" + (
        f" and {len(names) - _NAMES_IN_MESSAGES:,} more" * (len(names) > _NAMES_IN_MESSAGES)
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:39]}…"
