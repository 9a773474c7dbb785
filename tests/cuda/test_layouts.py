"""The tests of `tests/test_layouts.py`, on a device."""

import pytest

pytest.importorskip("hypothesis")

from tests.test_layouts import *  # noqa: F403

pytestmark = pytest.mark.usefixtures("on_device")

# the strides of a gradient do not come back to the host; test_device.py looks at them there
del test_two_arrays_in_the_same_odd_order_are_walked_in_memory_order  # noqa: F821
# a minute for fibers; a GPU has its own in test_gpu.py
del test_more_elements_than_32_bits_can_count  # noqa: F821
