"""Which states are copied to other nodes: one keeper of the job, the conductor, names them, one after the other.

Theory of operation.  A state can be combined from images of one key only, so all nodes must copy the same step, and
must not overwrite its images before all of them are copied.  Every keeper reports how far its ranks are.  The conductor
names the next state, the *pending* one; each rank keeps its image of it, each keeper copies the images of its ranks to
the nodes that keep its copies (`resilient_train.plan.placement`), and reports them as done when all of these have them.
When all are done the state is *kept*: it survives the loss of as many nodes as there are copies, and its images stay
until a newer one is kept.  Then the next is named.

That is the newest state that all ranks have published, or the one that they publish next: where copying takes less than
a step, every state is copied.  Ranks that are so fast that they overwrite a state before they hear of it are told of
one ahead of them instead.

A report replaces the one before it, so a lost one delays and does no harm.  A conductor that dies is followed by one
that knows nothing: the reports tell it what is kept, and it names a new state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from resilient_train.spec.world import Key

LEAD = 2
"""Steps between the furthest rank and a state that all ranks can still hear of, as a rule."""
MOST_LEAD = 64
CALM = 16
"""States in a row that were kept after which the lead is halved."""
STALL = 20.0
"""Seconds without a byte copied anywhere after which a pending state is given up."""
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 10.0
"""Seconds before another state is named after one was given up; doubled as long as that goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a node is, as its keeper reports it."""

    lineage: int
    """The lineage of its ranks' newest images; 0 while not all of them have one of this generation."""
    slowest: int
    """The fewest steps that any of its ranks has finished."""
    furthest: int
    """The most."""
    published: int
    """The newest state that all of its ranks have an image of; 0: none."""
    every: int
    """Steps between snapshots."""
    done: Key | None = None
    """The newest state whose images of all its ranks are copied."""
    missed: Key | None = None
    """The newest pending state that it cannot copy: some rank has no image of it, or nobody takes the copy."""
    moved: int = 0
    """Bytes copied so far; anything that changes while it works."""
    kept: Key | None = None
    """The newest kept state that it was told of."""
    saving: bool = False
    """Whether it is making a state durable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What the conductor knows."""

    generation: int
    """The world's."""
    nodes: tuple[str, ...]
    """Its nodes, in ring order."""
    heard: Mapping[str, Progress] = field(default_factory=dict)
    """The last report of each node that is connected."""
    pending: Key | None = None
    """The state to copy."""
    kept: Key | None = None
    """The newest state of this generation's lineage that survives the loss of a node."""
    moved_at: float = 0.0
    """When anything was copied last, or a state was named."""
    lead: int = 0
    """Steps to name ahead; doubled, from `LEAD` on, whenever some rank heard of a state too late."""
    calm: int = 0
    """States kept in a row with this lead."""
    failures: int = 0
    """States given up in a row."""
    pause_until: float = 0.0
    """When the next may be named."""
    persist_at: int = 0
    """The step that all nodes make durable; 0: none was named yet."""
    reason: str = ""
    """Why the last state was given up, for people."""


def heard(state: State, node: str, progress: Progress, now: float) -> State:
    """A node has reported."""
    if node not in state.nodes:
        return state
    before = state.heard.get(node)
    state = replace(state, heard={**state.heard, node: progress})
    if before is None or (before.moved, before.done) != (progress.moved, progress.done):
        state = replace(state, moved_at=max(state.moved_at, now))
    lineage = progress.lineage
    if progress.kept is not None and progress.kept.lineage == lineage and progress.kept > (state.kept or Key(0, 0)):
        state = replace(state, kept=progress.kept)
    return _named(_judged(state, now), now)


def lost(state: State, node: str) -> State:
    """A node is not connected any more; no state is named until it reports again."""
    return replace(state, heard={name: progress for name, progress in state.heard.items() if name != node})


def persist(state: State) -> State:
    """It is time to make a state durable: name a step that nobody has reached yet."""
    if not _complete(state) or any(progress.saving for progress in state.heard.values()):
        return state
    furthest = max(progress.furthest for progress in state.heard.values())
    slowest = min(progress.slowest for progress in state.heard.values())
    # A step that was passed just now may still be on its way: its copy ends during the step behind it.
    passed = state.persist_at + 3 < slowest
    if passed or state.persist_at > furthest + MOST_LEAD + 1:
        return replace(state, persist_at=furthest + max(LEAD, state.lead))
    return state


def _complete(state: State) -> bool:
    """Whether every node has reported, and all compute the same lineage."""
    return (
        len(state.heard) == len(state.nodes)
        and len({p.lineage for p in state.heard.values()} - {0}) == 1
        and all(progress.lineage for progress in state.heard.values())
    )


def _judged(state: State, now: float) -> State:
    pending = state.pending
    if pending is None:
        return state
    if len(state.heard) == len(state.nodes) and all(progress.done == pending for progress in state.heard.values()):
        calm = (state.calm + 1) % CALM
        lead = state.lead if calm else state.lead // 2
        return replace(
            state,
            pending=None,
            kept=pending,
            failures=0,
            pause_until=0.0,
            reason="",
            calm=calm,
            lead=lead if lead >= LEAD else 0,
        )
    missed = [node for node, progress in state.heard.items() if progress.missed == pending]
    if missed:
        lead = min(max(LEAD, 2 * state.lead), MOST_LEAD)
        return _given_up(replace(state, lead=lead, calm=0), f"{missed[0]} cannot copy {pending}", now)
    if now > state.moved_at + STALL:
        waiting = [node for node in state.nodes if (p := state.heard.get(node)) is None or p.done != pending]
        return _given_up(state, f"{', '.join(waiting)} did not copy {pending}", now)
    return state


def _given_up(state: State, reason: str, now: float) -> State:
    pause = min(FIRST_PAUSE * 2**state.failures, LONGEST_PAUSE)
    return replace(state, pending=None, failures=state.failures + 1, pause_until=now + pause, reason=reason)


def _named(state: State, now: float) -> State:
    if state.pending is not None or len(state.nodes) < 2 or now < state.pause_until or not _complete(state):
        return state
    every = max(progress.every for progress in state.heard.values())
    lineage = next(iter(state.heard.values())).lineage
    kept = state.kept.step if state.kept is not None and state.kept.lineage == lineage else 0
    step = min(progress.published for progress in state.heard.values())
    if state.lead:
        furthest = max(progress.furthest for progress in state.heard.values())
        step = -(-(furthest + state.lead) // every) * every
    elif step <= kept:
        step = (kept // every + 1) * every
    return replace(state, pending=Key(lineage, step), moved_at=now)
