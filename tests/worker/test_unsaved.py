"""What became of a state is told to whoever asks, whenever that is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import os, shutil, sys, time, torch, resilient_train as rt
from resilient_train.errors import StorageError
url = sys.argv[1]
model = torch.nn.Linear(3, 3)
ckpt = rt.Checkpointer(rt.State(model=model), url, persist_every=1000)
ckpt.restore()
ckpt.snapshot(1)
shutil.rmtree(url)
open(url, "w").close()
ckpt.persist()
step = 2
while ckpt._pending:
    ckpt.snapshot(step)
    step += 1
    time.sleep(0.01)
try:
    ckpt.wait()
except StorageError as error:
    print("unsaved:", error)
os.unlink(url)
ckpt.persist()
ckpt.wait()
ckpt.wait()
print("saved")
ckpt.close()
"""


def test_wait_tells_of_a_failure_that_was_heard_before(tmp_path: Path) -> None:
    """A snapshot in between takes the keeper's news in; what could not be saved is still said, and only once."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "run")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert "unsaved: step 1 (lineage 1) is not durable" in result.stdout
    assert result.stdout.endswith("saved\n")


LAST = """
import os, pathlib, shutil, sys, torch, resilient_train as rt
url = pathlib.Path(sys.argv[1])
model = torch.nn.Linear(3, 3)
ckpt = rt.Checkpointer(rt.State(model=model), url, persist_every=1000)
for step in ckpt.steps(3):
    if step == 2:
        shutil.rmtree(url)
        url.write_text("")
print("done")
"""


def test_a_process_whose_last_state_is_lost_says_so_by_its_exit_code(tmp_path: Path) -> None:
    """Without a launcher too: whoever started it would take it for saved."""
    command = [sys.executable, "-c", LAST, str(tmp_path / "run")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 74
    assert result.stdout == "done\n"
    assert "could not be made durable" in result.stderr


DESCRIPTORS = """
import os, sys, torch, resilient_train as rt
from resilient_train.errors import ConfigError
model = torch.nn.Linear(3, 3)
held = []
for _ in range(4):
    ckpt = rt.Checkpointer(rt.State(model=model), sys.argv[1])
    ckpt.restore(); ckpt.close()
    held.append(len(os.listdir("/proc/self/fd")))
try:
    ckpt.wait()
except ConfigError:
    print(held[-1] - held[0])
"""


def test_what_is_closed_holds_no_descriptors(tmp_path: Path) -> None:
    """One Checkpointer after the other, as often as one likes."""
    command = [sys.executable, "-c", DESCRIPTORS, str(tmp_path / "run")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout) == (0, "0\n"), result.stderr
