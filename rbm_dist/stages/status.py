"""How far a run is, asked from outside: its status file, and whether the driver that keeps it is alive.

It needs neither Ray nor the cluster, only the run directory.
"""

import time
from dataclasses import asdict
from typing import Any

from rbm_dist import storage
from rbm_dist.errors import InputError
from rbm_dist.stages import lease

_SILENT_S = 300.0  # where nothing else tells, a driver that has not written for so long is gone


def run_status(run_url: str) -> dict[str, Any]:
    """`status.json` of a run with `alive`, who the `owner` is now, `age_s` of what it says, and the `state`.

    States: `at work`, `done`, `stopped` (it said why) and `gone` (it said nothing more). Raises `InputError`.
    """
    url = storage.absolute(run_url)
    path = storage.join(url, "status.json")
    if not storage.exists(path):
        raise InputError(f"{path}: no such file; no run was started there, or one of rbm-dist before this command")
    found = storage.read_json(path)
    if not isinstance(found, dict) or not {"state", "written", "owner", "stages", "loops"} <= found.keys():
        raise InputError(f"{path}: is not a run's")
    owner, alive = lease.look(url)
    age_s = time.time() - found["written"]
    if alive is None:
        alive = found["state"] == "at work" and age_s < _SILENT_S
    # A driver that has only just begun has not written yet: what is there is its predecessor's.
    state = "at work" if alive else "gone" if found["state"] == "at work" else found["state"]
    return found | {
        "run": run_url, "state": state, "alive": alive, "age_s": round(age_s, 1),
        "owner": asdict(owner) if owner else found["owner"],
    }  # fmt: skip
