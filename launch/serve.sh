#!/usr/bin/env bash
# Serve exported students on a Ray cluster, from any folder:  launch/serve.sh [NAME=]FOLDER… [--address URL] …
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PYTHONPATH="${here%/*}${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python}" "$here/serve.py" "$@"
