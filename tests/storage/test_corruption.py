"""Damage of every kind, to every file of a checkpoint: an error that names it, or nothing has changed.

A small job of three ranks on two nodes (one parameter sharded, the rest replicated) saves two checkpoints through the
real code; each case damages the newer one and restores it into fresh objects.  *Accidents* are what disks do: flipped
bits, lost and exchanged files.  *Forgeries* are what an attacker does who repairs every checksum afterwards, so that
what refuses them is the structure.  Checksums are no signatures: whoever forges a complete, consistent checkpoint of
another state is believed.  What may never happen is that bytes end up in another place than they were saved from.

Run all of it with ``make soak``, and one case again with ``python tests/storage/test_corruption.py 1 SEED INDEX``.
"""

from __future__ import annotations

import collections
import contextlib
import json
import random
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from corruptions import Case, corrupt, dump, layout_of, repair, with_document
from saved_training import FOLDER, NEW, OLD, WORLD, Contents, Files, Saved, Training, contents, save_all

from resilient_train.errors import CheckpointDamaged, FormatError, StateMismatch, StorageError, UnsupportedState
from resilient_train.spec.world import Key
from resilient_train.storage.commit import folder_of, image_name
from resilient_train.storage.filesystem import FilesystemTier
from resilient_train.worker.fill import fill
from resilient_train.worker.sources import Candidate, TierSource

ROOM = 256 << 20
"""Address space that a restore may take on top of what the process has: far more than the checkpoint needs."""


def restore(folder: Path, key: Key, rank: int, world: int) -> Training:
    fresh = Training(99)
    source = TierSource(FilesystemTier(str(folder)))
    source.candidates({})
    with source.open(Candidate(key=key)) as images:
        fill(fresh.state, images, rank, world)
    return fresh


def judge(restored: Contents, expected: Contents, *, generators: bool, forged: bool) -> str:
    """What a restore without an error came to.

    Raises:
        AssertionError: if it is wrong.
    """
    (tensors, document), (right, original) = restored, expected
    if not generators or (forged and document["rng"] != original["rng"]):
        # Another library's checkpoint has no generators; whoever forges one like that leaves them as they are.
        tensors, right = ({k: v for k, v in t.items() if not k.startswith("rng/")} for t in (tensors, right))
        document, original = ({k: v for k, v in d.items() if k != "rng"} for d in (document, original))
    if tensors == right and document == original:
        return "nothing has changed"
    differ = sorted(k for k in tensors.keys() | right.keys() if tensors.get(k) != right.get(k))
    assert forged, f"wrong after a restore without an error: {differ or 'the document'}"
    # Another dtype of an optimizer's tensor, another learning rate: all of it believable, none of it misplaced.
    moved = [k for k in differ if k in tensors and k in right and tensors[k][2] != right[k][2]]
    foreign = [k for k in differ if k.startswith("model/") or k not in tensors or k not in right]
    assert not moved + foreign, f"bytes in the wrong place: {moved + foreign}"
    return "another state, consistently described"


@contextlib.contextmanager
def on_disk(saved: Saved, files: Files) -> Iterator[list[str]]:
    """The checkpoints as they are in ``files``; which of them differ."""
    changed = [path for path in saved.files if files.get(path) != saved.files[path]]
    for path in changed:
        if path in files:
            (saved.folder / path).write_bytes(files[path])
        else:
            (saved.folder / path).unlink()
    try:
        yield changed
    finally:
        for path in changed:
            (saved.folder / path).write_bytes(saved.files[path])


def attempt(saved: Saved, case: Case, changed: list[str], rank: int, world: int) -> str:
    """Restore the damaged checkpoint; what came of it."""
    try:
        restored = contents(restore(saved.folder, NEW, rank, world), rank)
    except (StorageError, FormatError, StateMismatch, UnsupportedState) as error:
        said, mismatch = str(error), not isinstance(error, (StorageError, FormatError))
    else:
        return judge(restored, saved.expected[NEW][rank], generators=world == WORLD, forged=case.forged)
    if mismatch:
        assert case.forged, f"damage was taken for another model: {said}"
        return "refused as another model's"
    if any(path in said for path in changed):
        return "refused, naming the file"
    assert FOLDER in said, f"the error names no file: {said}"
    return "refused, naming another file of the checkpoint"


def outcome(saved: Saved, seed: int, index: int) -> tuple[str, str]:
    """(kind, outcome) of one case.

    Raises:
        AssertionError: if it is none that is allowed; the case's seed and index are in the message.
    """
    chance = random.Random(f"{seed} {index}")
    case = corrupt(saved.files, chance)
    with on_disk(saved, case.files) as changed:
        try:
            verdict = attempt(saved, case, changed, *chance.choice([(0, WORLD), (1, WORLD), (2, WORLD), (0, 1)]))
            if chance.random() < 0.1 and not any(path.startswith(folder_of(OLD)) for path in changed):
                older = contents(restore(saved.folder, OLD, 0, WORLD), 0)
                judge(older, saved.expected[OLD][0], generators=True, forged=False)
        except Exception as error:
            raise AssertionError(f"seed {seed} index {index}: {case.kind} of {changed}: {error!r:.2000}") from error
    return case.kind, verdict


@contextlib.contextmanager
def bounded(room: int) -> Iterator[None]:
    """This process cannot take more than ``room`` further bytes of address space."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save_all(tmp_path_factory.mktemp("corruption") / "run")


@pytest.mark.parametrize(("rank", "world"), [(0, WORLD), (1, WORLD), (2, WORLD), (0, 1)])
def test_what_is_not_damaged_is_restored(saved: Saved, rank: int, world: int) -> None:
    """Every tensor, every option and the generators, bit for bit, on any rank and on another number of ranks."""
    for key in (OLD, NEW):
        restored = contents(restore(saved.folder, key, rank, world), rank)
        verdict = judge(restored, saved.expected[key][rank], generators=world == WORLD, forged=False)
        assert verdict == "nothing has changed"


def test_damage_is_an_error_that_names_it_or_harmless(saved: Saved) -> None:
    """A random sample, within bounded memory; `make soak` runs 10,000."""
    seed = random.randrange(1 << 30)
    print("seed", seed)
    with bounded(ROOM):
        for index in range(400):
            outcome(saved, seed, index)


STATE = ("optim", "state", "model.wide.bias")
FORGED: list[tuple[tuple[Any, ...], Any]] = [
    ((*STATE, "step", "packed"), -1),
    ((*STATE, "step", "packed"), 10**6),
    ((*STATE, "step", "dtype"), "save"),
    ((*STATE, "exp_avg", "tensor"), "optim/model.wide.bias/exp_avg_sq"),
    ((*STATE, "exp_avg", "tensor"), "model/wide.bias"),
    (("optim", "groups", 0), {"params": []}),
    (("optim", "groups", 0), "lr"),
    (("counter", "value", "$dict", 0, 1), {"$tensor": "model/wide.weight", "device": "cpu"}),
    (("counter", "value", "$dict", 0, 1, "device"), "meta"),
    (("counter", "value", "$dict", 0, 1, "device"), "nonsense"),
    (("rng", "numpy", 1), 10**6),
    (("rng", "python", 0), 2),
    (("rng",), {}),
]


@pytest.mark.parametrize(("place", "value"), FORGED, ids=lambda item: str(item)[-60:])
def test_documents_say_nothing_that_is_not_checked(saved: Saved, place: tuple[Any, ...], value: Any) -> None:
    """What would misplace bytes, leave a tensor as it is or reach outside of memory is refused by the image's name."""
    path = f"{FOLDER}/{image_name(1, WORLD)}"
    files = dict(saved.files)
    layout, stamp = layout_of(files[path])
    document = json.loads(files[path][layout.json_start : layout.json_start + stamp.json_length])
    inside = document
    for key in place[:-1]:
        inside = inside[key]
    assert place[-1] in inside or isinstance(inside, list)
    inside[place[-1]] = value
    files[path] = with_document(files[path], dump(document))
    repair(files)
    with on_disk(saved, files), pytest.raises(CheckpointDamaged, match=path):
        restore(saved.folder, NEW, 1, WORLD)


def main(count: int, seed: int, first: int) -> int:
    """Run ``count`` cases and print a table; the number of those that failed."""
    table: collections.Counter[tuple[str, str]] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        saved = save_all(Path(folder) / "run")
        restore(saved.folder, NEW, 0, WORLD)
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        with bounded(ROOM):
            for index in range(first, first + count):
                try:
                    table[outcome(saved, seed, index)] += 1
                except AssertionError as error:
                    table["failed", "FAILED"] += 1
                    print(error, flush=True)
                    if count == 1:
                        traceback.print_exc()
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        seconds = time.monotonic() - began
    for (kind, verdict), number in sorted(table.items()):
        print(f"{number:6}  {kind:16} {verdict}")
    print()
    totals: collections.Counter[str] = collections.Counter()
    for (_, verdict), number in table.items():
        totals[verdict] += number
    for verdict, number in totals.most_common():
        print(f"{number:6}  {verdict}")
    print(f"{count} cases, seed {seed}, {seconds:.0f} s; resident memory grew by at most {grown / 1024:.0f} MiB")
    return totals["FAILED"]


if __name__ == "__main__":
    numbers = [int(text) for text in sys.argv[1:]]
    how_many, chosen, start = [*numbers, *[10_000, random.randrange(1 << 30), 0][len(numbers) :]]
    sys.exit(min(1, main(how_many, chosen, start)))
