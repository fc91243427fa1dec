"""``rtrun``: torchrun's command line, with an agent that keeps a job alive."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from resilient_train.agent.addresses import own_addresses
from resilient_train.agent.agent import Agent, AgentConfig, Outcome, print_line
from resilient_train.agent.keeper_process import KeeperProcess
from resilient_train.agent.workers import ScratchLogs, Workers, WorkerSpec
from resilient_train.clock import MonotonicClock
from resilient_train.control.rdzv_conf import read_conf, seconds
from resilient_train.control.tcp import serve
from resilient_train.errors import ConfigError, ExitCode, FormatError, ResilientError, StoreLost
from resilient_train.events import JsonLinesSink, NoSink, Sink
from resilient_train.launch.meeting import MASTER_PORT, Place, joined
from resilient_train.launch.waiting import Interrupted, interruptible, said
from resilient_train.plan.view import Limits
from resilient_train.spec.topology import parse_labels

_EPILOG = """
rtrun takes every flag of the installed torchrun, with the same meaning. Scripts that use @resilient_train.elastic are
not restarted when a worker dies: the others go on in their processes, and a replacement joins at a step boundary.
--max-restarts counts restarts of the whole group and concerns other scripts. With --log-dir DIR, everything that
happened to the job is written to DIR/events.jsonl, or DIR/events-NODE.jsonl by each of several nodes.

With several nodes, start the same command on each. --rdzv-endpoint=HOST:PORT names the node that keeps the job's
record; without that node the job cannot change any more. --rdzv-backend=etcd lets the job outlive every node.

exit codes: 0 success; 1 an error of the script; 2 a wrong command line; 66 losses set the job back to the same step
again and again; 67 the control store was lost; 68 too few nodes for too long; 74 the training finished, but its last
state could not be made durable; 130 ended by a signal.
"""


def parser() -> argparse.ArgumentParser:
    """torchrun's parser under our name."""
    made: argparse.ArgumentParser = torchrun.get_args_parser()
    made.prog = "rtrun"
    made.description = "Run a PyTorch training so that it survives the loss of its processes."
    made.epilog = _EPILOG
    made.formatter_class = _Formatter
    ours = made.add_argument_group("staying alive")
    ours.add_argument(
        "--detect-within",
        type=_seconds,
        default=5.0,
        metavar="SECONDS",
        help="how soon a loss must be noticed; all other times follow: nodes say that they live 5 times within it,"
        " announcements expire after it, a rank may take twice as long to come free for a new world. A job whose ranks"
        " pass no step boundary for this long, or for twice the longest recent step if that is more, hangs: the rank"
        " that the others wait for is ended, its stacks in the log (default 5)",
    )
    ours.add_argument(
        "--standby",
        type=_count,
        default=0,
        metavar="N",
        help="workers on this node that wait, warm, to take a lost one's place (default 0)",
    )
    ours.add_argument(
        "--label",
        action="append",
        default=[],
        metavar="LEVEL=NAME",
        help="where this node stands, as zone=NAME, rack=NAME or switch=NAME; once for each. Copies of a node's state"
        " go to another zone, else another rack, else another switch, as long as there is one",
    )
    ours.add_argument(
        "--patience",
        type=_seconds,
        default=600.0,
        metavar="SECONDS",
        help="how long to wait for MIN nodes, or for a control store that does not answer (default 600)",
    )
    return made


def _seconds(text: str) -> float:
    with suppress(ValueError):
        if 0 < (value := float(text)) < float("inf"):
            return value
    raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, it is {text!r}")


def _count(text: str) -> int:
    with suppress(ValueError):
        if (value := int(text)) >= 0:
            return value
    raise argparse.ArgumentTypeError(f"must be a whole number, 0 or more, it is {text!r}")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the epilog's lines, and shows torchrun's own help texts as they are."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; ends the process with the job's exit code."""
    args = parser().parse_args(argv)
    try:
        with interruptible():
            code = run(args)
    except Interrupted as signal_:
        print_line(f"ended by {signal_} while no job was running on this node")
        code = ExitCode.INTERRUPTED
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
    if "/" in str(args.rdzv_id) or "\0" in str(args.rdzv_id):
        raise ConfigError(f"--rdzv-id names folders and must not contain '/', it is {args.rdzv_id!r}")
    args.label = _labels(args)
    if args.rdzv_id in (None, "", "none") and str(args.nnodes) in ("1", "1:1"):
        args.rdzv_id = uuid.uuid4().hex
    scratch = None if args.log_dir else ScratchLogs()
    if scratch is not None:
        args.log_dir = scratch.path
    try:
        return _run(args, write_events=scratch is None)
    finally:
        if scratch is not None:
            scratch.remove()


def _run(args: argparse.Namespace, write_events: bool) -> ExitCode:
    launch, entrypoint, worker_args = _launch_config(args)
    code: ExitCode | None = None
    try:
        with ExitStack() as stack:
            where = args.rdzv_endpoint or f"{args.master_addr}:{args.master_port or MASTER_PORT}"
            with said(f"the control store at {where}", print_line) as because:
                place = stack.enter_context(joined(args, launch, because))
            code = _take_part(args, launch, entrypoint, worker_args, place, write_events)
    except Interrupted:
        # Of a job that has ended, all that is left to wait for is that the others have heard of it.
        if code is None:
            raise
    assert code is not None
    return code


def _take_part(
    args: argparse.Namespace, launch: Any, entrypoint: str, worker_args: list[str], place: Place, write_events: bool
) -> ExitCode:
    address = f"job-{uuid.uuid4().hex}"
    bootstraps: list[Any] = []

    def new_bootstrap() -> str:
        # The first is where the user wants the ranks to meet; later generations need stores that are new.
        bootstraps.append(serve(place.host, 0 if bootstraps else place.port))
        # Members of the generation before may still be connected; nobody needs those before it.
        del bootstraps[:-3]
        return f"{place.host}:{bootstraps[-1].port}"

    spec = WorkerSpec(
        entrypoint=entrypoint,
        args=tuple(map(str, worker_args)),
        slots=launch.nproc_per_node,
        standby=args.standby,
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
        node=f"n{place.order}",
        order=place.order,
        slots=launch.nproc_per_node,
        limits=_limits(args, launch),
        address=address,
        job=launch.run_id,
        within=args.detect_within,
        host=place.host,
        addresses=own_addresses() if place.secret else (),
        labels=args.label,
        secret=place.secret,
        standby=args.standby,
        stop_timeout=float(getattr(launch, "shutdown_timeout", 30)),
        signals=_signals(getattr(launch, "signals_to_handle", "SIGTERM,SIGINT,SIGHUP")),
    )
    workers = Workers(spec, address)
    # Nodes may share the folder, and none knows what time it is on another's clock.
    name = f"events-{settings.node}.jsonl" if place.secret else "events.jsonl"
    diary = JsonLinesSink(Path(args.log_dir) / name) if write_events else None
    sink: Sink = diary or NoSink()
    agent = Agent(
        settings,
        workers,
        KeeperProcess(
            f"{address}/keeper",
            launch.nproc_per_node + args.standby,
            "" if write_events else args.log_dir,
            place.leaves,
        ),
        place.store,
        new_bootstrap,
        sink,
        print_line,
        MonotonicClock(),
    )
    try:
        outcome = agent.run()
    finally:
        if diary is not None:
            diary.close()
    _report(outcome, workers, args.training_script, keeps_logs=write_events)
    if outcome.unsaved and outcome.code is ExitCode.SUCCESS:
        # The training succeeded and its result is lost: nobody may take that for a success.
        return ExitCode.NOT_DURABLE
    return outcome.code


def _labels(args: argparse.Namespace) -> tuple[str, ...]:
    try:
        return parse_labels(args.label)
    except FormatError as error:
        raise ConfigError(f"--label: {error}") from error


def _check_script(args: argparse.Namespace) -> None:
    if not 0.5 <= args.detect_within < float("inf"):
        raise ConfigError(f"--detect-within must be at least 0.5 seconds, it is {args.detect_within:g}")
    script = args.training_script
    if not args.module and not args.no_python and not os.path.isfile(script):
        raise ConfigError(f"there is no training script {script!r} (in {os.getcwd()})")


def _limits(args: argparse.Namespace, launch: Any) -> Limits:
    return Limits(
        min_nodes=launch.min_nodes,
        max_nodes=launch.max_nodes,
        max_restarts=launch.max_restarts,
        last_call=seconds(read_conf(args.rdzv_conf), "last_call_timeout", Limits().last_call),
        patience=args.patience,
    )


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
    if not 0 <= args.node_rank < max_nodes:
        raise ConfigError(f"--node-rank={args.node_rank} is not one of {max_nodes} nodes")
    # What the user did not say is to be told from torch's default later.
    args = argparse.Namespace(**vars(args))
    args.master_port = args.master_port or MASTER_PORT
    try:
        launch, entrypoint, worker_args = torchrun.config_from_args(args)
    except (ValueError, AssertionError, RuntimeError, OSError) as error:
        raise ConfigError(str(error)) from error
    if args.standby and getattr(launch, "virtual_local_rank", False):
        raise ConfigError("--standby needs workers that see every device: it does not go with --virtual-local-rank")
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
    if outcome.code is ExitCode.USAGE:
        print_line(f"error: {outcome.text}")
    elif outcome.text:
        print_line(f"the job {'ended' if outcome.code is ExitCode.INTERRUPTED else 'failed'}: {outcome.text}")
    if outcome.unsaved:
        print_line(outcome.unsaved)
    if outcome.code.requeue and outcome.saved:
        print_line(f"exit code {int(outcome.code)}: starting the same command again resumes the job")


if __name__ == "__main__":
    main()
