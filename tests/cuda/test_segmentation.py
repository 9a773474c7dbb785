"""The tests of `tests/test_segmentation.py`, on a device."""

import pytest

from tests.test_segmentation import *  # noqa: F403

pytestmark = pytest.mark.usefixtures("on_device")

# warnings point at the caller, who is the one that takes the arrays to the device here, and none is given where the host would wait
del test_a_mean_of_nothing_warns_once_at_the_caller, test_all_masked  # noqa: F821
del test_a_sample_without_elements_has_mean_nan_and_gradient_0  # noqa: F821
# with other dtypes sums take another order
del test_halves_are_the_float32_result_rounded_once, test_mixed_dtypes_compute_in_float64  # noqa: F821
# of several bad elements any is named; test_device.py asks with one
del test_validate_names_the_first_bad_target, test_validate_hints_at_target_scale  # noqa: F821
# threads, a process of its own, and the memory of the host
del test_any_number_of_threads_gives_the_same_bits, test_a_number_alone, test_with_out_nothing_large_is_allocated  # noqa: F821
