"""Records from JSON objects that a newer version of this package may have written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any


def known_fields(kind: type, data: Mapping[str, Any]) -> dict[str, Any]:
    """What ``data`` says of the fields of a dataclass; what it says besides is left out."""
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in data.items() if name in names}
