"""Small files that are written only if nobody else wrote them meanwhile, on storage that can promise it.

These are S3 and Google Cloud Storage, through s3fs and gcsfs. A condition that does not hold is `RefusedError`.
"""

import json
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote

import fsspec
from fsspec import asyn

_ANSWER_S = 20.0  # longest wait for one answer of the storage


class RefusedError(Exception):
    """The file is not as it was expected: another process wrote it."""


@dataclass(frozen=True)
class Found:
    """A file as it was read: its `version` is new with every write, its age is told by the storage's own clock."""

    data: bytes
    version: str
    age_s: float


def is_possible(url: str) -> bool:
    """Whether this kind of storage knows conditions. An implementation of S3 may not: see `is_kept`."""
    return _kind(url) is not None


def read(url: str) -> Found | None:
    """The file; None if there is none. Raises `OSError`, or what the storage's library raises."""
    return _call(url, _read_s3 if _kind(url) == "s3" else _read_gs)


def put(url: str, data: bytes, version: str | None) -> str:
    """Write the file if it still has this version; None: if there is none. Gives its new version.

    Raises `RefusedError`, `OSError`, or what the storage's library raises.
    """
    return _call(url, _put_s3 if _kind(url) == "s3" else _put_gs, data, version)


def is_kept(url: str, found: bytes) -> bool:
    """Whether the storage keeps to conditions, tried on a file that is there and may be written as it is."""
    try:
        put(url, found, None)
    except RefusedError:
        return True
    return False


def _kind(url: str) -> str | None:
    protocol = fsspec.core.url_to_fs(url)[0].protocol
    names = {protocol} if isinstance(protocol, str) else set(protocol)
    return next((name for name in ("s3", "gs") if name in names), None)


def _call(url: str, function: Any, *arguments: Any) -> Any:
    fs, path = fsspec.core.url_to_fs(url)
    bucket, key, _ = fs.split_path(path)
    return asyn.sync(fs.loop, function, fs, bucket, key, *arguments, timeout=_ANSWER_S)


async def _read_s3(fs: Any, bucket: str, key: str) -> Found | None:
    try:
        answer = await fs._call_s3("get_object", Bucket=bucket, Key=key)
    except FileNotFoundError:
        return None
    async with answer["Body"] as body:
        data = await body.read()
    now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
    return Found(data, answer["ETag"], (now - answer["LastModified"]).total_seconds())


async def _put_s3(fs: Any, bucket: str, key: str, data: bytes, version: str | None) -> str:
    condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
    try:
        answer = await fs._call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)
    except OSError as error:
        response = getattr(error.__cause__, "response", {})
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        # 409: another conditional write is under way; 404: what had that version was deleted.
        if status in (409, 412) or (status == 404 and version is not None):
            raise RefusedError from None
        raise
    return answer["ETag"]


async def _read_gs(fs: Any, bucket: str, key: str) -> Found | None:
    try:
        headers, facts = await fs._call("GET", "b/{}/o/{}", bucket, key)
        facts = json.loads(facts)
        version = facts["generation"]
        _, data = await fs._call("GET", "b/{}/o/{}", bucket, key, alt="media", generation=version)
    except FileNotFoundError:
        return None
    now = parsedate_to_datetime(headers["Date"])
    return Found(data, version, (now - datetime.fromisoformat(facts["updated"])).total_seconds())


async def _put_gs(fs: Any, bucket: str, key: str, data: bytes, version: str | None) -> str:
    path = f"{fs._location}/upload/storage/v1/b/{quote(bucket)}/o"
    try:
        answer = await fs._call(
            "POST", path, uploadType="media", name=key, ifGenerationMatch=version or "0", data=data,
            headers={"Content-Type": "application/json"}, json_out=True,
        )  # fmt: skip
    except FileExistsError:  # gcsfs' name for a condition that does not hold
        raise RefusedError from None
    return answer["generation"]
