"""Python values that are not tensors, as JSON and back, without losing tuples or integer keys.

Optimizer options and scheduler states hold tuples and integer keys, which JSON would silently turn into lists and
strings; here they are tagged.  Anything else is refused by the path at which it stands: nothing is ever pickled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from resilient_train.errors import FormatError, UnsupportedState

_TAGS = frozenset({"$tuple", "$dict", "$float", "$bytes"})
_MAX_DEPTH = 64


def encode(value: Any, path: str = "") -> Any:
    """``value`` as a JSON value.

    Raises:
        UnsupportedState: for anything but None, bool, int, float, str, bytes, list, tuple and dict of these.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, bytes):
        return {"$bytes": value.hex()}
    if isinstance(value, tuple):
        return {"$tuple": [encode(item, f"{path}[{i}]") for i, item in enumerate(value)]}
    if isinstance(value, list):
        return [encode(item, f"{path}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        plain = all(isinstance(key, str) for key in value) and not _TAGS & value.keys()
        if plain:
            return {key: encode(item, f"{path}.{key}") for key, item in value.items()}
        return {"$dict": [[encode(k, f"{path} key"), encode(v, f"{path}[{k!r}]")] for k, v in value.items()]}
    raise UnsupportedState(
        f"{path or 'value'} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint cannot hold:"
        " state may consist of tensors, numbers, strings, bytes, lists, tuples and dicts"
    )


def decode(value: Any, depth: int = 0) -> Any:
    """The inverse of `encode`.

    Raises:
        FormatError: if ``value`` was not made by `encode` or nests deeper than 64 levels.
    """
    if depth > _MAX_DEPTH:
        raise FormatError(f"non-tensor state nests deeper than {_MAX_DEPTH} levels")
    if isinstance(value, list):
        return [decode(item, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        (tag, inner), *_ = value.items()
        try:
            if tag == "$tuple":
                return tuple(decode(item, depth + 1) for item in inner)
            if tag == "$float":
                return float(inner)
            if tag == "$bytes":
                return bytes.fromhex(inner)
            if tag == "$dict":
                return {decode(key, depth + 1): decode(item, depth + 1) for key, item in inner}
        except (TypeError, ValueError) as error:
            raise FormatError(f"malformed {tag} in non-tensor state: {error}") from error
    return {key: decode(item, depth + 1) for key, item in value.items()}
