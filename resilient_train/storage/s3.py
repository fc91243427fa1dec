"""What to tell s3fs so that no request waits for ever.

botocore's read timeout begins when a request has been sent.  A server that takes a connection and then stops reading,
or never asks for the body that it was promised (``Expect: 100-continue``), is waited for without an end.
"""

from __future__ import annotations

import asyncio
import functools
from typing import Any

import fsspec

PROTOCOLS = ("s3", "s3a")
REQUEST_SECONDS = 120.0
"""The longest that one request may take: a part of an upload has 8 MiB, or more if the file is very long."""


def options(protocol: str) -> dict[str, Any]:
    """Keyword arguments for the file system of ``protocol``; none for all but S3."""
    if protocol not in PROTOCOLS:
        return {}
    try:
        session = _bounded_session()
    except ImportError:
        return {}  # fsspec says what is not installed.
    given = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    return {"config_kwargs": {"http_session_cls": session, **given}}


@functools.cache
def _bounded_session() -> type:
    from aiobotocore.httpsession import AIOHTTPSession
    from botocore.exceptions import ReadTimeoutError

    class BoundedSession(AIOHTTPSession):  # type: ignore[misc]
        async def send(self, request: Any) -> Any:
            try:
                return await asyncio.wait_for(super().send(request), REQUEST_SECONDS)
            except TimeoutError as error:
                raise ReadTimeoutError(endpoint_url=request.url, error=error) from error

    return BoundedSession
