"""What the environment says; the only module that reads ``os.environ``."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from resilient_train.errors import ConfigError

AGENT = "RESILIENT_TRAIN_AGENT"
MEMBER = "RESILIENT_TRAIN_MEMBER"


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """How this process was started."""

    agent: str = ""
    """Address of the agent (`rtrun`) that started this process; empty without one."""
    member: str = ""
    """This process's id in the agreed world; empty without an agent."""
    rank: int = 0
    """Rank, as torchrun or Slurm say it."""
    world_size: int = 1
    """World size, as torchrun or Slurm say it."""
    local_rank: int = 0
    """Rank on this node."""
    local_world_size: int = 1
    """Number of ranks on this node."""
    master_addr: str = ""
    """Where the ranks meet; empty if unknown."""
    meeting_place: str = ""
    """What tells this job's ranks from other jobs': the process that launched them, or where they meet."""
    job: str = ""
    """An id of the job that all of its processes share, if the launcher gave one."""


def environment(variables: Mapping[str, str] | None = None) -> Environment:
    """The settings in ``variables`` (default: this process's environment).

    Raises:
        ConfigError: if a number is none.
    """
    env = os.environ if variables is None else variables

    def number(default: int, *names: str) -> int:
        for name in names:
            if name in env:
                try:
                    return int(env[name])
                except ValueError:
                    raise ConfigError(f"{name} in the environment must be a number, it is {env[name]!r}") from None
        return default

    # Inside of an allocation but outside of srun, Slurm's variables describe the allocation and not this process.
    step = env.get("SLURM_STEP_ID", "")
    slurm = {name: env[name] for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID") if name in env and step}
    tasks = re.match(r"\d+", env.get("SLURM_TASKS_PER_NODE", "")) if slurm else None
    env = {**{k: v for k, v in env.items() if not k.startswith("SLURM_") or k == "SLURM_JOB_ID"}, **slurm}
    if tasks is not None:
        env.setdefault("LOCAL_WORLD_SIZE", tasks[0])
    local_rank = number(0, "LOCAL_RANK", "SLURM_LOCALID")
    return Environment(
        agent=env.get(AGENT, ""),
        member=env.get(MEMBER, ""),
        rank=number(0, "RANK", "SLURM_PROCID"),
        world_size=number(1, "WORLD_SIZE", "SLURM_NTASKS"),
        local_rank=local_rank,
        local_world_size=number(1, "LOCAL_WORLD_SIZE"),
        master_addr=env.get("MASTER_ADDR", ""),
        # torchrun may move the meeting place at every restart; its own process stays.
        meeting_place=_launcher()
        if "TORCHELASTIC_RUN_ID" in env
        else f"{env.get('MASTER_ADDR', '')}:{env.get('MASTER_PORT', '')}",
        job=env.get("TORCHELASTIC_RUN_ID") or (f"{env.get('SLURM_JOB_ID', '')}.{step}" if step else ""),
    )


def _launcher() -> str:
    """The parent process, as exactly as it can be named."""
    parent = os.getppid()
    try:
        started = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        started = ""
    return f"process {parent} of {started}"


def prepare_nccl() -> None:
    """Let NCCL groups be aborted and formed again in this process, before the first of them is made.

    Its watchdog must not end the process when a peer dies, and NVLink SHARP's memory cannot be taken back by an abort.
    """
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    os.environ.setdefault("TORCH_NCCL_RETHROW_CUDA_ERRORS", "0")
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")


def prepare_launcher() -> None:
    """Settings of the launcher's own process, and through it of its workers'.

    Name servers are asked again after one second, and not after five, as often as the resolver's total allows: torch
    asks for the name of every address that its stores connect, on both ends, and a lost answer holds them up.  And
    torch's own reports of lost connections, a page each, give way to one line of ours.
    """
    os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:5")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def process_environment() -> dict[str, str]:
    """A copy of this process's environment, for children."""
    return dict(os.environ)
