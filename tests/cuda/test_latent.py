"""The tests of `tests/test_latent.py`, on a device."""

import pytest

from tests.test_latent import *  # noqa: F403

pytestmark = pytest.mark.usefixtures("on_device")

# looks at the object itself, not at what it computes
del test_losses_are_objects_like_functions  # noqa: F821
