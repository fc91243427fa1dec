"""The pace of saving, and what is said about it, on a clock that the test turns."""

from __future__ import annotations

from resilient_train.keeper.progress import Progress
from resilient_train.plan.pace import Pace
from resilient_train.spec.world import Key


def test_bytes_leave_at_the_agreed_rate() -> None:
    """Over any stretch of time no more than the rate, and after a pause no burst."""
    pace = Pace(100.0)
    assert [pace.delay(now, 50) for now in (0.0, 0.0, 0.0)] == [0.0, 0.5, 1.0]
    assert pace.delay(1.25, 50) == 0.25
    assert pace.delay(60.0, 1000) == 0.0
    assert pace.delay(60.0, 1000) == 10.0
    assert Pace(0.0).delay(5.0, 1 << 40) == 0.0


def test_progress_counts_what_is_written_and_not_what_is_tried_again() -> None:
    """A file that had to be begun anew counts once."""
    slept: list[float] = []
    progress = Progress(Key(1, 30), 10.0, lambda: sum(slept), slept.append)
    progress.expect(200)
    assert str(progress) == "writing step 30 (lineage 1): 200 bytes to go"
    chunks = progress.paced([memoryview(bytes(50)), memoryview(bytes(50))])
    next(iter(chunks))
    assert [len(chunk) for chunk in chunks] == [50, 50]
    assert sum(slept) == 10.0, "three times 50 bytes at 10 a second, the first at once"
    assert str(progress) == "writing step 30 (lineage 1): 50% of 200 bytes, 0 MB/s, 10 s to go"
