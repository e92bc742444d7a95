"""How tables were understood, in words: for the summary of the source."""

from rbm_dist.sources import node_ids, table_files
from rbm_dist.sources.node_scan import Scanned
from rbm_dist.sources.pieces import Piece
from rbm_dist.sources.table_files import Listing
from rbm_dist.sources.table_schema import NodeColumns


def notes(
    columns: NodeColumns,
    scanned: Scanned,
    ends: tuple[str, str],
    node_files: Listing,
    edge_files: Listing,
    edge_pieces: list[Piece],
    num_added: int = 0,
) -> dict[str, str]:
    """A line by part. `ends`: the columns of an edge's ends."""
    ids = "row numbers"
    if columns.id and scanned.id is not None:
        example = node_ids.to_arrow(scanned.id[:1], scanned.id_type)[0].as_py()
        shown = example.hex() if isinstance(example, bytes) else repr(example) if isinstance(example, str) else example
        ids = f"column {columns.id}, {scanned.id_type}, such as {shown}"
    none = ", ".join(f"{word} ({count:,})" for word, count in scanned.classes.none.items())
    dialect = edge_pieces[0].dialect if edge_pieces else None
    return {
        "nodes": _files(node_files) + (f"; {num_added:,} more that only edges name" if num_added else ""),
        "ids": ids,
        "label": f"column {columns.label}" + (f"; read as no label: {none}" if none else ""),
        "split": f"column {columns.split}" if columns.split else ", ".join(columns.masks),
        "edges": f"columns {' and '.join(ends)} of {_files(edge_files)}"
        + ("; no header" if dialect and not dialect.header else ""),
    }  # fmt: skip


def passed_over(found: Listing) -> list[tuple[str, str]]:
    """Files that are no tables."""
    return [(file, "the file is no table") for file in found.others]


def warnings(scanned: Scanned) -> list[str]:
    """What a user may have meant otherwise."""
    return [
        f"label '{name}' ({count:,} nodes) is a class; if it stands for no label, add it to source.unlabelled"
        for name, count in scanned.classes.doubtful.items()
    ]


def _files(found: Listing) -> str:
    count, kind = len(found.files), table_files.format_of(found.files[0][0])
    empty = f", and {found.empty:,} empty" if found.empty else ""
    return f"{count:,} {kind} file{'s' * (count > 1)}{empty}"
