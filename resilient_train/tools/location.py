"""Which checkpoint is meant by ``URL[@STEP]``, or by its own folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from resilient_train.errors import ConfigError, StorageError
from resilient_train.spec.world import Key
from resilient_train.storage.catalogue import listing
from resilient_train.storage.commit import key_of
from resilient_train.storage.tier import Tier

_AT = re.compile(r"(?P<url>.+)@(?P<step>\d+)(\.g(?P<lineage>\d+))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """A parsed ``URL[@STEP[.gLINEAGE]]``."""

    url: str
    """Where the checkpoints are."""
    step: int | None = None
    """Which; None for the newest."""
    lineage: int | None = None
    """Computed by which generation; None if the step alone says it."""


def parse(text: str, exists: Callable[[str], bool] = lambda _: False) -> Location:
    """Split a command line's argument; an ``@`` that no step follows belongs to the URL, and one in an existing name.

    Args:
        text: the argument.
        exists: whether there is a folder of this name.

    Raises:
        ConfigError: if it is empty.
    """
    if not text:
        raise ConfigError("the place is empty: it is a path or a URL, as given to Checkpointer")
    url, _, last = text.rstrip("/").rpartition("/")
    if key := key_of(last):
        return Location(url=url or ("/" if text.startswith("/") else "."), step=key.step, lineage=key.lineage)
    match = _AT.fullmatch(text)
    if match is None or exists(text):
        return Location(url=text)
    lineage = match["lineage"]
    return Location(url=match["url"], step=int(match["step"]), lineage=None if lineage is None else int(lineage))


def find(tier: Tier, location: Location) -> Key:
    """The committed checkpoint that is meant.

    Raises:
        StorageError: if there is none.
        ConfigError: if several lineages have the step and none was named.
    """
    committed, unfinished = listing(tier)
    return choose(location, committed, unfinished)


def choose(location: Location, committed: Sequence[Key], unfinished: Sequence[Key]) -> Key:
    """The decision of `find`, which documents it."""
    if not committed:
        left = f" ({len(unfinished)} unfinished)" if unfinished else ""
        hint = "; a step is asked for as URL@120 or URL@120.g3" if "@" in location.url else ""
        raise StorageError(f"{location.url}: there is no committed checkpoint{left}{hint}")
    if location.step is None:
        return max(committed)
    fitting = [key for key in committed if fits(key, location)]
    if len(fitting) > 1:
        names = ", ".join(f"{key.step}.g{key.lineage}" for key in sorted(fitting))
        raise ConfigError(f"step {location.step} was computed by several lineages: say one of {names}")
    if not fitting:
        if any(fits(key, location) for key in unfinished):
            raise StorageError(f"{location.url}: the checkpoint of step {location.step} is unfinished")
        there = ", ".join(f"{key.step}.g{key.lineage}" for key in sorted(committed)[-10:])
        asked = f"step {location.step}" + ("" if location.lineage is None else f" of lineage {location.lineage}")
        raise StorageError(f"{location.url}: there is no checkpoint of {asked}; the newest are {there}")
    return fitting[0]


def fits(key: Key, location: Location) -> bool:
    """Whether a checkpoint may be the one that is meant."""
    return location.step in (None, key.step) and location.lineage in (None, key.lineage)
