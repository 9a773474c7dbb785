"""The tests of `tests/test_layouts.py`, on a device."""

import pytest

pytest.importorskip("hypothesis")

from tests.test_layouts import *  # noqa: F403

pytestmark = pytest.mark.usefixtures("on_device")

# a minute for fibers; a GPU has its own in test_gpu.py
del test_more_elements_than_32_bits_can_count  # noqa: F821
