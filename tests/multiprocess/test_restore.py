"""Fresh starts from disk: on another world size, another wrapper, another launcher."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import records

from resilient_train.testing.job import Job

SCRIPT = Path(__file__).parent / "scripts" / "train.py"
pytestmark = pytest.mark.timeout(240)


def run(tmp_path: Path, name: str, ranks: int, *args: str, launcher: list[str] | None = None) -> list[dict]:
    """Run the script to its end; what it wrote down."""
    folder = tmp_path / name
    arguments = ["--record", str(folder), "--url", str(tmp_path / "ckpt"), "--step-time", "0", *args]
    flags = [f"--nproc-per-node={ranks}"] if launcher != [sys.executable] else []
    with Job(SCRIPT, arguments, flags=flags, log_dir=tmp_path / f"{name}-logs", launcher=launcher) as job:
        assert job.finish(100) == 0, job.output
        assert job.leftovers() == []
    return records.read(folder)


def final(found: list[dict]) -> int:
    (digest,) = (steps[0] for by_time in records.digests(found).values() for steps in [by_time.get("final")] if steps)
    return digest


def restored(found: list[dict]) -> tuple[int, int]:
    ((step, digest),) = (item for times in records.digests(found).values() for item in times["restored"].items())
    return step, digest


@pytest.mark.parametrize(
    ("optim", "first", "second"),
    [
        ("adamw", ("fsdp", 3), ("fsdp", 2)),
        pytest.param("fused", ("fsdp", 2), ("ddp", 3), marks=pytest.mark.soak),
        pytest.param("sgd", ("ddp", 2), ("fsdp", 4), marks=pytest.mark.soak),
    ],
)
def test_a_fresh_start_on_another_world_has_the_same_bits(
    tmp_path: Path, optim: str, first: tuple[str, int], second: tuple[str, int]
) -> None:
    """Parameters and optimizer state equal the saved ones, across world sizes and between DDP and FSDP2."""
    one = run(tmp_path, "one", first[1], "--parallel", first[0], "--optim", optim, "--steps", "12")
    two = run(tmp_path, "two", second[1], "--parallel", second[0], "--optim", optim, "--steps", "20")
    assert restored(two) == (12, final(one))
    assert (tmp_path / "ckpt" / "step-000000020.g2" / "manifest.json").exists()


def test_torchrun_and_a_single_process_continue_what_rtrun_began(tmp_path: Path) -> None:
    """The same script and the same checkpoints under every launcher."""
    one = run(tmp_path, "one", 2, "--steps", "8")
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    two = run(tmp_path, "two", 3, "--steps", "16", launcher=torchrun)
    assert restored(two) == (8, final(one))
    three = run(tmp_path, "three", 1, "--steps", "20", launcher=[sys.executable])
    assert restored(three) == (16, final(two))


def test_replicated_state_is_written_once(tmp_path: Path) -> None:
    """Four DDP ranks write about as many bytes as one."""
    args = ("--parallel", "ddp", "--steps", "4", "--width", "300", "--hidden", "500")
    run(tmp_path, "one", 4, *args)
    sizes = [path.stat().st_size for path in (tmp_path / "ckpt").glob("*/*.safetensors")]
    parameters = 2 * 300 * 500 + 300 + 500
    assert len(sizes) == 4
    assert sum(sizes) < 3 * 4 * parameters + 4 * 40_000
    assert max(sizes) < 2.5 * 4 * parameters * 3 / 4
