// --- the loop, which is the same for every loss --------------------------------------------------------------------------
//
// Design: a) A group is the set of elements with one reduced value. It is cut into ranges, by sizes alone, and each block takes
// ranges in turn. b) Neighbouring threads of a block work on neighbouring packs. A thread loads several packs before it computes
// the first, because the number of loads in flight limits the speed. c) A thread sums a few elements in the type of the
// arithmetic, and its part of a range in float64; a block sums over its threads by halves. The block that finishes the last range
// of a group adds the partial sums of the ranges, in their order, and divides. So a pass takes one launch and no atomic operation
// on floating-point numbers, and its results have the same bits every time and on every device. d) A gradient may be divided by the
// number of elements that count. Then the blocks first count them, in ranges that they take from a queue, and a block waits for a
// group's number before it computes a range of the group. It waits only for blocks that run, and that wait for none while they
// count, so the grid may have any number of blocks. e) The loop assumes no width of a warp, and does not wait for the host.

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
DEVICE void process(
    const Arguments& a, const Numbers& number, const Place& place, const index_t first, const index_t stop, Sums& sums, Pack (&packs)[PACKS]
) {
    Position pos[PACKS];
#if !IS_LOCAL
    Constants constants[PACKS];
#endif
#pragma unroll
    for (int p = 0; p < PACKS; ++p)
        if (first + p * LANES < stop) {
            pos[p] = locate(a, place, first, p * LANES);
            load(packs[p], a, pos[p]);
#if !IS_LOCAL
            load_constants(constants[p], a, pos[p]);
#endif
        }
#pragma unroll
    for (int p = 0; p < PACKS; ++p)
        if (first + p * LANES < stop) {
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

struct Range {
    index_t group;
    Place place;
    index_t first, stop;  // packs of the segment or of the group
};

DEVICE Range find_range(const Arguments& a, const index_t number) {
    Range range;
    range.group = number / (index_t)a.group_ranges;
    index_t part = number - range.group * (index_t)a.group_ranges;
#if IS_LOCAL
    const index_t inner = part / (index_t)a.segment_ranges, packs = (index_t)a.segment_packs;
    part -= inner * (index_t)a.segment_ranges;
    range.place = find_place(a, range.group * (index_t)a.group_segments + inner);
#else
    const index_t packs = (index_t)a.group_packs;
    range.place = range.group;
#endif
    range.first = part * (index_t)a.range_packs;
    const index_t end = range.first + (index_t)a.range_packs;
    range.stop = end < packs ? end : packs;
    return range;
}

// Return in all threads of a block whether it is the last one to add 1 to a counter. What a block has written before can be read in
// the last.
DEVICE bool is_last(unsigned int* counter, const index_t blocks) {
    __shared__ bool shared;
    if (threadIdx.x == 0) {
        __threadfence();
        shared = atomicAdd(counter, 1u) == (unsigned int)blocks - 1;
        __threadfence();
    }
    __syncthreads();
    return shared;
}

#if COUNTS

// Count the elements of a range. All threads of the block get the number.
DEVICE Count count_range(const Arguments& a, const Range& range) {
    __shared__ unsigned int shared;
    const Numbers number = read_numbers(a, 1.0);
    unsigned int own = 0;
#pragma unroll 4
    for (index_t at = range.first + threadIdx.x; at < range.stop; at += THREADS) {
        const Position pos = locate(a, range.place, at, 0);
        Pack pack;
        load(pack, a, pos);  // the compiler drops what `counts` does not use
#if IS_LOCAL
        const Constants& constant = range.place.constants;
#else
        Constants constant;
        load_constants(constant, a, pos);
#endif
#pragma unroll
        for (int j = 0; j < PACK; ++j) own += counts(pack, constant, j, !IS_RAGGED || j < pos.count, number);
    }
    __syncthreads();  // the number of the range before may still be read
    if (threadIdx.x == 0) shared = 0;
    __syncthreads();
    atomicAdd(&shared, own);
    __syncthreads();
    return shared;
}

// Take ranges from the queue until it is empty, and add their numbers to those of their groups.
DEVICE void count_ranges(const Arguments& a) {
    __shared__ unsigned int taken;
    Counters& counters = *(Counters*)a.counters;
    for (;;) {
        if (threadIdx.x == 0) taken = atomicAdd(&counters.taken, 1u);
        __syncthreads();
        if (taken >= (unsigned int)(a.groups * a.group_ranges)) return;
        const Range range = find_range(a, taken);
        const Count counted = count_range(a, range);
        if (threadIdx.x == 0) atomicAdd(&counters.counts[range.group], (Count)1 << COUNT_BITS | counted);
        __syncthreads();
    }
}

// Return the number of a group's elements that count, when all of its ranges have been counted.
DEVICE double wait_for_count(const Arguments& a, const index_t group) {
    __shared__ Count shared;
    __syncthreads();  // the number of the group before may still be read
    if (threadIdx.x == 0) {
        do {
            shared = *(volatile Count*)&((Counters*)a.counters)->counts[group];
        } while (shared >> COUNT_BITS != (Count)a.group_ranges);
    }
    __syncthreads();
    return (double)(shared & (((Count)1 << COUNT_BITS) - 1));
}

// Set the counters to 0 in the last block that leaves.
DEVICE void leave(const Arguments& a) {
    Counters& counters = *(Counters*)a.counters;
    __syncthreads();  // what `is_last` returned before may still be read
    if (!is_last(&counters.left, gridDim.x)) return;
    for (index_t group = threadIdx.x; group < (index_t)a.groups; group += THREADS) counters.counts[group] = 0;
    if (threadIdx.x == 0) counters.taken = counters.left = 0;
}

#endif

// Return the number by which sums and gradients of a range's group are divided.
DEVICE double divisor(const Arguments& a, const Range& range) {
#if COUNTS
    return a.group_ranges > 1 ? wait_for_count(a, range.group) : (double)count_range(a, range);
#elif DIVIDES
    return ((const double*)a.divisors)[range.group];
#else
    return a.divisor;
#endif
}

#if SUMS || BY_CLASS

__shared__ double shared[SUMS > BY_CLASS ? SUMS : BY_CLASS][THREADS];

#define SIZE(T) ((int)(sizeof(T) / sizeof(double)))  // of `Totals`, or of `ClassTotals`

template <class T>
DEVICE void add(T& totals, const T& other) {
#pragma unroll
    for (int k = 0; k < SIZE(T); ++k) totals.x[k] += other.x[k];
}

template <class T>
DEVICE T read_shared(const int thread) {
    T totals;
#pragma unroll
    for (int k = 0; k < SIZE(T); ++k) totals.x[k] = shared[k][thread];
    return totals;
}

template <class T>
DEVICE void write_shared(const T& totals) {
#pragma unroll
    for (int k = 0; k < SIZE(T); ++k) shared[k][threadIdx.x] = totals.x[k];
    __syncthreads();
}

// Add the totals of a block's threads by halves. The result is right in the first thread.
template <class T>
DEVICE T sum_block(T totals) {
    write_shared(totals);
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) add(totals, read_shared<T>(threadIdx.x + half));
        write_shared(totals);  // the upper half, which other threads may still read, is written with the same values
    }
    return totals;
}

// Write the results of a group.
DEVICE void finish(const Arguments& a, const index_t group, const Totals& totals, const double divisor) {
#if IS_MEAN
    write_result(a, group, totals.x[0] / totals.x[1]);
#else
    for (int k = 0; k < SUMS; ++k) write_result(a, k * (index_t)a.groups + group, totals.x[k] / divisor);
#endif
}

#if BY_CLASS

// Add the classes of the block's entries to the sums of a range, or begin these. All threads have to agree on a class.
DEVICE void add_classes(const Arguments& a, const Pack (&packs)[PACKS], const index_t range, const bool begins) {
    const index_t classes = (index_t)a.classes.length;
    double* sums = (double*)a.class_partials + (long long)range * classes * BY_CLASS;
    for (index_t index = 0; index < classes; ++index, sums += BY_CLASS) {
        ClassTerms terms = {};
#pragma unroll
        for (int p = 0; p < PACKS; ++p)
            if (packs[p].entry.own >= 0) {
                Class loaded;
                load_class(loaded, a, packs[p], index);
                add_terms(terms, packs[p].entry, loaded, index == (index_t)packs[p].entry.own);
            }
        ClassTotals totals;
#pragma unroll
        for (int k = 0; k < BY_CLASS; ++k) totals.x[k] = (double)terms.x[k];
        totals = sum_block(totals);
        if (threadIdx.x == 0)
            for (int k = 0; k < BY_CLASS; ++k) sums[k] = begins ? totals.x[k] : sums[k] + totals.x[k];
    }
}

// Add the sums of the classes of a group's ranges, and write the results. The rounding errors are added up too (Kahan): with 64 ranges of
// equal entries, Dice of float64 was off by 9 ulp without.
DEVICE void finish_classes(const Arguments& a, const index_t group) {
    const index_t classes = (index_t)a.classes.length, sums = classes * BY_CLASS;
    const volatile double* partials = (const volatile double*)a.class_partials + group * a.group_ranges * sums;
    for (index_t at = threadIdx.x; at < sums; at += THREADS) {
        double total = 0.0, low = 0.0;
#pragma unroll 8
        for (index_t range = 0; range < (index_t)a.group_ranges; ++range) {
            const double x = partials[(long long)range * sums + at], added = total + x;
            low += x - (added - total);
            total = added;
        }
        ((double*)a.class_results)[(at % BY_CLASS * a.groups + group) * classes + at / BY_CLASS] = total + low;
    }
}

#endif

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

// Reduce a range's totals over the block; if it is the last range of its group, reduce the group and write its results.
DEVICE void reduce(const Arguments& a, const index_t number, const index_t group, const double divisor, Totals totals) {
    totals = sum_block(totals);
    if (a.group_ranges > 1) {
        if (threadIdx.x == 0)
            for (int k = 0; k < SUMS; ++k) ((volatile double*)a.partials)[number * SUMS + k] = totals.x[k];
        unsigned int& finished = ((Counters*)a.counters)->finished[group];
        if (!is_last(&finished, a.group_ranges)) return;
        totals = sum_ranges(a, group);
        if (threadIdx.x == 0) finished = 0;
    }
    if (threadIdx.x == 0) finish(a, group, totals, divisor);
#if BY_CLASS
    finish_classes(a, group);
#endif
    __syncthreads();
}

#endif

// Return the totals of a thread's part of a range, whose number is `index`.
DEVICE Totals sum_thread(const Arguments& a, const Numbers& number, const Range& range, const index_t index) {
    Totals totals = {};
#if BY_CLASS
    for (index_t at = range.first; at < range.stop; at += LANES * PACKS) {  // the same turns in all threads, which sum together
        Pack packs[PACKS];
        Sums sums = {};
        process(a, number, range.place, at + LANE, range.stop, sums, packs);
        fold(totals, sums);
        add_classes(a, packs, index, at == range.first);
    }
#else
    for (index_t at = range.first + LANE; at < range.stop; at += LANES * PACKS * ROUNDS) {
        Sums sums = {};
        for (int turn = 0; turn < ROUNDS; ++turn) {
            Pack packs[PACKS];
            process(a, number, range.place, at + turn * LANES * PACKS, range.stop, sums, packs);
        }
        fold(totals, sums);
    }
#endif
    return totals;
}

extern "C" __global__ void __launch_bounds__(BOUNDS) KERNEL(const Arguments a) {
#if COUNTS
    if (a.group_ranges > 1) count_ranges(a);
#endif
    for (index_t at = blockIdx.x; at < (index_t)(a.groups * a.group_ranges); at += gridDim.x) {
        const Range range = find_range(a, at);
        const double by = divisor(a, range);
        const Totals totals = sum_thread(a, read_numbers(a, numerator(a, range.group) / by), range, at);
#if SUMS || BY_CLASS
        reduce(a, at, range.group, by, totals);
#endif
    }
#if COUNTS
    if (a.group_ranges > 1) leave(a);
#endif
}
