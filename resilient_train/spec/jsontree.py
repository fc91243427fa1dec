"""Python values that are not tensors, as JSON and back, without losing tuples or integer keys.

Optimizer options and scheduler states hold tuples, integer keys and counters, which JSON would silently turn into
lists, strings and dicts; here they are tagged.  Anything else is refused by the path at which it stands: nothing is
ever pickled.
"""

from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from resilient_train.errors import FormatError, UnsupportedState

_TENSOR = "$tensor"
_LISTS = frozenset({"$tuple", "$dict", "$counter", "$ordered"})
_TAGS = frozenset({*_LISTS, "$float", "$bytes"})
_MAX_DEPTH = 64


class TensorAt(dict[str, Any]):
    """Stands in a tree where a tensor belongs: the name under which its elements are stored, and other facts."""

    def __init__(self, name: Any, facts: Mapping[str, Any]) -> None:
        super().__init__({**facts, _TENSOR: name})

    @property
    def name(self) -> Any:
        """As it was written, by whomever."""
        return self[_TENSOR]


def parse(text: bytes | str) -> Any:
    """The value of a JSON text that says everything once.

    Raises:
        FormatError: if it is not JSON, nests too deeply, has a key twice in one object or a number that is not finite.
    """
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"not JSON: {error}") from error


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number in JSON")


def integer(value: Any, low: int = 0, high: int = (1 << 63) - 1) -> int:
    """``value`` if it is an integer, and not a boolean, from ``low`` to ``high``.

    Raises:
        ValueError: if it is not.
    """
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{value!r:.50} is no integer from {low} to {high}")
    return value


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
    if isinstance(value, TensorAt):
        return dict(value)
    if isinstance(value, Mapping):
        tag = "$counter" if isinstance(value, Counter) else "$ordered" if isinstance(value, OrderedDict) else "$dict"
        plain = all(isinstance(key, str) for key in value) and not (_TAGS | {_TENSOR}) & value.keys()
        if plain and tag == "$dict":
            return {key: encode(item, f"{path}.{key}") for key, item in value.items()}
        return {tag: [[encode(k, f"{path} key"), encode(v, f"{path}[{k!r}]")] for k, v in value.items()]}
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
        ((tag, inner),) = value.items()
        if tag in _TAGS:
            if not isinstance(inner, list if tag in _LISTS else str):
                raise FormatError(f"malformed {tag} in non-tensor state: it holds a {type(inner).__name__}")
            try:
                return _untag(tag, inner, depth + 1)
            except (TypeError, ValueError) as error:
                raise FormatError(f"malformed {tag} in non-tensor state: {error}") from error
    found = {key: decode(item, depth + 1) for key, item in value.items()}
    return TensorAt(found.pop(_TENSOR), found) if _TENSOR in found else found


def _untag(tag: str, inner: Any, depth: int) -> Any:
    if tag == "$float":
        return float(inner)
    if tag == "$bytes":
        return bytes.fromhex(inner)
    if tag == "$tuple":
        return tuple(decode(item, depth) for item in inner)
    pairs = {decode(key, depth): decode(item, depth) for key, item in inner}
    return Counter(pairs) if tag == "$counter" else OrderedDict(pairs) if tag == "$ordered" else pairs
