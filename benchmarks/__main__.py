"""All benchmarks that need no input, one after the other: one table, and exit code 1 if a target is missed.

python -m benchmarks [--quick] [--json FOLDER] [NAME…]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.report import Row, show

NAMES = (
    "sampling", "experts", "kmeans", "parallel", "loading", "student_epoch", "partitioning", "tables", "shards",
    "served_parts", "teacher", "teacher_training", "update", "end_to_end", "predict", "serving", "http",
)  # fmt: skip


def main() -> int:
    """Each in a process of its own, so that none finds another's threads or memory."""
    parser = argparse.ArgumentParser(description="all benchmarks")
    parser.add_argument("names", nargs="*", default=NAMES, help=f"of {', '.join(NAMES)}; default: all")
    parser.add_argument("--quick", action="store_true", help="smaller, under a minute each")
    parser.add_argument("--json", type=Path, help="write each one's rows there, as NAME.json")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(NAMES)
    if unknown:
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    rows, failed = [], []
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.json or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for name in arguments.names:
            file = folder / f"{name}.json"
            file.unlink(missing_ok=True)
            command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(file)]
            done = subprocess.run(command + ["--quick"] * arguments.quick, check=False)
            if done.returncode or not file.exists():
                failed.append(name)
                continue
            rows += [Row(**{**row, "name": f"{name}: {row['name']}"}) for row in json.loads(file.read_text())]
    show("All benchmarks", rows, None)
    missed = [row.name for row in rows if not row.met]
    for name in failed:
        print(f"{name}: ended with an error", file=sys.stderr)
    print(f"{len(rows)} rows, {len(missed)} targets missed, {len(failed)} benchmarks failed")
    return int(bool(missed or failed))


if __name__ == "__main__":
    sys.exit(main())
