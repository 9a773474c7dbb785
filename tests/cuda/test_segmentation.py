"""The tests of `tests/test_segmentation.py`, on a device."""

import pytest

from tests.test_segmentation import *  # noqa: F403

pytestmark = pytest.mark.usefixtures("on_device")
