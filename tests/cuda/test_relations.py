"""The tests of `tests/test_relations.py`, on a device."""

import numpy as np
import pytest

from tests.test_relations import *  # noqa: F403

pytestmark = pytest.mark.usefixtures("on_device")


@pytest.fixture
def dtype():
    """float32 alone: what an option does is no matter of the dtype, and every kernel takes its time to be compiled."""
    return np.dtype(np.float32)
