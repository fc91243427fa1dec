"""SIGKILL while states are being saved, at random instants, of anything: what can be restored is whole and new enough.

``python tests/multiprocess/test_killed_while_saving.py 200 [SEED]`` (``make soak``) is the long form.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import records

from resilient_train.errors import StorageError
from resilient_train.events import Event
from resilient_train.spec.shard import Entry
from resilient_train.spec.world import Key
from resilient_train.storage.catalogue import listing, read_manifest
from resilient_train.storage.commit import MANIFEST, folder_of, key_of
from resilient_train.storage.filesystem import FilesystemTier
from resilient_train.testing.job import Job
from resilient_train.tools.images import open_image
from resilient_train.tools.verify import verify

HERE = Path(__file__).parent
SCRIPT = HERE / "scripts" / "train.py"
SIZES = ("--width", "300", "--hidden", "2000", "--optim", "sgd")
"""10 MB of state: parameters and momentum."""
SLOW_FSYNC = 0.03
"""Seconds that every flush to the device takes longer, so that something is being saved nearly all the time."""
BOUND = 60.0
"""Seconds within which everything that is waited for must happen: nothing hangs."""
IN_JOB = ("worker", "workers", "keeper", "keeper and worker")
WHOLE_JOB = ("agent", "all at once", "keeper, then agent")
KINDS = IN_JOB + WHOLE_JOB
pytestmark = pytest.mark.timeout(200)


class Diary:
    """What every rank of one run wrote down, read as it grows."""

    def __init__(self, folder: Path, log_dir: Path) -> None:
        self._folder = folder
        self._log_dir = log_dir
        self._read: dict[Path, int] = {}
        self._parts: dict[tuple[int, int], dict[str, int]] = {}
        self._sizes: dict[int, int] = {}
        self.pids: dict[int, set[int]] = {}
        """generation -> processes that finished a step in it"""
        self.finished_at: dict[tuple[int, int], float] = {}
        """(generation, number of finished steps) -> when the last rank was there"""
        self.restored: dict[int, tuple[int, int]] = {}
        """generation -> (step, digest) of the state that it resumed"""
        self.digests: dict[tuple[int, int], int] = {}
        """(generation, number of finished steps) -> digest"""

    def poll(self) -> None:
        """Take in what is new."""
        for path in self._folder.glob("*.jsonl"):
            begin = self._read.get(path, 0)
            with path.open("rb") as file:
                file.seek(begin)
                data = file.read()
            end = data.rfind(b"\n") + 1
            self._read[path] = begin + end
            for record in records.parse(data[:end].decode()):
                self._take_in(record, int(path.stem))

    def _take_in(self, record: dict, pid: int) -> None:
        if "digest" not in record or "final" in record:
            return
        generation = record["generation"]
        resumed = "restored" in record
        step = record["restored"] if resumed else record["step"] + 1
        if not resumed:
            self.pids.setdefault(generation, set()).add(pid)
        parts = self._parts.setdefault((generation, -1 if resumed else step), {})
        held, complete = record["digest"]
        parts.update(held)
        if len(parts) < complete:
            return
        digest = sum(parts.values()) % 2**64
        if resumed:
            self.restored[generation] = (step, digest)
        else:
            self.digests[generation, step] = digest
            self.finished_at[generation, step] = record["at"]

    def newest(self) -> tuple[int, int]:
        """(generation, number of steps) that all its ranks have finished; (0, 0) before the first."""
        return max(self.finished_at, default=(0, 0))


@dataclass
class Tally:
    """One line of the summary."""

    kills: int = 0
    while_saving: int = 0
    most_lost: int = 0
    slowest: float = 0.0


@dataclass
class Soak:
    """Jobs one after the other at one location, and what is known about the states they computed."""

    folder: Path
    chance: random.Random
    ranks: int
    tallies: dict[str, Tally] = field(default_factory=dict)
    states: dict[Key, int] = field(default_factory=dict)
    """Every state that is known bit for bit."""
    sound: set[Key] = field(default_factory=set)
    """Committed checkpoints that were read, verified and compared."""
    compared: int = 0
    unknown: int = 0
    failures: list[str] = field(default_factory=list)
    runs: int = 0
    resumed_runs: int = 0

    @property
    def url(self) -> str:
        return str(self.folder / "ckpt")

    # ---- what is at the location ------------------------------------------------------------------------------------

    def committed(self) -> list[Key]:
        return listing(FilesystemTier(self.url))[0]

    def unfinished(self) -> list[Key]:
        return listing(FilesystemTier(self.url))[1]

    def check_committed(self, again: bool = False) -> None:
        """Every folder with a manifest is whole and holds what the training computed at that step."""
        tier = FilesystemTier(self.url)
        for key in self.committed():
            if key in self.sound and not again:
                continue
            manifest_path = Path(self.url) / folder_of(key) / MANIFEST
            try:
                damage = [one.reason for one in verify(tier, key, lambda done, total: None).damage]
                digest = 0 if damage else digest_of(tier, key)
            except (StorageError, OSError) as error:
                damage = [str(error)]
            if damage and manifest_path.exists():
                raise AssertionError(f"{key} is committed and damaged: {damage}")
            if damage:
                continue  # Superseded while it was read: its manifest goes first.
            if key in self.states:
                assert digest == self.states[key], f"{key} is committed with other bits than were computed"
                self.compared += key not in self.sound
            else:
                self.unknown += key not in self.sound
            self.sound.add(key)

    def check_litter(self) -> None:
        """Once a later state is saved nothing is left of what was interrupted."""
        problem = ""

        def clean() -> bool:
            nonlocal problem
            problem = litter(Path(self.url))
            return not problem

        deadline = time.monotonic() + BOUND
        while not clean():
            assert time.monotonic() < deadline, f"left behind: {problem}"
            time.sleep(0.05)

    @contextlib.contextmanager
    def watching(self, run: Run) -> Iterator[None]:
        """Check what is committed as soon as it is, all the time."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.05):
                try:
                    run.learn()
                    self.check_committed()
                except Exception as error:
                    self.failures.append(f"{type(error).__name__}: {error}")
                    return

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
        assert not self.failures, self.failures

    # ---- jobs -------------------------------------------------------------------------------------------------------

    def rounds(self, kinds: list[str], *, finish: bool) -> None:
        """Start jobs and kill until every kind in ``kinds`` had its turn; then let a last job ``finish``."""
        left = list(kinds)
        while left:
            with self.run(steps=1_000_000) as run:
                run.settle()
                while left:
                    assert not self.failures, self.failures
                    kind = run.pick(left)
                    left.remove(kind)
                    (run.kill_in_job if kind in IN_JOB else run.kill_job)(kind)
                    self.say(kind, len(kinds) - len(left), len(kinds))
                    if kind in WHOLE_JOB:
                        break
                else:
                    run.kill_job("agent")
        if finish:
            self.finish()

    def finish(self) -> None:
        """A last job resumes what is left and comes to its end."""
        newest = max(key.step for key in self.committed())
        with self.run(steps=newest + 25) as run:
            assert run.job.finish(BOUND) == 0, run.job.output
            run.check_resumed_from(newest)
            assert run.job.leftovers() == []
        assert max(key.step for key in self.committed()) == newest + 25, "the last state is not durable"
        self.check_committed(again=True)
        assert litter(Path(self.url)) == ""

    @contextlib.contextmanager
    def run(self, steps: int) -> Iterator[Run]:
        self.runs += 1
        folder = self.folder / f"run-{self.runs}"
        every = self.chance.choice([1, 2, 5, 20])
        step_time = self.chance.choice([0.02, 0.05])
        arguments = [*SIZES, "--record", str(folder / "record"), "--steps", str(steps), "--url", self.url]
        arguments += ["--persist-every", str(every), "--step-time", str(step_time)]
        arguments += ["--parallel", self.chance.choice(["fsdp", "ddp"])]
        env = {"PYTHONPATH": str(HERE / "slow_disk"), "SLOW_FSYNC": str(SLOW_FSYNC), "PYTHONFAULTHANDLER": "1"}
        (folder / "record").mkdir(parents=True)
        # A lineage of which nothing was left may be given again.
        there = set(self.committed())
        self.states = {key: digest for key, digest in self.states.items() if key in there}
        with Job(SCRIPT, arguments, flags=[f"--nproc-per-node={self.ranks}"], log_dir=folder / "logs", env=env) as job:
            run = Run(self, job, Diary(folder / "record", folder / "logs"), every)
            with self.watching(run):
                yield run
            run.learn()
            self.check_committed(again=True)

    def say(self, kind: str, done: int, total: int) -> None:
        if total > 20 and done % 10 == 0:
            print(f"{done} of {total} kills, the last: {kind}", flush=True)

    def table(self) -> str:
        lines = [f"{'killed':20} {'kills':>5} {'while saving':>13} {'most steps lost':>16} {'slowest recovery':>17}"]
        for kind, tally in sorted(self.tallies.items(), key=lambda item: KINDS.index(item[0])):
            lines.append(
                f"{kind:20} {tally.kills:5} {tally.while_saving:13} {tally.most_lost:16} {tally.slowest:15.1f} s"
            )
        total = sum(tally.kills for tally in self.tallies.values())
        lines.append(
            f"{total} kills in {self.runs} jobs; {self.compared} checkpoints compared bit for bit with what was"
            f" computed, {self.unknown} whose last line a kill had cut off verified only"
        )
        return "\n".join(lines)


class Run:
    """One job of a soak."""

    def __init__(self, soak: Soak, job: Job, diary: Diary, every: int) -> None:
        self.soak = soak
        self.job = job
        self.diary = diary
        self.every = every
        self._lock = threading.Lock()
        self._before = {key.step for key in soak.committed()}
        self._longest_recovery = 0.0

    # ---- what is known ----------------------------------------------------------------------------------------------

    def resumed(self) -> list[Event]:
        return [event for event in self.job.events() if event.kind == "resumed"]

    def learn(self) -> None:
        """Take in what the ranks wrote, and hold every restored state against what was computed."""
        with self._lock:
            self.diary.poll()
            lineages = {}
            sources = {}
            for event in self.resumed():
                lineages[event.generation] = event.fields["lineage"]
                match = re.search(r"\(lineage (\d+)\)", event.text)
                if match:
                    sources[event.generation] = Key(int(match[1]), event.fields["step"])
            states = self.soak.states
            for (generation, step), digest in list(self.diary.digests.items()):
                if generation in lineages:
                    self._know(Key(lineages[generation], step), digest)
            for generation, (step, digest) in list(self.diary.restored.items()):
                if generation in lineages:
                    self._know(Key(lineages[generation], step), digest)
                source = sources.get(generation)
                if source is not None and source in states:
                    assert states[source] == digest, f"generation {generation} restored other bits than {source} had"

    def _know(self, key: Key, digest: int) -> None:
        known = self.soak.states.setdefault(key, digest)
        assert known == digest, f"{key} was computed twice, with different bits"

    def newest(self) -> tuple[int, int]:
        self.learn()
        return self.diary.newest()

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        try:
            self.job.wait_for(lambda: condition() or self.soak.failures, BOUND, what)
        except AssertionError:
            self._show_threads()
            raise
        assert not self.soak.failures, self.soak.failures

    def _show_threads(self) -> None:
        """What everybody of a job that is stuck waits for."""
        if self.job.running():
            for pid in [*self.job.keepers(), *self.job.workers().values()]:
                os.kill(pid, signal.SIGABRT)
            self.job.wait_for_line("Fatal Python error", 5.0)
            time.sleep(1.0)
            print(self.job.output, flush=True)

    def settle(self) -> None:
        """Wait until the job steps."""
        generation = max((event.generation for event in self.resumed()), default=1)
        self.wait_for(lambda: self.newest()[0] >= generation, f"a step in generation {generation}")

    def await_instant(self) -> None:
        """Wait for a random instant, more often than not one at which a state is being saved."""
        if self.soak.chance.random() < 0.7:
            self.wait_for(lambda: self.soak.unfinished(), "a save")
        self.pause(self.soak.chance.uniform(0.0, 0.2))

    def pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        self.wait_for(lambda: time.monotonic() >= end, "time passing")

    def members(self) -> list[int]:
        """Processes that step now."""
        running = set(self.job.workers().values())
        return sorted(self.diary.pids.get(self.newest()[0], set()) & running)

    def pick(self, left: list[str]) -> str:
        """One of the kinds that are left: one that needs survivors only while there are some."""
        lonely = [kind for kind in left if kind in ("keeper", "workers")]
        if len(self.members()) < 2 and left[0] not in WHOLE_JOB:
            if lonely:
                return lonely[0]
            self.wait_for(lambda: len(self.members()) > 1, "a replacement")
        return left[0]

    # ---- kills ------------------------------------------------------------------------------------------------------

    def check_resumed_from(self, newest: int) -> None:
        first = self.resumed()[0]
        assert first.fields["step"] == newest, f"{first.text}, although step {newest} was durable"

    def _tally(self, kind: str) -> Tally:
        tally = self.soak.tallies.setdefault(kind, Tally())
        tally.kills += 1
        tally.while_saving += bool(self.soak.unfinished())
        return tally

    def kill_in_job(self, kind: str) -> None:
        """The job goes on by itself, from memory, and loses no step but the one that was not at its boundary yet."""
        chance, job = self.soak.chance, self.job
        self.await_instant()
        members = self.members()
        if len(members) < 2 and "worker" in kind:
            kind = "workers"
        generation, finished = self.newest()
        durable = max((key.step for key in self.soak.committed()), default=0)
        takeovers = job.output.count("another takes over")
        keepers = job.keepers() if "keeper" in kind else []
        victims = members if kind == "workers" else [chance.choice(members)] if "worker" in kind else []
        pids = [*keepers, *victims]
        chance.shuffle(pids)
        tally = self._tally(kind)
        at = time.monotonic()
        kill(pids)
        if victims:
            self.wait_for(lambda: any(e.generation > generation for e in self.resumed()), f"recovery after {kind}")
            after = next(e for e in self.resumed() if e.generation > generation)
            # All ranks have finished `finished` steps, so all have passed the fence behind the one before.  Of a step
            # for which a keeper that was killed just before left no slot it was said that it got no snapshot.
            skipped = {int(step) for step in re.findall(r"no free slot for the snapshot of step (\d+)", job.output)}
            kept = next((step for step in range(finished - 1, 0, -1) if step not in skipped), 0)
            assert after.fields["step"] >= max(durable, kept), (
                f"{kind}: {after.text} after {finished} steps, of which {durable} were durable\n{job.output}"
            )
            tally.most_lost = max(tally.most_lost, finished - after.fields["step"])
        if keepers:
            self.wait_for(lambda: job.output.count("another takes over") > takeovers, "another keeper")
            newest = max(self.soak.committed(), default=Key(0, 0))
            self.wait_for(lambda: max(self.soak.committed(), default=newest) > newest, "a save by the next keeper")
        recovery = time.monotonic() - at
        tally.slowest = max(tally.slowest, recovery)
        self._longest_recovery = max(self._longest_recovery, recovery)
        if self.soak.chance.random() < 0.8:
            self.settle()
        else:
            # The next kill hits the recovery.
            self.pause(self.soak.chance.uniform(0.0, 0.3))
            self.wait_for(lambda: self.newest()[0] > 0, "a step")

    def kill_job(self, kind: str) -> None:
        """What the next job will find is whole and new enough, and nothing goes on running."""
        chance, job = self.soak.chance, self.job
        self.wait_for(lambda: {k.step for k in self.soak.committed()} - self._before, "a state of this job on disk")
        self.soak.check_litter()
        self.await_instant()
        tally = self._tally(kind)
        _, finished = self.newest()
        pids = {"agent": [job.pid], "all at once": [job.pid, *job.keepers(), *job.workers().values()]}.get(kind, [])
        chance.shuffle(pids)
        if not pids:
            kill(job.keepers())
            self.pause(chance.uniform(0.0, 0.5))
            pids = [job.pid]
        at = time.monotonic()
        kill(pids)
        assert job.leftovers(BOUND) == [], f"left running after {kind}"
        tally.slowest = max(tally.slowest, time.monotonic() - at)
        self.soak.check_committed(again=True)
        newest = max(key.step for key in self.soak.committed())
        tally.most_lost = max(tally.most_lost, finished - newest)
        if kind == "agent":
            assert newest >= finished - 1, f"the keeper saved step {newest} of {finished}\n{job.output}"
            return
        self.learn()
        writes = [float(text) for text in re.findall(r"is durable in .* bytes in ([0-9.]+) s", job.output)]
        # A state that is due waits for the write before it, and takes a write itself.
        limit = 2 * max(writes, default=0.0) + self._longest_recovery + 1.0
        for (generation, step), when in self.diary.finished_at.items():
            if step > newest and step % self.every == 0:
                assert at - when < limit, (
                    f"{kind}: step {step} was due {at - when:.2f} s before, and step {newest} is all there is"
                    f" (generation {generation}, limit {limit:.2f} s)\n{job.output}"
                )


def kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def litter(root: Path) -> str:
    """What stands at a location that belongs to no checkpoint and to nothing that may be being written; one of it."""
    committed, others = [], []
    for path in root.iterdir() if root.exists() else ():
        key = key_of(path.name)
        if key is None:
            return path.name
        try:
            names = {file.name for file in path.iterdir()}
        except FileNotFoundError:
            continue
        (committed if MANIFEST in names else others).append((key, names))
    if not committed:
        return ""
    newest = max(key for key, _ in committed)
    for key, names in others:
        if key < newest:
            return f"{folder_of(key)}, unfinished: {sorted(names)}"
    for key, names in committed:
        strange = [
            name for name in names if not re.fullmatch(r"manifest\.json|part-\d+\.json|rank-.*\.safetensors", name)
        ]
        if strange:
            return f"{folder_of(key)}/{strange[0]}"
    return ""


def digest_of(tier: FilesystemTier, key: Key) -> int:
    """What `scripts/train.py` calls the digest of a state, of a committed one."""
    manifest = read_manifest(tier, key)
    total = 0
    for file in manifest.files:
        image = open_image(tier, manifest, file)
        for entry in image.entries():
            if entry.name.startswith(("model/", "optim/")):
                total += digest_part(entry, bytes(image.data(entry)))
    return total % 2**64


def digest_part(entry: Entry, data: bytes) -> int:
    kind, *rest = entry.name.split("/")
    label = f"{rest[0]}." if kind == "model" else f"{rest[0].removeprefix('model.')}.{rest[1]}"
    assert entry.dtype == "F32"
    assert all(at == 0 for at in entry.offset[1:])
    bits = np.frombuffer(data, dtype=np.uint32).astype(np.uint64)
    first = entry.offset[0] * int(np.prod(entry.global_shape[1:], dtype=np.int64))
    places = np.arange(first, first + len(bits), dtype=np.uint64)
    salt = np.uint64(zlib.crc32(f"{label} torch.float32".encode()) | 1)
    return int(((bits + np.uint64(1)) * (places * np.uint64(2) + np.uint64(1)) * salt).sum(dtype=np.uint64))


@pytest.mark.soak
def test_killed_while_saving(tmp_path: Path) -> None:
    """Workers, keeper and agent, killed at random instants of a job that saves all the time: what is committed is
    whole bit for bit at every moment, in the job nothing but the running step is lost, what is on disk in the end is
    new enough, and nothing is left of what was interrupted."""
    seed = random.randrange(1 << 30)
    print("seed", seed)
    soak = Soak(tmp_path, random.Random(seed), ranks=2)
    kinds = soak.chance.sample(["keeper", "keeper and worker", "worker"], 3)
    soak.rounds([*kinds, soak.chance.choice(WHOLE_JOB)], finish=False)
    print(soak.table())


def test_a_loss_between_a_due_state_and_its_handover_and_a_location_that_is_away(tmp_path: Path) -> None:
    """State 10 is due, and a rank dies in the step in which it would have been handed over: the survivors save it.  A
    replacement comes while nothing can be written: it joins all the same, and later states are saved again."""
    url = tmp_path / "ckpt"
    args = ["--record", str(tmp_path / "record"), "--url", str(url), "--persist-every", "10", "--steps", "100000"]
    args += ["--step-time", "0.03", "--kill-self-at", "10", "--exit-rank", "1"]
    with Job(SCRIPT, args, flags=["--nproc-per-node=2"], log_dir=tmp_path / "logs") as job:
        job.wait_for_line("step 10 (lineage 2) is durable", 60)
        url.rename(tmp_path / "away")
        url.write_text("no folder")
        job.wait_for_line("joined by 1 worker", 30)
        job.wait_for_line("size 2 generation 3", 30)
        job.wait_for_line("is not durable", 30)
        url.unlink()
        (tmp_path / "away").rename(url)
        job.wait_for_line("is durable", 30, sum("is durable" in line for _, line in list(job.lines)) + 1)


def main() -> None:
    count = int(sys.argv[1])
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 30)
    print(f"seed {seed}, {count} kills", flush=True)
    chance = random.Random(seed)
    # A job that is killed as a whole has to be started again, which takes its time: one in thirteen.
    weights = [1 if kind in WHOLE_JOB else 9 for kind in KINDS]
    kinds = list(itertools.islice(iter(lambda: chance.choices(KINDS, weights)[0], None), count))
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"in {folder}, which stays if something fails")
    soak = Soak(folder, chance, ranks=3)
    began = time.monotonic()
    soak.rounds(kinds, finish=True)
    print(soak.table())
    print(f"nothing was lost, damaged, left behind or stuck: {time.monotonic() - began:.0f} s")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
