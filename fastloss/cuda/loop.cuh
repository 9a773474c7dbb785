// --- the loop, which is the same for every loss --------------------------------------------------------------------------
//
// Design: a) A group is the set of elements with one reduced value. It is cut into ranges, by sizes alone, and each block takes
// ranges in turn. b) Neighbouring threads of a block work on neighbouring packs. A thread loads several packs before it computes
// the first, because the number of loads in flight limits the speed. c) A thread sums a few elements in the type of the
// arithmetic, and its part of a range in float64; a block sums over its threads by halves. The block that finishes the last range
// of a group adds the partial sums of the ranges, in their order, and divides. So a pass takes one launch and no atomic operation
// on floating-point numbers, and its results have the same bits every time and on every device. d) The loop assumes no width of a
// warp, and does not wait for the host.

// Return the position of a pack of a group.
DEVICE Position locate(const Arguments& a, const index_t group, index_t pack) {
    Position pos;
    index_t segment = group * (index_t)a.group_segments, first = 0;
#if AXES
    const index_t inner = pack / (index_t)a.segment_packs;
    segment += inner;
    pack -= inner * (index_t)a.segment_packs;
    index_t row = segment / (index_t)a.row_segments;
    first = (segment - row * (index_t)a.row_segments) * (index_t)a.segment_size;
#pragma unroll
    for (int k = 0; k < ARRAYS; ++k) pos.offsets[k] = 0;
#pragma unroll
    for (int axis = 0; axis < AXES; ++axis) {
        const index_t length = (index_t)a.axes[axis].length, outer = axis + 1 < AXES ? row / length : 0;
        const index_t index = row - outer * length;
        row = outer;
#pragma unroll
        for (int k = 0; k < ARRAYS; ++k) pos.offsets[k] += (long long)index * a.axes[axis].strides[k];
    }
#else
    first = segment * (index_t)a.segment_size;  // there is one row, and each group is a part of it
#endif
    pos.column = first + pack * PACK;
    pos.linear = segment * (index_t)a.segment_size + pack * PACK;
    const index_t left = (index_t)a.segment_size - pack * PACK;
    pos.count = IS_RAGGED && left < PACK ? (int)left : PACK;
    return pos;
}

// Load, compute and store PACKS packs of a thread. All loads come first, so that they are in flight together.
DEVICE void process(const Arguments& a, const Numbers& number, const index_t group, const index_t first, const index_t stop, Sums& sums) {
    Pack packs[PACKS];
    Position pos[PACKS];
#pragma unroll
    for (int p = 0; p < PACKS; ++p)
        if (first + p * THREADS < stop) {
            pos[p] = locate(a, group, first + p * THREADS);
            load(packs[p], a, pos[p]);
        }
#pragma unroll
    for (int p = 0; p < PACKS; ++p)
        if (first + p * THREADS < stop) {
#pragma unroll
            for (int j = 0; j < PACK; ++j) compute(packs[p], j, !IS_RAGGED || j < pos[p].count, pos[p].linear + j, a, number, sums);
            store(packs[p], a, pos[p]);
        }
}

// Return the totals of a thread's part of a range.
DEVICE Totals sum_thread(const Arguments& a, const Numbers& number, const index_t group, const index_t first, const index_t stop) {
    Totals totals = {};
    for (index_t at = first + threadIdx.x; at < stop; at += THREADS * PACKS * ROUNDS) {
        Sums sums = {};
        for (int turn = 0; turn < ROUNDS; ++turn) process(a, number, group, at + turn * THREADS * PACKS, stop, sums);
        fold(totals, sums);
    }
    return totals;
}

#if SUMS

__shared__ double shared[SUMS][THREADS];

DEVICE void add(Totals& totals, const Totals& other) {
#pragma unroll
    for (int k = 0; k < SUMS; ++k) totals.x[k] += other.x[k];
}

DEVICE Totals read_shared(const int thread) {
    Totals totals;
#pragma unroll
    for (int k = 0; k < SUMS; ++k) totals.x[k] = shared[k][thread];
    return totals;
}

DEVICE void write_shared(const Totals& totals) {
#pragma unroll
    for (int k = 0; k < SUMS; ++k) shared[k][threadIdx.x] = totals.x[k];
    __syncthreads();
}

// Add the totals of a block's threads by halves. The result is right in the first thread.
DEVICE Totals sum_block(Totals totals) {
    write_shared(totals);
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) add(totals, read_shared(threadIdx.x + half));
        write_shared(totals);  // the upper half, which other threads may still read, is written with the same values
    }
    return totals;
}

// Write the results of a group.
DEVICE void finish(const Arguments& a, const index_t group, const Totals& totals) {
#if IS_MEAN
    write_result(a, group, totals.x[0] / totals.x[1]);
#else
    for (int k = 0; k < SUMS; ++k) write_result(a, k * (index_t)a.groups + group, totals.x[k] / divisor(a, group));
#endif
}

// Add the partial sums of a group's ranges, in the block that finishes the last range.
DEVICE Totals sum_ranges(const Arguments& a, const index_t group) {
    const volatile double* partials = (const volatile double*)a.partials + group * (index_t)a.group_ranges * SUMS;
    Totals totals = {};
    for (index_t range = threadIdx.x; range < (index_t)a.group_ranges; range += THREADS) {
        Totals other;
#pragma unroll
        for (int k = 0; k < SUMS; ++k) other.x[k] = partials[range * SUMS + k];
        add(totals, other);
    }
    return sum_block(totals);
}

// Count a finished range of a group, and return whether it is the last.
DEVICE bool is_last_range(const Arguments& a, const index_t group) {
    __shared__ bool is_last;
    if (threadIdx.x == 0) {
        __threadfence();
        is_last = atomicAdd((unsigned int*)a.finished + group, 1u) == (unsigned int)a.group_ranges - 1;
        __threadfence();
    }
    __syncthreads();
    return is_last;
}

// Reduce a range's totals over the block; if it is the last range of its group, reduce the group and write its results.
DEVICE void reduce(const Arguments& a, const index_t range, const index_t group, Totals totals) {
    totals = sum_block(totals);
    if (a.group_ranges > 1) {
        if (threadIdx.x == 0)
            for (int k = 0; k < SUMS; ++k) ((volatile double*)a.partials)[range * SUMS + k] = totals.x[k];
        if (!is_last_range(a, group)) return;
        totals = sum_ranges(a, group);
        if (threadIdx.x == 0) ((unsigned int*)a.finished)[group] = 0;
    }
    if (threadIdx.x == 0) finish(a, group, totals);
    __syncthreads();
}

#endif

extern "C" __global__ void __launch_bounds__(BOUNDS) KERNEL(const Arguments a) {
    const index_t group_ranges = (index_t)a.group_ranges;
    for (index_t range = blockIdx.x; range < (index_t)a.groups * group_ranges; range += gridDim.x) {
        const index_t group = range / group_ranges;
        const index_t first = (range - group * group_ranges) * (index_t)a.range_packs, end = first + (index_t)a.range_packs;
        const Numbers number = read_numbers(a, numerator(a, group) / divisor(a, group));
        const Totals totals = sum_thread(a, number, group, first, end < (index_t)a.group_packs ? end : (index_t)a.group_packs);
#if SUMS
        reduce(a, range, group, totals);
#endif
    }
}
