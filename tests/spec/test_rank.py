"""A rank's report, as it travels."""

from __future__ import annotations

import json

import pytest

from resilient_train.errors import FormatError
from resilient_train.spec.node import NodeInfo
from resilient_train.spec.rank import RankReport, Where

REPORT = RankReport(member="n/0.0", generation=2, step=7, where=Where.UNCLEAR, frame="x.py:1", counts=(("0", 3),))


def test_reports_survive_the_journey() -> None:
    """Alone and in a node's announcement."""
    assert RankReport.from_json(json.loads(json.dumps(REPORT.to_json()))) == REPORT
    info = NodeInfo(node="n", order=0, endpoint="h:1", slots=1, stuck=(REPORT,))
    assert NodeInfo.from_json(json.loads(json.dumps(info.to_json()))) == info


@pytest.mark.parametrize("change", [{"where": "nowhere"}, {"counts": [1]}])
def test_malformed_reports(change: dict) -> None:
    """Raise, before anything is decided from them."""
    with pytest.raises(FormatError):
        RankReport.from_json({**REPORT.to_json(), **change})
