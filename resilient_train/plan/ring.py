"""Which keepers belong together: a pure function of the record and the nodes."""

from __future__ import annotations

from resilient_train.plan.view import View
from resilient_train.spec.messages import Peers
from resilient_train.spec.world import node_of, slot_of


def peers_of(view: View) -> Peers | None:
    """What this node's keeper has to know of the others; None before there is a world.

    Those of the world's nodes are in the order of the ranks.  There are none while some member's node is lost or does
    not serve: a state without that node's images is none.
    """
    record = view.record
    if record is None:
        return None
    members = list(dict.fromkeys(node_of(member) for member in record.members))
    serving = {name: info.keeper for name, info in view.nodes.items() if info.keeper}
    ring = members if all(name in serving for name in members) else []
    return Peers(
        node=view.me,
        generation=record.generation,
        slots=[slot_of(member) for member in record.members if node_of(member) == view.me],
        keepers=[[name, serving[name]] for name in ring],
        labels={name: list(view.nodes[name].labels) for name in ring if view.nodes[name].labels},
        others=[[name, endpoint] for name, endpoint in sorted(serving.items()) if name not in ring],
    )
