"""Files on any fsspec URL: written whole or not at all, with a checksum, and arrays that are memory-mapped."""

from rbm_dist.storage.arrays import open_array, write_array, write_chunks
from rbm_dist.storage.checksums import FileInfo, file_info, verify
from rbm_dist.storage.files import HashingWriter, atomic_writer, copy_in, once, read_json, remove_work, write_json
from rbm_dist.storage.locations import (
    TEMPORARY,
    absolute,
    exists,
    filesystem,
    is_file,
    is_local,
    is_temporary,
    join,
    listdir,
    remove,
    remove_empty,
    remove_temporary,
    stamp,
)

__all__ = [
    "TEMPORARY", "FileInfo", "HashingWriter", "absolute", "atomic_writer", "copy_in", "exists", "file_info",
    "filesystem", "is_file", "is_local", "is_temporary", "join", "listdir", "once", "open_array", "read_json",
    "remove", "remove_empty", "remove_temporary", "remove_work", "stamp", "verify", "write_array",
    "write_chunks", "write_json",
]  # fmt: skip
