"""What `scripts/train.py` wrote down, put together again."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from resilient_train.events import Event
from resilient_train.plan.batch import sample
from resilient_train.spec.world import Key, Restore, ancestry, in_ancestry


def read(folder: Path) -> list[dict]:
    """Every record of every process; a line that a kill cut short is left out."""
    return [record for path in sorted(folder.glob("*.jsonl")) for record in lines(path)]


def lines(path: Path) -> list[dict]:
    """Every record of one process."""
    return parse(path.read_text())


def parse(text: str) -> list[dict]:
    """The records in ``text``, one a line."""
    records = []
    for line in text.splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def restores(events: list[Event]) -> list[Restore]:
    """The job's log of restores, from its events."""
    log = []
    for event in events:
        if event.kind == "resumed":
            fresh = event.text == "a fresh start"
            step = event.fields["step"]
            source = None if fresh else Key(int(event.text.split("lineage ")[1].split(")")[0]), step)
            log.append(Restore(generation=event.generation, lineage=event.fields["lineage"], source=source))
    return log


def surviving(records: list[dict], log: list[Restore]) -> dict[int, list[dict]]:
    """step -> records of the world whose computation of the step belongs to the job's final history.

    A step s computed in generation g counts if the state with s + 1 finished steps, keyed by g's lineage, is in the
    ancestry of the last generation.
    """
    lineage = {restore.generation: restore.lineage for restore in log}
    past = ancestry(log)
    found: dict[int, list[dict]] = {}
    for record in records:
        if "step" not in record or record["generation"] not in lineage:
            continue
        key = Key(lineage[record["generation"]], record["step"] + 1)
        if key.lineage in past and in_ancestry(key, past):
            found.setdefault(record["step"], []).append(record)
    return found


def check_every_batch_once(folder: Path, events: list[Event], steps: int) -> None:
    """In the history that led to the final state, every sample of every global batch was used exactly once."""
    history = surviving(read(folder), restores(events))
    assert sorted(history) == list(range(steps))
    for step, ranks in history.items():
        expected = [sample(step, i, length=501, global_batch=24, seed=0, shuffle=True) for i in range(24)]
        used = Counter(index for rank in ranks for index in rank["used"])
        generation = {rank["generation"] for rank in ranks}
        # A rank that was killed between finishing a step and writing it down is the only excuse for a missing line.
        if len(ranks) == ranks[0]["size"]:
            assert used == Counter(expected), (step, generation)
        else:
            assert not used - Counter(expected), (step, generation)


def digests(records: list[dict]) -> dict[int, dict[str, dict[int, int]]]:
    """generation -> when (``finished``, ``restored``, ``final``) -> number of finished steps -> digest of the state.

    Left out where a part is missing that no rank has written down.
    """
    parts: dict[tuple[int, str, int], dict[str, int]] = {}
    complete: dict[tuple[int, str, int], int] = {}
    for record in records:
        if "digest" in record:
            when = "restored" if "restored" in record else "final" if "final" in record else "finished"
            step = record["restored"] if when == "restored" else record["step"] + 1 if when == "finished" else 0
            place = (record["generation"], when, step)
            held, complete[place] = record["digest"]
            for which, number in held.items():
                assert parts.setdefault(place, {}).setdefault(which, number) == number, f"{which} differs in {place}"
    found: dict[int, dict[str, dict[int, int]]] = {}
    for (generation, when, step), held in parts.items():
        if len(held) == complete[generation, when, step]:
            found.setdefault(generation, {}).setdefault(when, {})[step] = sum(held.values()) % 2**64
    return found
