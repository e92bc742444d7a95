#!/usr/bin/env bash
# Jobs on a Ray cluster, from any folder:  launch/job.sh ls|status|logs|stop [JOB|latest] [--follow] [--address URL]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PYTHONPATH="${here%/*}${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python}" "$here/job.py" "$@"
