"""A bucket of an object store as duckdb reads files of it: read only, as AWS_* in the environment have it.

duckdb's own way there is an extension that it downloads when it is first needed, which a controller may not be able to.
"""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Mapping
from datetime import timedelta
from fnmatch import fnmatchcase
from typing import Any

import fsspec  # type: ignore[import-untyped]
import obstore
from obstore.store import from_url

# One that does not answer is given up after so many times and seconds.
RETRIES, GIVE_UP = 3, timedelta(seconds=30)


class Bucket(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """Of s3://BUCKET; what obstore raises comes out of duckdb as its error.

    A table of a fleet is thousands of directories: so all below a prefix is listed at once, and remembered.
    """

    protocol, cachable = "s3", False

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url
        self._store = from_url(url, retry_config={"max_retries": RETRIES, "retry_timeout": GIVE_UP})
        self._known: dict[str, Mapping[str, Any]] = {}

    def _key(self, path: str) -> str:
        return path.removeprefix(f"{self._url}/")

    def glob(self, path: str, **_: Any) -> list[str]:
        key = self._key(path)
        if key in self._known:
            return [path]
        if not glob.has_magic(key):
            with contextlib.suppress(FileNotFoundError):
                self._known[key] = obstore.head(self._store, key)
        else:
            for some in obstore.list(self._store, key.partition("*")[0].rpartition("/")[0]):
                self._known |= {one["path"]: one for one in some}
        return [f"{self._url}/{one}" for one in self._known if fnmatchcase(one, key)]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return {"name": path, "type": "file", "size": self._known[self._key(path)]["size"]}

    def modified(self, path: str) -> Any:
        return self._known[self._key(path)]["last_modified"]

    def open(self, path: str, *_: Any, **__: Any) -> Any:
        return obstore.open_reader(self._store, self._key(path))
