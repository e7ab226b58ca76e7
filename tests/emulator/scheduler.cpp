// Fibers, the order in which they run, and reports.
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "state.h"

namespace emulator {

Options options;
Machine machine;

// Pushes the registers that a function must keep (System V ABI, x86-64), swaps stacks, and pops those of the other one.
extern "C" void emulator_switch(void** save, void* to);
asm(R"(
.text
.globl emulator_switch
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr int kSavedRegisters = 6;
constexpr int kTurnsToTheEnd = 1 << 20;

struct PlainThread {
    bool runs = false;
    dim3 grid, block;
    uint3 block_index = {}, thread_index = {};
} plain;

uint64_t launch_number;

uint3 unflatten(unsigned thread, dim3 block) {
    return {thread % block.x, thread / block.x % block.y, thread / (block.x * block.y)};
}

}  // namespace

// xorshift64.
uint64_t random_bits() {
    uint64_t& state = machine.random_state;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state >> 11;
}

bool one_in(int n) { return random_bits() % static_cast<uint64_t>(n) == 0; }

void restart_launch_numbers() { launch_number = 0; }

// --- Threads
// ----------------------------------------------------------------------------------------------------------

uint3 thread_index() {
    if (plain.runs) return plain.thread_index;
    return unflatten(static_cast<unsigned>(machine.current->thread), machine.shape.block);
}
uint3 block_index() { return plain.runs ? plain.block_index : machine.cta->block; }
dim3 block_dim() { return plain.runs ? plain.block : machine.shape.block; }
dim3 grid_dim() { return plain.runs ? plain.grid : machine.shape.grid; }
int lane() { return machine.current->thread % 32; }
uint32_t cluster_rank() { return machine.cta->rank; }
uint32_t cluster_index() { return machine.cta->block.x / static_cast<uint32_t>(machine.cluster_size); }

void to_scheduler() { emulator_switch(&machine.current->stack_pointer, machine.scheduler_stack); }

void wait_generation(const int* generation, int value) {
    if (*generation != value) return;
    machine.current->wait = Fiber::Wait::kGeneration;
    machine.current->generation = generation;
    machine.current->value = value;
    to_scheduler();
}

void fail(const char* format, ...) {
    char text[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (machine.current == nullptr) throw std::runtime_error(text);
    const uint3 block = machine.cta->block;
    const int thread = machine.current->thread;
    char where[200];
    snprintf(where, sizeof where, " [CTA %u of its cluster, block %u,%u,%u, warp %d, thread %d]", machine.cta->rank,
             block.x, block.y, block.z, thread / 32, thread);
    machine.failure = std::string(text) + where;
    for (;;) to_scheduler();  // which throws: exceptions cannot leave a fiber
}

void run_plain_grid(dim3 grid, dim3 block, const std::function<void()>& thread) {
    plain = {true, grid, block, {}, {}};
    for (unsigned b = 0; b < grid.x * grid.y * grid.z; ++b) {
        plain.block_index = unflatten(b, grid);
        for (unsigned t = 0; t < block.x * block.y * block.z; ++t) {
            plain.thread_index = unflatten(t, block);
            thread();
        }
    }
    plain.runs = false;
}

// --- The life of a fiber
// ----------------------------------------------------------------------------------------------

namespace {

void end_cta(Cta* cta) {
    for (const Operation& operation : machine.operations) {
        if (operation.target == static_cast<int>(cta->rank))
            fail("the CTA ends while %s to it is on its way", operation.is_arrival ? "an arrival" : "a copy");
    }
    for (const auto& barrier : cta->mbarriers) {
        if (barrier->bytes != 0)
            fail("the CTA ends, and %ld bytes are expected by the mbarrier at %x", static_cast<long>(barrier->bytes),
                 barrier->offset);
    }
    cta->has_exited = true;
}

void fiber_main() {
    (*machine.thread)();
    Cta* cta = machine.cta;
    Fiber* fiber = machine.current;
    if (!fiber->copies.empty()) fail("a thread ends with copies that it has not waited for");
    if (fiber->cluster_arrivals != fiber->cluster_waits)
        fail("a thread ends between barrier.cluster.arrive and barrier.cluster.wait");
    fiber->is_done = true;
    --cta->alive;
    --cta->warps[fiber->thread / 32].alive;
    // A thread that has exited is not waited for.
    --machine.cluster_alive;
    settle_cluster();
    if (cta->all.came > 0 && cta->all.came == cta->alive) {
        cta->sums[(cta->all.generation + 1) % 2] = 0;
        cta->all.came = 0;
        ++cta->all.generation;
    }
    if (cta->alive == 0) end_cta(cta);
    for (;;) to_scheduler();
}

bool can_go_on(const Fiber& fiber) {
    switch (fiber.wait) {
        case Fiber::Wait::kNone:
            return true;
        case Fiber::Wait::kGeneration:
            return *fiber.generation != fiber.value;
        case Fiber::Wait::kMbarrier:
            return fiber.barrier->completed > fiber.value;
        case Fiber::Wait::kCluster:
            return machine.cluster_phase >= fiber.value;
    }
    return false;
}

// Up to `turns` rounds over the lanes of a warp, in random order; whether one of them went on.
bool run_warp(Cta* cta, int warp, int turns) {
    const int threads = static_cast<int>(cta->fibers.size());
    bool any = false;
    for (bool more = true; more && turns > 0; --turns) {
        more = false;
        const int start = static_cast<int>(random_bits() % 32);
        const int step = one_in(2) ? 1 : 31;
        for (int k = 0; k < 32; ++k) {
            const int thread = warp * 32 + (start + k * step) % 32;
            if (thread >= threads) continue;
            Fiber& fiber = cta->fibers[thread];
            if (fiber.is_done || !can_go_on(fiber)) continue;
            fiber.wait = Fiber::Wait::kNone;
            cta->has_started = true;
            machine.cta = cta;
            machine.current = &fiber;
            emulator_switch(&machine.scheduler_stack, fiber.stack_pointer);
            machine.current = nullptr;
            if (!machine.failure.empty()) throw std::runtime_error(machine.failure);
            more = any = true;
        }
    }
    return any;
}

// --- Reports
// ----------------------------------------------------------------------------------------------------------

std::string describe_wait(const Cta& cta, const Fiber& fiber) {
    char text[200];
    if (fiber.wait == Fiber::Wait::kMbarrier) {
        const Mbarrier& barrier = *fiber.barrier;
        snprintf(text, sizeof text, "mbarrier %x, phase %d (%d complete; of the next %d arrivals and %ld bytes lack)",
                 barrier.offset, fiber.value, barrier.completed, barrier.pending, static_cast<long>(barrier.bytes));
        return text;
    }
    if (fiber.wait == Fiber::Wait::kCluster) {
        snprintf(text, sizeof text, "barrier.cluster.wait %d (%d complete)", fiber.value, machine.cluster_phase);
        return text;
    }
    if (fiber.generation == &cta.all.generation) return "__syncthreads";
    if (fiber.generation == &cta.cluster_join.generation) return "barrier.cluster.wait, for other warps of its CTA";
    for (size_t id = 0; id < cta.named.size(); ++id) {
        const Counter& barrier = cta.named[id];
        if (fiber.generation != &barrier.generation) continue;
        snprintf(text, sizeof text, "named barrier %zu (%d of %d warps came)", id, barrier.came, barrier.expected);
        return text;
    }
    for (const auto& meeting : cta.warps[fiber.thread / 32].meetings) {
        if (fiber.generation != &meeting->generation) continue;
        snprintf(text, sizeof text, "%s (lanes %x of %x came)", meeting->op, meeting->came, meeting->mask);
        return text;
    }
    return "nothing";
}

// A line per warp, and per place where lanes of it wait.
std::string describe_deadlock() {
    std::string text = "deadlock:";
    for (int rank = 0; rank < machine.cluster_size; ++rank) {
        const Cta& cta = *machine.pool[rank];
        std::string last;
        for (const Fiber& fiber : cta.fibers) {
            if (fiber.is_done) continue;
            const std::string line = "\n  CTA " + std::to_string(rank) + " warp " + std::to_string(fiber.thread / 32) +
                                     ": " + describe_wait(cta, fiber);
            if (line != last) text += line;
            last = line;
        }
    }
    return text;
}

// --- The order of warps
// -----------------------------------------------------------------------------------------------

int warps_of_cta() {
    const dim3 block = machine.shape.block;
    return static_cast<int>((block.x * block.y * block.z + 31) / 32);
}

bool draw_starved(int rank, int warp, int one_cta, int one_warp) {
    switch (machine.starved) {
        case Starved::kSomeWarps:
            return one_in(4);
        case Starved::kOneWarp:
            return rank == one_cta && warp == one_warp;
        case Starved::kOneCta:
            return rank == one_cta;
        case Starved::kAllButOneCta:
            return rank != one_cta;
        case Starved::kFirstWarpgroup:
            return warp < 4;
        case Starved::kAllButFirstWarpgroup:
            return warp >= 4;
        case Starved::kFirstWarps:
            return warp < 2 && one_in(2);
        default:
            return false;
    }
}

void choose_starved() {
    const int warps = warps_of_cta();
    const int one_cta = static_cast<int>(random_bits() % static_cast<uint64_t>(machine.cluster_size));
    const int one_warp = static_cast<int>(random_bits() % static_cast<uint64_t>(warps));
    for (int rank = 0; rank < machine.cluster_size; ++rank) {
        for (int warp = 0; warp < warps; ++warp)
            machine.pool[rank]->warps[warp].is_starved = draw_starved(rank, warp, one_cta, one_warp);
    }
}

using WarpOfCluster = std::pair<Cta*, int>;

// Some turns of one starved warp.
bool run_starved(const std::vector<WarpOfCluster>& order) {
    for (const auto& [cta, warp] : order) {
        if (cta->warps[warp].alive == 0 || !cta->warps[warp].is_starved) continue;
        if (run_warp(cta, warp, 1 + static_cast<int>(random_bits() % 4))) return true;
    }
    return false;
}

void run_cluster() {
    std::vector<WarpOfCluster> order;
    for (int rank = 0; rank < machine.cluster_size; ++rank) {
        for (int warp = 0; warp < warps_of_cta(); ++warp) order.emplace_back(machine.pool[rank].get(), warp);
    }
    const bool lands_at_the_end = machine.landing == Landing::kAtTheEnd || machine.landing == Landing::kLastFirst;
    const bool operations_before_starved = one_in(2);
    for (;;) {
        for (size_t i = order.size() - 1; i > 0; --i) std::swap(order[i], order[random_bits() % (i + 1)]);
        bool any = false;
        bool is_alive = false;
        for (const auto& [cta, warp] : order) {
            if (cta->warps[warp].alive == 0) continue;
            is_alive = true;
            if (cta->warps[warp].is_starved && !one_in(5000)) continue;
            const int turns = one_in(4) ? 1 + static_cast<int>(random_bits() % 8) : kTurnsToTheEnd;
            any = run_warp(cta, warp, turns) || any;
            if (!lands_at_the_end && one_in(6)) any = run_one_operation() || any;
            if (one_in(16)) run_product(cta, warp);
        }
        if (!is_alive) break;
        if (any) continue;
        // Only starved warps and operations on their way are left: one of them, then the others again.
        const bool went_on = operations_before_starved ? run_one_operation() || run_starved(order)
                                                       : run_starved(order) || run_one_operation();
        if (!went_on) throw std::runtime_error(describe_deadlock());
    }
}

// --- Launches
// ---------------------------------------------------------------------------------------------------------

void check_shape(const LaunchShape& shape) {
    const auto refuse = [](const char* what) { throw std::runtime_error(std::string("launch: ") + what); };
    if (shape.shared_bytes > kMostShared) refuse("more than 227 KB of shared memory");
    if (shape.cluster > kMaxCtas || shape.grid.x % shape.cluster != 0) refuse("the cluster does not divide the grid");
    if (shape.block.x * shape.block.y * shape.block.z > kMaxThreads) refuse("more than 1024 threads in a block");
    if (shape.grid.y > 65535 || shape.grid.z > 65535) refuse("more than 65535 blocks along y or z");
}

void grow_pool(size_t ctas) {
    while (machine.pool.size() < ctas) {
        auto cta = std::make_unique<Cta>();
        cta->arena = static_cast<char*>(aligned_alloc(kArenaBytes, kArenaBytes));
        cta->stacks = static_cast<char*>(mmap(nullptr, kStackBytes * kMaxThreads, PROT_READ | PROT_WRITE,
                                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        if (cta->stacks == MAP_FAILED) throw std::runtime_error("no memory for stacks");
        machine.pool.push_back(std::move(cta));
    }
}

// What the first switch to a fiber pops and returns to.
void* initial_stack(char* end) {
    void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(end - 64) & ~uintptr_t{15});
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(fiber_main);
    for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
    return top;
}

// Shared memory holds NaN until it is written.
void start_cta(Cta* cta, uint32_t rank, uint3 block) {
    const LaunchShape& shape = machine.shape;
    const int threads = static_cast<int>(shape.block.x * shape.block.y * shape.block.z);
    cta->alive = threads;
    cta->all = cta->cluster_join = {};
    cta->sums[0] = cta->sums[1] = 0;
    cta->named.fill({});
    cta->mbarriers.clear();
    cta->block = block;
    cta->rank = rank;
    cta->has_started = cta->has_exited = false;
    cta->in_flight.assign(kArenaBytes / kGranule, 0);
    memset(cta->arena, 0xff, machine.shared_end);
    for (Warp& warp : cta->warps) warp = Warp();
    cta->fibers.assign(threads, Fiber());
    for (int thread = 0; thread < threads; ++thread) {
        ++cta->warps[thread / 32].alive;
        cta->fibers[thread].thread = thread;
        cta->fibers[thread].stack_pointer = initial_stack(cta->stacks + (thread + 1) * kStackBytes);
    }
}

void start_cluster(uint3 first_block) {
    machine.starved = static_cast<Starved>(random_bits() % static_cast<uint64_t>(Starved::kCount));
    machine.landing = static_cast<Landing>(random_bits() % static_cast<uint64_t>(Landing::kCount));
    machine.late_cta = static_cast<int>(random_bits() % static_cast<uint64_t>(machine.cluster_size));
    machine.operations.clear();
    machine.failure.clear();
    machine.current = nullptr;
    machine.cta = nullptr;
    machine.cluster_phase = machine.cluster_came = 0;
    for (int rank = 0; rank < machine.cluster_size; ++rank) {
        const uint3 block = {first_block.x + static_cast<unsigned>(rank), first_block.y, first_block.z};
        start_cta(machine.pool[rank].get(), static_cast<uint32_t>(rank), block);
    }
    machine.cluster_alive = machine.pool[0]->alive * machine.cluster_size;
    choose_starved();
}

}  // namespace

void run_grid(const LaunchShape& shape, const std::function<void()>& thread) {
    check_shape(shape);
    grow_pool(shape.cluster);
    machine.shape = shape;
    machine.thread = &thread;
    machine.statics.clear();
    machine.shared_end = shape.shared_bytes;
    machine.cluster_size = static_cast<int>(shape.cluster);
    machine.random_state = (options.seed + 1) * 0x9e3779b97f4a7c15ull + ++launch_number * 0xbf58476d1ce4e5b9ull;
    for (int i = 0; i < 4; ++i) random_bits();
    std::vector<uint3> clusters;
    for (unsigned z = 0; z < shape.grid.z; ++z) {
        for (unsigned y = 0; y < shape.grid.y; ++y) {
            for (unsigned x = 0; x < shape.grid.x; x += shape.cluster) clusters.push_back({x, y, z});
        }
    }
    for (size_t i = clusters.size() - 1; i > 0; --i) std::swap(clusters[i], clusters[random_bits() % (i + 1)]);
    for (const uint3 block : clusters) {
        start_cluster(block);
        try {
            run_cluster();
        } catch (const std::exception& error) {
            machine.current = nullptr;
            char where[300];
            snprintf(where, sizeof where,
                     "\n{launch %lu of the test, seed %lu: grid %u x %u x %u, clusters of %u, this one from block "
                     "%u,%u,%u, starved %d, landing %d}",
                     static_cast<unsigned long>(launch_number), static_cast<unsigned long>(options.seed), shape.grid.x,
                     shape.grid.y, shape.grid.z, shape.cluster, block.x, block.y, block.z,
                     static_cast<int>(machine.starved), static_cast<int>(machine.landing));
            throw std::runtime_error(error.what() + std::string(where));
        }
    }
}

}  // namespace emulator
