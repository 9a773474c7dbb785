"""The tests of `tests/test_options.py`, on a device."""

import pytest

from tests.test_options import *  # noqa: F403

pytestmark = pytest.mark.usefixtures("on_device")

# computes nothing
del test_ulp_table_has_every_loss  # noqa: F821
# the caller is the one who takes the arrays to the device
del test_the_warning_points_at_the_caller, test_value_and_grad_warns_at_the_caller_too  # noqa: F821
