"""Worker processes: torchrun's environment, logs and error files; spawn, stop and reap them one by one.

torchelastic starts and stops a node's workers as one group.  Here each has a life of its own, so its building blocks
are used (log destinations, tailing, the subprocess handler) and its group object is not.
"""

from __future__ import annotations

import inspect
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

from torch.distributed.elastic.multiprocessing.api import LogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
from torch.distributed.elastic.multiprocessing.tail_log import TailLog
from torch.distributed.elastic.utils import macros

from resilient_train import config
from resilient_train.errors import OutsideError
from resilient_train.spec.world import WorldRecord, incarnation_of, node_of, slot_of

_SHIM = Path(__file__).parents[1] / "ipc" / "shim.py"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """What to run; everything the user said to ``rtrun`` about it."""

    entrypoint: str
    """The program."""
    args: tuple[str, ...]
    """Its arguments, with torchrun's macros."""
    slots: int
    """Ranks on this node."""
    standby: int = 0
    """Further workers that stand by."""
    run_id: str
    """The job's id."""
    role: str
    """torchrun's ``--role``."""
    max_restarts: int
    """torchrun's ``--max-restarts``."""
    logs: LogsSpecs
    """Where output goes."""
    log_line_prefix: str | None = None
    """Template of the prefix of teed lines."""
    signals: str = "SIGTERM,SIGINT,SIGHUP,SIGQUIT"
    """torchrun's ``--signals-to-handle``."""
    virtual_local_rank: bool = False
    """Every worker sees its device as number 0."""
    numa_options: Any = None
    """torchrun's ``--numa-binding``."""
    stdout_filters: tuple[str, ...] = ()
    """Only lines with one of these go to ``filtered_stdout.log`` as well."""
    stderr_filters: tuple[str, ...] = ()
    """The same for stderr."""


@dataclass
class Worker:
    """A running worker process."""

    member: str
    handler: SubprocessHandler
    pidfd: int
    error_file: str
    tails: list[TailLog] = field(default_factory=list)

    @property
    def pid(self) -> int:
        """Its process id."""
        return int(self.handler.proc.pid)


class Workers:
    """The worker processes of this node."""

    def __init__(self, spec: WorkerSpec, agent_address: str) -> None:
        self._spec = spec
        self._address = agent_address
        self._running: dict[str, Worker] = {}
        self._ended: dict[str, ProcessFailure] = {}
        self._destinations: dict[int, Any] = {}

    def spawn(self, member: str, record: WorldRecord) -> Worker:
        """Start a member's process (from the main thread).

        Raises:
            OutsideError: if it cannot be started.
        """
        try:
            return self._spawn(member, record)
        except OSError as error:
            raise OutsideError(f"cannot start {self._spec.entrypoint}: {error}") from error

    def _spawn(self, member: str, record: WorldRecord) -> Worker:
        slot = slot_of(member)
        env = self._environment(member, record)
        destination, paths = self._logs(member, record, env)
        args = macros.substitute(list(self._spec.args), str(slot))
        kwargs: dict[str, Any] = {
            "entrypoint": sys.executable,
            "args": (
                "-I",
                "-S",
                str(_SHIM),
                str(os.getpid()),
                str(int(signal.SIGKILL)),
                self._spec.entrypoint,
                *args,
            ),
            "env": env,
            "stdout": paths["stdout"],
            "stderr": paths["stderr"],
            "local_rank_id": slot,
        }
        if "numa_options" in inspect.signature(SubprocessHandler).parameters:
            kwargs["numa_options"] = self._spec.numa_options
        handler = SubprocessHandler(**kwargs)
        worker = Worker(member, handler, os.pidfd_open(handler.proc.pid), paths["error"])
        # In the table first: if its output cannot be followed it has to be ended.
        self._running[member] = worker
        worker.tails = self._tail(member, record, destination, paths)
        return worker

    def _environment(self, member: str, record: WorldRecord) -> dict[str, str]:
        """torchrun's variables for a member, and ours."""
        spec, slot = self._spec, slot_of(member)
        nodes = list(dict.fromkeys(node_of(m) for m in record.members))
        # A replacement is not in the record yet; it starts under its slot's number and gets its rank when it joins.
        rank = record.members.index(member) if member in record.members else min(slot, record.size - 1)
        host, _, port = record.bootstrap.rpartition(":")
        group = nodes.index(node_of(member)) if node_of(member) in nodes else 0
        inherited = config.process_environment()
        env = {
            "RANK": str(rank),
            "LOCAL_RANK": str(slot),
            "GROUP_RANK": str(group),
            "ROLE_RANK": str(rank),
            "ROLE_NAME": spec.role,
            "WORLD_SIZE": str(record.size),
            "LOCAL_WORLD_SIZE": str(spec.slots),
            "GROUP_WORLD_SIZE": str(len(nodes)),
            "ROLE_WORLD_SIZE": str(record.size),
            "MASTER_ADDR": host,
            "MASTER_PORT": port,
            "TORCHELASTIC_RESTART_COUNT": str(record.restarts),
            "TORCHELASTIC_MAX_RESTARTS": str(spec.max_restarts),
            "TORCHELASTIC_RUN_ID": spec.run_id,
            "TORCHELASTIC_SIGNALS_TO_HANDLE": spec.signals,
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            # torch's warnings about lost connections look up host names, which can hold a recovery up for seconds.
            "TORCH_CPP_LOG_LEVEL": inherited.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": inherited.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
            config.AGENT: self._address,
            config.MEMBER: member,
        }
        if spec.virtual_local_rank:
            devices = inherited.get("CUDA_VISIBLE_DEVICES")
            env["LOCAL_RANK"] = "0"
            env["CUDA_VISIBLE_DEVICES"] = devices.split(",")[slot].strip() if devices else str(slot)
        return env

    def _logs(self, member: str, record: WorldRecord, env: dict[str, str]) -> tuple[Any, dict[str, str]]:
        """torchrun's log destinations; one folder per attempt, and one more per replacement process."""
        slot, attempt = slot_of(member), record.restarts
        if attempt not in self._destinations:
            envs = {index: dict(env) for index in range(self._spec.slots + self._spec.standby)}
            self._destinations = {attempt: self._spec.logs.reify(envs)}
        destination = self._destinations[attempt]
        paths = {
            "stdout": destination.stdouts[slot],
            "stderr": destination.stderrs[slot],
            "tee_stdout": destination.tee_stdouts.get(slot, ""),
            "tee_stderr": destination.tee_stderrs.get(slot, ""),
            "error": destination.error_files[slot],
        }
        extra = incarnation_of(member) - attempt
        if extra > 0:
            paths = {name: _beside(path, extra) for name, path in paths.items()}
        env["TORCHELASTIC_ERROR_FILE"] = "" if paths["error"] == os.devnull else paths["error"]
        return destination, paths

    def _tail(self, member: str, record: WorldRecord, destination: Any, paths: dict[str, str]) -> list[TailLog]:
        slot = slot_of(member)
        prefixes = None
        if self._spec.log_line_prefix is not None:
            rank = record.members.index(member) if member in record.members else slot
            values = {"role_name": self._spec.role, "rank": rank, "local_rank": slot}
            prefixes = {slot: Template(self._spec.log_line_prefix).safe_substitute(values)}
        tails = [
            TailLog(self._spec.role, {slot: paths[name]}, stream, prefixes).start()
            for name, stream in (("tee_stdout", sys.stdout), ("tee_stderr", sys.stderr))
            if paths[name] and paths[name] != os.devnull
        ]
        for filters, name in ((self._spec.stdout_filters, "stdout"), (self._spec.stderr_filters, "stderr")):
            if filters and paths[name]:
                target = open(getattr(destination, f"filtered_{name}"), "a", buffering=1)  # noqa: SIM115
                keep = _contains_any(filters)
                tails.append(
                    TailLog(self._spec.role, {slot: paths[name]}, target, prefixes, log_line_filter=keep).start()
                )
        return tails

    def reap(self, member: str) -> int:
        """Collect the exit code of a process whose pidfd became readable; minus the signal's number if one ended it."""
        worker = self._running.pop(member)
        # What the process itself left behind (its own children, in its session) goes with it.  Before it is reaped,
        # because until then nobody else can have its id.
        _signal_group(worker.pid, signal.SIGKILL)
        code = int(worker.handler.proc.wait())
        os.close(worker.pidfd)
        # A tail reads on until it sees the end of its file, up to a tenth of a second: not on the agent's thread.
        threading.Thread(target=_stop_all, args=(worker.tails,), name="last lines").start()
        if code != 0:
            self._ended[member] = ProcessFailure(
                local_rank=slot_of(member), pid=worker.pid, exitcode=code, error_file=worker.error_file
            )
        return code

    def failure(self, member: str) -> ProcessFailure | None:
        """How a member's process failed, if it did."""
        return self._ended.get(member)

    def signal(self, member: str, number: signal.Signals) -> None:
        """Send a signal to a member's process group, if it still runs."""
        if member in self._running:
            _signal_group(self._running[member].pid, number)

    def running(self) -> Sequence[Worker]:
        """All processes that have not been reaped."""
        return list(self._running.values())


def _stop_all(tails: Sequence[TailLog]) -> None:
    for tail in tails:
        tail.stop()


def _contains_any(filters: Sequence[str]) -> Callable[[str], bool]:
    return lambda line: any(text in line for text in filters)


def _signal_group(pid: int, number: signal.Signals) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        pass


def _beside(path: str, extra: int) -> str:
    """The log file of a slot's later process: ``attempt_0/2/stdout.log`` becomes ``attempt_0/2.1/stdout.log``."""
    if not path or path == os.devnull:
        return path
    folder = Path(path).parent
    folder = folder.with_name(f"{folder.name}.{extra}")
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder / Path(path).name)


class ScratchLogs:
    """A log folder that exists only while the job runs, for jobs whose user asked for none."""

    def __init__(self) -> None:
        self.path = tempfile.mkdtemp(prefix="rtrun_")

    def remove(self) -> None:
        """Delete it."""
        shutil.rmtree(self.path, ignore_errors=True)
