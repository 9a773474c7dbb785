"""The tests of `tests/test_latent.py`, on a device."""

import pytest

from tests.test_latent import *  # noqa: F403

pytestmark = pytest.mark.usefixtures("on_device")

# look at the objects themselves, not at what they compute
del test_losses_are_objects_like_functions, test_the_signature_names_the_options  # noqa: F821
# warnings point at the caller, who is the one that takes the arrays to the device here, and none is given where the host would wait
del test_a_mean_of_nothing_warns_at_the_caller, test_an_empty_batch_warns_at_the_caller  # noqa: F821
del test_numpy_set_to_raise_changes_nothing  # noqa: F821
