"""What a node can still give is the least of what its memory, its container and everything around that can."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from resilient_train.errors import MemoryRefused
from resilient_train.image.arena import _groups, _left, create_memory


def group(folder: Path, limit: str, used: int, version: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    prefix = "" if version == 2 else "total_"
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(
        f"inactive_file 1\nactive_file 2\n{prefix}inactive_file 10\n{prefix}active_file 20\n"
    )


@pytest.mark.parametrize("version", [1, 2])
def test_every_group_around_this_process_counts(tmp_path: Path, version: int) -> None:
    """Its own, and those that hold it; other processes' groups do not, and one without a limit says nothing."""
    root = tmp_path / "cgroup"
    top = root if version == 2 else root / "memory"
    group(top / "slurm", "10000", 4000, version)
    group(top / "slurm" / "job", "max" if version == 2 else str((1 << 63) - 4096), 1000, version)
    group(top / "other", "1", 0, version)
    own = tmp_path / "own"
    own.write_text("3:cpu:/elsewhere\n" + ("0::/slurm/job\n" if version == 2 else "4:memory:/slurm/job\n"))
    left = [_left(found) for found in _groups(own, root)]
    assert min(one for one in left if one is not None) == 6030


def test_a_container_whose_group_stands_at_the_root(tmp_path: Path) -> None:
    """Outside it has another name, which is nowhere to be seen."""
    group(tmp_path / "cgroup", "5000", 1000, 2)
    (tmp_path / "own").write_text("0::/../outside\n")
    left = [_left(found) for found in _groups(tmp_path / "own", tmp_path / "cgroup")]
    assert 4030 in left


def test_a_limit_on_files_is_named_as_such() -> None:
    """Shared memory is a file to the system; who was told of a memory limit would look in vain."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        with pytest.raises(MemoryRefused, match=r"EFBIG.*ulimit -f"):
            create_memory("an image", 1 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
