"""The tests of `tests/test_elementwise_loss.py`, on a device."""

import pytest

from tests.test_elementwise_loss import *  # noqa: F403

pytestmark = pytest.mark.usefixtures("on_device")

# looks at the object itself, not at what it computes
del test_a_loss_looks_like_a_function  # noqa: F821
