"""What may happen to a checkpoint: accidents, and forgeries by somebody who repairs every checksum."""

from __future__ import annotations

import contextlib
import copy
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from saved_training import FOLDER, OLD, Files

from resilient_train.image.native import checksum
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
from resilient_train.storage.commit import MANIFEST, folder_of


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
