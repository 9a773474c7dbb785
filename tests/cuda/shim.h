// What a C++ compiler needs to take a kernel of fastloss/cuda for a function of the CPU.
//
// The threads of a block are fibers, which are switched at barriers alone: a block runs from barrier to barrier, thread by thread,
// in an order that `seed` shuffles. A barrier that some threads of a block do not reach is an error, as on a device.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <algorithm>
#include <ucontext.h>
#include <vector>

using std::copysign;
using std::fabs;
using std::fma;
using std::sqrt;

#define __device__
#define __global__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(threads)

namespace shim {

struct Index {
    unsigned int x;
};

constexpr size_t STACK = 1 << 16;
enum State { READY, AT_BARRIER, DONE };

struct Fiber {
    ucontext_t context;
    State state;
};

static std::vector<Fiber> fibers;
static std::vector<char> stacks;
static ucontext_t scheduler;
static Index thread, block, grid;
static void (*body)(const void*);
static const void* arguments;

static void enter() {
    body(arguments);
    fibers[thread.x].state = DONE;
    swapcontext(&fibers[thread.x].context, &scheduler);
}

static void barrier() {
    const unsigned int own = thread.x;
    fibers[own].state = AT_BARRIER;
    swapcontext(&fibers[own].context, &scheduler);
}

// All threads of a block until each has ended or waits; returns whether they wait. They have to agree.
static bool run_to_barrier(std::mt19937& random) {
    std::vector<unsigned int> order(fibers.size());
    for (unsigned int k = 0; k < order.size(); ++k) order[k] = k;
    std::shuffle(order.begin(), order.end(), random);
    size_t waiting = 0;
    for (const unsigned int k : order) {
        thread.x = k;
        swapcontext(&scheduler, &fibers[k].context);
        waiting += fibers[k].state == AT_BARRIER;
    }
    if (waiting != 0 && waiting != fibers.size()) {
        fprintf(stderr, "%zu of %zu threads wait at a barrier\n", waiting, fibers.size());
        abort();
    }
    return waiting != 0;
}

static void run(const void* given, const unsigned int blocks, const unsigned int threads, const unsigned int seed) {
    std::mt19937 random(seed);
    arguments = given;
    grid.x = blocks;
    fibers.resize(threads);
    stacks.resize(threads * STACK);
    std::vector<unsigned int> order(blocks);
    for (unsigned int k = 0; k < blocks; ++k) order[k] = k;
    std::shuffle(order.begin(), order.end(), random);
    for (const unsigned int k : order) {
        block.x = k;
        for (size_t t = 0; t < threads; ++t) {
            getcontext(&fibers[t].context);
            fibers[t].context.uc_stack.ss_sp = stacks.data() + t * STACK;
            fibers[t].context.uc_stack.ss_size = STACK;
            fibers[t].context.uc_link = nullptr;
            fibers[t].state = READY;
            makecontext(&fibers[t].context, enter, 0);
        }
        while (run_to_barrier(random)) {
        }
    }
}

template <class T>
static T exchange(T* at, const T value) {
    const T before = *at;
    *at = value;
    return before;
}

}  // namespace shim

#define threadIdx shim::thread
#define blockIdx shim::block
#define gridDim shim::grid

static void __syncthreads() { shim::barrier(); }
static void __threadfence() {}
static void __threadfence_system() {}
static unsigned int atomicAdd(unsigned int* at, const unsigned int value) { return shim::exchange(at, *at + value); }
static int atomicExch(int* at, const int value) { return shim::exchange(at, value); }
