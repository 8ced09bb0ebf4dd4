"""Tests of what several devices do together; `test_eight_devices.py` runs them with eight CPU devices."""

import jax
import pytest


def pytest_collection_modifyitems(items):
    if jax.device_count() < 8:
        for item in items:
            if "eight_devices" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason="needs eight devices"))
