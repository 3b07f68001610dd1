"""The order of the tests: what takes minutes in one piece starts first, or a core waits for it."""

import pytest

LONGEST = "tests/unit/test_triton_operations.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest file in front; the others stay in their order."""
    items.sort(key=lambda item: LONGEST not in item.nodeid)
