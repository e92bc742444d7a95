"""Metrics of a run as `metrics.jsonl` and TensorBoard event files, written by the driver alone."""

import contextlib
import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

from rbm_dist import storage
from rbm_dist.errors import InputError

_log = logging.getLogger(__name__)

Row = dict[str, Any]
_EVENTS = "events.out.tfevents."  # what TensorBoard's files begin with


def read_metrics(run_url: str) -> dict[str, list[Row]]:
    """The rows of every loop of a finished run, by the loop's name; empty if there is no `metrics.jsonl`.

    Raises `InputError` for a line that is no row.
    """
    url = storage.join(run_url, "metrics.jsonl")
    if not storage.exists(url):
        return {}
    fs, path = storage.filesystem(url)
    loops: dict[str, list[Row]] = {}
    for number, line in enumerate(fs.cat_file(path).splitlines(), 1):
        try:
            row = json.loads(line)
            figures = {name: float(value) for name, value in row.items() if name != "loop" and value is not None}
            loops.setdefault(row["loop"], []).append({**figures, "epoch": int(figures["epoch"])})
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{url}: line {number} is not an epoch's row; the file was changed or cut off") from None
    return loops


class MetricsWriter:
    """Appends rows to `<run>/metrics.jsonl` and scalars to `<run>/tensorboard/<loop>/`.

    A loop begins with the history that its checkpoint holds, and both files are made to agree with it: each epoch
    stands there once, whenever the run was killed. On object storage the files are kept on local disk and copied up by
    `flush`.
    """

    def __init__(self, run_url: str):
        self._run_url = run_url
        self._local = storage.is_local(run_url)
        self._folder = Path(storage.absolute(run_url) if self._local else tempfile.mkdtemp())
        self._folder.mkdir(parents=True, exist_ok=True)
        self._jsonl = self._folder / "metrics.jsonl"
        if not self._local and storage.exists(storage.join(run_url, "metrics.jsonl")):
            fs, path = storage.filesystem(storage.join(run_url, "metrics.jsonl"))
            fs.get_file(path, str(self._jsonl))
        self._boards: dict[str, Any] = {}
        self._written: dict[str, set[int]] = {}  # epochs, by loop
        self._said = False

    def begin(self, loop: str, history: list[Row]) -> None:
        """A loop starts, or goes on after the epochs of `history` (rows with `epoch`, `time` and figures)."""
        others = [row for row in self._rows() if row["loop"] != loop]
        with storage.atomic_writer(str(self._jsonl)) as stream:
            stream.write("".join(f"{json.dumps(row)}\n" for row in others).encode())
        self._written[loop] = set()
        if loop in self._boards:
            self._boards.pop(loop).close()
        for board in {str(self._folder / "tensorboard" / loop), storage.join(self._run_url, "tensorboard", loop)}:
            for name in storage.listdir(board):
                if name.startswith(_EVENTS):
                    storage.remove(storage.join(board, name))
        self._board(loop)
        for row in history:
            self.write(loop, row)

    def write(self, loop: str, row: Row) -> None:
        """One epoch's row; one that is there already came twice."""
        if row["epoch"] in self._written.setdefault(loop, set()):
            return
        self._written[loop].add(row["epoch"])
        with open(self._jsonl, "a", encoding="utf-8") as stream:
            stream.write(json.dumps({"loop": loop, **row}) + "\n")
        for name, value in row.items():
            if name not in ("epoch", "time"):
                self._board(loop).add_scalar(name, value, row["epoch"], walltime=row["time"])

    def end(self, loop: str, history: list[Row]) -> None:
        """A loop ended with these epochs; if some did not arrive, or twice, all are written again."""
        if [row["epoch"] for row in self._rows() if row["loop"] == loop] != [row["epoch"] for row in history]:
            self.begin(loop, history)

    def _rows(self) -> list[Row]:
        rows = []
        for line in self._jsonl.read_text().splitlines() if self._jsonl.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):  # a killed driver may have left half a line
                rows.append(json.loads(line))
        return rows

    def _board(self, loop: str) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        if loop not in self._boards:
            self._boards[loop] = SummaryWriter(str(self._folder / "tensorboard" / loop))
        return self._boards[loop]

    def flush(self) -> None:
        """Bring everything to the run's storage, as far as it can be written."""
        try:
            for board in self._boards.values():
                board.flush()
            if not self._local:
                for path in self._folder.rglob("*"):
                    if path.is_file():
                        storage.copy_in(path, storage.join(self._run_url, path.relative_to(self._folder).as_posix()))
        except Exception as error:
            self.failed(error)

    def failed(self, error: Exception) -> None:
        """Say, once, that some metrics could not be written; no work is lost for that."""
        if not self._said:
            _log.warning("%s: metrics cannot be written, and may lack epochs: %s", self._run_url, error)
        self._said = True

    def close(self) -> None:
        self.flush()
        for board in self._boards.values():
            try:
                board.close()
            except Exception as error:
                self.failed(error)
        if not self._local:
            shutil.rmtree(self._folder, ignore_errors=True)
