"""A real job under ``rtrun`` in a subprocess, with means to hurt it and to see that nothing is left of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from resilient_train import config
from resilient_train.events import Event, read_events
from resilient_train.spec.world import slot_of

_MARK = "RESILIENT_TRAIN_JOB_MARK"


class Job:
    """``rtrun`` with a script; a context manager that leaves no process behind.

    Args:
        script: the training script.
        args: its arguments.
        flags: flags for ``rtrun``.
        log_dir: where logs and the files of events go.
        env: further environment variables.
        launcher: another launcher's command instead of ``rtrun``, for comparisons.
        prefix: what to put before the command, such as one that runs it in a network namespace.
    """

    def __init__(
        self,
        script: Path | str,
        args: Sequence[str] = (),
        *,
        flags: Sequence[str] = (),
        log_dir: Path,
        env: Mapping[str, str] | None = None,
        launcher: Sequence[str] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        self.log_dir = log_dir
        self._mark = uuid.uuid4().hex
        command = [*prefix, *(launcher or (sys.executable, "-m", "resilient_train.launch.rtrun")), *flags]
        if launcher is None:
            command.append(f"--log-dir={log_dir}")
        variables = {**config.process_environment(), "OMP_NUM_THREADS": "1", **(env or {}), _MARK: self._mark}
        self._process = subprocess.Popen(
            [*command, str(script), *args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=variables,
            start_new_session=True,
        )
        self._events: tuple[int, list[Event]] = (0, [])
        self.lines: list[tuple[float, str]] = []
        """(monotonic time, line) of everything the job printed."""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append((time.monotonic(), line.rstrip("\n")))

    @property
    def pid(self) -> int:
        """The agent's process id."""
        return self._process.pid

    @property
    def output(self) -> str:
        """Everything the job printed so far."""
        return "\n".join(line for _, line in self.lines)

    def events(self) -> list[Event]:
        """What the agent recorded so far."""
        paths = sorted(self.log_dir.glob("events*.jsonl"))
        # Only a file that has grown is read again: this is asked in loops beside a job that needs the processor.
        size = sum(path.stat().st_size for path in paths)
        if size != self._events[0]:
            self._events = (size, [event for path in paths for event in read_events(path)])
        return list(self._events[1])

    def workers(self) -> dict[str, int]:
        """Member id to process id of the workers that run now."""
        found = {}
        for pid in self._processes():
            member = _environment(pid).get(config.MEMBER, "")
            if member and _parent(pid) == self.pid:
                found[member] = pid
        return found

    def slots(self) -> list[int]:
        """Slots with a running worker."""
        return sorted(slot_of(member) for member in self.workers())

    def running(self) -> bool:
        """Whether the launcher still runs."""
        return self._process.poll() is None

    def keepers(self) -> list[int]:
        """Process ids of the keepers that run now."""
        return [pid for pid in self._processes() if "resilient_train.keeper" in _command(pid)]

    def _processes(self) -> list[int]:
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        return [pid for pid in pids if _environment(pid).get(_MARK) == self._mark]

    def leftovers(self, patience: float = 10.0) -> list[str]:
        """Commands of processes that outlive the job by ``patience`` seconds."""
        deadline = time.monotonic() + patience
        while (pids := self._processes()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return [f"{pid} {_command(pid)}" for pid in pids]

    def kill(self, *slots: int, number: signal.Signals = signal.SIGKILL) -> float:
        """Send a signal to the workers in these slots; when it was sent."""
        pids = {slot_of(member): pid for member, pid in self.workers().items()}
        at = time.monotonic()
        for slot in slots:
            os.kill(pids[slot], number)
        return at

    def wait_for(self, condition: Callable[[], object], timeout: float, what: str) -> None:
        """Wait until ``condition()`` is true.

        Raises:
            AssertionError: with the job's output, if the job ends before or the time is up.
        """
        deadline = time.monotonic() + timeout
        while not condition():
            if self._process.poll() is not None and not condition():
                raise AssertionError(
                    f"the job ended (exit code {self._process.returncode}) before {what}\n{self.output}"
                )
            if time.monotonic() > deadline:
                raise AssertionError(f"{what} did not happen within {timeout:g} s\n{self.output}")
            time.sleep(0.005)

    def wait_for_line(self, text: str, timeout: float, count: int = 1) -> None:
        """Wait until ``count`` lines with ``text`` were printed."""
        self.wait_for(lambda: sum(text in line for _, line in list(self.lines)) >= count, timeout, f"{text!r}")

    def wait_for_event(self, kind: str, timeout: float, count: int = 1) -> None:
        """Wait until ``count`` events of a kind were recorded."""
        self.wait_for(lambda: sum(e.kind == kind for e in self.events()) >= count, timeout, f"event {kind!r}")

    def finish(self, timeout: float) -> int:
        """Wait for the job's end; its exit code.

        Raises:
            AssertionError: with the job's output, if the time is up.
        """
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the job did not end within {timeout:g} s\n{self.output}") from None
        self._reader.join(5.0)
        return code

    def has_child_with(self, text: str) -> bool:
        """Whether the agent has a child with ``text`` in its command."""
        return any(_parent(pid) == self.pid and text in _command(pid) for pid in self._processes())

    def kill_all(self) -> None:
        """SIGKILL every process of the job."""
        for pid in [self.pid, *self._processes()]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def signal_process(self, pid: int, number: signal.Signals) -> None:
        """Send a signal to one of the job's processes."""
        os.kill(pid, number)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the agent."""
        os.kill(self.pid, number)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for pid in self._processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._reader.join(5.0)
        if self._process.stdout is not None:
            self._process.stdout.close()


def _environment(pid: int) -> dict[str, str]:
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    pairs = (item.split(b"=", 1) for item in raw.split(b"\0") if b"=" in item)
    return {name.decode(errors="replace"): value.decode(errors="replace") for name, value in pairs}


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return -1
