"""The tests of `tests/test_accuracy.py`, on a device."""

import pytest

from tests.test_accuracy import *  # noqa: F403

pytestmark = pytest.mark.usefixtures("on_device")
