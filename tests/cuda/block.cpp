// Run the blocks of a launch on the CPU. Their threads are fibers, which are switched only at barriers.
//
// A block runs from barrier to barrier, thread by thread, in an order that `seed` shuffles. A barrier that some threads of a block
// do not reach is an error, as on a device.

#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

struct Index {
    unsigned int x;
};

extern "C" {
Index threadIdx, blockIdx, gridDim;
}

static constexpr size_t STACK = 1 << 16;
enum State { NEW, AT_BARRIER, DONE };

struct Fiber {
    ucontext_t start;  // used only to start the fiber, because switching to a context makes a system call
    jmp_buf here;
    State state;
};

static std::vector<Fiber> fibers;
static std::vector<char> stacks;
static jmp_buf scheduler;
static void (*kernel)(const void*);
static const void* arguments;

static void give_way(Fiber& fiber, const State state) {
    fiber.state = state;
    if (!_setjmp(fiber.here)) _longjmp(scheduler, 1);
}

// Run a thread of one block after another.
static void enter() {
    Fiber& own = fibers[threadIdx.x];
    for (;;) {
        kernel(arguments);
        give_way(own, DONE);
    }
}

extern "C" void __syncthreads() {
    const unsigned int own = threadIdx.x;
    give_way(fibers[own], AT_BARRIER);
}

static void resume(Fiber& fiber) {
    if (_setjmp(scheduler)) return;
    if (fiber.state == NEW) setcontext(&fiber.start);
    _longjmp(fiber.here, 1);
}

// Run every thread of the block to its end or to the next barrier; return whether the threads wait. All threads have to agree.
static bool run_to_barrier(const std::vector<unsigned int>& order) {
    size_t waiting = 0;
    for (const unsigned int k : order) {
        threadIdx.x = k;
        resume(fibers[k]);
        waiting += fibers[k].state == AT_BARRIER;
    }
    if (waiting != 0 && waiting != fibers.size()) {
        fprintf(stderr, "%zu of %zu threads wait at a barrier\n", waiting, fibers.size());
        abort();
    }
    return waiting != 0;
}

static std::vector<unsigned int> shuffled(const unsigned int count, std::mt19937& random) {
    std::vector<unsigned int> order(count);
    std::iota(order.begin(), order.end(), 0u);
    std::shuffle(order.begin(), order.end(), random);
    return order;
}

static void make_fibers(const unsigned int threads) {
    fibers.resize(threads);
    stacks.resize(threads * STACK);
    for (size_t t = 0; t < threads; ++t) {
        getcontext(&fibers[t].start);
        fibers[t].start.uc_stack.ss_sp = stacks.data() + t * STACK;
        fibers[t].start.uc_stack.ss_size = STACK;
        fibers[t].start.uc_link = nullptr;
        fibers[t].state = NEW;
        makecontext(&fibers[t].start, enter, 0);
    }
}

extern "C" void launch(void (*body)(const void*), const void* given, unsigned int blocks, unsigned int threads, unsigned int seed) {
    std::mt19937 random(seed);
    kernel = body;
    arguments = given;
    gridDim.x = blocks;
    if (fibers.size() != threads) make_fibers(threads);
    for (const unsigned int k : shuffled(blocks, random)) {
        blockIdx.x = k;
        while (run_to_barrier(shuffled(threads, random))) {
        }
    }
}
