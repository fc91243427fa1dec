"""The Checkpointer in a single process without a launcher: durable, restorable, clear about damage."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import resilient_train as rt
from resilient_train.errors import ConfigError

pytestmark = pytest.mark.timeout(120)

SCRIPT = """
import sys, logging, torch, resilient_train as rt
logging.basicConfig(level=logging.INFO, format="%(message)s")
url, steps, width = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(0)
model = torch.nn.Linear(width, width)
optim = torch.optim.AdamW(model.parameters())
ckpt = rt.Checkpointer(rt.State(model=model, optim=optim), url, persist_every=10, keep_last=2)
for step in ckpt.steps(steps):
    (model(torch.ones(2, width)) ** 2).sum().backward()
    optim.step(); optim.zero_grad()
    if step % 10 == 5: ckpt.wait()
    print("step", step, flush=True)
print("sum", repr(float(sum(p.double().sum() for p in model.parameters()))))
"""


def run(url: Path, steps: int, width: int = 6) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, str(url), str(steps), str(width)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def checkpoints(url: Path) -> list[str]:
    return sorted(path.parent.name for path in url.glob("*/manifest.json"))


def test_a_script_goes_on_where_it_ended(tmp_path: Path) -> None:
    """Every run continues from the last, with the same result as one long run; old checkpoints go."""
    url = tmp_path / "run"
    first = run(url, 25)
    assert first.returncode == 0, first.stderr
    assert "a fresh start" in first.stderr
    assert checkpoints(url) == ["step-000000020.g1", "step-000000025.g1"]
    second = run(url, 40)
    assert second.returncode == 0, second.stderr
    assert "step 25\n" in second.stdout
    assert "step 24\n" not in second.stdout
    assert checkpoints(url) == ["step-000000030.g2", "step-000000040.g2"], "every run has a lineage of its own"
    whole = run(tmp_path / "whole", 40)
    assert second.stdout.splitlines()[-1] == whole.stdout.splitlines()[-1]
    third = run(url, 40)
    assert third.stdout.startswith("sum")
    assert "40 steps were asked for and 40 are finished: there is nothing left to train" in third.stderr
    assert "nothing left" not in second.stderr


def test_a_state_that_cannot_be_read_now_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    """It may be there again in a moment; who knows better is told what to move away, and the one before is taken."""
    url = tmp_path / "run"
    assert run(url, 25).returncode == 0
    (image,) = (url / "step-000000025.g1").glob("rank-*")
    image.unlink()
    image.symlink_to(image.name)
    refused = run(url, 26)
    assert refused.returncode != 0
    assert f"{url}/step-000000025.g1 cannot be read now; once it is moved away" in refused.stderr
    shutil.move(url / "step-000000025.g1", tmp_path / "away")
    again = run(url, 26)
    assert again.returncode == 0, again.stderr
    assert "step 20\n" in again.stdout


COUNTED = """
from resilient_train.storage.filesystem import FilesystemTier
read, by_way = FilesystemTier.read, [0]
def counted(self, path, offset, length):
    by_way[0] += length
    return read(self, path, offset, length)
FilesystemTier.read = counted
"""


def test_tensors_are_read_straight_from_the_files_of_a_disk(tmp_path: Path) -> None:
    """Of the 20 MB of a state only the blocks with headers, tables and documents come by way of other memory."""
    script = COUNTED + SCRIPT + "print('by way', by_way[0])"
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    for steps in (1, 2):
        done = subprocess.run([*command, str(steps), "1300"], capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 0, done.stderr
    assert "resumes" in done.stderr
    assert "step 0\n" not in done.stdout
    assert 100 < int(done.stdout.split()[-1]) < 4_000_000


def damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(tmp_path: Path) -> None:
    """Whatever happened to it: said by name, and no step is lost that is whole somewhere."""
    whole = tmp_path / "run"
    assert run(whole, 25).returncode == 0
    ways: dict[str, Callable[[Path], object]] = {
        "flipped": lambda image: damage(image, image.stat().st_size // 2),
        "header": lambda image: damage(image, 300),
        "truncated": lambda image: image.write_bytes(image.read_bytes()[:-100]),
        "missing": lambda image: image.unlink(),
        "manifest": lambda image: (image.parent / "manifest.json").write_text("{"),
    }
    for way, harm in ways.items():
        shutil.copytree(whole, tmp_path / way)
        (image,) = (tmp_path / way / "step-000000025.g1").glob("*.safetensors")
        harm(image)
    with ThreadPoolExecutor(2) as pool:
        for way, again in zip(ways, pool.map(lambda way: run(tmp_path / way, 30), ways), strict=True):
            assert again.returncode == 0, (way, again.stderr)
            assert "step-000000025.g1" in again.stderr, way
            assert "step 20\n" in again.stdout, way
            assert "step 19\n" not in again.stdout, way


def test_if_every_checkpoint_is_damaged_nothing_is_started_over(tmp_path: Path) -> None:
    """A fresh start on top of damaged states would bury them: an error that names them, and no step."""
    url = tmp_path / "run"
    assert run(url, 5).returncode == 0
    (image,) = url.glob("*/*.safetensors")
    damage(image, image.stat().st_size // 2)
    again = run(url, 8)
    assert again.returncode != 0
    assert "every state that is left is damaged" in again.stderr
    assert "step 5 (lineage 1)" in again.stderr
    assert "step 0" not in again.stdout
    assert checkpoints(url) == ["step-000000005.g1"]


@pytest.mark.parametrize("wrong", [-1, 17, 1.0, True, "2"])
def test_a_number_of_copies_that_is_none_is_refused(wrong: object) -> None:
    """Before anything is begun."""
    with pytest.raises(ConfigError, match="replicas must be a whole number from 0 to 16"):
        rt.Checkpointer(rt.State(model=torch.nn.Linear(2, 2)), replicas=wrong)  # type: ignore[arg-type]


def test_a_url_that_lasts_no_longer_than_a_process_is_refused() -> None:
    """fsspec's memory:// is the keeper's own, and ends with it."""
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="lasts no longer"):
        rt.Checkpointer(rt.State(model=model), "memory://run")


@pytest.mark.parametrize("wrong", ["", "xor", "xor:1", "xor:65", "raid:4", 4])
def test_a_redundancy_that_is_none_is_refused(wrong: object) -> None:
    """Before anything is begun; so is one beside copies."""
    state = rt.State(model=torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="redundancy must be 'xor:N', with N from 2 to 64 nodes"):
        rt.Checkpointer(state, redundancy=wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="takes the place of copies; leave replicas out"):
        rt.Checkpointer(state, redundancy="xor:4", replicas=2)


LOOPS = """
import sys, torch, resilient_train as rt
from resilient_train.errors import ConfigError
model = torch.nn.Linear(3, 3)
state = rt.State(model=model)
ckpt = rt.Checkpointer(state, sys.argv[1])
try:
    ckpt.snapshot()
except ConfigError as error:
    print("early:", error)
try:
    rt.Checkpointer(state)
except ConfigError as error:
    print("second:", error)
done = [step for last in (3, 6) for step in ckpt.steps(last)]
print("epochs", done)
try:
    ckpt.restore()
except ConfigError as error:
    print("again:", error)
ckpt.close()
own = rt.Checkpointer(state, sys.argv[1])
print("restored", own.restore())
for nonsense in (-1, True, 1 << 40, 7.0):
    try:
        own.snapshot(nonsense)
    except ConfigError as error:
        print("number:", error)
for step in range(6, 9):
    with torch.no_grad():
        model.weight += 1
    assert own.snapshot(step + 1)
try:
    own.snapshot()
except ConfigError as error:
    print("same:", error)
assert own.persist()
own.wait()
own.close()
last = rt.Checkpointer(state, sys.argv[1])
with torch.no_grad():
    expected = model.weight.clone()
    model.weight.zero_()
print("last", last.restore(), torch.equal(model.weight, expected))
"""


def test_loops_of_other_shapes(tmp_path: Path) -> None:
    """Several steps() in a row, restore and snapshot by hand, and what is refused because it would mix states."""
    command = [sys.executable, "-c", LOOPS, str(tmp_path / "run")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stderr
    lines = dict(line.split(" ", 1) for line in result.stdout.splitlines())
    assert lines["epochs"] == "[0, 1, 2, 3, 4, 5]"
    assert lines["restored"] == "6"
    assert lines["last"] == "9 True"
    assert result.stdout.count("number:") == 4
    for refused in ("early:", "second:", "again:", "same:"):
        assert refused in lines


BY_HAND = """
import sys, threading, torch, resilient_train as rt
from resilient_train.image.snapshot import ImageWriter
copied, wait = threading.Event(), ImageWriter.wait
ImageWriter.wait = lambda writer: (copied.wait(), wait(writer))  # However fast a machine copies.
copied.set()
model = torch.nn.Sequential(torch.nn.Linear(4000, 4000, bias=False), torch.nn.Linear(300, 300))
ckpt = rt.Checkpointer(rt.State(model=model), sys.argv[1], persist_every=1000)
ckpt.restore()
for step in range(1, 4):
    assert ckpt.snapshot(step)
ckpt.wait()  # The first three are audited, and those are copied at once.
copied.clear()
assert ckpt.snapshot(4)
with torch.no_grad():
    model[1].weight += 1  # While it is copied.
copied.set()
print("torn:", ckpt.persist())
assert ckpt.snapshot(5)
expected = model[1].weight.clone()
print("whole:", ckpt.persist())
with torch.no_grad():
    model[1].weight.zero_()
ckpt.wait()
ckpt.close()
last = rt.Checkpointer(rt.State(model=model), sys.argv[1])
print("last:", last.restore(), torch.equal(model[1].weight, expected))
"""


def test_a_state_that_is_asked_for_by_hand_is_durable_or_not_said_to_be(tmp_path: Path) -> None:
    """`persist` says whether there is something: not if the copy was torn; what comes later tears nothing."""
    command = [sys.executable, "-c", BY_HAND, str(tmp_path / "run")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["torn: False", "whole: True", "last: 5 True"]
    assert "changed outside of an optimizer step" in result.stderr


FORK = """
import os, sys, torch, resilient_train as rt
torch.set_num_threads(1)  # OpenMP does not survive a fork.
model = torch.nn.Linear(700, 700)
optim = torch.optim.SGD(model.parameters(), lr=0.1)
ckpt = rt.Checkpointer(rt.State(model=model), sys.argv[1], persist_every=100)
keepers = set()
for step in ckpt.steps(12):
    model(torch.ones(700)).sum().backward()
    if step == 6:
        child = os.fork()
        if child == 0:
            optim.step()
            sys.exit(7)
        print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    optim.step()
    keepers.add(id(ckpt._host.keeper._channel))
print("lines to keepers", len(keepers))
"""


def test_a_forked_process_leaves_its_parents_keeper_alone(tmp_path: Path) -> None:
    """It may use what it inherited of the model and end as it likes; the parent's images and line stay."""
    command = [sys.executable, "-c", FORK, str(tmp_path / "run")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["child 7", "lines to keepers 1"]
    assert checkpoints(tmp_path / "run") == ["step-000000012.g1"]


TIMED = """
import sys, time, torch, resilient_train as rt
from pathlib import Path
model = torch.nn.Linear(3, 3)
ckpt = rt.Checkpointer(rt.State(model=model), sys.argv[1], persist_every="0.1s")
step = ckpt.restore()
deadline = time.monotonic() + 60
while len(list(Path(sys.argv[1]).glob("*/manifest.json"))) < 2 and time.monotonic() < deadline:
    step += 1
    ckpt.snapshot(step)
    time.sleep(0.01)
print(sorted(path.parent.name for path in Path(sys.argv[1]).glob("*/manifest.json")))
"""


def test_loops_of_other_shapes_persist_by_time(tmp_path: Path) -> None:
    """Whoever calls snapshot() by hand says with it how far the training is."""
    command = [sys.executable, "-c", TIMED, str(tmp_path / "run")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("step-") == 2


def test_another_models_checkpoint_is_refused_and_kept(tmp_path: Path) -> None:
    """The tensors that differ are named; nothing is overwritten."""
    url = tmp_path / "run"
    assert run(url, 12).returncode == 0
    before = checkpoints(url)
    other = run(url, 20, width=8)
    assert other.returncode != 0
    assert "model/weight: shape [8, 8] here, [6, 6] there" in other.stderr
    assert checkpoints(url) == before


def test_an_unwritable_location_is_refused_before_training(tmp_path: Path) -> None:
    """One clear error, no step done."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    result = run(blocked / "run", 5)
    assert result.returncode != 0
    assert "cannot be written" in result.stderr
    assert "step 0" not in result.stdout
