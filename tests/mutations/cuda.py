"""Mutations of the CUDA kernels, their launches, and the memory that they need."""

from __future__ import annotations

from functools import partial

from tests.mutations import mutation

DEVICE = "cuda/test_device.py::"
ANY_SIZE, ANY_ALIGNMENT = f"{DEVICE}test_any_size", f"{DEVICE}test_any_alignment"
NO_MEMORY_BEHIND = f"{DEVICE}test_no_memory_behind_an_array_is_accessed"
MANY_RANGES = f"{DEVICE}test_many_samples_and_few_of_many_ranges"
DEFERRED, ANY_VIEW = f"{DEVICE}test_errors_of_targets_are_deferred", f"{DEVICE}test_the_bad_element_is_found_through_any_view"
STREAMS = f"{DEVICE}test_each_stream_has_a_workspace_and_each_captured_launch"
COUNTED = f"{DEVICE}test_elements_are_counted_before_gradients_are_computed"
OVERWRITTEN = f"{DEVICE}test_out_may_overwrite_grad_output"
CLASSES, DIGITS = "test_classes.py::test_reductions_of_every_shape", "test_classes.py::test_every_digit_in_extended_precision"
REGIONS = "test_segmentation_classes.py::"
OF_EACH_CLASS = f"{DEVICE}test_sums_of_each_class_do_not_depend_on_the_device"
BAD_CLASS = f"{DEVICE}test_errors_of_class_indices_are_deferred"
VIEWS, SHORT = "test_layouts.py::test_views", "test_layouts.py::test_short_rows_are_joined"

Mutation = partial(mutation.Mutation, side="cuda")

MUTATIONS: tuple[mutation.Mutation, ...] = (
    # --- loads, stores and conversions
    Mutation(
        "half-exp-uncorrected", "kernel/elementary.py", "fma(root, fma(exponent, -2.0 / LOG2_E, x), root)", "root",
        "The rounding of the exponent is not corrected in the exponential for 16 bits.",
        ("test_half.py::test_every_sum_of_one_element_in_extended_precision",), select="cross_entropy_with_logits and stand",
    ),
    Mutation(
        "half-exp-of-infinity", "kernel/elementary.py", "x = x.at_least(fmt.exp_range[0])", "x = x",
        "The exponential for 16 bits is NaN at infinite logits.", ("test_half.py::test_infinite_logits_have_the_limit",), select="stand",
    ),
    Mutation(
        "load-past-row", "cuda/elements.cuh", "x[j] = j < pos.count ? from[j] : T(0);", "x[j] = from[j];",
        "A pack at the end of a row is loaded past the row.", (NO_MEMORY_BEHIND,),
    ),
    Mutation(
        "store-past-row", "cuda/elements.cuh", "if (j < pos.count) to[j] = x[j];", "to[j] = x[j];",
        "A pack at the end of a row is stored past the row.", (NO_MEMORY_BEHIND, ANY_ALIGNMENT),
    ),
    Mutation(
        "strided-outer-stride", "cuda/elements.cuh", "(long long)(pos.column + pos.ahead + j) * a.inner_strides[k]) : T(0)",
        "(long long)(pos.column + pos.ahead + j) * a.outer_strides[k]) : T(0)",
        "Strided loads take the stride of the outer axis.", (VIEWS,),
    ),
    Mutation(
        "nested-index-too-large", "cuda/elements.cuh", "if (++index == (index_t)a.inner_size) {", "if (++index > (index_t)a.inner_size) {",
        "In rows with two axes, the inner index goes one too far.", (SHORT,),
    ),
    Mutation(
        "device-ties-up", "cuda/elements.cuh", "bits + (bits >> 16 & 1u) + 0x7FFFu", "bits + 0x8000u",
        "Ties are rounded away from 0 in bfloat16.", (f"{DEVICE}test_ties_are_rounded_to_even",),
    ),
    Mutation(
        "device-nan-to-infinity", "cuda/elements.cuh", "x != x ? bits | 1u << 22 :", "x != x ? bits :",
        "A NaN with only low bits becomes an infinity.", (f"{DEVICE}test_a_nan_with_only_low_bits_is_rounded_to_nan",),
    ),
    Mutation(
        "odd-the-wrong-way", "cuda/elements.cuh", "bits + (grows ? 1 : -1)", "bits + (grows ? -1 : 1)",
        "Rounding to odd goes the wrong way.", ("test_half.py::test_float64_is_rounded_once",),
    ),
    Mutation(
        "device-maximum-swallows-nan", "cuda/elements.cuh", "return x != x || y != y ? x + y : x > y ? x : y;", "return x > y ? x : y;",
        "The maximum may lose a NaN.", ("test_elementwise_loss.py::test_minimum_and_maximum_propagate_nan",),
    ),
    # --- the loop
    Mutation(
        "tail-too-long", "cuda/loop.cuh", "(index_t)a.segment_size - (pack + further) * PACK;",
        "(index_t)a.segment_size - (pack + further) * PACK + 1;",
        "The last pack of a row counts one element too many.", (ANY_SIZE, NO_MEMORY_BEHIND),
    ),
    Mutation(
        "segments-at-row-start", "cuda/loop.cuh", "found.first = (segment - row * (index_t)a.row_segments) * (index_t)a.segment_size;",
        "found.first = 0;",
        "Groups that share a row all begin where the row does.", ("test_segmentation.py::test_views",),
    ),
    Mutation(
        "position-in-row", "cuda/loop.cuh", "pos.linear = segment.linear + pack * PACK;", "pos.linear = pos.column;",
        "A bad element is recorded by its position in its row.", (ANY_VIEW,),
    ),
    Mutation(
        "packs-of-a-turn-at-one-place", "cuda/loop.cuh", "pos.ahead = further * PACK;", "pos.ahead = 0;",
        "All packs of a turn are the first one.", (f"{DEVICE}test_ranges_of_many_packs",),
    ),
    Mutation(
        "constants-of-first-segment", "cuda/loop.cuh", "load_constants(place.constants, a, locate_in(a, place.segment, 0, 0));",
        "load_constants(place.constants, a, locate_in(a, find_segment(a, 0), 0, 0));",
        "Every range takes the constants of the first segment.", (f"{DEVICE}test_ranges_of_one_segment",),
    ),
    Mutation(
        "ranges-of-first-segment", "cuda/loop.cuh", "part -= inner * (index_t)a.segment_ranges;", "",
        "A range of a later segment begins past its end.", (f"{DEVICE}test_ranges_of_one_segment",),
    ),
    Mutation(
        "threads-overlap", "cuda/loop.cuh", "at += LANES * PACKS * ROUNDS)", "at += LANES * PACKS)",
        "A thread visits most packs several times.", (f"{DEVICE}test_ranges_of_many_packs",),
    ),
    Mutation(
        "record-forgotten", "cuda/elements.cuh", "    *(volatile long long*)record = a.launch;", "    ;", "A bad element is not reported.",
        (DEFERRED,),
    ),
    Mutation(
        "record-overwritten", "cuda/elements.cuh",
        "if (*(volatile int*)&counters.is_recorded || atomicExch(&counters.is_recorded, 1)) return;", "",
        "Several threads write one record.", (f"{DEVICE}test_the_first_of_several_bad_targets_of_a_thread_is_named",),
    ),
    Mutation(
        "half-of-block-dropped", "cuda/loop.cuh", "for (int half = THREADS / 2; half > 0;", "for (int half = THREADS / 4; half > 0;",
        "The sums of half the threads of a block are dropped.", (ANY_SIZE,),
    ),
    Mutation(
        "no-barrier", "cuda/loop.cuh", "shared[k][threadIdx.x] = totals.x[k];\n    __syncthreads();",
        "shared[k][threadIdx.x] = totals.x[k];",
        "Threads read sums that others have not written yet.", (ANY_SIZE,),
    ),
    Mutation(
        "partials-misread", "cuda/loop.cuh", "partials[range * SUMS + k]", "partials[range + k]",
        "Partial sums are read at the wrong places.", (f"{DEVICE}test_sums_do_not_depend_on_the_device", DEFERRED, ANY_SIZE,
        "test_segmentation.py::test_digits_of_large_groups"),
    ),
    Mutation(
        "partials-of-first-group", "cuda/loop.cuh", "(const volatile double*)a.partials + group * (index_t)a.group_ranges * SUMS;",
        "(const volatile double*)a.partials;", "Every group takes the partial sums of the first.", (MANY_RANGES,),
    ),
    Mutation(
        "counter-not-reset", "cuda/loop.cuh", "if (threadIdx.x == 0) finished = 0;", "",
        "The counter of finished ranges keeps its number after a launch.", (MANY_RANGES, ANY_SIZE),
    ),
    Mutation(
        "one-counter", "cuda/loop.cuh", "((Counters*)a.counters)->finished[group]", "((Counters*)a.counters)->finished[0]",
        "All groups share a counter of finished ranges.", (MANY_RANGES,),
    ),
    Mutation(
        "range-past-end", "cuda/loop.cuh", "end < packs ? end : packs", "end",
        "The last range goes on past the end of its group.", (ANY_SIZE,),
    ),
    Mutation(
        "blocks-take-one-range", "cuda/loop.cuh", "at += gridDim.x) {", "at += (index_t)(a.groups * a.group_ranges)) {",
        "A block takes a single range.", (MANY_RANGES,),
    ),
    Mutation(
        "mean-upside-down", "cuda/loop.cuh", "totals.x[0] / totals.x[1]", "totals.x[1] / totals.x[0]",
        "A mean over unmasked elements is inverted.", ("test_options.py::test_ignore_index_and_mask_together",),
        select="cross_entropy_with_logits",
    ),
    Mutation(
        "results-by-sum", "cuda/loop.cuh", "k * (index_t)a.groups + group, totals.x[k]", "k + group * SUMS, totals.x[k]",
        "Sums of several groups are written in the wrong order.", ("test_segmentation.py::test_groups",),
    ),
    # --- generated code and launches
    Mutation(
        "upstream-of-first-group", "cuda/source.py", "(long long)group * a.upstream_stride", "0 * a.upstream_stride",
        "Every group takes the upstream gradient of the first.", (OVERWRITTEN,),
    ),
    Mutation(
        "count-of-first-group", "cuda/loop.cuh", "((Counters*)a.counters)->counts[group]", "((Counters*)a.counters)->counts[0]",
        "Every group is divided by the count of the first.", (COUNTED,), select="sample_mean",
    ),
    Mutation(
        "counts-not-reset", "cuda/loop.cuh", "counters.counts[group] = 0;", "counters.counts[group] = 1;",
        "A launch leaves a count behind.", (COUNTED,),
    ),
    Mutation(
        "count-of-range-before", "cuda/loop.cuh", "if (threadIdx.x == 0) shared = 0;", ";",
        "The count of a range includes those of the block's earlier ranges.", (COUNTED,),
    ),
    Mutation(
        "counted-past-end", "cuda/loop.cuh", "counts(pack, constant, j, !IS_RAGGED || j < pos.count, number)",
        "counts(pack, constant, j, true, number)", "Elements past the end of a row count.",
        ("test_options.py::test_ignore_index_is_a_mask",), select="cross_entropy_with_logits",
    ),
    Mutation(
        "uneven-ranges", "cuda/launch.py", "range_packs = turns(-(-walked // parts), lanes)",
        "range_packs = turns(-(-plan.groups * group_packs // MAX_RANGES), lanes)",
        "The last range of a group may be much shorter than the others.", (f"{DEVICE}test_blocks_do_the_same_work",),
    ),
    Mutation(
        "uneven-blocks", "cuda/launch.py", "return -(-self.ranges // in_turn)", "return BLOCKS * multiprocessors",
        "Some blocks get one range more than others.", (f"{DEVICE}test_blocks_do_the_same_work",),
    ),
    Mutation(
        "quotient-without-correction", "cuda/elements.cuh", "return fma(fma(-divisor, q, dividend), r, q);", "return q;",
        "A quotient is as inaccurate as the estimate of the reciprocal.", ("test_accuracy.py::test_quotients",),
    ),
    Mutation(
        "indices-of-32-bits", "cuda/launch.py", "INT32 = 2**31 - 2**20", "INT32 = 2**32", "Large batches are indexed in 32 bits.",
        (f"{DEVICE}test_large_batches_are_counted_in_64_bits",),
    ),
    Mutation(
        "wide-indices-narrow", "cuda/source.py", '"unsigned long long" if variant.is_wide', '"unsigned int" if variant.is_wide',
        "The wide variant of a kernel has indices of 32 bits.", (f"{DEVICE}test_large_batches_are_counted_in_64_bits",),
    ),
    Mutation(
        "alignment-of-device-axes", "cuda/launch.py", "distances = [pack * size, *(by[k] for _, by in plan.axes)]",
        "distances = [pack * size]",
        "Wide loads ignore the strides between rows.", (VIEWS,),
    ),
    Mutation(
        "alignment-of-address", "cuda/launch.py", "[gcd(width, address) for", "[width for", "Wide loads ignore the addresses of arrays.",
        (ANY_ALIGNMENT,),
    ),
    Mutation(
        "alignment-of-segments", "cuda/launch.py", "if self.cut.row_segments > 1:", "if self.cut.row_segments > 2:",
        "Wide loads ignore where the second group of a row begins.", (MANY_RANGES,),
    ),
    Mutation(
        "never-ragged", "cuda/launch.py", "ragged = self.cut.segment_size % pack_of(self.plan.spec) != 0", "ragged = False",
        "Rows are taken to have whole packs.", (NO_MEMORY_BEHIND, ANY_SIZE),
    ),
    Mutation(
        "bad-operand", "cuda/launch.py", "checked[key % len(checked)], key // len(checked)", "checked[0], key // len(checked)",
        "The error always names the first operand.", (DEFERRED,),
    ),
    Mutation(
        "index-not-reversed", "cuda/launch.py", "count if strides[axis] > 0 else shape[axis] - 1 - count", "count",
        "The index of a bad element ignores negative strides.", (ANY_VIEW,),
    ),
    Mutation(
        "upstream-overwritten", "cuda/call.py", "upstream = upstream.copy()", "pass",
        "The kernel reads an upstream gradient that it overwrites.",
        (OVERWRITTEN,),
    ),
    # --- entries with several classes
    Mutation(
        "first-class-largest", "cuda/classes.cuh", "{ return y > x ? y : x; }", "{ return x > (compute_t)-1e30 ? x : y; }",
        "The logit of the first class is taken for the largest.", (DIGITS,), select="19-30 and focal",
    ),
    Mutation(
        "classes-visited-twice", "cuda/classes.cuh", "first += AHEAD * TEAM", "first += AHEAD",
        "Threads of a team visit classes of others.",
        (CLASSES,), select="many and none",
    ),
    Mutation(
        "batches-of-classes-overlap", "cuda/classes.cuh", "load_class(loaded[k], a, pack, first + k * TEAM);",
        "load_class(loaded[k], a, pack, first);", "A thread loads the first class of a batch for all of them.", (CLASSES,),
        select="pixels and none",
    ),
    Mutation(
        "team-without-barrier", "cuda/classes.cuh", "    shared[MEMBER] = own;\n    __syncthreads();", "    shared[MEMBER] = own;",
        "Threads of a team read what others have not written yet.", (CLASSES,), select="many and none",
    ),
    Mutation(
        "ties-of-one-thread", "cuda/classes.cuh", "both.ties += y.ties;", "",
        "Classes with the largest logit count in one thread of a team.", (CLASSES,), select="many and none",
    ),
    Mutation(
        "every-member-adds", "cuda/classes.py", "if (MEMBER == 0) sums.total", "sums.total",
        "Every thread of a team adds its entry to the sums.",
        (CLASSES,), select="many and sum",
    ),
    Mutation(
        "excluded-not-cleared", "cuda/classes.cuh", "if (own < 0) return clear(a, pack);", "if (own < 0) return;",
        "The outputs of entries that do not count keep what was in their memory.", ("test_classes.py::test_relations",),
    ),
    Mutation(
        "class-too-many", "cuda/classes.py",
        "(index >= 0) & (index < Scalar(at.lines, \"a.classes.length\", \"long long\"))", "(index >= 0)",
        "An index beyond the classes reads other memory.", (BAD_CLASS,), select="int8-5",
    ),
    Mutation(
        "bad-class-along-classes", "cuda/launch.py", "for length, by in self.axes:", "for length, by in self.plan.axes:",
        "The position of a bad class index is looked for along the classes.", (BAD_CLASS,), select="first and int8-5",
    ),
    Mutation(
        "divisor-of-first-group", "cuda/loop.cuh", "((const double*)a.divisors)[range.group]", "((const double*)a.divisors)[0]",
        "Every sample is divided by the weights of the first.", (CLASSES,), select="pixels and sample_mean",
    ),
    Mutation(
        "classes-of-the-last-turn", "cuda/loop.cuh", "begins ? totals.x[k] : sums[k] + totals.x[k]", "totals.x[k]",
        "Sums of classes keep the last turn of a range alone.", (OF_EACH_CLASS,), select="turns",
    ),
    Mutation(
        "classes-of-the-first-range", "cuda/loop.cuh", "partials[(long long)range * sums + at]", "partials[at]",
        "The sums of the classes of a group's first range count for all of them.", (OF_EACH_CLASS,), select="many and ranges",
    ),
    Mutation(
        "sums-of-ranges-rounded", "cuda/loop.cuh", "total + low;", "total;",
        "The rounding errors of the sums over ranges are dropped.",
        (f"{DEVICE}test_sums_of_each_class_over_many_ranges_keep_their_digits",),
    ),
    Mutation(
        "classes-of-uncounted-entries", "cuda/loop.cuh", "if (packs[p].entry.own >= 0) {", "if (true) {",
        "Entries that do not count are added to the sums of classes.", (f"{REGIONS}test_excluded_pixels_do_not_count",),
        select="float32",
    ),
    Mutation(
        "tops-of-one-thread", "cuda/classes.cuh", "add_exactly(both.top, both.top_low, y.top, y.top_low);", "",
        "Slopes of classes with the largest logit count in one thread of a team.", (f"{REGIONS}test_many_classes",), select="30",
    ),
    Mutation(
        "classes-nested-address", "cuda/elements.cuh", "outer = IS_NESTED ? column / (index_t)a.inner_size : 0;", "outer = 0;",
        "Entries in rows with two axes are looked for along the inner axis.", ("test_classes.py::test_any_memory_order",),
    ),
    Mutation(
        "difference-rounded", "kernel/entry.py", "small - (d - large)", "d.splat(0.0)",
        "The rounding error of the distance to the largest logit is lost.", (DIGITS,), select="30",
    ),
    Mutation(
        "exponentials-uncompensated", "kernel/entry.py", "(sums.rest + sums.low) + (sums.ties - 1.0)", "sums.rest + (sums.ties - 1.0)",
        "The rounding errors of the sum over many classes are lost.", (DIGITS,), select="1000",
    ),
    Mutation(
        "teams-of-any-stride", "cuda/launch.py", "return THREADS if abs(stride) == plan.spec.arrays[0].size else 1", "return THREADS",
        "Teams also compute entries whose classes are far from each other.", (f"{DEVICE}test_teams_compute_classes_side_by_side",),
    ),
    # --- streams and records
    Mutation(
        "one-workspace", "cuda/workspace.py", "key = device, stream.ptr, threading", "key = device, 0, threading",
        "All streams share a workspace.", (STREAMS,),
    ),
    Mutation(
        "threads-share", "cuda/workspace.py", "threading.get_ident() if stream.ptr == PER_THREAD else 0", "0",
        "Default streams of several threads share a workspace.",
        (f"{DEVICE}test_threads_with_default_streams_of_their_own_share_no_workspace",),
    ),
    Mutation(
        "captured-in-workspace", "cuda/workspace.py", "    if is_capturing(stream):\n        spare", "    if False:\n        spare",
        "A captured launch shares the workspace of its stream.", (STREAMS,),
    ),
    Mutation(
        "spare-counters-shared", "cuda/workspace.py", "spare.pop()", "spare[-1]", "Captured launches share their counters.", (STREAMS,),
    ),
    Mutation(
        "spare-counters-overlap", "cuda/workspace.py", "memory + k * COUNTERS", "memory + k * FLAG",
        "The flag of a bad element lies in the counters of the next workspace.", (STREAMS,),
    ),
    Mutation(
        "ranges-without-turns", "cuda/launch.py", "min(-(-total // AT_ONCE), lanes * packs_of(plan.spec))", "0",
        "A thread has one pack, however many ranges there are.",
        (f"{DEVICE}test_more_ranges_than_are_computed_at_once_have_a_turn_for_each_thread",),
    ),
    Mutation(
        "flag-not-cleared", "cuda/workspace.py", "                (self.counters + FLAG).memset_async(0, 4)", "                pass",
        "After one bad element, no other is recorded.", (DEFERRED,),
    ),
    Mutation(
        "rescale-past-end", "cuda/rescale.cuh", "k < a.size; k += stride", "k < a.size - 1; k += stride",
        "The last element is not multiplied by the upstream gradient.", ("cuda/test_torch.py::test_upstream_gradients",),
    ),
    Mutation(
        "flush-to-zero", "cuda/compile.py", '"--ftz=false"', '"--ftz=true"', "Subnormal numbers become 0.",
        (f"{DEVICE}test_subnormal_numbers_are_not_flushed_to_zero",),
    ),
    Mutation(
        "factors-of-power", "kernel/elementary.py", "where(negative, e_r.splat(2.0**-half), 2.0**half)",
        "where(negative, e_r.splat(2.0**half), 2.0**-half)", "The second factor of a power of two has the wrong sign.",
        ("test_accuracy.py::test_functions_of_the_vocabulary",), select="float32-exp",
    ),
)  # fmt: skip
