"""The tests of `tests/test_relations.py`, on a device."""

import pytest

from tests.test_relations import *  # noqa: F403

pytestmark = pytest.mark.usefixtures("on_device")
