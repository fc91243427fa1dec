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
import copy
import json
import os
import random
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from resilient_train.errors import CheckpointDamaged, FormatError, StateMismatch, StorageError, UnsupportedState
from resilient_train.image.arena import Slot, create_memory
from resilient_train.image.native import checksum
from resilient_train.image.snapshot import ImageWriter
from resilient_train.keeper.persist import Job, persist
from resilient_train.keeper.progress import Progress
from resilient_train.spec.shard import (
    BLOCK,
    FIELD_AT,
    MAX_HEADER,
    PAGE,
    ImageLayout,
    Stamp,
    parse_header,
    plan_image,
)
from resilient_train.spec.world import Key
from resilient_train.storage.commit import MANIFEST, folder_of, image_name
from resilient_train.storage.filesystem import FilesystemTier
from resilient_train.worker.fill import fill
from resilient_train.worker.process_group import clear_dtensor_caches
from resilient_train.worker.sources import Candidate, TierSource
from resilient_train.worker.state import State

OLD, NEW = Key(1, 17), Key(2, 41)
FOLDER = folder_of(NEW)
WORLD = 3
ROOM = 256 << 20
"""Address space that a restore may take on top of what the process has: far more than the checkpoint needs."""

Files = dict[str, bytes]
Contents = tuple[dict[str, tuple[str, tuple[int, ...], bytes]], dict[str, Any]]


# ---- the checkpoint -------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.short = nn.Parameter(torch.randn(5, 3).bfloat16())
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.none = nn.Parameter(torch.empty(0, 4))
        # More than one block of checksums.
        self.register_buffer("table", torch.randn(270, 1000))
        self.register_buffer("flags", torch.rand(7) < 0.5)
        self.register_buffer("phase", torch.randn(3, dtype=torch.complex64))
        self.register_buffer("tiny", torch.randn(5).to(torch.float8_e4m3fn))
        self.register_buffer("exact", torch.randn(2, 2, dtype=torch.float64))
        self.note: Any = {"seen": 0}

    def get_extra_state(self) -> Any:
        return self.note

    def set_extra_state(self, state: Any) -> None:
        self.note = state


class Counter:
    """State of one's own, with everything that the document can hold."""

    def __init__(self) -> None:
        self.state: dict[Any, Any] = {"ema": torch.randn(4), "more": [torch.randn(2, dtype=torch.complex128)]}
        self.state |= {"pair": (1, 2.5), 5: [None, "x"], "best": float("inf"), "raw": b"\x00\xff"}

    def state_dict(self) -> dict[Any, Any]:
        return self.state

    def load_state_dict(self, state: dict[Any, Any]) -> None:
        self.state = {key: state[key] for key in state}


class Training:
    """A model with all that belongs to it; ``mesh``: with its widest parameter sharded."""

    def __init__(self, seed: int, mesh: DeviceMesh | None = None) -> None:
        torch.manual_seed(seed)
        self.model = Net()
        if mesh is not None:
            self.model.wide.weight = nn.Parameter(shard(self.model.wide.weight, mesh))
        first, *others = self.model.parameters()
        self.optim = torch.optim.AdamW([{"params": [first]}, {"params": others, "lr": 0.1}], lr=0.01, foreach=False)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optim, 2)
        self.counter = Counter()
        self.state = State(model=self.model, optim=self.optim, schedule=self.schedule, counter=self.counter)

    def train(self) -> None:
        """Steps of which the parameters see different numbers."""
        for skipped in range(3):
            for index, parameter in enumerate(self.model.parameters()):
                parameter.grad = torch.randn_like(parameter) if index >= skipped else None
            self.optim.step()
            self.schedule.step()
        self.model.note = {"seen": 3, "last": (1, float("nan"))}

    def follow(self, other: Training, mesh: DeviceMesh) -> None:
        """Take over all of ``other``, which is not sharded."""
        self.model.note, self.counter.state = other.model.note, other.counter.state
        self.schedule.load_state_dict(other.schedule.state_dict())
        for group, options in zip(self.optim.param_groups, other.optim.param_groups, strict=True):
            group.update({key: value for key, value in options.items() if key != "params"})
        with torch.no_grad():
            for mine, theirs in zip(self.model.buffers(), other.model.buffers(), strict=True):
                mine.copy_(theirs)
            for mine, theirs in zip(self.model.parameters(), other.model.parameters(), strict=True):
                sharded = isinstance(mine, DTensor)
                mine.copy_(shard(theirs, mesh) if sharded else theirs)
                state = other.optim.state[theirs].items()
                self.optim.state[mine] = {k: shard(v, mesh) if sharded and v.dim() else v.clone() for k, v in state}


def shard(whole: torch.Tensor, mesh: DeviceMesh) -> DTensor:
    local = whole.detach().chunk(mesh.size())[mesh.get_local_rank()].clone()
    return DTensor.from_local(
        local, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.contiguous().stride()
    )


def contents(training: Training, rank: int) -> Contents:
    """Every tensor (dtype, shape, bytes) and the document."""
    frame = training.state.capture(rank)
    tensors = {}
    for part in frame.parts:
        raw = b"".join(source.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for source in part.sources)
        tensors[part.entry.name] = (part.entry.real_dtype or part.entry.dtype, part.entry.shape, raw)
    return tensors, json.loads(frame.document)


def seed_all(number: int) -> None:
    torch.manual_seed(number), np.random.seed(number), random.seed(number)


def image(training: Training, rank: int, key: Key) -> Slot:
    frame = training.state.capture(rank)
    layout = plan_image([part.entry for part in frame.parts], len(frame.document), alike=True)
    fd = create_memory("test", layout.total)
    slot = Slot(fd)
    os.close(fd)
    by_name = {part.entry.name: part for part in frame.parts}
    parts = [by_name[entry.name] for entry in layout.entries]
    writer = ImageWriter(layout, parts, rank, WORLD)
    assert writer.begin(slot, key, parts, frame.document)
    assert writer.conclude() == []
    return slot


def save(folder: Path, key: Key, seed: int) -> dict[int, Contents]:
    """Persist a checkpoint as two nodes would; what a restore must give on each rank."""
    whole = Training(seed)
    whole.train()
    expected, slots = {}, {}
    for rank in range(WORLD):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=WORLD)
        try:
            mesh = DeviceMesh("cpu", list(range(WORLD)))
            mine = Training(seed + 1, mesh)
            mine.follow(whole, mesh)
            seed_all(100 + rank)
            slots[rank] = image(mine, rank, key)
            expected[rank] = contents(whole, rank)
        finally:
            dist.destroy_process_group()
            clear_dtensor_caches()
    for node in ((0, 1), (2,)):
        job = Job(
            key=key,
            world=WORLD,
            images={rank: slots[rank] for rank in node},
            origins=dict.fromkeys(node, "n"),
            past={1: 20, 2: None},
            url=str(folder),
            keep_last=2,
            progress=Progress(key, 0.0),
        )
        persist(FilesystemTier(str(folder)), job)
    for slot in slots.values():
        slot.close()
    return expected


@dataclass(frozen=True, kw_only=True)
class Saved:
    folder: Path
    files: Files
    expected: dict[Key, dict[int, Contents]]


def save_all(folder: Path) -> Saved:
    expected = {key: save(folder, key, 10 * key.lineage) for key in (OLD, NEW)}
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return Saved(folder=folder, files=files, expected=expected)


# ---- what may happen to it ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Case:
    kind: str
    files: Files
    forged: bool
    """Whether an attacker repaired the checksums."""


def images_of(files: Files) -> list[str]:
    return sorted(path for path in files if path.startswith(FOLDER) and path.endswith(".safetensors"))


def layout_of(data: bytes) -> tuple[ImageLayout, Stamp]:
    return parse_header(data, len(data))


def some_file(files: Files, chance: random.Random) -> str:
    """Mostly an image, often the manifest, sometimes a part."""
    manifest = f"{FOLDER}/{MANIFEST}"
    return chance.choice([*images_of(files), manifest, *sorted(p for p in files if p.startswith(FOLDER))])


def some_place(data: bytes, chance: random.Random) -> int:
    """A byte of a region chosen first: most bytes are one big tensor's."""
    if not data.startswith(b"{"):
        layout, stamp = layout_of(data)
        ends = [start + entry.nbytes for start, entry in zip(layout.starts, layout.entries, strict=True)]
        spans = [(start, end) for start, end in zip(layout.starts, ends, strict=True) if end > start]
        spans += [(0, 8), (8, layout.data_start), (min(FIELD_AT.values()), max(FIELD_AT.values()) + 8)]
        spans += [(layout.json_start, layout.json_start + stamp.json_length), (layout.crc_start, len(data))]
        return chance.randrange(*chance.choice(spans))
    return chance.randrange(len(data))


def flip(files: Files, chance: random.Random) -> None:
    path = some_file(files, chance)
    data = bytearray(files[path])
    for _ in range(chance.choice([1, 1, 1, 2, 5, 40])):
        data[some_place(files[path], chance)] ^= 1 << chance.randrange(8)
    files[path] = bytes(data)


def overwrite(files: Files, chance: random.Random) -> None:
    """Zeroes, noise, or another part of the same file over a range."""
    path = some_file(files, chance)
    data = bytearray(files[path])
    at = some_place(files[path], chance)
    size = min(chance.choice([1, 8, 512, PAGE, BLOCK]), len(data) - at)
    source = chance.randrange(len(data) - size + 1)
    data[at : at + size] = chance.choice([bytes(size), chance.randbytes(size), data[source : source + size]])
    files[path] = bytes(data)


def truncate(files: Files, chance: random.Random) -> None:
    path = some_file(files, chance)
    files[path] = files[path][: chance.choice([0, 7, 8, 100, PAGE, some_place(files[path], chance)])]


def lengthen(files: Files, chance: random.Random) -> None:
    path = some_file(files, chance)
    files[path] += chance.choice([bytes(1), bytes(PAGE), b" ", b"}", chance.randbytes(100)])


def lose(files: Files, chance: random.Random) -> None:
    for _ in range(chance.choice([1, 1, 2])):
        files.pop(some_file(files, chance), None)


def exchange(files: Files, chance: random.Random) -> None:
    """Two files change places, within the checkpoint or with the older one."""
    one, other = some_file(files, chance), chance.choice(sorted(files))
    files[one], files[other] = files[other], files[one]


def go_stale(files: Files, chance: random.Random) -> None:
    """Files are those of the older checkpoint."""
    for _ in range(chance.choice([1, 2, 6])):
        path = some_file(files, chance)
        files[path] = files[path.replace(FOLDER, folder_of(OLD))]


ACCIDENTS = (flip, flip, flip, overwrite, truncate, lengthen, lose, exchange, go_stale)


class Raw(str):
    """JSON text that `json.dumps` would not make."""


DEEP = Raw("[" * 100_000 + "]" * 100_000)
DEEP_OBJECT = Raw('{"a":' * 100_000 + "0" + "}" * 100_000)
NUMBERS = [-1, 0, 1, 2, 3, 7, 8, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**4000, 1.5, 1.0, 1e308]
NUMBERS += [Raw("NaN"), Raw("-Infinity"), Raw("1e999"), Raw("9" * 5000)]
TEXTS = ["", "x", "../x", "/etc/passwd", "..", "\x00", "\ud800", "save", "__class__", "float32", "meta", "cuda"]
TEXTS += ["F32", "I32", "U8", "C64", "F4", "cpu:99", "nonsense", "a" * 100_000, "__json__", "$tensor", "params"]
TREES: list[Any] = [None, True, False, [], {}, [[]], [0, 0], [[], []], ["a"], {"a": 1}, DEEP, DEEP_OBJECT]
TREES += [{"$tuple": 5}, {"$float": 10**400}, {"$float": []}, {"$bytes": "zz"}, {"$dict": [[[], 1]]}, {"$dict": 7}]
TREES += [{"$tensor": "counter/ema", "device": "cpu"}, {"$tensor": "model/wide.weight", "device": "cpu"}]
TREES += [{"$tensor": "nowhere", "device": "cpu"}, {"$tensor": [], "device": 5}, {"$tensor": "counter/ema"}]
TREES += [{"tensor": "optim/model.wide.bias/exp_avg", "device": "parameter"}, {"value": {"$tuple": [1, 2]}}]
TREES += [{"packed": 0, "dtype": "float32", "device": "cpu"}, {"packed": -1, "dtype": "save", "device": "meta"}]


def nodes(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key or index) of everything inside of a JSON value."""
    found: list[tuple[Any, Any]] = []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        found.append((tree, key))
        found += nodes(value)
    return found


def mutate(tree: Any, chance: random.Random) -> Any:
    """Change a JSON value in a few places; ``@twice`` at the end of a key makes it one that stands there twice."""
    if chance.random() < 0.03:
        return copy.deepcopy(chance.choice([*TREES, *NUMBERS, *TEXTS]))
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        places = nodes(tree)
        if not places:
            return tree
        inside, key = chance.choice(places)
        other, place = chance.choice(places)
        value = inside[key]
        action = chance.randrange(8)
        if action == 0:
            del inside[key]
        elif action == 1 and isinstance(inside, dict):
            inside[f"{key}@twice"] = copy.deepcopy(chance.choice([value, *NUMBERS, *TREES]))
        elif action == 2 and isinstance(inside, dict):
            inside[chance.choice(TEXTS)] = inside.pop(key)
        elif action == 3 and isinstance(inside, list):
            inside.append(copy.deepcopy(chance.choice([value, *NUMBERS])))
        elif action == 4 and type(other[place]) is type(value):
            inside[key], other[place] = copy.deepcopy(other[place]), copy.deepcopy(value)
        elif isinstance(value, int) and abs(value) < 2**64 and chance.random() < 0.5:
            inside[key] = chance.choice([value + 1, value - 1, -value, value * 2, str(value), float(value)])
        else:
            same = NUMBERS if isinstance(value, (int, float)) else TEXTS if isinstance(value, str) else TREES
            inside[key] = copy.deepcopy(chance.choice(same if chance.random() < 0.6 else [*NUMBERS, *TEXTS, *TREES]))
    return tree


def dump(tree: Any, **options: Any) -> bytes:
    raws: list[Raw] = []

    def mark(node: Any) -> Any:
        if isinstance(node, Raw):
            raws.append(node)
            return f"@raw{len(raws) - 1}@"
        if isinstance(node, dict):
            return {key: mark(value) for key, value in node.items()}
        return [mark(value) for value in node] if isinstance(node, list) else node

    text = json.dumps(mark(tree), **options)
    for index, raw in enumerate(raws):
        text = text.replace(f'"@raw{index}@"', raw)
    return text.replace("@twice", "").encode()


def repair(files: Files) -> None:
    """Make the manifest agree with the images as they are."""
    path = f"{FOLDER}/{MANIFEST}"
    manifest = json.loads(files[path])
    for file in manifest["files"]:
        data = files[f"{FOLDER}/{file['name']}"]
        length = min(8 + int.from_bytes(data[:8], "little"), len(data))
        crc = data[FIELD_AT["crc"] : FIELD_AT["crc"] + 8]
        file |= {"size": len(data), "header_crc": checksum(data[:length])}
        with contextlib.suppress(ValueError):
            file["table_crc"] = int(crc, 16)
    files[path] = dump(manifest, indent=1)


def forge_length(files: Files, chance: random.Random) -> None:
    """The header says another length of itself."""
    path = chance.choice(images_of(files))
    data = files[path]
    length = int.from_bytes(data[:8], "little")
    others = [0, 1, 2**63, 2**64 - 1, MAX_HEADER, MAX_HEADER // PAGE * PAGE - 8, chance.randrange(2**64)]
    others += [length + PAGE, length - PAGE, length - 1, len(data) - 8, chance.randrange(len(data)) // PAGE * PAGE - 8]
    files[path] = (max(0, chance.choice(others))).to_bytes(8, "little") + data[8:]
    repair(files)


def forge_stamp(files: Files, chance: random.Random) -> None:
    """One of the fields at fixed places says something else."""
    path = chance.choice(images_of(files))
    data = bytearray(files[path])
    name = chance.choice(["resilient_train", "lineage", "step", "rank", "world", "json"])
    width = {"resilient_train": 1, "lineage": 8, "step": 13, "rank": 6, "world": 6, "json": 10}[name]
    texts = ["-1", "9" * width, "0", "+7", "1_0", " 3", "\x00", "1", "12345"]
    data[FIELD_AT[name] : FIELD_AT[name] + width] = chance.choice(texts)[:width].rjust(width, "0").encode()
    files[path] = bytes(data)
    repair(files)


def forge_header(files: Files, chance: random.Random) -> None:
    """The JSON of the header says something else; the data stays."""
    path = chance.choice(images_of(files))
    data = files[path]
    layout, _ = layout_of(data)
    header = json.loads(data[8 : layout.data_start])
    metadata, names = header["__metadata__"], [name for name in header if name != "__metadata__"]
    action = chance.randrange(6)
    if action == 0:
        header = mutate(header, chance)
    elif action == 1:
        field = chance.choice(["boxes", "dtypes", "names"])
        inner = json.loads(metadata[field])
        inner[chance.choice(names)] = chance.choice([[[8, 6], [6, 0]], [[3, 6], [0, 0]], "float64", "wide", 5])
        metadata[field] = dump(mutate(inner, chance)).decode(errors="surrogatepass")
    elif action == 2:
        mutate(header[chance.choice(names)], chance)
    elif action == 3:
        item = header[chance.choice(names)]
        others = ["F32", "I32", "U32", "F16", "I64", "C64", "BOOL", "I8", "F8_E5M2", "F4", 4, None]
        item["dtype"] = chance.choice(others)
    elif action == 4:
        item = header[chance.choice(names)]
        begin, end = item["data_offsets"]
        spans = [[-begin, end], [begin - 1, end - 1], [end, begin], [0, end], [begin, 2**70], [begin] * 3, [True, end]]
        item["data_offsets"] = chance.choice(spans)
    else:
        item = header[chance.choice(names)]
        count = item["data_offsets"][1] - item["data_offsets"][0]
        shapes = [[count], [-1, -count], [1] * 70 + item["shape"], [0, 2**62, 2**62], [count, True], [2**40, 2**40]]
        item["shape"] = chance.choice([*shapes, item["shape"][::-1], [str(n) for n in item["shape"]], [1.0], None, 3])
    text = dump(header, separators=(",", ":"))
    length = -(-(8 + len(text)) // PAGE) * PAGE - 8
    files[path] = length.to_bytes(8, "little") + text.ljust(length) + data[layout.data_start :]
    repair(files)


def forge_manifest(files: Files, chance: random.Random) -> None:
    path = f"{FOLDER}/{MANIFEST}"
    manifest = json.loads(files[path])
    file = chance.choice(manifest["files"])
    action = chance.randrange(4)
    if action == 0:
        name = file["name"]
        file["name"] = chance.choice([*TEXTS, f"../{folder_of(OLD)}/{name}", f"./{name}", MANIFEST, "..."])
    elif action == 1:
        manifest["world"] = chance.choice([*NUMBERS, None, "3", [3]])
        if chance.random() < 0.3:
            manifest["files"] = []
    else:
        manifest = mutate(manifest, chance)
    files[path] = dump(manifest, indent=chance.choice([None, 1]))


def forge_document(files: Files, chance: random.Random) -> None:
    """What is not tensors says something else, in one image or in all."""
    paths = images_of(files)
    seed = chance.random()
    for path in paths if chance.random() < 0.6 else [chance.choice(paths)]:
        data = files[path]
        layout, stamp = layout_of(data)
        document = json.loads(data[layout.json_start : layout.json_start + stamp.json_length])
        alike = random.Random(seed)
        part = alike.choice([None, *sorted(document)])
        if part is None:
            document = mutate(document, alike)
        else:
            document[part] = mutate(document[part], alike)
        files[path] = with_document(data, dump(document, separators=(",", ":")))
    repair(files)


def with_document(data: bytes, document: bytes) -> bytes:
    """An image with another document, right in every other respect."""
    old, stamp = layout_of(data)
    new = plan_image(old.entries, len(document), alike=old.alike)
    assert new.entries == old.entries
    body = data[old.data_start : old.json_start] + document.ljust(new.json_capacity)
    sums = [checksum(body[at : at + BLOCK]).to_bytes(4, "little") for at in range(0, len(body), BLOCK)]
    table = b"".join(sums)
    header = bytearray(new.header)
    for at, value in Stamp(
        key=stamp.key, rank=stamp.rank, world=stamp.world, json_length=len(document), crc=checksum(table)
    ).fields():
        header[at : at + len(value)] = value
    return (bytes(header) + body + table).ljust(new.total, b"\0")


FORGERIES = (forge_length, forge_stamp, forge_header, forge_header, forge_manifest, forge_document, forge_document)


def corrupt(files: Files, chance: random.Random) -> Case:
    """The files after something happened to them, and what it was; depends on nothing else."""
    forged = chance.random() < 0.65
    action: Callable[[Files, random.Random], None] = chance.choice(FORGERIES if forged else ACCIDENTS)
    damaged = dict(files)
    action(damaged, chance)
    return Case(kind=action.__name__, files=damaged, forged=forged)


# ---- what must come of it -------------------------------------------------------------------------------------------


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
    if not generators:
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
