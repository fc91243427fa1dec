"""Whether this node was started like the others: all decide for all, and by the same numbers."""

from __future__ import annotations

from collections.abc import Iterable

from resilient_train.spec.node import NodeInfo


def conflict(me: NodeInfo, others: Iterable[NodeInfo]) -> str:
    """Why this node must not take part, if a node that joined before it was started with other terms; else empty."""
    for other in sorted(others, key=lambda node: node.order):
        if other.order < me.order and None not in (me.terms, other.terms) and me.terms != other.terms:
            return (
                f"this node was started with {me.terms}, node {other.node} of this job with {other.terms}: start all"
                " nodes alike (`rtctl scale` changes how many nodes of a running job may take part)"
            )
    return ""
