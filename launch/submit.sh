#!/usr/bin/env bash
# Run the pipeline on a Ray cluster, from any folder:  launch/submit.sh CONFIG [KEY=VALUE ...] [--address URL]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PYTHONPATH="${here%/*}${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python}" "$here/submit.py" "$@"
