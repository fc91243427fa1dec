"""``rtctl``: look at jobs and steer them; look at checkpoints, verify them, export models, import, clean up."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fsspec

from resilient_train.errors import ConfigError, ExitCode, ResilientError, StorageError
from resilient_train.storage.catalogue import sorted_keys, with_begun
from resilient_train.storage.commit import folder_of
from resilient_train.storage.filesystem import open_tier
from resilient_train.storage.tier import Tier
from resilient_train.tools.clean import propose, remove
from resilient_train.tools.export import export
from resilient_train.tools.images import Progress
from resilient_train.tools.inspect import Content, inspect
from resilient_train.tools.location import find, fits, parse
from resilient_train.tools.status import describe, jobs, the_job, wish
from resilient_train.tools.survey import COMMITTED, Checkpoint, survey
from resilient_train.tools.text import count, human, parse_size, table
from resilient_train.tools.verify import Verdict, verify

_EPILOG = """
URL is a path or any fsspec URL, as given to Checkpointer. URL@120 means the checkpoint of step 120, URL@120.g3 the one
that lineage 3 computed; without a step, the newest. The folder of one checkpoint means that one.

exit codes: 0 fine; 1 something is damaged, missing or could not be read or written (ls only lists, and says it); 2 a
wrong command line; 130 interrupted.
"""

_WATCH_EVERY = 1.0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="rtctl",
        description="Look at jobs and steer them; look at checkpoints, verify, export, import and clean them up.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], ExitCode], place: str, text: str) -> Any:
        sub = commands.add_parser(name, help=text, description=text)
        where = "the folder" if place == "DIR" else "where the checkpoints are" + ", and which" * ("@" in place)
        sub.add_argument("place", metavar=place, help=where)
        sub.set_defaults(run=run)
        return sub

    ls = command("ls", _ls, "URL[@STEP]", "list checkpoints, newest last")
    look = command("inspect", _inspect, "URL[@STEP]", "show what a checkpoint holds")
    check = command("verify", _verify, "URL[@STEP]", "read all of a checkpoint and hold it against its checksums")
    check.add_argument("--all", action="store_true", help="every committed checkpoint there")
    for sub in (ls, look, check):
        sub.add_argument("--json", action="store_true", help="print one JSON document")
    out = command("export", _export, "URL[@STEP]", "write a module as whole tensors, for Hugging Face")
    out.add_argument("--to", metavar="DIR", required=True, type=_path, help="the folder to write to")
    out.add_argument("--part", metavar="NAME", help="the module's name in State(NAME=...), if there are several")
    out.add_argument("--max-shard-size", metavar="SIZE", default="5GB", help="bytes in one file (default: 5GB)")
    out.add_argument("--force", action="store_true", help="replace the model in DIR; other files there stay")
    into = command("import", _import, "DIR", "make a checkpoint of one that torch.distributed.checkpoint wrote")
    into.add_argument("--to", metavar="URL", required=True, help="where to")
    into.add_argument("--step", metavar="N", type=int, help="finished steps (default: the number DIR's name ends with)")
    clean = command("clean", _clean, "URL", "remove unfinished leftovers, and old checkpoints with --keep")
    clean.add_argument("--keep", metavar="N", type=int, help="remove all but the newest N good checkpoints")
    clean.add_argument("--yes", action="store_true", help="do not ask")
    for name, run, text in (
        ("status", _status, "show the jobs that have an agent on this machine, as they are now"),
        ("drain", _drain, "have a node leave a job at its next step boundary"),
        ("scale", _scale, "change how many nodes may take part in a job"),
    ):
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--job", metavar="ID", default="", help="the job (rtrun's --rdzv-id), if several run here")
        sub.set_defaults(run=run)
        if name == "status":
            sub.add_argument("--watch", action="store_true", help="go on showing it, until Ctrl-C")
            sub.add_argument("--json", action="store_true", help="print one JSON document")
        elif name == "drain":
            sub.add_argument("node", metavar="NODE", nargs="+", help="its id, as `rtctl status` shows it")
        else:
            sub.add_argument("nodes", metavar="N", type=int, help="the most nodes that may take part")
    return made


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return Path(text)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; ends the process with its exit code."""
    # SIGTERM as Ctrl-C: what was begun is taken back.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = run(argv)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (head, less) has seen enough; nothing may be written at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = ExitCode.USER_ERROR
    except KeyboardInterrupt:
        print("rtctl: interrupted", file=sys.stderr)
        code = ExitCode.INTERRUPTED
    sys.exit(int(code))


def run(argv: Sequence[str] | None = None) -> ExitCode:
    """Run the command line; how the process should end. Errors are said on stderr."""
    args = parser().parse_args(argv)
    try:
        code: ExitCode = args.run(args)
    except ConfigError as error:
        print(f"rtctl: error: {error}", file=sys.stderr)
        code = ExitCode.USAGE
    except ResilientError as error:
        print(f"rtctl: {error}", file=sys.stderr)
        code = ExitCode.USER_ERROR
    return code


def _status(args: argparse.Namespace) -> ExitCode:
    while True:
        found = jobs(args.job)
        if args.job and not found:
            the_job(args.job)
        if args.json:
            _print_json({"jobs": [dataclasses.asdict(one.status) for one in found.values()]})
        else:
            lines = [line for one in found.values() for line in [*describe(one), ""]]
            clear = "\033[H\033[2J" if args.watch and sys.stdout.isatty() else ""
            print(clear + ("\n".join(lines).rstrip() or "no job runs on this machine"), flush=True)
        if not args.watch:
            return ExitCode.SUCCESS
        time.sleep(_WATCH_EVERY)


def _drain(args: argparse.Namespace) -> ExitCode:
    job = the_job(args.job)
    wish(job.address, args.node, 0)
    print(f"{', '.join(args.node)} will leave job {job.status.job} at its next step boundary")
    return ExitCode.SUCCESS


def _scale(args: argparse.Namespace) -> ExitCode:
    if args.nodes < 1:
        raise ConfigError(f"a job has at least one node, not {args.nodes}")
    job = the_job(args.job)
    wish(job.address, [], args.nodes)
    print(f"job {job.status.job} may span {count(args.nodes, 'node')}")
    return ExitCode.SUCCESS


def _ls(args: argparse.Namespace) -> ExitCode:
    location = parse(args.place, os.path.isdir)
    tier = _opened(location.url)
    # To ask a server about every file takes long.
    found = survey(tier, sizes=tier.local, wanted=lambda key: fits(key, location))
    if location.step is not None and not found:
        raise StorageError(f"{location.url}: there is nothing of step {location.step}")
    total = sum(one.nbytes or 0 for one in found)
    if args.json:
        _print_json({"url": location.url, "checkpoints": [one.to_json() for one in found], "total_bytes": total})
        return ExitCode.SUCCESS
    if found:
        head = ("STEP", "LINEAGE", "RANKS", "SIZE", "STATE", "NOTE")
        print("\n".join(table(head, [_row(one) for one in found], "STEP LINEAGE RANKS SIZE")))
    others = len(found) - sum(one.state == COMMITTED for one in found)
    print(
        f"{count(len(found) - others, 'committed checkpoint')}, {others} unfinished or damaged, {human(total)} in all"
    )
    return ExitCode.SUCCESS


def _opened(place: str) -> Tier:
    """Where checkpoints are to be: a folder that is not there is a slip of the pen.

    Raises:
        StorageError: if there is none.
    """
    tier = open_tier(place)
    # fsspec knows how many ways there are to write a path.
    path = fsspec.core.url_to_fs(place)[1] if tier.local else ""
    if path and not os.path.isdir(path):
        raise StorageError(f"{place}: " + ("is no folder" if os.path.exists(path) else "there is no such folder"))
    return tier


def _row(one: Checkpoint) -> tuple[str, ...]:
    ranks = "-" if one.ranks is None else str(one.ranks)
    return str(one.key.step), str(one.key.lineage), ranks, human(one.nbytes), one.state, one.note


def _inspect(args: argparse.Namespace) -> ExitCode:
    location = parse(args.place, os.path.isdir)
    tier = open_tier(location.url)
    content = inspect(tier, find(tier, location))
    if args.json:
        _print_json({"url": location.url, **content.to_json()})
    else:
        print("\n".join(_describe(location.url, content)))
    return ExitCode.SUCCESS


def _describe(url: str, content: Content) -> list[str]:
    manifest = content.manifest
    stored = sum(file.size for file in manifest.files)
    past = ", ".join(str(g) if b is None else f"{g} up to step {b}" for g, b in sorted(manifest.past.items()))
    lines = [
        f"checkpoint  {url.rstrip('/')}/{folder_of(manifest.key)}",
        f"step        {manifest.key.step}",
        f"lineage     {manifest.key.lineage}" + f" (past: {past})" * bool(past),
        f"ranks       {manifest.world}",
        f"images      {len(manifest.files)}, {human(stored)}",
        "memory      {} for the snapshots of each of as many ranks, {} while one is written".format(
            *map(human, content.memory)
        ),
        "",
        *table(("PART", "KIND"), sorted(content.parts.items())),
        "",
    ]
    rows = [
        (one.name, one.dtype, "x".join(map(str, one.shape)) or "scalar", str(one.shards), human(one.nbytes))
        for one in content.tensors
    ]
    lines += table(("TENSOR", "DTYPE", "SHAPE", "SHARDS", "SIZE"), rows, "SHARDS SIZE")
    return [*lines, f"{count(len(rows), 'tensor')}, {human(content.nbytes)}"]


def _verify(args: argparse.Namespace) -> ExitCode:
    location = parse(args.place, os.path.isdir)
    tier = open_tier(location.url)
    if args.all and location.step is not None:
        raise ConfigError("--all means every checkpoint: leave the step out")
    newest = find(tier, location)
    keys, unfinished = sorted_keys(with_begun(tier)) if args.all else ([newest], [])
    verdicts = []
    for key in keys:
        verdict = verify(tier, key, _progress(f"verifying {folder_of(key)}"))
        verdicts.append(verdict)
        if not args.json:
            print(_judge(verdict), flush=True)
    whole = not any(verdict.damage for verdict in verdicts)
    if args.json:
        left = [{"step": key.step, "lineage": key.lineage} for key in unfinished]
        found = {"checkpoints": [one.to_json() for one in verdicts], "unfinished": left}
        _print_json({"url": location.url, "whole": whole, **found})
        return ExitCode.SUCCESS if whole else ExitCode.USER_ERROR
    for key in unfinished:
        print(f"{folder_of(key)}: unfinished, without a manifest to verify it by")
    return ExitCode.SUCCESS if whole else ExitCode.USER_ERROR


def _judge(verdict: Verdict) -> str:
    said = f"{folder_of(verdict.key)}: " + ("DAMAGED" if verdict.damage else "whole")
    if verdict.images:
        said += f" ({count(verdict.images, 'image')}, {human(verdict.nbytes)})"
    return "\n".join([said, *(f"  {one.file}: {one.reason}" for one in verdict.damage)])


def _export(args: argparse.Namespace) -> ExitCode:
    limit = parse_size(args.max_shard_size)
    location = parse(args.place, os.path.isdir)
    tier = open_tier(location.url)
    done = export(
        tier,
        find(tier, location),
        args.to,
        part=args.part,
        limit=limit,
        force=args.force,
        progress=_progress(f"exporting to {args.to}"),
    )
    print(f"{done.part} of {done.key}: {count(done.tensors, 'tensor')}, {human(done.nbytes)} in {args.to}")
    print("\n".join(f"  {name}" for name in done.files))
    for alias, name in sorted(done.aliases.items()):
        print(f"  {alias} is stored as {name}")
    if done.left_out:
        print(f"  left out, because they are no tensors: extra states of {', '.join(done.left_out)}")
    return ExitCode.SUCCESS


def _import(args: argparse.Namespace) -> ExitCode:
    # It needs torch, and the others shall start fast.
    from resilient_train.interop.dcp_import import import_checkpoint, step_of

    step = step_of(args.place) if args.step is None else args.step
    show = _progress(f"importing {args.place}")
    done = import_checkpoint(open_tier(args.place), open_tier(args.to), step, show)
    tensors, images = count(done.tensors, "tensor"), count(done.images, "image")
    print(f"{args.to.rstrip('/')}/{folder_of(done.key)}: {tensors}, {human(done.nbytes)} in {images}")
    print("\n".join(f"  {name}: {kind}" for name, kind in done.parts.items()))
    return ExitCode.SUCCESS


def _clean(args: argparse.Namespace) -> ExitCode:
    if args.keep is not None and args.keep < 1:
        raise ConfigError(f"--keep must be at least 1, it is {args.keep}")
    location = parse(args.place, os.path.isdir)
    if location.step is not None:
        raise ConfigError(f"clean looks at all checkpoints of a place: leave the step out, {location.url}")
    tier = _opened(args.place)
    proposal = propose(tier, args.keep)
    for one in proposal.kept:
        print(f"keep    {folder_of(one.key)}  {human(one.nbytes)}  {one.state}{f': {one.note}' if one.note else ''}")
    for one, reason in proposal.doomed:
        print(f"remove  {folder_of(one.key)}  {human(one.nbytes)}  {reason}")
    if proposal.doomed and proposal.kept:
        print(f"contents were not read: `rtctl verify {args.place}` tells whether what is kept is whole")
    if not proposal.doomed:
        print("nothing to remove")
    elif args.yes or _agreed(f"remove {count(len(proposal.doomed), 'folder')} of {args.place}? [y/N] "):
        gone = remove(tier, proposal, args.keep)
        print(f"removed {count(len(gone), 'folder')}, {human(sum(one.nbytes or 0 for one in gone))}")
    else:
        print("nothing was removed")
    return ExitCode.SUCCESS


def _agreed(question: str) -> bool:
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        print()
        raise ConfigError("nobody is there to ask: --yes removes without asking") from None


def _progress(what: str) -> Progress:
    """Shows how far something is in one line of stderr, where somebody sees it."""
    shown = ""

    def show(done: int, total: int) -> None:
        nonlocal shown
        percent = 100 * done // max(total, 1)
        text = f"{what}: {percent}% of {human(total)}" if done < total else ""
        if text != shown:
            shown = text
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

    return show if sys.stderr.isatty() else _silent


def _silent(done: int, total: int) -> None:
    del done, total


def _print_json(document: Any) -> None:
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
