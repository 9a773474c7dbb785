"""The tests of `tests/test_layouts.py`, on a device."""

import pytest

pytest.importorskip("hypothesis")

from tests.test_layouts import *  # noqa: F403

pytestmark = pytest.mark.usefixtures("on_device")
