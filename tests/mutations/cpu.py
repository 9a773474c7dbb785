"""Mutations of the CPU's loop, launches and threads, and of plans, checks, caches and formulas."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

SHAPES, VIEWS = "test_layouts.py::test_shapes", "test_layouts.py::test_views"
OUTSIDE = "test_layouts.py::test_nothing_outside_the_output_is_written"
ALIGNED = "test_layouts.py::test_large_outputs_of_any_alignment"
ODD_ROWS = "test_layouts.py::test_large_samples_and_rows_of_odd_length"
SHORT = "test_layouts.py::test_short_rows_are_joined"
MASK = "test_options.py::test_mask_takes_elements_out"
EDGES, BULK = "test_accuracy.py::test_edges_in_60_digits", "test_accuracy.py::test_bulk_in_extended_precision"
FUNCTIONS = "test_accuracy.py::test_functions_of_the_vocabulary"
LIMITS = "test_accuracy.py::test_infinite_logits_have_the_limit"
SUMS_OF_ONE = "test_half.py::test_every_sum_of_one_element_in_extended_precision"
DIGITS = "test_classes.py::test_every_digit_in_extended_precision"
ONCE = "test_half.py::test_float64_is_rounded_once"

MUTATIONS = (
    # --- the loop
    Mutation(
        "row-mask-inclusive", "cpu/step.py", 'icmp_signed("<", lane_ids(lanes), ', 'icmp_signed("<=", lane_ids(lanes), ',
        "The masks at the end of a row have one lane too many.", (OUTSIDE,),
    ),
    Mutation(
        "full-step-too-early", "cpu/step.py", 'icmp_signed(">=", left, I64(self.lanes))', 'icmp_signed(">=", left, I64(self.lanes - 1))',
        "A step that lacks one element counts as full.", (OUTSIDE, SHAPES),
    ),
    Mutation(
        "sums-past-row", "cpu/step.py", "return [self.builder.select(mask, v.value, ir.Constant(v.type, None)) for v in vectors]",
        "return [v.value for v in vectors]", "Lanes past the end of a row are added to the sums.", (SHAPES,),
    ),
    Mutation(
        "nested-strides-swapped", "cpu/step.py",
        "builder.mul(outer, spread(builder, row.outer_strides[k], self.lanes)), builder.mul(index, stride)",
        "builder.mul(index, spread(builder, row.outer_strides[k], self.lanes)), builder.mul(outer, stride)",
        "In rows with two axes, the inner and the outer index are swapped.", (SHORT,),
    ),
    Mutation(
        "nested-division-too-large", "cpu/step.py", "[0.5] * self.lanes", "[1.0] * self.lanes",
        "The last element of an inner axis is counted to the next one.", (SHORT,),
    ),
    Mutation(
        "nested-division-without-half", "cpu/step.py", "[0.5] * self.lanes", "[0.0] * self.lanes",
        "The division of small integers in float32 has no margin.", (SHORT,),
        survives="IEEE division of such small integers never rounds a quotient up to the next integer; the half is a margin",
    ),
    Mutation(
        "strided-without-start", "cpu/step.py", "builder.mul(builder.add(spread(builder, self.start, self.lanes), self.ids), stride)",
        "builder.mul(self.ids, stride)", "Every step of a strided row reads the first elements.", (VIEWS,),
    ),
    Mutation(
        "shifted-lines-misplaced", "cpu/step.py", "head = LINE - PIECE", "head = PIECE",
        "Whole cache lines are stored at addresses that are not those of cache lines.", (ALIGNED,),
    ),
    Mutation(
        "parts-at-first-place", "cpu/step.py", "builder.gep(pointer, [I64(first // 4)])", "builder.gep(pointer, [I64(0)])",
        "All parts of a non-temporal store go to the first place.", (ALIGNED,),
    ),
    Mutation(
        "prefetch-far-beyond", "cpu/step.py", "PREFETCH = 2048", "PREFETCH = 1 << 24", "Prefetches go far beyond the arrays.", (ALIGNED,),
        survives="a prefetch of an address that does not exist has no effect",
    ),
    Mutation(
        "added-twice", "cpu/step.py", "return element.accumulate(old, new, as_factors)",
        "return element.accumulate(element.accumulate(old, new, as_factors), new, as_factors)", "Each step is added twice.", (SHAPES,),
    ),
    Mutation(
        "half-of-step-dropped", "cpu/step.py", "new = element.accumulate(*new.halves(), as_factors)", "new = new.halves()[0]",
        "Sums take the lower lanes of a step only.", (SHAPES,),
    ),
    Mutation(
        "blocks-too-long", "cpu/step.py", "BLOCK = 64 * REGISTER_BYTES", "BLOCK = 65536 * REGISTER_BYTES",
        "Long parts of rows are summed in float32.",
        ("test_options.py::test_a_constant_batch_sums_without_bias", "test_options.py::test_the_largest_logarithms_sum_without_overflow"),
    ),
    Mutation(
        "fold-forgets-sum", "cpu/step.py", "new[k] = new[k] + widen(", "new[k] = widen(",
        "The logarithm of a product replaces the sum instead of being added.", (SHAPES,),
    ),
    Mutation(
        "lanes-not-added", "cpu/loop.py", "while lanes.type.count > 1:", "while lanes.type.count > 2:",
        "The last two lanes of a sum are not added.", (SHAPES,),
    ),
    Mutation(
        "range-past-group", "cpu/loop.py", "stop = min(at + range_size, (part + 1) * part_size)", "stop = at + range_size",
        "The last range of a group goes on into the next group.", (ODD_ROWS,),
    ),
    Mutation(
        "range-index-of-batch", "cpu/loop.py", "(index - part * per_part) * range_size", "index * range_size",
        "Ranges of later groups begin too late.", (ODD_ROWS,),
    ),
    Mutation(
        "range-takes-whole-row", "cpu/loop.py", "end_of_row = min(row_size, column + stop - at)", "end_of_row = row_size",
        "A range goes on to the end of its row.", (SHAPES,),
    ),
    Mutation(
        "axis-fields-misread", "cpu/loop.py", "axis += 1 + len(base)", "axis += len(base)", "The second axis outside a row is misread.",
        (VIEWS,),
    ),
    Mutation(
        "axis-index-unreduced", "cpu/loop.py", "place - rest * layout[axis])", "place)",
        "Indices along inner axes are not reduced to the axis.", (VIEWS,),
    ),
    Mutation(
        "block-past-row", "cpu/loop.py", "last = min(first + block, end_of_row)", "last = first + block",
        "A block goes on past the end of its row.", (OUTSIDE,),
    ),
    Mutation(
        "partials-overwritten", "cpu/loop.py", "end_range(partials, partial_count * index, totals)",
        "end_range(partials, partial_count * part, totals)", "The ranges of a group overwrite each other's partial sums.", (ODD_ROWS,),
    ),
    Mutation(
        "first-scale-for-all", "cpu/loop.py", "builder.gep(args[1], [builder.mul(args[3], args[2])])", "args[1]",
        "Every group takes the scale of the first.", ("test_options.py::test_grad_output_is_the_chain_rule",),
        select="cross_entropy_with_logits and sample_sum",
    ),
    # --- launches and layouts
    Mutation(
        "lines-unaligned", "cpu/launch.py", "if self.alignment % LINE == 0 and firsts <= {0}:", "if self.alignment % LINE == 0:",
        "Non-temporal stores of lines go to arrays that are not aligned.", (ALIGNED,),
    ),
    Mutation(
        "pieces-unaligned", "cpu/launch.py", "return NONTEMPORAL if all(first % PIECE == 0 for first in firsts) else CACHED",
        "return NONTEMPORAL", "Non-temporal stores of pieces go to arrays that are not aligned.", (ALIGNED,),
    ),
    Mutation(
        "alignment-of-groups", "cpu/launch.py", "lengths = [plan.group_size * size,", "lengths = [0,",
        "The alignment of an output ignores where its groups begin.", (ODD_ROWS,),
    ),
    Mutation(
        "alignment-of-axes", "cpu/launch.py", "gcd(LINE, *lengths, *strides)", "gcd(LINE, *lengths)",
        "The alignment of an output ignores the strides between its rows.",
        ("test_layouts.py::test_large_rows_of_an_output_with_gaps",),
    ),
    Mutation(
        "in-place-past-caches", "cpu/launch.py", "if set(addresses[:reads]) & set(addresses[reads:]):", "if False:",
        "Outputs over their operand are stored past the caches.", ("test_half.py::test_any_length_any_stride_in_place",),
        survives="the results are the same; such stores are only slower",
    ),
    Mutation(
        "last-range-dropped", "cpu/launch.py", "sum(sums[k :: self.partials])", "sum(sums[k :: self.partials][:-1])",
        "The partial sums of the last range are not added.", (SHAPES,),
    ),
    Mutation(
        "one-bad-element-missed", "cpu/launch.py", "return sums, sums[-1] > 0.0", "return sums, sums[-1] > 2.0",
        "A single element outside [0, 1] is not reported.", ("test_errors.py::test_validate_hints_at_target_scale",),
    ),
    Mutation(
        "layout-strides-swapped", "cpu/abi.py", "[*plan.inner_strides, *plan.outer_strides, *plan.starts]",
        "[*plan.outer_strides, *plan.inner_strides, *plan.starts]", "The inner and the outer strides are swapped.", (SHORT, VIEWS),
    ),
    # --- plans, checks and calls
    Mutation(
        "reversed-start", "core/plan.py", "start + stride * (length - 1)", "start + stride * length",
        "A reversed axis begins one element too far.", (VIEWS,),
    ),
    Mutation("merge-any", "core/plan.py", "if merged and all(", "if merged and any(", "Axes merge if one array allows it.", (VIEWS,)),
    Mutation(
        "never-nested", "core/plan.py", "if outer_stride != stride * inner_size:", "if outer_stride < 0:",
        "Rows with two axes are read as a single axis.", (SHORT,),
    ),
    Mutation(
        "narrow-arithmetic", "core/plan.py", 'if op.name in ("input", "target"))', 'if op.name == "input")',
        "A float64 target does not make the arithmetic float64.", ("test_options.py::test_mixed_dtypes_compute_in_float64",),
        select="cross_entropy_with_logits",
    ),
    Mutation(
        "key-without-formula", "core/plan.py", 'trace=request.formula.trace(request.parameters) if computes else "",',
        'trace="formula" if computes else "",', "Kernels of different formulas have the same key.",
        ("test_elementwise_loss.py::test_formulas_with_different_constants_have_different_kernels",),
    ),
    Mutation(
        "weighted-factors", "core/plan.py", 'if any(op.name == "weight" for op in self.operands):',
        'if any(op.name == "weights" for op in self.operands):', "Logarithms of a weighted sum are multiplied without their weights.",
        ("test_options.py::test_weight_multiplies_but_does_not_change_the_denominator_of_the_mean",), select="cross_entropy_with_logits",
    ),
    Mutation(
        "broadcast-steps", "core/plan.py", "along = (0 if have == 1 else stride for", "along = (stride for",
        "An array steps along an axis of length 1 that it broadcasts.", (SHORT,),
    ),
    Mutation(
        "overlap-first-byte", "core/overlap.py", "(k, j, begin - last, end - first)", "(k, j, begin - last + 1, end - first)",
        "An output that ends one byte inside an operand is accepted.", ("test_errors.py::test_outputs_that_overlap_by_a_byte",),
    ),
    Mutation(
        "overlap-last-byte", "core/overlap.py", "(k, j, begin - last, end - first)", "(k, j, begin - last, end - first - 1)",
        "An output that begins one byte inside an operand is accepted.", ("test_errors.py::test_outputs_that_overlap_by_a_byte",),
    ),
    Mutation(
        "overlap-of-transposed", "core/overlap.py", " and all(a == b for a, b in strides)", "",
        "An output over its operand in another order is accepted.", ("test_errors.py::test_out_over_the_transposed_input",),
    ),
    Mutation(
        "sample-mean-of-batch", "core/call.py", "return math.prod(self.entries[1:])", "return math.prod(self.entries)",
        "The mean of a sample is divided by the size of the batch.", ("test_options.py::test_reductions",),
        select="cross_entropy_with_logits",
    ),
    Mutation(
        "batchmean-by-last-axis", "core/call.py", "return self.shape[0] if", "return self.shape[-1] if",
        "A batchmean is divided by the length of the last axis.", ("test_options.py::test_reductions",), select="cross_entropy_with_logits",
    ),
    Mutation(
        "sample-count-not-masked", "core/call.py", 'self.reduction in ("mean", "sample_mean")', 'self.reduction == "mean"',
        "The mean of a masked sample counts every element.", (MASK,), select="cross_entropy_with_logits",
    ),
    Mutation(
        "count-without-mask", "core/call.py", '("target", "mask", "ignore_index") if', '("target", "ignore_index") if',
        "With ignore_index, masked elements are counted.", ("test_options.py::test_ignore_index_and_mask_together",),
        select="cross_entropy_with_logits",
    ),
    Mutation(
        "ignored-not-rounded", "core/call.py", "float(np.asarray(ignored, dtype)) if is_float(dtype) else ignored", "ignored",
        "The ignored value is not rounded as targets are.", ("test_half.py::test_an_ignored_target_is_rounded_as_targets_are",),
    ),
    Mutation(
        "bounds-exclude-least", "core/checks.py", "if not low <= number <= high:", "if not low < number <= high:",
        "The least number of a parameter is refused.", ("test_relations.py::test_smooth_l1_without_a_parabola_is_l1",),
    ),
    # --- elements
    Mutation(
        "mask-inverted", "kernel/element.py", '(raw["mask"] != 0)', '(raw["mask"] == 0)', "Masks are inverted.", (MASK,),
        select="cross_entropy_with_logits",
    ),
    Mutation(
        "target-not-scaled", "kernel/element.py", 'multiply(loaded["target"], number.get("target_scale"))', 'loaded["target"]',
        "The option target_scale has no effect.", ("test_options.py::test_integer_targets_equal_their_float_copy_bit_by_bit",),
    ),
    Mutation(
        "value-times-upstream", "kernel/element.py", 'weight if output.name == "value" else factor', "factor",
        "Values of elements are multiplied by the upstream gradient.", ("test_options.py::test_grad_output_does_not_change_values",),
    ),
    Mutation(
        "masked-results-kept", "kernel/element.py", "where(counted, result, 0.0) if spec.excludes else result", "result",
        "Masked elements have gradients.", (MASK,), select="cross_entropy_with_logits",
    ),
    Mutation(
        "masked-factors", "kernel/element.py", "factors.append(where(counted, e, 0.0))", "factors.append(e)",
        "Masked elements multiply their factors into the sum.", (MASK,), select="cross_entropy_with_logits",
    ),
    Mutation(
        "weighted-count", "kernel/element.py", 'value if name == "count" else multiply(value, weight)', "multiply(value, weight)",
        "Weights change the number of elements that a mean divides by.",
        ("test_options.py::test_a_weight_does_not_change_the_count_of_a_masked_value",),
    ),
    Mutation(
        "nan-is-valid", "kernel/element.py", "counted & ~((x >= 0.0) & (x <= 1.0))", "counted & ((x < 0.0) | (x > 1.0))",
        "A NaN passes the check of probabilities.", ("test_errors.py::test_validate_names_the_first_bad_target",),
    ),
    Mutation(
        "factors-added", "kernel/element.py", "return x + fma(x, y, y) if as_factors else x + y", "return x + y",
        "Factors are added instead of multiplied.", (SHAPES,),
    ),
    # --- elementary functions and conversions
    Mutation(
        "exp-coefficient", "kernel/elementary.py", "0.166665147921380389", "0.166667147921380389",
        "A coefficient of exp is off in its sixth digit.", (FUNCTIONS,), select="float32",
    ),
    Mutation(
        "exp-coefficient-double", "kernel/elementary.py", "0.50000000000000117", "0.50000000000000917",
        "A coefficient of exp is off in its fourteenth digit.", (FUNCTIONS,), select="float64",
    ),
    Mutation(
        "log-coefficient", "kernel/elementary.py", "0.33333330665121394", "0.33333530665121394",
        "A coefficient of log is off in its sixth digit.", (FUNCTIONS,), select="float32",
    ),
    Mutation(
        "expm1-branch", "kernel/elementary.py", "where(x > -0.34, minus_1", "where(x > -0.36, minus_1",
        "The branch of expm1 near 0 reaches beyond half of log 2.", (FUNCTIONS,), select="expm1",
    ),
    Mutation(
        "tanh-sign", "kernel/elementary.py", "return copysign(fma(fma(q, h, h - 2.0 * q), r, q), x)",
        "return fma(fma(q, h, h - 2.0 * q), r, q)", "The hyperbolic tangent loses its sign.", (FUNCTIONS,), select="tanh",
    ),
    Mutation(
        "exact-pivot-too-small", "core/exact.py", "(x.size + 2).bit_length()", "1", "Sums of many leading bits are rounded.",
        ("test_accumulator.py::test_sums_are_exact",),
    ),
    Mutation(
        "ranges-by-batch", "core/plan.py", "choose_range_size(group_size, (GROUP", "choose_range_size(group_size, groups * 9000 + (GROUP",
        "The ranges of a sample depend on the size of the batch.",
        ("test_accumulator.py::test_any_split_and_any_order_of_merges_gives_the_same_bits",),
    ),
    Mutation(
        "half-functions-for-singles", "core/plan.py", 'self.compute == "f4" and sizes == {2}', 'self.compute == "f4"',
        "Results of 32 bits come from the functions for 16 bits.", (BULK,),
    ),
    Mutation(
        "half-exp-coefficient", "kernel/elementary.py", "0.166671332138", "0.166691332138",
        "A coefficient of the exponential for 16 bits is off in its fifth digit.", (SUMS_OF_ONE,), select="cross_entropy_with_logits",
    ),
    Mutation(
        "half-exp-scale", "kernel/elementary.py", "r = fma(n, -1.0 / LOG2_E, x)", "r = fma(n, -0.6931, x)",
        "The exponential for 16 bits is wrong by a hundred-thousandth for each power of two.", (SUMS_OF_ONE,),
        select="cross_entropy_with_logits",
    ),
    Mutation(
        "half-log1p-coefficient", "kernel/elementary.py", "-0.244954572919", "-0.244994572919",
        "A coefficient of log1p for 16 bits is off in its fourth digit.", (SUMS_OF_ONE,),
        select="cross_entropy_with_logits",
    ),
    Mutation(
        "half-tanh-near-zero", "kernel/elementary.py", "where(abs(x) < 0.25, near,", "where(abs(x) < 0.0, near,",
        "The hyperbolic tangent for 16 bits cancels near 0.", ("test_half.py::test_every_input_in_extended_precision",),
        select="log_cosh",
    ),
    Mutation(
        "maximum-swallows-nan", "cpu/vector.py", "return _where(unordered, x + y, chosen)", "return chosen",
        "Minimum and maximum may lose a NaN.", ("test_elementwise_loss.py::test_minimum_and_maximum_propagate_nan",),
    ),
    Mutation(
        "bfloat16-ties-up", "cpu/vector.py", "bits + odd + 0x7FFF", "bits + 0x8000", "Ties are rounded away from 0 in bfloat16.", (ONCE,),
    ),
    Mutation(
        "rounded-twice", "cpu/vector.py", 'self.round_to_odd() if code == "f8" else self',
        'self.cast("fptrunc", "f4") if code == "f8" else self',
        "A float64 number is rounded to float32 before it is rounded to 16 bits.", (ONCE,),
    ),
    # --- formulas
    Mutation(
        "slope-not-reflected", "losses/logistic.py", "return value, where(z > 0.0, slope, -slope)",
        "return value, where(z > 0.0, slope, slope)",
        "The slope of the cross-entropy has the wrong sign at negative logits.", (LIMITS,),
    ),
    Mutation(
        "infinity-times-0", "losses/logistic.py", "return where(wrong == 0.0, 0.0, magnitude * wrong)", "return magnitude * wrong",
        "An infinite logit that agrees with its target gives NaN.", (LIMITS,),
    ),
    Mutation(
        "pos-weight-in-one-place", "losses/logistic.py", "wrong - mass * s, mass * variance(s)", "wrong - s, mass * variance(s)",
        "The slope takes pos_weight into account in one of two places.", ("test_accuracy.py::test_pos_weight_in_extended_precision",),
    ),
    Mutation(
        "smoothing-sign", "losses/logistic.py", "t + label_smoothing * (0.5 - t)", "t - label_smoothing * (0.5 - t)",
        "Label smoothing moves targets away from 1/2.", ("test_options.py::test_label_smoothing_equals_smoothed_targets",),
    ),
    Mutation(
        "huber-at-delta", "losses/regression.py", "near = size <= delta", "near = size < delta",
        "An error of exactly delta counts as an outlier.", ("test_relations.py::test_an_error_of_delta_is_on_the_parabola_of_huber",),
    ),
    Mutation(
        "smooth-l1-at-0", "losses/regression.py", "near = size < beta", "near = size <= beta",
        "With beta = 0, an error of 0 gives NaN.", (EDGES,), select="smooth_l1",
    ),
    Mutation(
        "log-cosh-rounding", "losses/regression.py", "fma(-2.0 * slope * lost, curvature, curvature)", "curvature",
        "The curvature ignores the rounding error of the difference.", (BULK,), select="log_cosh",
    ),
    Mutation(
        "infinity-minus-infinity", "losses/latent.py", "0.5 * minimum(logvar, 1000.0)", "0.5 * logvar",
        "An infinite log-variance gives NaN.", ("test_latent.py::test_limits",),
    ),
    Mutation(
        "dice-overlap-once", "losses/regions.py", '2 * sums["overlap"] + smooth', 'sums["overlap"] + smooth',
        "The overlap counts once in the Dice loss.", ("test_segmentation.py::test_groups",),
    ),
    Mutation(
        "dice-entropy-divisor", "losses/regions.py", 'weight * np.divide(self.upstream, self.divisor("count"))',
        'weight * np.divide(self.upstream, self.divisor("present"))',
        "The gradient of the cross-entropy is divided by the number of regions.",
        ("test_segmentation.py::test_dice_and_cross_entropy_add_up",),
    ),
    # --- repeated calls, memory, threads, the cache
    Mutation(
        "prepared-without-strides", "backends/numpy.py", "get_layout(first), get_layout(second), form",
        "first.dtype, first.shape, get_layout(second), form", "A repeated call ignores the strides of its input.", (VIEWS,),
    ),
    Mutation(
        "prepared-without-dtype", "backends/numpy.py", "get_layout(first), get_layout(second), form",
        "first.shape, first.strides, get_layout(second), form", "A repeated call ignores the dtype of its input.",
        ("test_half.py::test_both_halves_in_turn",),
    ),
    Mutation(
        "prepared-without-options", "backends/numpy.py", "[*arrays, *others], (*key, forms)", "[*arrays, *others], key",
        "A repeated call ignores which options are passed.", (MASK,), select="cross_entropy_with_logits",
    ),
    Mutation(
        "prepared-overlap", "backends/numpy.py", "made.launch.plan.check_overlap(every, addresses)", "pass",
        "A prepared call does not check that its output has memory of its own.", ("test_errors.py::test_overlapping_out",),
    ),
    Mutation(
        "lent-block-reused", "cpu/memory.py", "_free.remove(memory)", "_free.index(memory)",
        "The cache of memory hands out a block that is in use.", ("test_torch.py::test_memory_of_large_gradients_is_reused",),
    ),
    Mutation(
        "worker-not-awaited", "cpu/pool.py", "br i1 %running, label %wait, label %ended", "br i1 %running, label %ended, label %ended",
        "A call returns while a worker still computes.", ("test_threads.py::test_a_call_waits_for_a_worker_that_has_begun",),
    ),
    Mutation(
        "worker-returned-twice", "cpu/pool.py", "idle.extend(workers)", "idle.extend(workers * 2)",
        "A worker is given to two calls at once.", ("test_threads.py::test_workers_are_shared_by_several_python_threads",),
    ),
    Mutation(
        "worker-counted-twice", "cpu/pool.py", "self._workers += 1", "self._workers += 2", "Each worker counts as two.",
        ("test_threads.py::test_workers_are_shared_by_several_python_threads",),
    ),
    Mutation(
        "limit-of-pytorch", "cpu/threads.py", "count = min(count, team.limit())", "pass",
        "A call uses more threads than PyTorch is set to.",
        ("test_threads.py::test_pytorchs_team_computes_with_at_most_its_number_of_threads",),
    ),
    Mutation(
        "limit-of-threads", "cpu/threads.py", "count = min(self.count, most,", "count = min(most,",
        "A call ignores set_num_threads.", ("test_threads.py::test_pytorchs_team_computes_with_at_most_its_number_of_threads",),
    ),
    Mutation(
        "worker-stays", "cpu/pool.py", "- {cpu}", "- set()", "A worker does not leave the caller's CPU.",
        ("test_threads.py::test_a_worker_leaves_the_callers_cpu_and_gains_none",),
    ),
    Mutation(
        "pool-stays-pinned", "cpu/pool.py", "!= self._cpus and", "is None and",
        "The workers of a process that was pinned stay on those CPUs.",
        ("test_threads.py::test_a_pool_made_by_a_pinned_thread_is_not_pinned",),
    ),
    Mutation(
        "key-without-sources", "cpu/compile.py", 'f"{_fingerprint()} {spec.key}"', 'f"{spec.key}"',
        "A kernel on disk is loaded although the package has changed.", ("test_process.py::test_an_edited_package_is_compiled_anew",),
    ),
    Mutation(
        "damaged-kernel-loaded", "kernel/cache.py", "if content[:HASH_BYTES] != digest(name, content[HASH_BYTES:]):", "if not content:",
        "A damaged kernel on disk is loaded.", ("test_cache.py::test_a_damaged_file_is_replaced",),
    ),
    Mutation(
        "kernel-under-another-name", "kernel/cache.py", 'hashlib.sha256(name.encode() + b"\\0" + code)', "hashlib.sha256(code)",
        "One kernel's file is loaded under the name of another.", ("test_cache.py::test_a_file_under_another_name_is_refused",),
    ),
    Mutation(
        "planted-kernel-loaded", "kernel/cache.py", "if fault := find_fault(os.fstat(file.fileno())):", "if False:",
        "A kernel that another user may have written is loaded.",
        ("test_cache.py::test_a_file_that_others_may_write_is_refused", "test_cache.py::test_what_belongs_to_another_user_is_refused"),
    ),
    Mutation(
        "state-of-the-caller", "cpu/compile.py", "store i32 8064, ptr %default", "store i32 40832, ptr %default",
        "Kernels flush subnormal results to 0, whatever the state of the thread is.",
        ("test_cpu_state.py::test_flushing_subnormal_numbers_changes_nothing_and_is_kept",),
    ),
    # --- classes
    Mutation(
        "maximum-in-the-rest", "kernel/entry.py", "sums.low, where(is_max, 0.0, e)", "sums.low, e",
        "The sum of the other classes has the largest logit's term too.", (DIGITS,), select="options0-cross_entropy-5",
    ),
    Mutation(
        "ties-dropped", "kernel/entry.py", "(sums.rest + sums.low) + (sums.ties - 1.0)", "sums.rest + sums.low",
        "Further classes with the largest logit are left out.", ("test_classes.py::test_two_classes_with_equal_logits",),
    ),
    Mutation(
        "rounding-of-sums-dropped", "kernel/entry.py", "low + (x - (added - total))", "low",
        "The rounding errors of sums over classes are not added.", (DIGITS,), select="options0-cross_entropy-1000",
    ),
    Mutation(
        "rounding-of-differences-dropped", "kernel/entry.py", "small - (d - large)", "d.splat(0.0)",
        "The rounding error of z - m is not counted.", (DIGITS,), select="options0-cross_entropy-19-30.0",
    ),
    Mutation(
        "curvature-of-the-rest", "kernel/entry.py", "factors[0] * e * ((1.0 - e) + factors[1])", "factors[0] * e * factors[1]",
        "The second derivative by a logit takes 1 - p from the other classes alone.", (DIGITS,), select="options0-cross_entropy-5",
    ),
    Mutation(
        "class-weights-not-counted", "core/call.py", "(self.excludes or has_class_weights)", "self.excludes",
        "A mean does not divide by the sum of the class weights.", ("test_classes.py::test_relations",),
    ),
    Mutation(
        "gradient-of-excluded-entries", "cpu/classes.py", "where(target == NO_CLASS, 0.0, slope) if self.spec.excludes else slope", "slope",
        "Entries that do not count have gradients.", ("test_classes.py::test_relations",),
    ),
    Mutation(
        "next-block-too-early", "cpu/class_loop.py", "last = min(k + length, end_of_row)", "last = k + length",
        "A block goes on past the end of its row.", ("test_classes.py::test_nothing_outside_the_gradient_is_written",),
    ),
    Mutation(
        "tile-past-the-block", "cpu/classes.py", "I64, first, builder.sub(block.last, I64(lanes)))", "I64, first, block.last)",
        "The last entries of a tile lie past the end of the block.", ("test_fences.py::test_classes_side_by_side",),
    ),
    Mutation(
        "saturated-classes-cancel", "kernel/regions.py", "where(tops == 1.0, 1.0, 2.0)", "tops.splat(2.0)",
        "The gradient of a wrong class with p close to 1 is a difference of nearly equal numbers.",
        ("test_segmentation_classes.py::test_every_digit_in_extended_precision",), select="wrong",
    ),
    Mutation(
        "equal-slopes-cancel", "losses/segmentation_classes.py", "parameters = {name: x - least for name", "parameters = {name: x for name",
        "The slopes of several classes in one region are not subtracted before they are rounded.",
        ("test_segmentation_classes.py::test_one_region_keeps_the_tails",),
    ),
    Mutation(
        "rounding-of-slopes-dropped", "kernel/regions.py", "(sums.pull + sums.pull_low)", "sums.pull",
        "The rounding errors of sums of slopes over classes are not added.",
        ("test_segmentation_classes.py::test_many_classes",), select="1000",
    ),
    Mutation(
        "excluded-pixels-are-false-positives", "kernel/regions.py", "where(is_own | ~is_counted, 0.0", "where(is_own, 0.0",
        "Pixels that do not count are false positives of every class.",
        ("test_segmentation_classes.py::test_excluded_pixels_do_not_count",),
    ),
    Mutation(
        "background-in-the-mean", "losses/segmentation_classes.py", 'by_class["elements"][:, 0] = 0.0', "pass",
        "The mean counts the background, though it has no region.",
        ("test_segmentation_classes.py::test_settings_of_other_packages",), select="background",
    ),
    # --- data sets in parts
    Mutation(
        "groups-at-once-skipped", "cpu/loop.py", "            index += 1\n", "            index += 2\n",
        "Every other group of those that a thread takes at once is left out.",
        ("test_accumulator.py::test_sums_of_many_short_samples_are_those_of_each",),
    ),
    Mutation(
        "lanes-share-totals", "cpu/loop.py", "return ir.Constant(args[4].type, None)", "return args[4]",
        "A lane that computes short groups adds each of them to those before.",
        ("test_accumulator.py::test_sums_of_many_short_samples_are_those_of_each",),
    ),
    Mutation(
        "lanes-scale-of-first", "cpu/loop.py", "builder.mul(entry, size))", "builder.mul(I64(0), size))",
        "The gradients of short groups take the scales of the first ones.", ("test_layouts.py::test_short_groups_in_any_memory_order",),
    ),
    Mutation(
        "waiting-batches-forgotten", "accumulator.py", "joined(self._added, exact(*self._waiting))", "exact(*self._waiting)",
        "Adding the batches that wait forgets those added before.", ("test_accumulator.py::test_batches_wait_to_be_added",),
    ),
    Mutation(
        "rest-of-exact-sums-dropped", "core/exact.py", "        if not np.logical_or.reduce(rest):\n", "        if True:\n",
        "Only the leading bits of samples' sums are added.", ("test_accumulator.py",),
    ),
    Mutation(
        "part-without-divisor", "core/accumulated.py", '"grad_output", 1.0), divisor)', '"grad_output", 1.0), 1.0)',
        "The gradient of a part is not divided by the number of elements of all parts.",
        ("test_dask.py::test_any_blocks_give_the_bits_of_an_accumulator",),
    ),
    Mutation(
        "part-divided-by-its-own-count", "losses/regions.py", 'whole if whole is not None and self.settings["per_sample"] else {', "{",
        "The Dice losses divide the gradient of a part by the part's own number of regions.",
        ("test_dask.py::test_any_blocks_give_the_bits_of_an_accumulator",),
    ),
    Mutation(
        "masked-divisor-from-shape", "backends/dask.py", "(self.reduction == \"mean\" and self.must_count())", "False",
        "A masked mean of Dask arrays is divided by the number of all elements.",
        ("test_dask.py::test_any_blocks_give_the_bits_of_an_accumulator",),
    ),
    Mutation(
        "class-weights-cut-as-samples", "core/abstract_loss.py", "(class_axis(axes),)", "(0,)",
        "Class weights beside a Dask array with as many samples as classes are cut into its blocks.",
        ("test_dask.py::test_losses_of_classes",),
    ),
    Mutation(
        "gradient-of-one-process", "backends/torch/ranks.py", '"grad_output": self.processes})', '"grad_output": 1})',
        "Gradients are those of the joined value, which averaging over processes makes too small.",
        ("test_torch_distributed.py::test_a_process_group_gives_the_loss_of_the_joined_batch",),
    ),
    Mutation(
        "samples-of-one-process", "backends/torch/ranks.py", "self.samples = int(total[0])", "self.samples = len(first)",
        "A mean over the samples of all processes is divided by those of one.",
        ("test_torch_distributed.py::test_a_process_group_gives_the_loss_of_the_joined_batch",),
    ),
    # --- linear layers
    Mutation(
        "input-gradient-of-the-last-outputs", "core/layer.py", "accumulate or piece[1].start > 0", "accumulate",
        "The gradient of the input is that of the last range of outputs.", ("test_linear.py::test_pieces_options_and_reductions",),
        select="none-samples-8",
    ),
    Mutation(
        "weight-gradient-of-the-last-entries", "core/layer.py", "accumulate or piece[1] == last", "accumulate",
        "The gradient of the weight is that of the last entries.", ("test_linear.py::test_pieces_options_and_reductions",),
        select="none-image-256",
    ),
    Mutation(
        "piece-of-every-option", "core/layer.py", "axis < len(piece) and n > 1 else", "axis < len(piece) else",
        "An option that broadcasts along an axis is cut there.", ("test_linear.py::test_pieces_options_and_reductions",),
        select="number or outputs-image-8",
    ),
    Mutation(
        "index-in-the-piece", "core/layer.py", "        except ValueError:\n            self.check_elements()\n            raise",
        "        except ZeroDivisionError:\n            raise",
        "An error names the element of the piece.",
        ("test_linear.py::test_an_error_names_the_element_of_the_whole_target_and_writes_nothing",),
    ),
    Mutation(
        "buffers-may-overlap", "core/layer.py", "for x in buffers], spans)", "for x in ()], spans)",
        "Gradients overwrite what is read.", ("test_linear.py::test_given_arrays_share_no_memory",),
    ),
    Mutation(
        "every-gradient-of-tensors", "backends/torch/layer.py",
        "compute(NOTHING if has_samples else ctx.wanted)", "compute(NOTHING if has_samples else (True,) * 3)",
        "Gradients are computed that nothing needs.",
        ("test_linear_torch.py::test_tensors_are_arrays_and_only_the_needed_gradients_are_computed",),
    ),
    Mutation(
        "rows-of-every-sparse-piece", "core/sparse.py", "if height < self.length:", "if False:",
        "Values of other samples are written into a piece.", ("test_sparse_targets.py::test_pieces_and_options",), select="none-8",
    ),
    Mutation(
        "sparse-piece-keeps-values", "core/sparse.py", "            self.space[self.filled] = 0", "            pass",
        "A piece has the values of the one before.", ("test_sparse_targets.py::test_pieces_and_options",), select="none-256",
    ),
    Mutation(
        "several-values-at-one-place", "core/sparse.py", "(self.keys[1:] == self.keys[:-1]).any()", "False",
        "One of several values at a place is taken.", ("test_sparse_targets.py::test_errors",),
    ),
    Mutation(
        "any-integer-in-a-byte", "core/sparse.py", "return small if bool((small == values).all()) else values", "return small",
        "Integers of a sparse target wrap around.", ("test_sparse_targets.py::test_errors",),
    ),
    Mutation(
        "sparse-options-of-other-places", "core/layer.py", "np.broadcast_to(x, self.layer.shape)[rows, columns] if np.ndim(x)",
        "np.broadcast_to(x, self.layer.shape)[:1, :1] if np.ndim(x)",
        "A masked value of a sparse target is refused.", ("test_sparse_targets.py::test_masked_values_are_not_refused",),
    ),
    Mutation(
        "products-of-16-bits", "core/layer.py", "x if x.dtype == self.dtype else x.astype(self.dtype)", "x",
        "Products of 16-bit arrays are rounded to 16 bits.", ("test_linear.py::test_16_bits_are_computed_in_float32",),
    ),
    Mutation(
        "targets-are-read-twice", "core/layer.py", "if self.may_refuse_elements():", "if True:",
        "A target that nothing refuses is read before the gradients are written.",
        ("test_linear.py::test_targets_that_nothing_refuses_are_not_read_twice",),
    ),
    Mutation(
        "gradients-rounded-before-the-scale", "backends/torch/layer.py", "            ctx.save_for_backward(*gradients)",
        "            ctx.save_for_backward(*(None if x is None else x.to(d) for x, d in zip(gradients, ctx.dtypes)))",
        "16-bit gradients are rounded before they are multiplied by the loss scale.",
        ("test_linear_torch.py::test_gradients_of_16_bits_are_scaled_before_they_are_rounded",),
    ),
    Mutation(
        "compiled-gradients-of-the-mean", "backends/torch/layer.py", "numbers, dtype, wanted, grads[0])", "numbers, dtype, wanted, None)",
        "Compiled code ignores the upstream gradients of samples.", ("test_linear_torch.py::test_compiled_code_computes_the_same",),
    ),
    Mutation(
        "weighted-mean-of-squares", "torch/functional.py", 'reduction, total = "sum", weight.sum()', 'reduction, total = "mean", None',
        "A weighted mean is divided by the number of elements.", ("test_linear_torch.py::test_functions_are_the_layer_and_the_loss",),
    ),
)  # fmt: skip
