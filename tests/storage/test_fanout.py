"""Several ranks restore from remote storage: each byte is read once, and whatever fails is heard of by all.

The storage is a folder that says that it is remote, and counts; one test has a real server instead.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from .faulty_server import FaultyServer
from .test_s3 import bucket

__all__ = ["bucket"]
pytestmark = pytest.mark.timeout(240)

SCRIPT = """
import hashlib, logging, os, signal, sys
import torch, torch.distributed as dist, torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
import resilient_train as rt
from resilient_train.errors import ResilientError, StorageError
from resilient_train.image.verified import VerifiedImage
from resilient_train.storage.filesystem import FilesystemTier
from resilient_train.worker import checkpointer, fanout
from resilient_train.worker.exchange import Exchange
from resilient_train.worker.process_group import is_communication_error
from resilient_train.worker.state import State

class Remote(FilesystemTier):
    count = looked = 0
    refused = "nothing"
    folder = False

    def __init__(self, url):
        super().__init__(url)
        self.local = self.folder

    def size(self, path):
        Remote.looked += path.endswith(".safetensors")
        return super().size(path)

    def read(self, path, offset, length):
        if self.refused in path:
            raise StorageError(f"{path}: refused")
        Remote.count += length
        return super().read(path, offset, length)

def say(text):
    os.write(1, (text.replace(chr(10), " ") + chr(10)).encode())

def lies(send):
    def sending(self, buffer, to):
        buffer = buffer.clone()
        buffer[3] ^= 1
        return send(self, buffer, to)
    return sending

def dies(self, run):
    os.kill(os.getpid(), signal.SIGKILL)

def lacks(self, *_, **__):
    raise RuntimeError("out of memory")

def digest(model, optim):
    found = hashlib.sha256()
    for tensor in [p.data for p in model.parameters()] + [s[k] for s in optim.state.values() for k in sorted(s)]:
        full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        found.update(full.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]

def work(rank, ranks, url, meeting, steps, kind, fault):
    logging.basicConfig(format=f"{rank} %(message)s", stream=sys.stderr)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    torch.manual_seed(7)
    model = torch.nn.Sequential(torch.nn.Linear(1000, 2200), torch.nn.LayerNorm(2200), torch.nn.Linear(2200, 500))
    if kind == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
    optim = torch.optim.AdamW(model.parameters(), lr=0.1)
    if fault == f"{rank} lies":
        Exchange.send = lies(Exchange.send)
    if fault == f"{rank} dies":
        VerifiedImage.fetch = dies
    if fault == f"{rank} lacks memory":
        State.targets = lacks
    if fault == f"{rank} is refused":
        Remote.refused = "rank-00001"
    if "in a folder" in fault:
        Remote.folder, fanout.FEW_FILES, fanout.FEW_READERS = True, 1, 3 if "few readers" in fault else 0
    if not url.startswith("s3:"):
        checkpointer.open_tier = Remote
    try:
        ckpt = rt.Checkpointer(rt.State(model=model, optim=optim), url, persist_every=2)
        first = ckpt.restore()
        say(f"{rank} at {first} {Remote.count} {digest(model, optim)}")
        say(f"{rank} looked into {Remote.looked}")
        for step in ckpt.steps(steps) if steps > first else ():
            model(torch.ones(2, 1000)).square().mean().backward()
            optim.step(); optim.zero_grad()
            if step % 2:
                ckpt.snapshot(step + 1)
                ckpt.wait()
        if steps > first:
            ckpt.wait()
            say(f"{rank} left at {steps} {digest(model, optim)}")
        ckpt.close()
    except ResilientError as error:
        say(f"{rank} {type(error).__name__}: {error}")
    except RuntimeError as error:
        logging.exception("restoring or training failed")
        say(f"{rank} lost the others: {is_communication_error(error)}")
        os._exit(3)
    dist.destroy_process_group()

if __name__ == "__main__":
    ranks, url, meeting, steps, kind, fault = sys.argv[1:]
    context = mp.start_processes(
        work, (int(ranks), url, meeting, int(steps), kind, fault), nprocs=int(ranks), join=False, start_method="spawn")
    for process in context.processes:
        process.join()
    sys.exit(max(process.exitcode not in (0, -9, 3) for process in context.processes))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What a rank said when it had restored, and when it had gone on."""

    rank: int
    step: int
    read: int
    """Bytes that it has read."""
    restored: str
    """The state, as a digest."""


class Runs:
    """Ranks that save to a place and restore from it, one run after the other."""

    def __init__(self, folder: Path, url: str | None = None) -> None:
        self.place = folder / "run"
        self.url = url or str(self.place)
        self.place.mkdir(exist_ok=True)
        self._folder = folder
        (folder / "script.py").write_text(SCRIPT)

    def run(self, ranks: int, steps: int, kind: str = "ddp", fault: str = "none") -> tuple[list[str], list[str]]:
        """What each rank said, in the order of ranks, and what was logged."""
        meeting = self._folder / f"meeting-{len(list(self._folder.iterdir()))}"
        command = [sys.executable, self._folder / "script.py", str(ranks), self.url, meeting, str(steps), kind, fault]
        env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=env)
        assert result.returncode == 0, result.stderr
        return sorted(result.stdout.splitlines()), result.stderr.splitlines()

    def save(self, ranks: int, steps: int, kind: str = "ddp") -> str:
        """Save at every second step; the digest of the last state."""
        said, _ = self.run(ranks, steps, kind)
        (digest,) = {line.split()[-1] for line in said if "left" in line}
        return digest

    def restore(self, ranks: int, steps: int, kind: str = "ddp", fault: str = "none") -> tuple[list[Said], list[str]]:
        """What each rank has restored, and what was logged."""
        said, logged = self.run(ranks, steps, kind, fault)
        lines = [line.split() for line in said if " at " in line and "left" not in line]
        assert len(lines) == ranks, (said, logged)
        found = [Said(rank=int(r), step=int(s), read=int(n), restored=digest) for r, _, s, n, digest in lines]
        return found, logged

    def size(self) -> int:
        """Bytes of the only checkpoint."""
        return sum(path.stat().st_size for path in self.place.glob("step-*/*.safetensors"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Two checkpoints of three replicas, after steps 2 and 4, and the digest of the newer."""
    runs = Runs(tmp_path_factory.mktemp("saved"))
    digest = runs.save(3, 4)
    return runs.place, digest


@pytest.fixture
def runs(saved: tuple[Path, str], tmp_path: Path) -> Runs:
    """Ranks that find these."""
    shutil.copytree(saved[0], tmp_path / "run")
    return Runs(tmp_path)


@pytest.mark.parametrize(("kind", "saved_by"), [pytest.param("ddp", 3, marks=pytest.mark.soak), ("fsdp", 4)])
def test_each_byte_is_read_once_by_all_ranks_together(tmp_path: Path, kind: str, saved_by: int) -> None:
    """Three ranks restore what as many replicas, or four shards, were: the same bits, and one state is read in all."""
    runs = Runs(tmp_path)
    digest = runs.save(saved_by, 2, kind)
    said, _ = runs.restore(3, 2, kind)
    assert {(one.step, one.restored) for one in said} == {(2, digest)}
    assert 0.9 * runs.size() < sum(one.read for one in said) <= 1.1 * runs.size()
    assert max(one.read for one in said) <= 0.55 * runs.size()


@pytest.mark.parametrize(("fault", "looked"), [("in a folder", [2, 0, 2]), ("in a folder, few readers", [2, 2, 2])])
def test_of_many_files_in_a_folder_each_header_is_read_by_few(tmp_path: Path, fault: str, looked: list[int]) -> None:
    """By one rank for all that want it, or by these few; the rest by whoever needs it, and not passed on.

    The first tells all ranks of all images, so nobody opens one that it wants nothing of.
    """
    runs = Runs(tmp_path)
    digest = runs.save(4, 2, "fsdp")
    said, _ = runs.run(3, 2, "fsdp", fault)
    assert [line.split()[-1] for line in said if " at 2 " in line] == 3 * [digest]
    assert [int(line.split()[-1]) for line in said if "looked" in line] == looked


def test_a_damaged_block_is_named_once_and_all_fall_back(runs: Runs) -> None:
    """Only one rank has read it, and all hear of it; one says what it was, and everybody takes the state before."""
    (image,) = runs.place.glob("step-000000004.*/rank-00001-*")
    data = bytearray(image.read_bytes())
    data[len(data) // 2] ^= 1
    image.write_bytes(data)
    said, logged = runs.restore(3, 2)
    assert {one.step for one in said} == {2}
    named = [line[0] for line in logged if re.search(rf"{image.name}: block \d+ .*fails its checksum", line)]
    assert named == ["0"]


@pytest.mark.soak
def test_a_rank_that_passes_on_something_else_is_named_and_does_no_harm(runs: Runs, saved: tuple[Path, str]) -> None:
    """Whoever gets it sees that it is not what was committed, and reads that from storage."""
    said, logged = runs.restore(3, 2, fault="1 lies")
    assert {(one.step, one.restored) for one in said} == {(4, saved[1])}
    assert any(re.match(r"2 .* came damaged from rank 1", line) for line in logged), logged
    assert not any(re.match(r"1 .* came damaged", line) for line in logged)


def test_a_rank_that_lacks_memory_is_heard_of_by_the_others(runs: Runs) -> None:
    """Any error before it knows what it wants: the others do not wait for that."""
    said, logged = runs.run(3, 2, fault="1 lacks memory")
    assert [line.split(":")[0] for line in said] == ["0 PeerFailed", "1 lost the others", "2 PeerFailed"], logged
    assert any("out of memory" in line for line in logged)


@pytest.mark.soak
def test_when_a_reader_dies_the_others_hear_of_it(runs: Runs) -> None:
    """They wait for what it would have sent, and get an error of communication, as after any loss."""
    said, _ = runs.run(3, 2, fault="1 dies")
    assert said == ["0 lost the others: True", "2 lost the others: True"]


def test_an_error_of_one_rank_reaches_all(runs: Runs) -> None:
    """What storage refuses one rank, of what it looks after for all: nobody waits."""
    said, _ = runs.run(3, 2, fault="1 is refused")
    assert [line.split(":")[0] for line in said] == ["0 PeerFailed", "1 StorageError", "2 PeerFailed"]
    assert all("rank-00001" in line for line in said)


@pytest.mark.soak
def test_a_bucket_is_read_once(bucket: str, endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same over HTTP, by what the server has sent."""
    runs = Runs(tmp_path, f"s3://{bucket}/run")
    digest = runs.save(2, 2)
    with FaultyServer(endpoint) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        monkeypatch.setenv("FSSPEC_S3_ENDPOINT_URL", server.url)
        said, _ = runs.restore(2, 2)
        assert {(one.step, one.restored) for one in said} == {(2, digest)}
    import s3fs

    files = s3fs.S3FileSystem(endpoint_url=endpoint).find(f"{bucket}/run", detail=True)
    size = sum(file["size"] for file in files.values())
    assert 0.9 * size < server.answered <= 1.1 * size
