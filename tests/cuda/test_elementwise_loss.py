"""The tests of `tests/test_elementwise_loss.py`, on a device."""

import pytest

from tests.test_elementwise_loss import *  # noqa: F403

pytestmark = pytest.mark.usefixtures("on_device")

# look at the object itself, or are refused before anything is computed
del test_a_loss_looks_like_a_function, test_every_option_is_reserved, test_bounds_of_a_parameter_that_is_not_there  # noqa: F821
del test_what_cannot_be_a_formula_fails_at_once, test_what_cannot_be_compiled_fails_at_once_and_names_the_line  # noqa: F821
del test_a_formula_returns_as_much_with_a_parameter_as_without, test_a_formula_with_fewer_than_two_arguments_is_refused  # noqa: F821
del test_a_helper_of_the_formula_is_named_too  # noqa: F821
