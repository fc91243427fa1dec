"""Who is lost: announcements, lines, refusals and what others find, under a manual clock."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from random import Random

import pytest

from resilient_train.plan import suspicion as s
from resilient_train.spec.node import NodeInfo

WITHIN = 5.0


def node(order: int, **changes: object) -> NodeInfo:
    info = NodeInfo(node=f"n{order}", order=order, endpoint="h:1", slots=1, link=f"h:{order}")
    return replace(info, **changes)


@dataclass
class Bench:
    """One agent's machine among ``count`` nodes; ``hears`` is whom its lines bring signs of life from."""

    count: int = 4
    me: int = 0
    hears: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.now = 100.0
        self.infos = {f"n{order}": node(order) for order in range(self.count)}
        self.state = s.State(me=self.infos[f"n{self.me}"], within=WITHIN, at=self.now)
        self.hears = {name for name in self.infos if name != f"n{self.me}"}
        self.announced()

    def feed(self, event: s.Event) -> s.Verdict:
        self.state, self.verdict = s.step(self.state, event, self.now)
        return self.verdict

    def announced(self, *without: str) -> s.Verdict:
        return self.feed(s.Announced(tuple(i for name, i in self.infos.items() if name not in without)))

    def run_for(self, seconds: float) -> s.Verdict:
        """Beats of those that are heard, and looks."""
        end = self.now + seconds
        while self.now < end - 1e-9:
            self.now += min(1.0, end - self.now)
            for name in sorted(self.hears & self.verdict.wanted):
                self.feed(s.Heard(frozenset({name})))
            self.feed(s.Looked())
        return self.verdict

    def alive(self) -> list[str]:
        return [info.node for info in self.verdict.alive]


def test_all_is_well() -> None:
    """Everybody announces and beats: nobody is suspected, nobody is lost."""
    bench = Bench()
    verdict = bench.run_for(60)
    assert bench.alive() == ["n1", "n2", "n3"]
    assert (verdict.suspects, verdict.lost, verdict.doubted) == (frozenset(), {}, False)


def test_each_keeps_lines_to_two_on_either_side() -> None:
    """Of many nodes only the ring's neighbours are listened for."""
    assert Bench(count=9, me=4).verdict.wanted == {"n2", "n3", "n5", "n6"}
    assert Bench(count=9, me=0).verdict.wanted == {"n7", "n8", "n1", "n2"}
    assert Bench(count=2).verdict.wanted == {"n1"}
    assert Bench(count=1).verdict.wanted == frozenset()


def test_a_refusal_is_a_loss_at_once() -> None:
    """Nobody listens where the agent did: no announcement, however young, says otherwise."""
    bench = Bench()
    bench.run_for(1)
    assert bench.feed(s.Refused("n2")).lost == {"n2": "its agent is gone"}
    assert bench.alive() == ["n1", "n3"]
    assert bench.announced("n2").lost == {"n2": "its agent is gone"}
    assert bench.feed(s.Looked()).lost == {}, "once its announcement has expired, it is forgotten"
    assert bench.alive() == ["n1", "n3"]


def test_whom_all_refuse_is_the_one_to_go() -> None:
    """Its own way out is broken: it takes nobody for dead who is announced, and proposes nothing."""
    bench = Bench(me=3)
    bench.run_for(2)
    bench.hears.clear()
    for name in ("n0", "n1", "n2"):
        verdict = bench.feed(s.Refused(name))
    assert verdict.suspects == {"n0", "n1", "n2"}
    assert (dict(verdict.lost), verdict.doubted) == ({}, True)
    assert bench.announced("n0", "n1", "n2").lost.keys() == {"n0", "n1", "n2"}, "they do not reach the store either"
    assert not bench.verdict.doubted


def test_when_the_store_has_ended_whoever_refuses_is_gone() -> None:
    """Also where all do: there is nobody to leave the rest to, and this node has to know that it is alone."""
    bench = Bench(3)
    bench.announced()
    for other in (1, 2):
        verdict = bench.feed(s.Refused(f"n{other}"))
    assert verdict.lost == {}
    verdict = bench.feed(s.Deaf(gone=True))
    assert verdict.lost == {"n1": s.AGENT_GONE, "n2": s.AGENT_GONE}
    assert not verdict.doubted
    assert bench.announced().lost.keys() <= {"n1", "n2"}


def test_who_refused_while_all_did_has_to_do_so_again() -> None:
    """A way out that was broken may just be mended."""
    bench = Bench()
    for name in ("n1", "n2", "n3"):
        bench.feed(s.Refused(name))
    assert s.AGENT_GONE not in bench.verdict.lost.values()
    assert bench.feed(s.Heard(frozenset({"n1"}))).lost == {}
    assert bench.feed(s.Refused("n2")).lost == {"n2": s.AGENT_GONE}


def test_of_two_nodes_a_refusal_always_counts() -> None:
    """There is nobody else to ask."""
    assert Bench(count=2).feed(s.Refused("n1")).lost == {"n1": s.AGENT_GONE}


def test_silence_makes_a_suspect_and_no_more() -> None:
    """A node that still announces itself may be cut off from us only."""
    bench = Bench()
    bench.run_for(2)
    bench.hears.discard("n2")
    assert bench.run_for(4.9).suspects == frozenset()
    assert bench.run_for(0.2).suspects == {"n2"}
    assert bench.verdict.lost == {}, "others may have something to say"
    gone = bench.run_for(1.3).lost
    assert gone == {"n2": "other nodes cannot reach it"}, "of two at odds the one that joined last goes"
    assert "n2" in bench.verdict.wanted, "it may come back"


def test_silence_and_an_expired_announcement_are_a_loss() -> None:
    """It reaches neither us nor the store."""
    bench = Bench()
    bench.run_for(2)
    bench.hears.discard("n2")
    bench.run_for(5.1)
    assert bench.announced("n2").lost["n2"] == "nothing was heard from it for 5 s"


def test_an_expired_announcement_alone_is_no_loss() -> None:
    """The line still brings signs of life; but who stays away from the store for long would stop its world."""
    bench = Bench()
    bench.run_for(2)
    bench.announced("n2")
    assert bench.run_for(17.9).lost == {}
    assert bench.alive() == ["n1", "n2", "n3"]
    bench.now += 0.2
    assert bench.feed(s.Looked()).lost == {"n2": "it does not reach the control store"}


def test_while_the_store_is_silent_nobody_goes_for_not_being_announced() -> None:
    """Who was not announced when it was last heard may be since; the time begins anew when it answers."""
    bench = Bench()
    bench.run_for(2)
    bench.announced("n2")
    for _ in range(30):
        assert bench.run_for(2).lost == {}
        bench.feed(s.Deaf())
    assert bench.run_for(17.9).lost == {}
    bench.now += 0.2
    assert bench.feed(s.Looked()).lost.keys() == {"n2"}


def test_everybodys_announcement_may_expire_at_once() -> None:
    """A store that was frozen: every line still lives, nobody goes."""
    bench = Bench()
    bench.run_for(2)
    bench.announced("n0", "n1", "n2", "n3")
    assert bench.run_for(60).lost == {}
    assert bench.alive() == ["n1", "n2", "n3"]


def test_an_expired_node_without_a_line_is_probed() -> None:
    """It gets a line, and a moment to answer; then it is lost, or not."""
    for answers in (True, False):
        bench = Bench(count=9, me=4)
        bench.run_for(2)
        assert "n8" in bench.announced("n8").wanted
        if not answers:
            bench.hears.discard("n8")
        bench.run_for(0.9)
        assert "n8" in bench.alive()
        bench.run_for(0.2)
        assert ("n8" in bench.alive()) is answers


def test_a_mass_expiry_is_probed_by_few() -> None:
    """Of many expired announcements only those whose turn to propose comes first look into all."""
    gone = [f"n{order}" for order in range(20, 40)]
    first, other = Bench(count=40, me=0), Bench(count=40, me=10)
    assert set(gone) <= first.announced(*gone).wanted
    assert other.announced(*gone).wanted == {"n8", "n9", "n11", "n12"}


def test_a_node_that_comes_back_is_alive_again() -> None:
    """A sign of life ends a suspicion; a new address after a refusal is a new agent."""
    bench = Bench()
    bench.run_for(2)
    bench.hears.discard("n2")
    bench.run_for(7)
    assert bench.alive() == ["n1", "n3"]
    bench.hears.add("n2")
    assert bench.run_for(1).lost == {}
    bench.feed(s.Refused("n3"))
    bench.infos["n3"] = node(3, link="h:33")
    assert bench.announced().lost == {}


def test_a_new_line_has_time_to_come_about() -> None:
    """Whom we only begin to listen for is no suspect for as long as anybody else may be silent."""
    bench = Bench(count=9, me=4)
    bench.run_for(2)
    bench.hears -= {"n6", "n7"}
    bench.infos.pop("n6")
    bench.feed(s.Refused("n6"))
    assert "n7" in bench.verdict.wanted
    assert bench.run_for(4.9).suspects <= {"n6"}
    assert "n7" in bench.run_for(0.2).suspects


def test_who_was_stopped_itself_suspects_nobody_for_it() -> None:
    """After a SIGSTOP nothing was heard from anybody, and that says nothing about them."""
    bench = Bench()
    bench.run_for(2)
    bench.now += 30
    assert bench.feed(s.Looked()).suspects == frozenset()
    assert bench.run_for(60).suspects == frozenset()


def test_whom_most_doubt_goes_and_knows_it() -> None:
    """All reach the store; one cannot be reached by the others: it goes, and proposes nothing."""
    others = {f"n{order}": replace(node(order), suspects=("n1",)) for order in (0, 2, 3)}
    bench = Bench(me=1)
    bench.infos |= others
    verdict = bench.announced()
    assert verdict.doubted
    assert verdict.lost == {}
    bench = Bench(me=0)
    bench.infos |= {name: info for name, info in others.items() if name != "n0"}
    verdict = bench.announced()
    assert set(verdict.lost) == {"n1"}
    assert not verdict.doubted


def test_asymmetric_doubt_counts_both_ways() -> None:
    """One that suspects all others is itself the one to go."""
    bench = Bench(me=0)
    bench.infos["n3"] = node(3, suspects=("n0", "n1", "n2"))
    assert set(bench.announced().lost) == {"n3"}


def test_who_notices_first_does_not_go_for_it() -> None:
    """Two nodes are gone: what the other survivor says of the one that this agent has not missed yet is no quarrel."""
    bench = Bench(me=0)
    bench.run_for(2)
    bench.hears -= {"n1", "n2"}
    assert bench.feed(s.Refused("n2")).lost == {"n2": s.AGENT_GONE}
    bench.infos["n3"] = node(3, suspects=("n1", "n2"))
    assert bench.announced().lost == {"n2": s.AGENT_GONE}
    assert bench.feed(s.Refused("n1")).lost == {"n1": s.AGENT_GONE, "n2": s.AGENT_GONE}
    assert bench.run_for(3).lost == {"n1": s.AGENT_GONE, "n2": s.AGENT_GONE}
    assert bench.alive() == ["n3"]


def test_two_that_stay_at_odds_are_parted_in_time() -> None:
    """It says when to look again; an agent that was stopped itself begins to count anew; of two nodes there is nobody
    else who could have something to say."""
    bench = Bench(me=0)
    bench.infos["n3"] = node(3, suspects=("n1",))
    verdict = bench.announced()
    assert verdict.lost == {}
    assert verdict.wake_at is not None
    bench.run_for(1.0)
    bench.now += 4.0
    bench.announced()
    assert bench.run_for(1.2).lost == {}
    assert bench.run_for(0.2).lost == {"n3": "other nodes cannot reach it"}
    bench = Bench(count=2)
    bench.hears.clear()
    assert bench.run_for(5.1).lost == {"n1": "other nodes cannot reach it"}


def test_who_expired_is_not_asked_for_an_opinion() -> None:
    """What a node that reaches nobody announced before says nothing any more."""
    bench = Bench(me=0)
    bench.infos["n3"] = node(3, suspects=("n1",))
    bench.announced()
    assert bench.announced("n3").lost.keys() <= {"n3"}
    assert "n1" in bench.alive()


def test_agents_that_see_the_same_agree() -> None:
    """For any announcements of suspects, all who stay reckon the same nodes lost, and those who go know it."""
    for seed in range(200):
        random = Random(seed)
        count = random.randint(2, 7)
        names = [f"n{order}" for order in range(count)]
        found = {name: tuple(sorted(o for o in names if o != name and random.random() < 0.25)) for name in names}
        lost, doubted = set(), set()
        for me in range(count):
            bench = Bench(count=count, me=me)
            bench.infos = {n: node(o, suspects=found[n]) for o, n in enumerate(names)}
            # What this one finds itself is in its own state, not in its announcement.
            verdict = s.step(
                replace(bench.state, me=bench.infos[names[me]]), s.Announced(tuple(bench.infos.values())), bench.now
            )[1]
            own = set(found[names[me]])
            if not own:
                lost.add(frozenset(set(verdict.lost) | ({names[me]} if verdict.doubted else set())))
                doubted |= {names[me]} if verdict.doubted else set()
        assert len(lost) <= 1, (seed, found)
        assert not lost or doubted <= next(iter(lost))


@pytest.mark.parametrize("silent", [True, False])
def test_it_says_when_to_look_again(silent: bool) -> None:
    """When the next silence would become a sign, or a suspicion; not for those that are suspects already."""
    bench = Bench(count=2)
    bench.feed(s.Heard(frozenset({"n1"})))
    assert bench.verdict.wake_at == bench.now + 0.4 * WITHIN
    bench.now += 0.4 * WITHIN
    assert bench.feed(s.Looked()).fading == {"n1"}
    assert bench.verdict.wake_at == pytest.approx(bench.now + 0.6 * WITHIN)
    bench.now += WITHIN if silent else 0.0
    verdict = bench.feed(s.Looked())
    assert verdict.wake_at is None if silent and verdict.suspects else verdict.wake_at is not None


def test_signs_of_life_that_change_nothing_are_not_thought_about() -> None:
    """With or without the short way for them, every verdict is the same but for when to look again."""
    for seed in range(100):
        random = Random(seed)
        count = random.randint(2, 8)
        names = [f"n{order}" for order in range(1, count)]
        short = long = s.State(me=node(0), within=WITHIN, at=0.0)
        now = 0.0
        for _ in range(60):
            now += random.choice((0.1, 0.5, 1.0, 2.0))
            some = [name for name in names if random.random() < 0.8]
            event: s.Event = random.choice(
                (s.Heard(frozenset(some[:1])), s.Heard(frozenset(some[:2])), s.Looked(), s.Looked())
            )
            if random.random() < 0.15:
                event = s.Announced(tuple(node(int(name[1:])) for name in some))
            elif random.random() < 0.05:
                event = s.Refused(random.choice(names))
            short, verdict = s.step(short, event, now)
            long, expected = s.step(replace(long, last=None), event, now)
            assert replace(verdict, wake_at=None) == replace(expected, wake_at=None)
            assert verdict.wake_at is None or expected.wake_at is None or verdict.wake_at <= expected.wake_at
            assert short.peers == long.peers


def test_who_refuses_and_announces_something_new_is_there() -> None:
    """This node's own firewall refuses what is sent to it: that is no reason to put it out again and again."""
    bench = Bench()
    bench.run_for(2)
    bench.hears.discard("n1")
    assert bench.feed(s.Refused("n1")).lost == {"n1": s.AGENT_GONE}
    bench.infos["n1"] = node(1, generation=2)
    assert bench.announced().lost == {"n1": s.AGENT_GONE}, "that was on its way before"
    bench.run_for(2)
    bench.infos["n1"] = node(1, generation=3)
    assert s.AGENT_GONE not in bench.announced().lost.values()
    assert bench.verdict.suspects == {"n1"}
