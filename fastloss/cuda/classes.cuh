// --- entries with several classes, such as pixels, in the place of elements -----------------------------------------------
//
// Design: a) A thread computes an entry, so that neighbouring threads read neighbouring entries of one class, and then of the next. If
// the classes of an entry lie side by side and are many, all threads of a block compute it together (a team), each of them some of its
// classes. b) It walks along the classes up to three times: for the largest logit, for the sums, and for the derivatives. Only the first
// time, the logits come from memory, and then from the caches. c) It loads the logits of several classes before it computes the first.
// d) Entries that do not count are not read. e) The arithmetic is that of the CPU (kernel/entry.py, kernel/regions.py).

// Call `visit` with the index of each class of the thread and the class itself.
template <class Visit>
DEVICE void visit_classes(const Arguments& a, const Pack& pack, const Visit& visit) {
    const index_t classes = (index_t)a.classes.length;
    for (index_t first = MEMBER; first < classes; first += AHEAD * TEAM) {
        Class loaded[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; ++k)
            if (first + k * TEAM < classes) load_class(loaded[k], a, pack, first + k * TEAM);
#pragma unroll
        for (int k = 0; k < AHEAD; ++k)
            if (first + k * TEAM < classes) visit(first + k * TEAM, loaded[k]);
    }
}

#if TEAM > 1
__shared__ ClassSums team_memory[TEAM];  // of sums, and before of logits
#endif

// Combine what the threads of a team have found, by halves. All of them get the result.
template <class T, class Combine>
DEVICE T over_team(const T own, const Combine& combine) {
#if TEAM > 1
    T* shared = (T*)team_memory;
    shared[MEMBER] = own;
    __syncthreads();
    for (int half = TEAM / 2; half > 0; half /= 2) {
        if (MEMBER < half) shared[MEMBER] = combine(shared[MEMBER], shared[MEMBER + half]);
        __syncthreads();
    }
    const T result = shared[0];
    __syncthreads();  // the next entry's numbers are written to the same memory
    return result;
#else
    return own;
#endif
}

DEVICE compute_t larger(const compute_t x, const compute_t y) { return y > x ? y : x; }  // x if y is NaN; the sum over the classes is NaN then

// Add a sum of another thread and its rounding errors; the rounding error of this addition (Knuth) is added up too.
DEVICE void add_exactly(compute_t& total, compute_t& low, const compute_t other, const compute_t other_low) {
    const compute_t added = total + other, part = added - total;
    low = (low + other_low) + ((total - (added - part)) + (other - part));
    total = added;
}

// Add the sums of two threads.
DEVICE ClassSums add_sums(const ClassSums& x, const ClassSums& y) {
    ClassSums both = x;
    add_exactly(both.rest, both.low, y.rest, y.low);
    both.ties += y.ties;
#if HAS_REGIONS && HAS_DERIVATIVE
    add_exactly(both.pull, both.pull_low, y.pull, y.pull_low);
    add_exactly(both.top, both.top_low, y.top, y.top_low);
#else
    both.weights += y.weights;
    both.spread += y.spread;
#endif
    return both;
}

// Store 0 to all outputs of an entry.
DEVICE void clear(const Arguments& a, const Pack& pack) {
    if (MEMBER == 0) store_value(pack, (compute_t)0);
#if HAS_DERIVATIVE
    for (index_t index = MEMBER; index < (index_t)a.classes.length; index += TEAM) store_derivative(a, pack, index, (compute_t)0);
#endif
}

// Compute an entry: store its value and its derivatives, and add it to the sums.
DEVICE void compute(
    Pack& pack, const Constants& constant, const int j, const bool is_inside, const index_t linear, const Arguments& a, const Numbers& number,
    Sums& sums
) {
    const long long own = pack.entry.own = find_class(pack, constant, j, is_inside, linear, a, number);
    if (own < 0) return clear(a, pack);
    compute_t m = LEAST_LOGIT;
    ClassSums found = {};
#if HAS_LOGITS
    visit_classes(a, pack, [&](const index_t, const Class& loaded) { m = larger(m, logit(loaded)); });
    m = over_team(m, larger);
    visit_classes(a, pack, [&](const index_t index, const Class& loaded) { add_class(found, m, loaded, a, number, index == (index_t)own); });
    found = over_team(found, add_sums);
#endif
    Class of_entry;
    load_class(of_entry, a, pack, (index_t)own);
    const Factors factors = evaluate(found, m, of_entry, a, number, pack, constant, j, sums);
    pack.entry.m = m;
    pack.entry.factors = factors;
#if HAS_DERIVATIVE
    visit_classes(a, pack, [&](const index_t index, const Class& loaded) {
        store_derivative(a, pack, index, derivative_of_class(m, factors, loaded, a, number, index == (index_t)own));
    });
#endif
}

