"""Tests that hold other people's software up to what is said of it, and ours beside it."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "oracle: compares with another implementation, or with a published figure")
