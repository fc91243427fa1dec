"""Real jobs, real kills: the promises of the README, held on four processes of this machine."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import records

from resilient_train.spec.world import Key
from resilient_train.testing.job import Job

SCRIPT = Path(__file__).parent / "scripts" / "train.py"
pytestmark = pytest.mark.timeout(300)


def job(tmp_path: Path, *args: str, ranks: int = 4, flags: tuple[str, ...] = ()) -> Job:
    return Job(
        SCRIPT,
        ["--record", str(tmp_path / "record"), *args],
        flags=[f"--nproc-per-node={ranks}", *flags],
        log_dir=tmp_path / "logs",
    )


def check_restored_bit_for_bit(tmp_path: Path, running: Job) -> None:
    """Parameters and optimizer state that a world restored equal, bit for bit, those that the world before had at that
    step."""
    log = records.restores(running.events())
    found = records.digests(records.read(tmp_path / "record"))
    finished = {
        Key(restore.lineage, step): digest
        for restore in log
        for step, digest in found.get(restore.generation, {}).get("finished", {}).items()
    }
    # What a world resumed is its first state, and all that there is of it if it was lost in its first step: written
    # down by itself or, where a rank was killed before it wrote, by the world that had finished that step.
    for restore in log:
        for step, digest in found.get(restore.generation, {}).get("restored", {}).items():
            finished.setdefault(Key(restore.lineage, step), digest)
        if restore.source in finished:
            finished.setdefault(Key(restore.lineage, restore.source.step), finished[restore.source])
    compared = 0
    for restore in log:
        restored = found.get(restore.generation, {}).get("restored", {})
        if restore.source is not None and restored:
            assert restored == {restore.source.step: finished[restore.source]}, restore
            compared += 1
    # A world that lost a rank while it restored has nothing to compare.
    assert compared >= 0.6 * (len(log) - 1) > 0, log


@pytest.mark.parametrize("parallel", ["fsdp", pytest.param("ddp", marks=pytest.mark.soak)])
def test_survivors_go_on_in_their_processes_and_a_replacement_joins(tmp_path: Path, parallel: str) -> None:
    """4 to 3 to 4 ranks: same process ids, nothing lost beyond the running step, every batch used once.

    What `world.keep` keeps are the same objects throughout, but for what is sharded.
    """
    steps = 400
    with job(tmp_path, "--parallel", parallel, "--steps", str(steps), "--step-time", "0.08", "--keep") as running:
        running.wait_for_line("step 10 size 4", 90)
        before = running.workers()
        running.kill(2)
        running.wait_for_line("size 3 generation 2", 20)
        running.wait_for_line("size 4 generation 3", 90)
        (tmp_path / "record" / "hurry").touch()
        after = running.workers()
        assert running.finish(120) == 0, running.output
        assert {m: p for m, p in before.items() if m != "n0/2.0"} == {m: p for m, p in after.items() if m in before}
        assert "n0/2.1" in after
        records.check_every_batch_once(tmp_path / "record", running.events(), steps)
        check_restored_bit_for_bit(tmp_path, running)
        grown = next(r for r in records.restores(running.events()) if r.generation == 3)
        finished = [r["step"] for r in records.read(tmp_path / "record") if r.get("generation") == 2 and "step" in r]
        assert grown.source is not None
        assert grown.source.step == max(finished) + 1, "a planned change lost a step"
        for pid in set(before.values()) & set(after.values()):
            rows = map(json.loads, (tmp_path / "record" / f"{pid}.jsonl").read_text().splitlines())
            made = {tuple(row["made"]) for row in rows if "made" in row}
            assert (len(made) == 1) == (parallel == "ddp")
        assert running.leftovers() == []


@pytest.mark.soak
@pytest.mark.parametrize("rounds", [(3, 2), (2, 3, 1, 3, 2, 3, 1, 3)])
def test_kills_at_random_instants(tmp_path: Path, rounds: tuple[int, ...]) -> None:
    """Two and three ranks at once, one during a recovery and one in the last step among them: the job finishes, every
    batch is used once, and the survivors do not grow with the number of generations."""
    seed = random.randrange(1 << 30)
    print("seed", seed)
    chance = random.Random(seed)
    steps, kills = 250 * len(rounds), 0
    args = ("--steps", str(steps), "--step-time", "0.08", "--kill-self-at", str(steps - 1), "--exit-rank", "3")
    with job(tmp_path, *args) as running:
        running.wait_for_line("step 5 size 4", 90)
        # One besides during a recovery, and one in the last step: with the longer sequence twenty in all.
        for round_, together in enumerate(rounds):
            running.wait_for_line(f"size 4 generation {running_generation(running)}", 60)
            wait(running, chance.uniform(0.05, 0.4))
            # Slot 0 is spared, to watch one process through all generations.
            slots = chance.sample([1, 2, 3], together)
            running.kill(*slots)
            kills += len(slots)
            if round_ == len(rounds) // 2:
                wait(running, chance.uniform(0.02, 0.15))
                running.kill(chance.choice([slot for slot in running.slots() if slot]))
                kills += 1
            generation = running_generation(running)
            running.wait_for(lambda g=generation: running_generation(running) > g, 30, "a new generation")
            running.wait_for(lambda: full_strength(running), 60, "full strength again")
        (tmp_path / "record" / "hurry").touch()
        assert running.finish(240) == 0, running.output
        assert (tmp_path / "record" / "killed").exists()
        assert kills == sum(rounds) + 1
        records.check_every_batch_once(tmp_path / "record", running.events(), steps)
        check_restored_bit_for_bit(tmp_path, running)
        if len(rounds) > 2:
            check_memory_is_flat(tmp_path)
        assert running.leftovers() == []


def check_memory_is_flat(tmp_path: Path) -> None:
    """A process that lived through all generations holds no more of anything after many than after a few."""
    by_process = [records.lines(path) for path in (tmp_path / "record").glob("*.jsonl")]
    usage = max(([r["usage"] for r in found if "usage" in r] for found in by_process), key=len)
    assert len(usage) >= 16
    # The first few generations meet every world size and warm every allocator.
    early, late = usage[4], usage[-1]
    assert late["tensors"] <= early["tensors"] + 2, usage
    assert late["fds"] <= early["fds"] + 2, usage
    assert late["threads"] <= early["threads"] + 2, usage
    assert late["memory"] - early["memory"] < 0.3e6 * (len(usage) - 5), usage


def wait(running: Job, seconds: float) -> None:
    """Let the job run for a while, as long as it runs."""

    end = time.monotonic() + seconds
    running.wait_for(lambda: time.monotonic() >= end, seconds + 5, "time passing")


def slots_of(running: Job) -> list[int]:
    return [int(member.rpartition("/")[2].partition(".")[0]) for member in running.workers()]


def running_generation(running: Job) -> int:
    return max((event.generation for event in running.events() if event.kind == "agreed"), default=0)


def full_strength(running: Job) -> bool:
    newest = [event for event in running.events() if event.kind == "agreed"][-1]
    steps = [e for e in running.events() if e.kind == "first_step" and e.generation == newest.generation]
    return newest.fields["size"] == 4 and len(steps) == 4


@pytest.mark.soak
def test_a_kill_in_the_last_step_does_not_spoil_the_job(tmp_path: Path) -> None:
    """A rank that dies in the last step: the others are called back, finish and succeed."""
    args = ("--steps", "12", "--kill-self-at", "11", "--exit-rank", "2")
    with job(tmp_path, *args) as running:
        assert running.finish(120) == 0, running.output
        records.check_every_batch_once(tmp_path / "record", running.events(), 12)
        assert running.output.count("result") >= 3
        assert running.leftovers() == []


def test_all_ranks_killed_at_once(tmp_path: Path) -> None:
    """Even with every worker gone the keeper still holds the state, and replacements go on from it."""
    with job(tmp_path, "--steps", "60") as running:
        running.wait_for_line("step 10 size 4", 90)
        running.kill(0, 1, 2, 3)
        assert running.finish(180) == 0, running.output
        second = records.restores(running.events())[1]
        assert second.source is not None
        assert second.source.step >= 10
        records.check_every_batch_once(tmp_path / "record", running.events(), 60)


def test_a_users_error_ends_the_job_and_is_shown(tmp_path: Path) -> None:
    """The error is raised as it is on its rank, named by the launcher, and nobody hangs."""
    with job(tmp_path, "--raise-at", "7", "--exit-rank", "1") as running:
        assert running.finish(120) == 1, running.output
        assert "ValueError: a bug at step 7" in running.output
        assert "the job failed: rank 1: ValueError: a bug at step 7" in running.output
        assert "local_rank: 1" in running.output
        assert running.leftovers() == []


@pytest.mark.soak
def test_a_crash_at_the_same_step_again_and_again_ends_the_job(tmp_path: Path) -> None:
    """A bug that kills its process at a certain step does not loop."""
    with job(tmp_path, "--abort-at", "5", "--exit-rank", "0", ranks=3) as running:
        assert running.finish(180) == 66, running.output
        assert "3 losses in a row set the job back to step 5" in running.output
        assert running.leftovers() == []


def test_keeper_killed(tmp_path: Path) -> None:
    """The agent holds the images' memory too: another keeper takes over, and a later loss recovers from memory."""
    with job(tmp_path, "--steps", "150", "--url", str(tmp_path / "ckpt"), "--persist-every", "50") as running:
        running.wait_for_line("step 20 size 4", 90)

        (keeper,) = running.keepers()
        os.kill(keeper, signal.SIGKILL)
        running.wait_for_line("another takes over", 20)
        running.wait_for_line("step 60 size 4", 60)
        running.kill(1)
        running.wait_for_line("size 3 generation 2", 30)
        assert running.finish(120) == 0, running.output
        second = records.restores(running.events())[1]
        assert second.source is not None
        assert second.source.step >= 55
        check_restored_bit_for_bit(tmp_path, running)
        assert max(path.parent.name for path in (tmp_path / "ckpt").glob("*/manifest.json"))[:14] == "step-000000150"
        assert running.leftovers() == []


@pytest.mark.soak
def test_a_rank_and_the_keeper_killed_at_the_same_instant(tmp_path: Path) -> None:
    """The agent's copy of the memory is enough: the survivors resume from it and lose no finished step."""
    with job(tmp_path, "--steps", "120", ranks=3) as running:
        running.wait_for_line("step 20 size 3", 90)
        (keeper,) = running.keepers()
        pid = next(pid for member, pid in running.workers().items() if member == "n0/0.0")
        os.kill(keeper, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
        assert running.finish(120) == 0, running.output
        second = records.restores(running.events())[1]
        assert second.source is not None
        assert second.source.step >= 20
        records.check_every_batch_once(tmp_path / "record", running.events(), 120)
        check_restored_bit_for_bit(tmp_path, running)
        assert running.leftovers() == []


@pytest.mark.soak
def test_agent_killed_leaves_nothing_behind(tmp_path: Path) -> None:
    """SIGKILL of the launcher: workers end with it, the keeper makes the last state durable and ends too."""
    with job(tmp_path, "--steps", "4000", "--url", str(tmp_path / "ckpt")) as running:
        running.wait_for_line("step 20 size 4", 90)

        os.kill(running.pid, signal.SIGKILL)
        assert running.leftovers(30) == []
        saved = [path.parent.name for path in (tmp_path / "ckpt").glob("*/manifest.json")]
        assert len(saved) == 1
        assert int(saved[0][5:14]) >= 20
