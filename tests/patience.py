"""How long tests wait for what must come: one scale for all of their deadlines.

Figures in the tests are what a free machine with two cores needs, with room to spare. `RBM_DIST_TEST_PATIENCE` is the
factor by which they are longer; raise it on a machine that does much else. Deadlines that a test wants to pass do not
go through here.
"""

import os

_FACTOR = float(os.environ.get("RBM_DIST_TEST_PATIENCE", "5"))


def patient(seconds: float) -> float:
    """A deadline, in seconds."""
    return _FACTOR * seconds
