"""What must never be untrue, whatever goes wrong; checked at every event that could make it so."""

from __future__ import annotations

from dataclasses import dataclass, field

from resilient_train.spec.world import Key, Phase, WorldRecord


@dataclass
class Checker:
    """Watches the record and the worlds that train."""

    records: dict[int, WorldRecord] = field(default_factory=dict)
    """Every version, by revision."""
    worlds: dict[int, WorldRecord] = field(default_factory=dict)
    """The first version of every generation."""
    problems: list[str] = field(default_factory=list)
    """What was untrue."""
    steps: list[tuple[float, int, int]] = field(default_factory=list)
    """(time, generation, step) of every step that a world has finished."""
    newest: WorldRecord | None = None
    disturbed: float = 0.0
    """Until when something was wrong with nodes, workers or the network."""
    beside: dict[int, int] = field(default_factory=dict)
    """Steps that each generation has finished after a later one had finished a step."""
    begun: dict[int, float] = field(default_factory=dict)
    """When each generation was agreed."""

    def wrong(self, text: str) -> None:
        """Something was untrue."""
        if text not in self.problems:
            self.problems.append(text)

    def committed(self, record: WorldRecord, at: float) -> None:
        """Revisions and generations grow one by one; within a generation the world stays; the end is the end."""
        before, self.newest = self.newest, record
        self.records[record.revision] = record
        self.begun.setdefault(record.generation, at)
        if len(set(record.members)) != record.size:
            self.wrong(f"generation {record.generation} names a member twice")
        if before is None:
            self.worlds[record.generation] = record
            return
        if record.revision != before.revision + 1:
            self.wrong(f"revision {record.revision} follows {before.revision}")
        if before.phase is not Phase.RUNNING:
            self.wrong(f"the record was {before.phase} and changed")
        if record.generation == before.generation:
            if record.members != before.members:
                self.wrong(f"generation {record.generation} has two worlds")
        elif record.generation != before.generation + 1:
            self.wrong(f"generation {record.generation} follows {before.generation}")
        else:
            self.worlds[record.generation] = record

    def entered(self, member: str, record: WorldRecord) -> None:
        """Nobody forms a world that is not in the record, or that does not name it."""
        world = self.worlds.get(record.generation)
        if world is None or world.members != record.members or member not in world.members:
            self.wrong(f"{member} forms a world of generation {record.generation} that is not in the record")

    def stepped(self, at: float, record: WorldRecord, step: int, deaf: bool) -> None:
        """A world trains only while the record names it, or the one that follows it at once.

        One of whose nodes none can hear of the record goes on: nobody can tell it.  But it never trains beside a later
        one: what it may still finish then is the step that it was in.
        """
        latest = max((generation for _, generation, _ in self.steps), default=0)
        if record.generation < latest:
            count = self.beside[record.generation] = self.beside.get(record.generation, 0) + 1
            if count > 1:
                self.wrong(f"generation {record.generation} trains beside generation {latest}")
        self.steps.append((at, record.generation, step))
        if self.newest is None or record.members != self.worlds[record.generation].members:
            self.wrong(f"generation {record.generation} trains and is not in the record")
        elif record.generation < self.newest.generation - 1 and not deaf:
            self.wrong(f"generation {record.generation} trains while the record is at {self.newest.generation}")

    def resumed(self, record: WorldRecord, source: Key | None) -> None:
        """A planned change loses and repeats no step, if nothing else happens meanwhile."""
        world = self.worlds[record.generation]
        if self.disturbed < self.begun[record.generation] and not _follows(world, source):
            self.wrong(
                f"generation {record.generation} began at the boundary of step {world.boundary} and resumed {source}"
            )


def _follows(world: WorldRecord, source: Key | None) -> bool:
    return world.boundary is None or source == Key(world.generation - 1, world.boundary)
