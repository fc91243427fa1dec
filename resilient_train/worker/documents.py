"""The documents of ranks whose states are of different makes, as one: pipeline stages, experts of their own.

Where all ranks hold alike, any rank's document describes the state.  Where they do not, each describes its own part,
and what a rank needs may have been another's: another number of ranks, or modules that moved from one stage to another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from resilient_train.errors import FormatError

Document = Mapping[str, Any]


def merged(documents: Sequence[Document]) -> dict[str, Any]:
    """One document that describes what any of them does; of what several describe, the first one's word counts.

    Args:
        documents: this rank's own first, if it has one.

    Raises:
        FormatError: if they contradict each other in what kind of thing a part is.
    """
    parts: dict[str, list[Document]] = {}
    for document in documents:
        for name, part in document.items():
            if name != "rng":
                parts.setdefault(name, []).append(part)
    result: dict[str, Any] = {name: _merged_part(name, described) for name, described in parts.items()}
    result["rng"] = next((document["rng"] for document in documents if document.get("rng") is not None), None)
    return result


def _merged_part(name: str, described: Sequence[Document]) -> Document:
    kinds = {part["kind"] for part in described}
    if len(kinds) > 1:
        raise FormatError(f"{name} is a {' and a '.join(sorted(kinds))}")
    if kinds == {"module"}:
        buffers = list(dict.fromkeys(path for part in described for path in part.get("buffers", ())))
        return {
            **described[0],
            "aliases": _first(described, "aliases"),
            "extra": _first(described, "extra"),
            "buffers": buffers,
        }
    if kinds == {"optimizer"}:
        return _merged_optimizer(described)
    return described[0]


def _first(described: Sequence[Document], field: str) -> dict[str, Any]:
    return {key: value for part in reversed(described) for key, value in part.get(field, {}).items()}


def _merged_optimizer(described: Sequence[Document]) -> Document:
    """Parameters by group, each once; a group's options are the first one's."""
    first = described[0]
    groups: list[dict[str, None]] = [{} for _ in first["groups"]]
    for part in described:
        if len(part["groups"]) != len(groups):
            raise FormatError(f"an optimizer has {len(groups)} and {len(part['groups'])} parameter groups")
        sizes = part.get("sizes", [len(part["parameters"])])
        left = list(part["parameters"])
        for group, size in zip(groups, sizes, strict=True):
            group.update(dict.fromkeys(left[:size]))
            left = left[size:]
    return {
        **first,
        "parameters": [path for group in groups for path in group],
        "sizes": [len(group) for group in groups],
        "state": _first(described, "state"),
    }


def restricted(document: Document, paths: Sequence[str], sizes: Sequence[int]) -> Document:
    """An optimizer's merged document, as that of one that has these parameters only.

    Args:
        document: of all ranks.
        paths: names of the parameters, group by group.
        sizes: of the groups.

    Returns:
        ``document`` as it is, unless it has all of these parameters, in the same groups, and others besides.
    """
    there: list[set[str]] = []
    left = list(document["parameters"])
    for size in document.get("sizes", []):
        there.append(set(left[:size]))
        left = left[size:]
    here = list(paths)
    for size, held in zip(sizes, there, strict=False):
        if not set(here[:size]) <= held:
            return document
        here = here[size:]
    if here or len(sizes) != len(there):
        return document
    return {**document, "parameters": list(paths), "sizes": list(sizes)}
