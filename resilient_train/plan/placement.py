"""Which nodes keep copies of which node's images: a pure function of where the nodes stand.

Theory of operation.  A node is copied as a whole, because a state needs the images of all ranks: the fewer different
sets of nodes hold the copies of an image, the fewer combinations of losses end a state.  A copy goes as far away from
its node as there is anybody (another zone, else another rack, and so on), and among those as far as possible from the
other copies.  That is never given up for an even load.

For the load there is one ring of all nodes for each copy, in an order that is hashed from their names.  Everybody walks
it from its own place to the first node that is far enough away and has room; of those who wait the nearest is served
first.  Each ring gives every node one copy to keep, if the domains are of about one size, and where one is larger than
all others together the others share what it has too much.  When a node is lost, those behind it in each ring move up,
so few copies move, and in every ring to another node.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from resilient_train.plan.batch import mix
from resilient_train.spec.topology import NODE, Topology

_REACH = 64
"""How many of those who wait a node looks at; it only bounds the time where a domain is far larger than the others."""


def place(topology: Topology, copies: int) -> dict[str, tuple[str, ...]]:
    """The nodes that keep the copies of each node's images, the first copy first.

    Args:
        topology: where the nodes stand.
        copies: how many copies of each image there are to be; where there are too few nodes, one on each.

    Returns:
        Node -> nodes, all different and none of them itself.
    """
    targets: dict[str, list[str]] = {node: [] for node in topology.nodes}
    load = dict.fromkeys(targets, 0)
    for copy in range(min(copies, len(targets) - 1)):
        ring = sorted(targets, key=lambda node: (_hash(copy, node), node))
        for node, target in _matched(topology, ring, targets, load, copy + 1).items():
            targets[node].append(target)
            load[target] += 1
    return {node: tuple(found) for node, found in targets.items()}


def _hash(ring: int, node: str) -> int:
    name = node.encode()
    return mix(ring, *(int.from_bytes(name[at : at + 8], "little") for at in range(0, len(name), 8)))


def distance(topology: Topology, node: str, others: Sequence[str], target: str) -> tuple[int, int]:
    """How far a copy of ``node`` on ``target`` is from it and from the copies on ``others``; less is farther."""
    return topology.apart(node, target), max((topology.apart(other, target) for other in others), default=0)


def _farthest(topology: Topology, node: str, others: Sequence[str]) -> tuple[int, int]:
    """The best that there is for one more copy of ``node``: at which level it can be apart from it, and from which on
    it can be apart from all ``others`` besides."""
    domains = topology.domains(node)
    for level in range(NODE + 1):
        rivals = [topology.domains(other) for other in others if topology.apart(node, other) == level]
        for finer in range(level if rivals else NODE, NODE + 1):
            there = topology.count(domains[level], finer) - topology.count(domains[level + 1], finer)
            if there > len({rival[finer + 1] for rival in rivals}):
                return level, finer
    raise ValueError(f"there is no node besides {node} and {list(others)}")


def _matched(
    topology: Topology,
    ring: Sequence[str],
    targets: Mapping[str, Sequence[str]],
    load: Mapping[str, int],
    even: int,
) -> dict[str, str]:
    """One more target for every node, none of which keeps more than ``even`` copies where that can be had."""
    best = {node: _farthest(topology, node, targets[node]) for node in ring}
    domains = {node: topology.domains(node) for node in ring}
    taken = {node: [domains[other][best[node][1] + 1] for other in targets[node]] for node in ring}

    def fits(node: str, target: str) -> bool:
        level, finer = best[node]
        own, its = domains[node], domains[target]
        return own[level + 1] != its[level + 1] and own[level] == its[level] and its[finer + 1] not in taken[node]

    found: dict[str, str] = {}
    room = {node: even - load[node] for node in ring}
    while waiting := [node for node in ring if node not in found]:
        _walk(ring, set(waiting), room, fits, found)
        left = [node for node in waiting if node not in found]
        if left:
            # A domain that is larger than all that it can turn to: these take more, evenly.
            fewest = min(_choice(topology, domains[node], best[node][0]) for node in left)
            more = max(1, len(left) // fewest)
            room = {node: max(0, free) + more for node, free in room.items()}
    return found


def _choice(topology: Topology, domains: Sequence[int], level: int) -> int:
    """The number of nodes that are apart from a node at this level, and at no wider one."""
    return topology.count(domains[level], NODE) - topology.count(domains[level + 1], NODE)


def _walk(
    ring: Sequence[str],
    waiting: Collection[str],
    room: dict[str, int],
    fits: Callable[[str, str], bool],
    found: dict[str, str],
) -> None:
    """Once around the ring for everybody: whoever has room serves the nearest of those behind it whom it fits."""
    behind: list[str] = []
    for lap in range(2):
        for node in ring:
            at = len(behind) - 1
            last = max(-1, at - _REACH)
            while room[node] > 0 and at > last:
                if fits(behind[at], node):
                    found[behind.pop(at)] = node
                    room[node] -= 1
                at -= 1
            if lap == 0 and node in waiting:
                behind.append(node)
