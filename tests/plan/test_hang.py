"""When a job stands still and what follows, under a manual clock: agents of several nodes, no processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from resilient_train.plan import hang
from resilient_train.plan.view import Limits, View
from resilient_train.spec.node import NodeInfo, WorkerInfo
from resilient_train.spec.rank import RankReport, Where
from resilient_train.spec.world import Planned, WorldRecord, node_of

Place = Callable[[str], "RankReport | None"]


class Bench:
    """Agents that look as often as they want to, and workers that are where the test says."""

    def __init__(self, nodes: int = 2, slots: int = 2, detect_within: float = 5.0) -> None:
        self.now = 1000.0
        names = [f"n{i}" for i in range(nodes)]
        members = tuple(f"{name}/{slot}.0" for name in names for slot in range(slots))
        self.record = WorldRecord(revision=1, generation=1, members=members, bootstrap="h:1", reason="start")
        self.infos = {
            name: NodeInfo(
                node=name,
                order=i,
                endpoint="h:1",
                slots=slots,
                workers=tuple(
                    WorkerInfo(member=m, elastic=True, acknowledged=1, formed=1, stepping=1)
                    for m in members
                    if node_of(m) == name
                ),
            )
            for i, name in enumerate(names)
        }
        self.watches = {name: hang.Watch(detect_within=detect_within) for name in names}
        self.wakes: dict[str, list[float]] = {name: [] for name in names}
        self.board = dict.fromkeys(members, (1, 0))
        self.stopped: set[str] = set()
        self.silent = False
        self.effects: list[tuple[float, hang.Effect]] = []
        self.place: Place = lambda member: self.report(member)
        self.late: list[tuple[float, str, hang.Answer]] = []

    def report(self, member: str, where: Where = Where.COMMUNICATION, count: int = 9) -> RankReport:
        generation, step = self.board[member]
        return RankReport(
            member=member, generation=generation, step=step, where=where, frame="train.py:1", counts=(("0", count),)
        )

    def feed(self, node: str, event: hang.Event) -> None:
        self.watches[node], effects = hang.step(self.watches[node], event, self.now)
        for effect in effects:
            self.effects.append((self.now, effect))
            match effect:
                case hang.Ask(number, members):
                    for member in members:
                        report = None if member in self.stopped else self.place(member)
                        if report is not None:
                            self.feed(node, hang.Answer(number, report))
                case hang.Announce(reports):
                    self.infos[node] = replace(self.infos[node], stuck=reports)
                case hang.LookAt(at):
                    self.wakes[node].append(at)

    def look(self, node: str) -> None:
        view = View(me=node, limits=Limits(max_nodes=9), nodes=self.infos, record=self.record, silent=self.silent)
        board = {m: at for m, at in self.board.items() if node_of(m) == node}
        self.feed(node, hang.Look(view, board, self.stopped & board.keys()))

    def run_for(self, seconds: float) -> None:
        """Let time pass; every agent looks when it is time, and when it asked for it."""
        end = self.now + seconds
        periodic = dict.fromkeys(self.infos, self.now)
        while True:
            due = {n: min([periodic[n], *self.wakes[n]]) for n in self.infos}
            node = min(due, key=lambda n: due[n])
            if due[node] > end:
                self.now = end
                return
            self.now = max(self.now, due[node])
            self.wakes[node] = [at for at in self.wakes[node] if at > self.now]
            if periodic[node] <= self.now:
                periodic[node] = self.now + self.watches[node].period
            self.look(node)

    def train(self, steps: int, step_time: float) -> None:
        """All ranks pass boundaries."""
        for _ in range(steps):
            self.run_for(step_time)
            self.board = {m: (g, step + 1) for m, (g, step) in self.board.items()}
        for node in self.infos:
            self.look(node)

    def worker(self, member: str, **changes: object) -> None:
        info = self.infos[node_of(member)]
        workers = tuple(replace(w, **changes) if w.member == member else w for w in info.workers)
        self.infos[info.node] = replace(info, workers=workers)

    def acts(self) -> list[tuple[float, hang.Effect]]:
        return [(at, e) for at, e in self.effects if isinstance(e, (hang.Evict, hang.Regroup))]

    def evicted(self) -> list[str]:
        return [e.member for _, e in self.acts() if isinstance(e, hang.Evict)]


def stuck(bench: Bench, member: str) -> Place:
    """One rank is in its own code, the others wait for it."""
    return lambda m: bench.report(m, Where.ELSEWHERE, 8) if m == member else bench.report(m)


def test_the_stuck_rank_is_evicted_by_its_own_agent_within_the_bound() -> None:
    """Both agents come to the verdict, the culprit's acts, once, not before the limit and within 2 s after it."""
    bench = Bench()
    bench.train(20, 0.3)
    began = bench.now
    bench.place = stuck(bench, "n1/0.0")
    bench.run_for(20)
    ((at, act),) = bench.acts()
    assert isinstance(act, hang.Evict)
    assert act.member == "n1/0.0"
    assert "hung: rank 2 has not entered operation 9 of process group 0, for which ranks 0, 1, 3 wait" in act.reason
    assert 5.0 <= at - began <= 7.0


def test_no_answer_while_others_wait() -> None:
    """A process that answers nobody is the culprit, whether it fell silent before or between the questions."""
    for answers in (0, 1):
        bench = Bench()
        bench.train(20, 0.3)
        began, asked = bench.now, dict.fromkeys(bench.board, 0)

        def place(member: str, bench: Bench = bench, asked: dict = asked, answers: int = answers) -> RankReport | None:
            asked[member] += 1
            silent = member == "n0/1.0" and asked[member] > answers
            return None if silent else bench.report(member)

        bench.place = place
        bench.run_for(20)
        ((at, act),) = bench.acts()
        assert isinstance(act, hang.Evict)
        assert act.member == "n0/1.0"
        assert "does not answer" in act.reason
        assert 5.0 <= at - began <= 7.0


def test_a_stopped_process_is_evicted_at_any_time() -> None:
    """Even in first steps, and whatever the others do."""
    bench = Bench()
    bench.run_for(3)
    began = bench.now
    bench.stopped = {"n1/1.0"}
    bench.run_for(8)
    ((at, act),) = bench.acts()
    assert act == hang.Evict("n1/1.0", "hung: rank 3 has been stopped (SIGSTOP) for 5 s")
    assert 5.0 <= at - began <= 6.5


def test_a_process_that_goes_on_in_time_is_left_alone() -> None:
    """SIGSTOP and SIGCONT after four of five seconds, twice."""
    bench = Bench()
    bench.train(10, 0.3)
    for _ in range(2):
        bench.stopped = {"n1/1.0"}
        bench.run_for(4)
        bench.stopped = set()
        bench.train(10, 0.3)
    assert bench.acts() == []


def test_all_wait_for_each_other() -> None:
    """Nobody is evicted; every agent wants to form again, in the generation that is stuck."""
    bench = Bench()
    bench.train(20, 0.3)
    bench.run_for(20)
    assert [(e.generation, type(e)) for _, e in bench.acts()] == [(1, hang.Regroup)] * 2
    assert bench.infos["n0"].stuck


def test_ranks_at_a_planned_boundary_wait_for_the_record() -> None:
    """The store does not answer, so what they have promised is not agreed: no hang, however long it takes."""
    bench = Bench()
    bench.train(20, 0.3)
    planned = Planned(number=2, boundary=20, members=bench.record.members[:2], reason="test")
    bench.record = replace(bench.record, revision=2, planned=planned)
    bench.run_for(60)
    assert bench.acts() == []
    bench.record = replace(bench.record, revision=3, planned=replace(planned, boundary=22))
    bench.run_for(20)
    assert bench.acts() != [], "it lies ahead, and somebody hangs on the way to it"


def test_no_verdict_while_the_store_is_silent() -> None:
    """Nobody could agree on what follows from it; the verdict is made when that is possible."""
    bench = Bench()
    bench.train(20, 0.3)
    bench.silent = True
    bench.run_for(60)
    assert bench.acts() == []
    bench.silent = False
    bench.run_for(10)
    assert len(bench.acts()) == 2


def test_the_first_steps_of_a_job_take_as_long_as_they_take() -> None:
    """Nothing is asked before every rank has passed two boundaries."""
    bench = Bench()
    bench.place = stuck(bench, "n0/0.0")
    bench.run_for(1000)
    bench.train(1, 400)
    bench.run_for(1000)
    assert not [e for _, e in bench.effects if not isinstance(e, hang.LookAt)]


def test_first_steps_of_a_later_generation_have_a_generous_limit() -> None:
    """Four times what first steps took before: a hang that comes back right away does not last for ever."""
    bench = Bench()
    bench.train(2, 10.0)
    bench.train(20, 0.3)
    bench.record = replace(bench.record, revision=2, generation=2)
    bench.board = dict.fromkeys(bench.board, (2, 22))
    for member in bench.record.members:
        bench.worker(member, acknowledged=2, formed=2, stepping=2)
    bench.place = stuck(bench, "n0/0.0")
    began = bench.now
    bench.run_for(200)
    ((at, act),) = bench.acts()
    assert isinstance(act, hang.Evict)
    assert 80 <= at - began <= 95


def test_announced_operations_take_as_long_as_they_take() -> None:
    """Of any rank; the clock starts anew when it is over, and its time is not taken for a usual step."""
    bench = Bench()
    bench.train(20, 0.3)
    bench.place = stuck(bench, "n1/0.0")
    bench.worker("n1/0.0", busy="evaluate")
    bench.run_for(100)
    assert not [e for _, e in bench.effects if isinstance(e, (hang.Ask, hang.Evict))]
    bench.worker("n1/0.0", busy="")
    bench.run_for(4.5)
    assert bench.acts() == []
    bench.run_for(2)
    assert bench.evicted() == ["n1/0.0"]


def test_scripts_without_boundaries_are_never_suspected() -> None:
    """Without `steps()` there is nothing to see progress by."""
    bench = Bench()
    for member in bench.record.members:
        bench.worker(member, stepping=0)
    bench.board = dict.fromkeys(bench.board, (0, 0))
    bench.place = stuck(bench, "n1/0.0")
    bench.run_for(1000)
    assert not [e for _, e in bench.effects if isinstance(e, hang.Ask)]


def test_a_rank_that_is_done_ends_the_watch() -> None:
    """What others do until they return too is not measured in steps."""
    bench = Bench()
    bench.train(20, 0.3)
    bench.worker("n0/0.0", done=1)
    bench.place = stuck(bench, "n1/0.0")
    bench.run_for(100)
    assert bench.acts() == []


def test_the_limit_follows_the_steps() -> None:
    """Twice the longest recent one, if that is more than the flag says."""
    bench = Bench()
    bench.train(10, 6.0)
    began = bench.now
    bench.place = stuck(bench, "n1/0.0")
    bench.run_for(40)
    ((at, _),) = bench.acts()
    assert 12.0 <= at - began <= 16.0


def test_the_limit_doubles_while_losses_set_the_job_back_to_one_step() -> None:
    """What is only slow, and was taken for a hang, gets through in the end."""
    bench = Bench()
    bench.record = replace(bench.record, stalls=3)
    bench.train(20, 0.3)
    bench.place = stuck(bench, "n1/0.0")
    began = bench.now
    bench.run_for(40)
    ((at, _),) = bench.acts()
    assert 20.0 <= at - began <= 22.5


def test_ranks_that_communicate_within_a_long_step_are_not_stuck() -> None:
    """A count that grows between two questions is progress, boundaries or not."""
    bench = Bench()
    bench.train(20, 0.3)
    bench.place = lambda m: bench.report(m, count=int(bench.now * 2))
    bench.run_for(300)
    assert bench.acts() == []


def test_where_nobody_waits_nobody_is_stuck() -> None:
    """An unannounced evaluation on all ranks is said once, and left alone."""
    bench = Bench(nodes=1)
    bench.train(20, 0.3)
    bench.place = lambda m: bench.report(m, Where.ELSEWHERE)
    bench.run_for(100)
    assert bench.acts() == []
    said = [e.text for _, e in bench.effects if isinstance(e, hang.Say)]
    assert said == ["no rank has passed a boundary for 5 s, but no rank waits for another: leaving them alone"]
    bench.place = stuck(bench, "n0/1.0")
    bench.run_for(7)
    assert bench.evicted() == ["n0/1.0"]


def test_reports_are_withdrawn_once_the_job_goes_on() -> None:
    """Announcements are empty while all is well."""
    bench = Bench(nodes=1)
    bench.train(20, 0.3)
    bench.place = lambda m: bench.report(m, Where.ELSEWHERE)
    bench.run_for(10)
    assert bench.infos["n0"].stuck
    bench.train(1, 0.3)
    assert bench.infos["n0"].stuck == ()


def test_an_agent_that_was_frozen_itself_suspects_nobody_for_it() -> None:
    """After a suspended machine resumes, time starts anew."""
    bench = Bench()
    bench.train(20, 0.3)
    bench.now += 3600
    bench.place = stuck(bench, "n1/0.0")
    bench.run_for(4.5)
    assert bench.acts() == []
    bench.run_for(3)
    assert bench.evicted() == ["n1/0.0"]


def test_no_verdict_without_all_nodes() -> None:
    """As long as one agent has not said where its ranks are, nobody is ended."""
    bench = Bench()
    bench.train(20, 0.3)
    bench.place = stuck(bench, "n0/0.0")
    away = bench.watches["n1"]
    for _ in range(100):
        bench.run_for(0.2)
        bench.watches["n1"] = away  # It never gets to anything.
        bench.infos["n1"] = replace(bench.infos["n1"], stuck=())
    assert bench.acts() == []


def test_a_rank_stuck_on_the_way_to_a_planned_change() -> None:
    """The others have left for the next generation, or wait at its boundary, and cannot form it without this one."""
    bench = Bench()
    bench.train(20, 0.3)
    bench.record = replace(bench.record, revision=3, generation=2, boundary=21)
    for member in bench.record.members:
        if member != "n1/1.0":
            bench.worker(member, acknowledged=2)
    bench.place = lambda m: replace(bench.report(m), generation=2) if m != "n1/1.0" else stuck(bench, m)(m)
    began = bench.now
    bench.run_for(20)
    ((at, _),) = bench.acts()
    assert bench.evicted() == ["n1/1.0"]
    assert at - began <= 7.0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 3), st.floats(0.02, 4.0), st.sampled_from([0.5, 2.0, 5.0]), st.integers(3, 20))
def test_any_stuck_rank_after_any_steps(rank: int, step_time: float, detect_within: float, steps: int) -> None:
    """It, and nobody else, is out within the limit, a look and the time between its last boundary and the hang."""
    bench = Bench(detect_within=detect_within)
    bench.train(4 + int(4 * bench.watches["n0"].period / step_time), step_time)
    bench.train(steps, step_time)
    assert bench.acts() == [], "a job that goes on was disturbed"
    member = bench.record.members[rank]
    bench.place = stuck(bench, member)
    limit = max(w.limit(bench.record) for w in bench.watches.values())
    began = bench.now
    bench.run_for(3 * limit)
    assert bench.evicted() == [member]
    assert bench.acts()[0][0] - began <= limit + 2 * bench.watches["n0"].period
    assert limit <= max(detect_within, 2 * (step_time + 2 * bench.watches["n0"].period))


def newcomer(bench: Bench) -> None:
    """n2 is to join at the boundary after the one at which ranks stand, and its agent has seen none of their steps."""
    waiting = WorkerInfo(member="n2/0.0", elastic=True, acknowledged=2)
    bench.infos["n2"] = NodeInfo(node="n2", order=2, endpoint="h:1", slots=1, workers=(waiting,))
    bench.watches["n2"] = hang.Watch(detect_within=5.0)
    bench.wakes["n2"] = []
    members = (*bench.record.members, "n2/0.0")
    bench.record = replace(bench.record, revision=2, generation=2, members=members, boundary=30)
    bench.board["n2/0.0"] = (0, 0)


def test_a_node_that_has_just_joined_says_where_its_ranks_are() -> None:
    """It has seen no step, so it suspects nobody before others do; with its reports the stuck rank is found."""
    bench = Bench()
    bench.train(20, 0.3)
    newcomer(bench)
    began = bench.now
    bench.place = lambda m: bench.report(m, Where.ELSEWHERE if m == "n1/0.0" else Where.COMMUNICATION)
    bench.run_for(60)
    assert bench.evicted() == ["n1/0.0"]
    first = min(at for at, e in bench.effects if isinstance(e, hang.Announce) and e.reports)
    assert 5.0 <= first - began <= 7.0
    assert bench.acts()[0][0] - began <= 5.0 * hang.START + 2.0


def test_a_node_that_has_just_joined_suspects_nobody_by_itself() -> None:
    """Nobody else finds that the job stands still: its workers are not even asked."""
    bench = Bench()
    bench.train(20, 0.3)
    newcomer(bench)
    for node in ("n0", "n1"):
        for info in bench.infos[node].workers:
            bench.worker(info.member, acknowledged=2)
    bench.run_for(100)
    assert not [e for _, e in bench.effects if isinstance(e, (hang.Ask, hang.Evict, hang.Regroup))]


def left_out() -> Bench:
    """A world of which one local member was left out when the next one was made."""
    bench = Bench()
    bench.train(10, 1.0)
    members = tuple(m for m in bench.record.members if m != "n1/1.0")
    bench.record = replace(bench.record, revision=2, generation=2, members=members)
    for member in members:
        bench.worker(member, acknowledged=2, formed=2, stepping=2)
        bench.board[member] = (2, 10)
    return bench


def test_who_is_left_out_and_never_comes_free_is_ended() -> None:
    """By its own agent, after what first steps may take; where it comes free before, or said what it does, it stays."""
    bench = left_out()
    bench.train(19, 1.0)
    assert bench.evicted() == []
    bench.train(3, 1.0)
    assert bench.evicted() == ["n1/1.0"]
    (end,) = [effect for _, effect in bench.acts()]
    assert isinstance(end, hang.Evict)
    assert "left out of generation 2 and has not come free for 20 s" in end.reason
    for change in ({"idle": True}, {"busy": "evaluate"}, {"done": 1}, {"elastic": False}):
        bench = left_out()
        bench.train(15, 1.0)
        bench.worker("n1/1.0", **change)
        bench.train(30, 1.0)
        assert bench.evicted() == [], change


def test_who_is_left_out_is_ended_where_nobody_trains_and_not_while_the_store_is_silent() -> None:
    """Its slot may be just the one that is missing; but the record may name it by now where nothing is heard of it."""
    bench = left_out()
    bench.record = replace(bench.record, members=())
    for member in bench.board:
        if member != "n1/1.0":
            bench.worker(member, idle=True)
    bench.run_for(15.0)
    bench.silent = True
    bench.run_for(15.0)
    bench.silent = False
    bench.run_for(19.0)
    assert bench.evicted() == []
    bench.run_for(2.0)
    assert bench.evicted() == ["n1/1.0"]
