"""The jobs of this machine as they are now, asked from their agents."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from resilient_train.errors import ConfigError, LinkLost, OutsideError
from resilient_train.ipc.channel import connect
from resilient_train.spec.messages import AskStatus, Message, Status, Wish, Wished
from resilient_train.spec.node import NodeInfo, WorkerInfo
from resilient_train.spec.world import Phase, WorldRecord, node_of
from resilient_train.tools.text import count, table

_TIMEOUT = 5.0


def agents() -> list[str]:
    """Addresses of the agents of this machine."""
    try:
        text = Path("/proc/net/unix").read_text()
    except OSError as error:
        raise OutsideError(f"cannot look for agents: {error}") from error
    return sorted(set(re.findall(r"@resilient_train/(job-[0-9a-f]+)$", text, re.MULTILINE)))


@dataclass(frozen=True, slots=True)
class Job:
    """A job with agents on this machine."""

    address: str
    """That of one of them."""
    status: Status
    """What it says."""
    here: frozenset[str]
    """The nodes that they are."""


def jobs(job: str = "") -> dict[str, Job]:
    """By their ids the jobs with an agent here, or just ``job``.

    Raises:
        OutsideError: if there are agents, and none of them answers.
    """
    found: dict[str, Job] = {}
    silent = 0
    for address in agents():
        try:
            status = _ask(address, AskStatus())
        except LinkLost:
            # Another user's, or one that ended just now.
            continue
        except OutsideError:
            silent += 1
            continue
        if isinstance(status, Status) and job in ("", status.job):
            first = found.get(status.job, Job(address, status, frozenset()))
            found[status.job] = replace(first, here=first.here | {status.node})
    if silent and not found:
        raise OutsideError(f"{count(silent, 'agent')} of this machine did not answer within {_TIMEOUT:g} s")
    return found


def the_job(job: str = "") -> Job:
    """The one job of this machine, or the one that is named.

    Raises:
        ConfigError: if there is none, or several.
    """
    found = jobs(job)
    if not found:
        raise ConfigError(f"no agent of a job {job!r} runs on this machine" if job else "no job runs on this machine")
    if len(found) > 1:
        raise ConfigError(f"several jobs run on this machine: say which, with --job {' or '.join(sorted(found))}")
    return next(iter(found.values()))


def wish(address: str, leave: list[str], room: int) -> None:
    """Have nodes leave a job, or the number of nodes that take part changed.

    Raises:
        ConfigError: if the job cannot do so.
        OutsideError: if its agent does not answer.
    """
    answer = _ask(address, Wish(leave=leave, room=room))
    if isinstance(answer, Wished) and answer.error:
        raise ConfigError(answer.error)


def _ask(address: str, question: Message) -> Message | None:
    channel = connect(address, 0.0)
    try:
        channel.send(question)
        received = channel.receive(_TIMEOUT)
    finally:
        channel.close()
    if received is None:
        raise OutsideError(f"the agent did not answer within {_TIMEOUT:g} s")
    return received[0]


def describe(job: Job) -> list[str]:
    """A job's status, for people."""
    status = job.status
    nodes = sorted((NodeInfo.from_json(node) for node in status.nodes), key=lambda node: node.order)
    if status.record is None:
        return [f"job {status.job}: waiting for its first world; {count(len(nodes), 'node')} so far"]
    record = WorldRecord.from_json(status.record)
    state = "parked" if record.phase is Phase.RUNNING and not record.members else str(record.phase)
    spanned = len({node_of(member) for member in record.members})
    lines = [
        f"job {status.job}: {state}, generation {record.generation}, {count(record.size, 'rank')} on"
        f" {count(spanned, 'node')}, step {status.step}"
    ]
    if record.planned is not None:
        lines.append(f"planned at the boundary of step {record.planned.boundary}: {record.planned.reason}")
    if status.store:
        lines.append(f"the control store does not answer: {status.store}")
    head = ("NODE", "ADDRESS", "RANKS", "WORKERS", "STATE")
    lines += ["", *table(head, [_row(node, record, job.here) for node in nodes])]
    if status.incidents:
        lines.append("")
        lines += [f"{_ago(float(seconds)):>9} ago  {text}" for seconds, text in status.incidents]
    return lines


def _row(node: NodeInfo, record: WorldRecord, here: Collection[str]) -> tuple[str, ...]:
    ranks = [rank for rank, member in enumerate(record.members) if node_of(member) == node.node]
    idle = sum(worker.idle for worker in node.workers)
    starting = sum(not worker.elastic for worker in node.workers)
    notes = [f"leaving: {node.leaving}"] if node.leaving else []
    notes += [f"cannot reach {', '.join(node.suspects)}"] if node.suspects else []
    notes += [f"{idle} {'standing by' if record.members else 'waiting for nodes'}"] if idle else []
    notes += [f"{starting} starting"] if starting else []
    name = f"{node.node} (here)" if node.node in here else node.node
    return name, node.link or "-", _ranges(ranks), str(len(node.workers)), "; ".join(notes) or _usual(node.workers)


def _usual(workers: tuple[WorkerInfo, ...]) -> str:
    return "training" if workers else "no workers"


def _ranges(numbers: list[int]) -> str:
    """``0-3, 7``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][-1:] = [number] if len(parts[-1]) > 1 else [parts[-1][0], number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts) or "-"


def _ago(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.1f} s"
