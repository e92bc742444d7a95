#!/usr/bin/env bash
# Predict on a Ray cluster, from any folder:  launch/predict.sh RUN_OR_FOLDER --out FOLDER [--nodes TABLE] [--address URL] …
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PYTHONPATH="${here%/*}${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python}" "$here/predict.py" "$@"
