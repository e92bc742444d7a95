"""Metrics of a run as `metrics.jsonl` and TensorBoard event files, written by the driver alone."""

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from rbm_dist import storage

Row = dict[str, Any]


class MetricsWriter:
    """Appends rows to `<run>/metrics.jsonl` and scalars to `<run>/tensorboard/<loop>/`.

    A loop that resumes drops the rows of the epochs that it runs again, so that each epoch stands there once.
    On object storage the files are kept on local disk and copied up by `flush`.
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

    def begin(self, loop: str, epoch: int) -> None:
        """A loop starts at `epoch`: rows it wrote from there on are dropped."""
        from torch.utils.tensorboard import SummaryWriter

        if self._jsonl.exists():
            rows = [json.loads(line) for line in self._jsonl.read_text().splitlines() if line.endswith("}")]
            kept = [row for row in rows if row["loop"] != loop or row["epoch"] < epoch]
            with storage.atomic_writer(str(self._jsonl)) as stream:
                stream.write("".join(json.dumps(row) + "\n" for row in kept).encode())
        if loop in self._boards:
            self._boards[loop].close()
        folder = self._folder / "tensorboard" / loop
        if epoch == 0:
            shutil.rmtree(folder, ignore_errors=True)
            if not self._local:
                storage.remove(storage.join(self._run_url, "tensorboard", loop))
        self._boards[loop] = SummaryWriter(str(folder), purge_step=epoch)

    def write(self, loop: str, epoch: int, metrics: dict[str, float]) -> None:
        """One epoch's metrics."""
        row = {"loop": loop, "epoch": epoch, "time": round(time.time(), 3), **metrics}
        with open(self._jsonl, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        for name, value in metrics.items():
            self._boards[loop].add_scalar(name, value, epoch)

    def flush(self) -> None:
        """Bring everything to the run's storage."""
        for board in self._boards.values():
            board.flush()
        if not self._local:
            for path in self._folder.rglob("*"):
                if path.is_file():
                    storage.copy_in(path, storage.join(self._run_url, path.relative_to(self._folder).as_posix()))

    def close(self) -> None:
        self.flush()
        for board in self._boards.values():
            board.close()
        if not self._local:
            shutil.rmtree(self._folder, ignore_errors=True)
