// --- the loop, which is the same for every loss --------------------------------------------------------------------------
//
// Design: a) A group is the set of elements with one reduced value. It is cut into ranges, by sizes alone, and each block takes
// ranges in turn. b) Neighbouring threads of a block work on neighbouring packs. A thread loads several packs before it computes
// the first, because the number of loads in flight limits the speed. c) A thread sums a few elements in the type of the
// arithmetic, and its part of a range in float64; a block sums over its threads by halves. The block that finishes the last range
// of a group adds the partial sums of the ranges, in their order, and divides. So a pass takes one launch and no atomic operation
// on floating-point numbers, and its results have the same bits every time and on every device. d) The loop assumes no width of a
// warp, and does not wait for the host.

struct Segment {
    index_t first, linear;  // index of its first element in its row, and in the order of visits
    long long offsets[AXES ? ARRAYS : 1];  // bytes from each array's first visited element to the first element of the row
};

// Find a segment: without axes outside the rows, there is one row, and each segment is a part of it.
DEVICE Segment find_segment(const Arguments& a, const index_t segment) {
    Segment found;
    found.first = found.linear = segment * (index_t)a.segment_size;
#if AXES
    index_t row = segment / (index_t)a.row_segments;
    found.first = (segment - row * (index_t)a.row_segments) * (index_t)a.segment_size;
#pragma unroll
    for (int k = 0; k < ARRAYS; ++k) found.offsets[k] = 0;
#pragma unroll
    for (int axis = 0; axis < AXES; ++axis) {
        const index_t length = (index_t)a.axes[axis].length, outer = axis + 1 < AXES ? row / length : 0;
        const index_t index = row - outer * length;
        row = outer;
#pragma unroll
        for (int k = 0; k < ARRAYS; ++k) found.offsets[k] += (long long)index * a.axes[axis].strides[k];
    }
#endif
    return found;
}

// Return the position of the pack of a segment that is `further` packs after another.
DEVICE Position locate_in(const Arguments& a, const Segment& segment, const index_t pack, const int further) {
    Position pos;
    pos.column = segment.first + pack * PACK;
    pos.linear = segment.linear + pack * PACK;
    pos.ahead = further * PACK;
#pragma unroll
    for (int k = 0; k < (AXES ? ARRAYS : 0); ++k) pos.offsets[k] = segment.offsets[k];
    const index_t left = (index_t)a.segment_size - (pack + further) * PACK;
    pos.count = IS_RAGGED && left < PACK ? (int)left : PACK;
    return pos;
}

// Where a range lies: in one segment, which is found once and whose constants are loaded once, or in a group, where this is done for
// each pack.
#if IS_LOCAL
struct Place {
    Segment segment;
    Constants constants;
};

DEVICE Place find_place(const Arguments& a, const index_t segment) {
    Place place;
    place.segment = find_segment(a, segment);
    load_constants(place.constants, a, locate_in(a, place.segment, 0, 0));
    return place;
}
DEVICE Position locate(const Arguments& a, const Place& place, const index_t first, const int further) {
    return locate_in(a, place.segment, first, further);
}
#else
typedef index_t Place;  // the group
DEVICE Position locate(const Arguments& a, const Place group, const index_t first, const int further) {
    const index_t pack = first + further, inner = pack / (index_t)a.segment_packs;
    return locate_in(a, find_segment(a, group * (index_t)a.group_segments + inner), pack - inner * (index_t)a.segment_packs, 0);
}
#endif

// Load, compute and store PACKS packs of a thread. All loads come first, so that they are in flight together.
// Constants that are the same for all packs are not copied: for compute capability 10.0, the compiler spills registers then.
DEVICE void process(const Arguments& a, const Numbers& number, const Place& place, const index_t first, const index_t stop, Sums& sums) {
    Pack packs[PACKS];
    Position pos[PACKS];
#if !IS_LOCAL
    Constants constants[PACKS];
#endif
#pragma unroll
    for (int p = 0; p < PACKS; ++p)
        if (first + p * THREADS < stop) {
            pos[p] = locate(a, place, first, p * THREADS);
            load(packs[p], a, pos[p]);
#if !IS_LOCAL
            load_constants(constants[p], a, pos[p]);
#endif
        }
#pragma unroll
    for (int p = 0; p < PACKS; ++p)
        if (first + p * THREADS < stop) {
#if IS_LOCAL
            const Constants& constant = place.constants;
#else
            const Constants& constant = constants[p];
#endif
#pragma unroll
            for (int j = 0; j < PACK; ++j) {
                const bool is_inside = !IS_RAGGED || j < pos[p].count;
                compute(packs[p], constant, j, is_inside, pos[p].linear + pos[p].ahead + j, a, number, sums);
            }
            store(packs[p], a, pos[p]);
        }
}

// Return the totals of a thread's part of a range.
DEVICE Totals sum_thread(const Arguments& a, const Numbers& number, const Place& place, const index_t first, const index_t stop) {
    Totals totals = {};
    for (index_t at = first + threadIdx.x; at < stop; at += THREADS * PACKS * ROUNDS) {
        Sums sums = {};
        for (int turn = 0; turn < ROUNDS; ++turn) process(a, number, place, at + turn * THREADS * PACKS, stop, sums);
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
        index_t part = range - group * group_ranges;
#if IS_LOCAL
        const index_t inner = part / (index_t)a.segment_ranges, packs = (index_t)a.segment_packs;
        part -= inner * (index_t)a.segment_ranges;
        const Place place = find_place(a, group * (index_t)a.group_segments + inner);
#else
        const index_t packs = (index_t)a.group_packs;
        const Place place = group;
#endif
        const index_t first = part * (index_t)a.range_packs, end = first + (index_t)a.range_packs;
        const Numbers number = read_numbers(a, numerator(a, group) / divisor(a, group));
        const Totals totals = sum_thread(a, number, place, first, end < packs ? end : packs);
#if SUMS
        reduce(a, range, group, totals);
#endif
    }
}
