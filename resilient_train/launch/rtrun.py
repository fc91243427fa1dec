"""``rtrun``: torchrun's command line, with an agent that keeps a job alive."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from resilient_train import config
from resilient_train.agent.agent import Agent, AgentConfig, Outcome, print_line
from resilient_train.agent.keeper_process import KeeperProcess
from resilient_train.agent.workers import ScratchLogs, Workers, WorkerSpec
from resilient_train.clock import MonotonicClock
from resilient_train.control.tcp import TcpControlStore, serve
from resilient_train.errors import ConfigError, ExitCode, ResilientError, StoreLost
from resilient_train.events import JsonLinesSink, ListSink, Sink
from resilient_train.plan.proposal import Limits

_EPILOG = """
rtrun takes every flag of the installed torchrun, with the same meaning. Scripts that use @resilient_train.elastic are
not restarted when a worker dies: the others go on in their processes, and a replacement joins at a step boundary.
--max-restarts counts restarts of the whole group and concerns other scripts. With --log-dir DIR, everything that
happened to the job is written to DIR/events.jsonl. This version runs one node (--nnodes=1).

exit codes: 0 success; 1 an error of the script; 2 a wrong command line; 66 losses set the job back to the same step
again and again; 67 the control store was lost; 74 the training finished, but its last state could not be made durable;
130 ended by a signal.
"""


def parser() -> argparse.ArgumentParser:
    """torchrun's parser under our name."""
    made: argparse.ArgumentParser = torchrun.get_args_parser()
    made.prog = "rtrun"
    made.description = "Run a PyTorch training so that it survives the loss of its processes."
    made.epilog = _EPILOG
    made.formatter_class = _Formatter
    made.add_argument(
        "--detect-within",
        "--detect_within",
        type=float,
        default=5.0,
        metavar="SECONDS",
        help="seconds within which a loss must be noticed; all time-outs derive from it. A job whose ranks pass no step"
        " boundary for this long, or for twice the longest recent step if that is more, hangs: the rank that the others"
        " wait for is ended, its stacks in the log (asked at 60%% and 85%% of that time; stopped processes after"
        " SECONDS)",
    )
    return made


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the epilog's lines, and shows torchrun's own help texts as they are."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; ends the process with the job's exit code."""
    args = parser().parse_args(argv)
    try:
        code = run(args)
    except ConfigError as error:
        print(f"rtrun: error: {error}", file=sys.stderr)
        code = ExitCode.USAGE
    except ResilientError as error:
        print(f"rtrun: {error}", file=sys.stderr)
        code = ExitCode.STORE_LOST if isinstance(error, StoreLost) else ExitCode.USER_ERROR
    sys.exit(int(code))


def run(args: argparse.Namespace) -> ExitCode:
    """Run a job from parsed arguments.

    Raises:
        ConfigError: for arguments that contradict each other or name nothing.
    """
    _check_script(args)
    config.prepare_name_lookups()
    args.rdzv_id = args.rdzv_id if args.rdzv_id not in (None, "", "none") else uuid.uuid4().hex
    scratch = None if args.log_dir else ScratchLogs()
    if scratch is not None:
        args.log_dir = scratch.path
    try:
        return _run(args, write_events=scratch is None)
    finally:
        if scratch is not None:
            scratch.remove()


def _run(args: argparse.Namespace, write_events: bool) -> ExitCode:
    asked = _asked_endpoint(args)
    launch, entrypoint, worker_args = _launch_config(args)
    host = launch.local_addr or asked[0]
    address = f"job-{uuid.uuid4().hex}"
    control = serve("127.0.0.1", 0)
    bootstraps: list[Any] = []

    def new_bootstrap() -> str:
        # The first is where the user wants the ranks to meet; later generations need stores that are new.
        bootstraps.append(serve(host, 0 if bootstraps else asked[1]))
        # Members of the generation before may still be connected; nobody needs those before it.
        del bootstraps[:-3]
        return f"{host}:{bootstraps[-1].port}"

    spec = WorkerSpec(
        entrypoint=entrypoint,
        args=tuple(map(str, worker_args)),
        slots=launch.nproc_per_node,
        run_id=launch.run_id,
        role=launch.role,
        max_restarts=launch.max_restarts,
        logs=launch.logs_specs,
        signals=getattr(launch, "signals_to_handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT"),
        log_line_prefix=launch.log_line_prefix_template,
        virtual_local_rank=getattr(launch, "virtual_local_rank", False),
        numa_options=getattr(launch, "numa_options", None),
        stdout_filters=tuple(getattr(launch, "duplicate_stdout_filters", None) or ()),
        stderr_filters=tuple(getattr(launch, "duplicate_stderr_filters", None) or ()),
    )
    settings = AgentConfig(
        node="n0",
        order=0,
        slots=launch.nproc_per_node,
        limits=Limits(max_restarts=launch.max_restarts),
        address=address,
        detect_within=args.detect_within,
        stop_timeout=float(getattr(launch, "shutdown_timeout", 30)),
        signals=_signals(getattr(launch, "signals_to_handle", "SIGTERM,SIGINT,SIGHUP")),
    )
    workers = Workers(spec, address)
    sink: Sink = JsonLinesSink(Path(args.log_dir) / "events.jsonl") if write_events else ListSink()
    agent = Agent(
        settings,
        workers,
        KeeperProcess(f"{address}/keeper", launch.nproc_per_node, "" if write_events else args.log_dir),
        TcpControlStore("127.0.0.1", control.port, launch.run_id),
        new_bootstrap,
        sink,
        print_line,
        MonotonicClock(),
    )
    outcome = agent.run()
    _report(outcome, workers, args.training_script, keeps_logs=write_events)
    if outcome.unsaved and outcome.code is ExitCode.SUCCESS:
        # The training succeeded and its result is lost: nobody may take that for a success.
        return ExitCode.NOT_DURABLE
    return outcome.code


def _check_script(args: argparse.Namespace) -> None:
    if not 0.5 <= args.detect_within < float("inf"):
        raise ConfigError(f"--detect-within must be at least 0.5 seconds, it is {args.detect_within:g}")
    script = args.training_script
    if not args.module and not args.no_python and not os.path.isfile(script):
        raise ConfigError(f"there is no training script {script!r} (in {os.getcwd()})")


def _asked_endpoint(args: argparse.Namespace) -> tuple[str, int]:
    """(host, port) where the user wants the ranks to meet; port 0 for any."""
    endpoint = args.rdzv_endpoint if not args.standalone else ""
    port = args.master_port
    if not endpoint and (port is None or port == parser().get_default("master_port")):
        return args.master_addr, 0
    host, _, text = endpoint.rpartition(":") if ":" in endpoint else (endpoint, "", "0")
    host, text = (host, text) if endpoint else (args.master_addr, str(port))
    if not text.isdigit() or int(text) > 65535:
        raise ConfigError(f"the endpoint must be HOST:PORT, it is {endpoint or text!r}")
    host = host or "127.0.0.1"
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise ConfigError(f"the endpoint's host {host!r} is not known: {error}") from error
    return host, int(text)


def _signals(names: str) -> tuple[signal.Signals, ...]:
    try:
        return tuple(signal.Signals[name.strip()] for name in names.split(",") if name.strip())
    except KeyError as error:
        raise ConfigError(f"--signals-to-handle={names}: there is no signal {error.args[0]}") from None


def _launch_config(args: argparse.Namespace) -> tuple[Any, str, list[str]]:
    """torchrun's own reading of its flags."""
    try:
        min_nodes, max_nodes = torchrun.parse_min_max_nnodes(args.nnodes)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"--nnodes must be a number or MIN:MAX, it is {args.nnodes!r}") from error
    if not 0 < min_nodes <= max_nodes:
        raise ConfigError(f"--nnodes must be at least 1 and MIN at most MAX, it is {args.nnodes!r}")
    if min_nodes > 1:
        raise ConfigError(f"this version of rtrun runs one node; --nnodes={args.nnodes} needs at least {min_nodes}")
    if not 0 <= args.node_rank < max_nodes:
        raise ConfigError(f"--node-rank={args.node_rank} is not one of {max_nodes} nodes")
    if args.master_port is None:
        args.master_port = 29500
    try:
        launch, entrypoint, worker_args = torchrun.config_from_args(args)
    except (ValueError, AssertionError, RuntimeError, OSError) as error:
        raise ConfigError(str(error)) from error
    if launch.nproc_per_node < 1:
        raise ConfigError(f"--nproc-per-node must be at least 1, it is {args.nproc_per_node!r}")
    if callable(entrypoint):
        # --run-path runs the script inside of a process that has torch imported already.
        code = "import sys; from torch.distributed.run import run_script_path as run; run(*sys.argv[1:])"
        return launch, sys.executable, ["-u", "-c", code, *worker_args]
    return launch, str(entrypoint), list(worker_args)


def _report(outcome: Outcome, workers: Workers, script: str, keeps_logs: bool) -> None:
    """What the user has to know about the end."""
    failure = workers.failure(outcome.culprit) if outcome.culprit else None
    if failure is not None:
        if not keeps_logs:
            failure.error_file = "<N/A>"
        print(ChildFailedError(script, {failure.local_rank: failure}).format_msg(), file=sys.stderr)
    if outcome.text:
        print_line(f"the job {'ended' if outcome.code is ExitCode.INTERRUPTED else 'failed'}: {outcome.text}")
    if outcome.unsaved:
        print_line(outcome.unsaved)
    if outcome.code.requeue and outcome.saved:
        print_line(f"exit code {int(outcome.code)}: starting the same command again resumes the job")


if __name__ == "__main__":
    main()
