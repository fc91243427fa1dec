"""Who is lost: from the links between agents, announcements that expire, and what the other agents find.

Theory of operation.  Every agent keeps a line to the next two of the ring of nodes, so each node is heard by four
others.  A node whose agent's port refuses a connection is dead now, unless all others refuse or are silent: who hears
nobody has a broken way out itself, and takes them for silent.  One that falls silent is a *suspect*, and suspects are
announced.  Silence alone proves little, because either end may be cut off:

- a suspect whose announcement has expired too is dead, since it reaches neither us nor the store;
- one that is heard, and whose announcement stays away, cannot reach the store: it goes too, before the store's word
  runs out that lets its world step (`resilient_train.plan.fence`), and so before it stops the others;
- among nodes that all reach the store but not each other, whoever most others cannot reach goes (`_most_doubted`).
  All see the same announcements and reckon alike; a node that finds itself among those to go proposes nothing.  The
  first that cannot reach a node that is in trouble is no more than one of two at odds: others are given time to say.

An expired announcement alone is a reason to probe, no more: a store that freezes and comes back may have let
everybody's expire at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field, replace

from resilient_train.spec.node import NodeInfo

NEIGHBOURS = 2
"""Nodes of the ring that each agent keeps lines to."""
PROBERS = 3
"""Agents, those whose turn to propose comes first, that look for themselves at whom others suspect."""
_FEW = 8
"""So many expired announcements every agent looks into; more at once say something about the store."""
_PROBE = 0.2
"""Share of ``within`` after which a node without a line and without an announcement is given up; and so long after it
refused, what it announces was not on its way before."""
_UNHEARD = (3.0, 3.0)
"""How long a node may be heard without an announcement, in which the store, its own line to it and its agent may be
slow: times ``within``, and so many seconds more."""
_FAINT = 0.4
"""Share of ``within`` of silence, two beats, after which a node may be on its way to be lost."""
_ALONE = 0.25
"""Share of ``within``, more than a beat, for which nobody else has had anything to say of two nodes at odds before one
of them goes: who notices first that a node is gone does not go for having noticed."""
AGENT_GONE = "its agent is gone"
"""Why a node is lost where nobody listens any more; it is known at once, and of each for itself."""


Odds = frozenset[str]
"""Two nodes of which one cannot reach the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """What is known of another node."""

    info: NodeInfo
    """Its newest announcement."""
    announced: bool = True
    """It stands, and has not expired."""
    wanted_at: float | None = None
    """Since when this agent has wanted to hear from it; None: it does not."""
    heard_at: float | None = None
    """When it was last heard over a line; None: never since it is wanted."""
    refused: bool = False
    """Nobody listens any more where its agent did."""
    refused_at: float = 0.0
    """Since when, if so."""
    contradicted: bool = False
    """It has announced something new since, so its agent is there, and only this node's way to it is barred."""
    expired_at: float = 0.0
    """When its announcement was found to have expired, if it has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What one agent knows of the others."""

    me: NodeInfo
    """This node."""
    within: float
    """Seconds of silence after which a node is a suspect."""
    peers: Mapping[str, Peer] = field(default_factory=dict)
    """The other nodes of the job that are not known to be gone."""
    at: float = 0.0
    """When this agent last did anything."""
    at_odds: Mapping[Odds, float] = field(default_factory=dict)
    """Nodes that do not reach each other, and since when that is known."""
    gone: bool = False
    """The store has ended for good: who refuses then is gone, too, and there is nobody to leave anything to."""
    standing: bool = False
    """This node's own announcement was among those that stand, when they were last heard of."""
    last: Verdict | None = None
    """The newest verdict; what was heard since has changed nothing about it."""


@dataclass(frozen=True, slots=True)
class Announced:
    """The announcements that stand in the store, this node's perhaps among them."""

    nodes: tuple[NodeInfo, ...]


@dataclass(frozen=True, slots=True)
class Heard:
    """Signs of life over the lines to these nodes."""

    nodes: frozenset[str]


@dataclass(frozen=True, slots=True)
class Refused:
    """Nobody listens where this node's agent did."""

    node: str


@dataclass(frozen=True, slots=True)
class Deaf:
    """The store did not answer, so who was not announced may be by now; ``gone``: it has ended for good."""

    gone: bool = False


@dataclass(frozen=True, slots=True)
class Looked:
    """Time has passed."""


Event = Announced | Heard | Refused | Deaf | Looked


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What to make of it."""

    wanted: frozenset[str]
    """Nodes to keep a line to."""
    suspects: frozenset[str]
    """Nodes that this agent cannot reach, for its announcement."""
    alive: tuple[NodeInfo, ...]
    """The other nodes that take part."""
    lost: Mapping[str, str]
    """Nodes that do not, and why, for people."""
    doubted: bool
    """This node itself is the one that most others cannot reach."""
    wake_at: float | None
    """When to look again although nothing happened."""
    fading: frozenset[str]
    """Nodes that take part, and of which nothing is heard; they may be about to be lost."""


def step(state: State, event: Event, now: float) -> tuple[State, Verdict]:
    """Take in one event; return what to make of everything known."""
    if _says_nothing_new(state, event, now) and state.last is not None:
        # Nearly all signs of life; with thousands of nodes the rest of this is work.
        peers = dict(state.peers)
        _take_in(peers, state.me, state.within, event, now)
        return replace(state, peers=peers, at=now), state.last
    peers = dict(state.peers)
    if now > state.at + state.within / 2:
        # This agent was stopped or starved itself: what it did not hear meanwhile says nothing.
        peers = {name: _excused(peer, now) for name, peer in peers.items()}
        state = replace(state, at_odds=dict.fromkeys(state.at_odds, now))
    if isinstance(event, Heard) and event.nodes & peers.keys() and not _refusals_count(state, now):
        # Who refused while nobody was heard has to do so again.
        peers = {name: replace(peer, refused=False) for name, peer in peers.items()}
    _take_in(peers, state.me, state.within, event, now)
    if isinstance(event, Announced):
        state = replace(state, standing=any(node.node == state.me.node for node in event.nodes), gone=False)
    elif isinstance(event, Deaf):
        state = replace(state, gone=event.gone)
    state = replace(state, peers=peers, at=now, last=None)
    lost, doubts = _condemned(state, now)
    state = replace(state, at_odds={odds: state.at_odds.get(odds, now) for odds in _odds(doubts)})
    verdict = _judge(state, lost, doubts, now)
    for name, peer in list(peers.items()):
        if not peer.announced and name in verdict.lost:
            # Who is lost and not announced any more is forgotten; it may come back under the same name.
            del peers[name]
        elif (name in verdict.wanted) != (peer.wanted_at is not None):
            peers[name] = replace(peer, wanted_at=now if name in verdict.wanted else None, heard_at=None)
    verdict = replace(verdict, wake_at=_next_look(state, now), fading=_fading(state, verdict.alive, now))
    # Who was just forgotten is in this verdict, and not in the next; refusals may count as soon as somebody is heard.
    stands = verdict.lost.keys() <= peers.keys() and not any(
        peer.refused and verdict.lost.get(name) != AGENT_GONE for name, peer in peers.items()
    )
    return replace(state, last=verdict if stands else None), verdict


def _says_nothing_new(state: State, event: Event, now: float) -> bool:
    """Whether the last verdict stands: nobody's silence has become too long, and no suspect was heard."""
    if state.last is None or now > state.at + state.within / 2:
        return False
    if state.last.wake_at is not None and now >= state.last.wake_at:
        return False
    return isinstance(event, Looked) or (
        isinstance(event, Heard) and not event.nodes & (state.last.suspects | state.last.fading)
    )


def _take_in(peers: dict[str, Peer], me: NodeInfo, within: float, event: Event, now: float) -> None:
    match event:
        case Announced(nodes):
            standing = {node.node: node for node in nodes if node.node != me.node}
            for name, peer in peers.items():
                if peer.announced != (name in standing):
                    peers[name] = replace(peer, announced=name in standing, expired_at=now)
            for name, info in standing.items():
                known = peers.get(name)
                if known is None or known.info.link != info.link:
                    peers[name] = Peer(info=info)
                elif known.info != info:
                    lives = known.refused and now >= known.refused_at + _PROBE * within
                    peers[name] = replace(known, info=info, contradicted=known.contradicted or lives)
        case Heard(nodes):
            for name in nodes & peers.keys():
                known = peers[name]
                peers[name] = Peer(
                    info=known.info,
                    announced=known.announced,
                    wanted_at=known.wanted_at,
                    heard_at=now,
                    refused=False,
                    expired_at=known.expired_at,
                )
        case Refused(node):
            if node in peers and not peers[node].refused:
                peers[node] = replace(peers[node], refused=True, refused_at=now)
        case Deaf():
            for name, peer in peers.items():
                if not peer.announced:
                    peers[name] = replace(peer, expired_at=now)
        case Looked():
            pass


def _excused(peer: Peer, now: float) -> Peer:
    wanted_at = None if peer.wanted_at is None else now
    heard_at = None if peer.heard_at is None else now
    return replace(peer, wanted_at=wanted_at, heard_at=heard_at, expired_at=now)


def with_own(state: State, me: NodeInfo) -> State:
    """The same with another announcement of this node's."""
    return replace(state, me=me)


def _silent_at(state: State, peer: Peer) -> float | None:
    """When a node that is not heard from has been silent for too long; None if nobody listens for it here."""
    if peer.wanted_at is None:
        return None
    if peer.heard_at is not None:
        return peer.heard_at + state.within
    return peer.wanted_at + state.within * (1.0 if peer.announced else _PROBE)


def _is_suspect(state: State, peer: Peer, now: float) -> bool:
    silent_at = _silent_at(state, peer)
    return peer.refused or (silent_at is not None and now >= silent_at)


def _faint_at(state: State, peer: Peer) -> float | None:
    """When so little has been heard of a node that it may be about to be lost; None if nobody listens for it here."""
    since = peer.wanted_at if peer.heard_at is None else peer.heard_at
    return None if since is None or peer.wanted_at is None else since + _FAINT * state.within


def _fading(state: State, alive: tuple[NodeInfo, ...], now: float) -> frozenset[str]:
    found = set()
    for info in alive:
        peer = state.peers[info.node]
        faint_at = _faint_at(state, peer)
        if peer.refused:
            faint = True
        elif peer.announced:
            faint = faint_at is not None and now >= faint_at
        else:
            faint = peer.heard_at is None or faint_at is None or now >= faint_at
        if faint:
            found.add(info.node)
    return frozenset(found)


def _unheard_at(state: State, peer: Peer) -> float:
    """When a node has been without an announcement for too long."""
    times, more = _UNHEARD
    return peer.expired_at + times * state.within + more


def _refusals_count(state: State, now: float) -> bool:
    """Whether refusals tell of the nodes that refuse, rather than of this one's way to them."""
    if len(state.peers) == 1:
        return True
    return any(peer.wanted_at is not None and not _is_suspect(state, peer, now) for peer in state.peers.values())


def _condemned(state: State, now: float) -> tuple[dict[str, str], dict[str, frozenset[str]]]:
    """(the nodes that are lost for what this one knows itself, and why; by node, this one included, whom it cannot
    reach)."""
    suspects = frozenset(name for name, peer in state.peers.items() if _is_suspect(state, peer, now))
    at_once = state.gone or _refusals_count(state, now)
    lost = {}
    for name in suspects:
        peer = state.peers[name]
        if peer.refused and not (peer.contradicted and peer.announced) and (at_once or not peer.announced):
            lost[name] = AGENT_GONE
        elif not peer.announced:
            lost[name] = f"nothing was heard from it for {state.within:g} s"
    for name, peer in state.peers.items():
        # A store that has forgotten this node too says nothing about the others.
        if state.standing and not peer.announced and name not in suspects and now >= _unheard_at(state, peer):
            lost[name] = "it does not reach the control store"
    doubts = {
        name: frozenset(peer.info.suspects) for name, peer in state.peers.items() if name not in lost and peer.announced
    }
    return lost, doubts | {state.me.node: suspects}


def _judge(state: State, lost: dict[str, str], doubts: Mapping[str, frozenset[str]], now: float) -> Verdict:
    suspects = doubts[state.me.node]
    infos = {name: peer.info for name, peer in state.peers.items() if name not in lost}
    orders = {name: info.order for name, info in infos.items()} | {state.me.node: state.me.order}
    young = {odds for odds in state.at_odds if now < _heeded_at(state, odds) and len(doubts) > 2}
    for name in _most_doubted(state.at_odds.keys(), orders, young):
        lost[name] = "other nodes cannot reach it"
    alive = tuple(sorted((info for name, info in infos.items() if name not in lost), key=lambda info: info.order))
    doubted = lost.pop(state.me.node, "") != "" and not state.gone
    return Verdict(
        wanted=_wanted(state, alive, suspects, doubts),
        suspects=suspects,
        alive=alive,
        lost=lost,
        doubted=doubted,
        wake_at=None,
        fading=frozenset(),
    )


def _odds(doubts: Mapping[str, frozenset[str]]) -> set[Odds]:
    return {frozenset((a, b)) for a, found in doubts.items() for b in found if b in doubts and a != b}


def _heeded_at(state: State, odds: Odds) -> float:
    """When something has to be done about two nodes at odds, whatever others say."""
    return state.at_odds[odds] + _ALONE * state.within


def _most_doubted(at_odds: Iterable[Odds], orders: Mapping[str, int], young: Set[Odds]) -> list[str]:
    """Who has to go so that all who stay reach each other: again and again whoever most others are at odds with.

    Of several the last that joined goes; of two that nobody else is at odds with none, while it is ``young``.  All who
    know the same agree.
    """
    edges = set(at_odds)
    gone = []
    while edges:
        degree = Counter(name for edge in edges for name in edge)
        worst = max(degree, key=lambda name: (degree[name], orders[name]))
        its = {edge for edge in edges if worst in edge}
        edges -= its
        if degree[worst] > 1 or not its <= young:
            gone.append(worst)
    return gone


def _wanted(
    state: State, alive: tuple[NodeInfo, ...], suspects: frozenset[str], doubts: Mapping[str, frozenset[str]]
) -> frozenset[str]:
    ring = sorted([*alive, state.me], key=lambda info: info.order)
    mine = next(index for index, info in enumerate(ring) if info.node == state.me.node)
    after = [ring[(mine + step) % len(ring)].node for step in range(1, NEIGHBOURS + 1)]
    before = [ring[(mine - step) % len(ring)].node for step in range(1, NEIGHBOURS + 1)]
    named = {name for found in doubts.values() for name in found} if mine < PROBERS else set()
    expired = {name for name, peer in state.peers.items() if not peer.announced}
    if len(expired) > _FEW and mine >= PROBERS:
        expired = set()
    # Who is suspected stays wanted: it may come back.
    wanted = {*after, *before, *named, *expired, *suspects} - {state.me.node}
    return frozenset(wanted & state.peers.keys())


def _next_look(state: State, now: float) -> float | None:
    times = [_silent_at(state, peer) for peer in state.peers.values() if not _is_suspect(state, peer, now)]
    times += [_faint_at(state, peer) for peer in state.peers.values()]
    times += [_unheard_at(state, peer) for peer in state.peers.values() if not peer.announced]
    times += [_heeded_at(state, odds) for odds in state.at_odds]
    return min((at for at in times if at is not None and at > now), default=None)
