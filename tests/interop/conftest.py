"""DCP says by warnings that it works without a process group, which these tests mean."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore::UserWarning:torch.*"))
            item.add_marker(pytest.mark.filterwarnings("ignore:torch.distributed is disabled"))
            item.add_marker(pytest.mark.timeout(120))
