"""Read everything of a checkpoint and hold it against its checksums, its manifest and itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from resilient_train.errors import CheckpointDamaged, StorageError, StorageUnusable
from resilient_train.image.verified import VerifiedImage
from resilient_train.plan.recovery import missing
from resilient_train.spec.shard import BLOCK
from resilient_train.spec.world import Key
from resilient_train.storage.catalogue import read_manifest
from resilient_train.storage.commit import MANIFEST, Manifest, folder_of
from resilient_train.storage.tier import Tier
from resilient_train.tools.images import Progress, contradictions, holders, open_image, parts_of

_BATCH = 8
"""Blocks read at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """A file that is not what it must be."""

    file: str
    """Its path below the URL."""
    reason: str
    """What is wrong, one sentence."""


@dataclass(kw_only=True)
class Verdict:
    """What was found out about a checkpoint."""

    key: Key
    """Which."""
    images: int = 0
    """Number of images that belong to it."""
    nbytes: int = 0
    """Bytes of them."""
    damage: list[Damage] = field(default_factory=list)
    """Every damaged file; empty if the checkpoint is whole."""

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "step": self.key.step,
            "lineage": self.key.lineage,
            "images": self.images,
            "bytes": self.nbytes,
            "whole": not self.damage,
            "damage": [{"file": one.file, "reason": one.reason} for one in self.damage],
        }


def verify(tier: Tier, key: Key, progress: Progress) -> Verdict:
    """Read every byte of a checkpoint; what is wrong with it is in the verdict, nothing is raised for that.

    Raises:
        StorageUnusable: if the place cannot be read at all.
    """
    verdict = Verdict(key=key)
    folder = folder_of(key)
    try:
        manifest = read_manifest(tier, key)
    except StorageUnusable:
        raise
    except StorageError as error:
        verdict.damage.append(_damage(tier, f"{folder}/{MANIFEST}", error))
        return verdict
    verdict.images, verdict.nbytes = len(manifest.files), sum(file.size for file in manifest.files)
    sound, done = [], 0
    for file in manifest.files:
        begin = done

        def report(read: int, begin: int = begin) -> None:
            progress(begin + read, verdict.nbytes)

        try:
            image = open_image(tier, manifest, file)
            sound.append(image)
            _read_all(image, report)
        except StorageUnusable:
            raise
        except StorageError as error:
            verdict.damage.append(_damage(tier, f"{folder}/{file.name}", error))
        done += file.size
        progress(done, verdict.nbytes)
    if len(sound) == len(manifest.files):
        verdict.damage += _whole(manifest, sound)
    return verdict


def _damage(tier: Tier, file: str, error: StorageError) -> Damage:
    return Damage(file=file, reason=str(error).removeprefix(f"{tier.name}/{file}: "))


def _read_all(image: VerifiedImage, report: Callable[[int], None]) -> None:
    """Every block, the padding, and the document.

    Raises:
        CheckpointDamaged: at the end, saying how many blocks are damaged and which is the first.
    """
    blocks = image.layout.blocks
    bad: list[int] = []
    for first in range(0, blocks, _BATCH):
        bad += image.bad_blocks(first, min(first + _BATCH, blocks) - 1)
        report(min((first + _BATCH) * BLOCK, image.layout.total))
    if bad:
        at = image.layout.data_start + bad[0] * BLOCK
        raise CheckpointDamaged(
            f"{image.name}: {len(bad)} of {blocks} blocks fail their checksums, first block {bad[0]} (from byte {at})"
        )
    if any(bytes(image.padding())):
        raise CheckpointDamaged(f"{image.name}: the padding behind the checksums is not zero")
    parts_of(image)


def _whole(manifest: Manifest, images: Sequence[VerifiedImage]) -> list[Damage]:
    """What the images lack together."""
    entries = [image.entries() for image in images]
    folder = folder_of(manifest.key)
    problems = [f"the images do not agree on the shape or dtype of {name}" for name in contradictions(holders(entries))]
    gone = {entry.name for image in images for entry in image.layout.common} - {
        e.name for some in entries for e in some
    }
    problems += [f"the images do not cover {name}" for name in sorted({*missing(entries), *gone})]
    return [Damage(file=folder, reason=problem) for problem in problems]
