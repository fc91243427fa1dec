"""Where nodes stand: what fails together.

A tree: the job, zones, racks, switches, nodes.  A node says where it stands by labels (``rack=r1``); whoever does not
say stands, at that level, together with all others who do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from resilient_train.errors import FormatError

LEVELS = ("zone", "rack", "switch")
"""What labels may name, widest first; a node itself is the last level."""
NODE = len(LEVELS)
"""The level of nodes."""


def parse_labels(texts: Iterable[str]) -> tuple[str, ...]:
    """Labels as an announcement has them: each ``level=name``, widest level first.

    Raises:
        FormatError: for a level that is none, one that is named twice, or an empty name.
    """
    found: dict[str, str] = {}
    for text in texts:
        level, _, name = text.partition("=")
        if level not in LEVELS or not name:
            possible = ", ".join(f"{known}=NAME" for known in LEVELS)
            raise FormatError(f"{text!r:.100} is no label: it has to be {possible}")
        if found.setdefault(level, name) != name:
            raise FormatError(f"one {level} is {found[level]!r:.50} and {name!r:.50} at once")
    return tuple(f"{level}={found[level]}" for level in LEVELS if level in found)


class Topology:
    """The tree of some nodes."""

    def __init__(self, nodes: Mapping[str, Sequence[str]]) -> None:
        """Args:
        nodes: each node's labels.

        Raises:
            FormatError: for labels that are none.
        """
        numbers: dict[tuple[str, ...], int] = {}
        self._domains: dict[str, tuple[int, ...]] = {}
        for node, labels in nodes.items():
            place = _place(node, labels)
            prefixes = [place[:level] for level in range(NODE + 2)]
            self._domains[node] = tuple(numbers.setdefault(prefix, len(numbers)) for prefix in prefixes)
        self._counts: list[dict[int, int]] = []
        for level in range(NODE + 1):
            counts: dict[int, int] = {}
            for domains in {domains[: level + 2] for domains in self._domains.values()}:
                for domain in domains:
                    counts[domain] = counts.get(domain, 0) + 1
            self._counts.append(counts)

    @property
    def nodes(self) -> tuple[str, ...]:
        """All of them, in the order in which they were given."""
        return tuple(self._domains)

    def domains(self, node: str) -> tuple[int, ...]:
        """Numbers of what a node is in: the job, its zone, rack, switch, itself; so level ``n`` stands at n + 1."""
        return self._domains[node]

    def apart(self, one: str, other: str) -> int:
        """The widest level at which two nodes are in different domains; `NODE` + 1 for a node and itself."""
        pairs = zip(self._domains[one], self._domains[other], strict=True)
        return next((level for level, (a, b) in enumerate(pairs, -1) if a != b), NODE + 1)

    def count(self, domain: int, level: int) -> int:
        """The number of domains of ``level`` in a domain, which is one of them or a wider one."""
        return self._counts[level].get(domain, 0)


def _place(node: str, labels: Sequence[str]) -> tuple[str, ...]:
    named = dict(label.split("=", 1) for label in parse_labels(labels))
    return (*(named.get(level, "") for level in LEVELS), node)
