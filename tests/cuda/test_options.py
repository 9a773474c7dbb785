"""The tests of `tests/test_options.py`, on a device."""

import numpy as np
import pytest

from tests.test_options import *  # noqa: F403

pytestmark = pytest.mark.usefixtures("on_device")


@pytest.fixture
def dtype():
    """float32 alone: what an option does is no matter of the dtype, and every kernel takes its time to be compiled."""
    return np.dtype(np.float32)


# the caller is the one who takes the arrays to the device
del test_the_warning_points_at_the_caller, test_value_and_grad_warns_at_the_caller_too  # noqa: F821
