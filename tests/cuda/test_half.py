"""The tests of `tests/test_half.py`, on a device."""

import pytest

from tests.test_half import *  # noqa: F403

pytestmark = pytest.mark.usefixtures("on_device")

# sums of elements of 16 bits take another order than those of 32, as more of them fit into a word: not equal to the last bit
del test_as_float32_and_rounded_once, test_mixed_in_every_direction, test_integer_targets  # noqa: F821
