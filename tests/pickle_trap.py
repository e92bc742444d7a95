"""A pickle that shows when it was loaded."""

from collections.abc import Callable
from pathlib import Path


class Trap:
    """A pickle of it makes a folder when it is loaded."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.mkdir, (self.folder,)
