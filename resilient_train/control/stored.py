"""What stands in a store, read without trust in who wrote it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from resilient_train.errors import FormatError
from resilient_train.spec.node import NodeInfo


def json_object(data: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        FormatError: if it is none.
    """
    try:
        value = json.loads(data)
    except ValueError as error:
        raise FormatError(f"the control store holds no JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError("the control store holds something else than an object")
    return value


def announcements(values: Iterable[bytes]) -> tuple[tuple[NodeInfo, ...], tuple[str, ...]]:
    """The announcements that can be read, and what is wrong with each that cannot: one node must not deafen all."""
    found, wrong = [], []
    for value in values:
        try:
            found.append(NodeInfo.from_json(json_object(value)))
        except FormatError as error:
            wrong.append(str(error))
    return tuple(found), tuple(wrong)
