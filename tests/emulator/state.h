#pragma once

#include <array>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "emulator.h"

// What the machine is made of; for its own files alone.
namespace emulator {

constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / 32;
constexpr int kMaxCtas = 16;
constexpr int kCtaShift = 18;  // of an address in shared memory
constexpr uint32_t kArenaBytes = 1u << kCtaShift;
constexpr uint32_t kOffsetMask = kArenaBytes - 1;
constexpr uint32_t kMostShared = 227 * 1024;
constexpr uint32_t kGranule = 8;  // bytes whose copies in flight are known together

// Warps that run only when no other can go on.
enum class Starved {
    kNone,
    kSomeWarps,
    kOneWarp,
    kOneCta,
    kAllButOneCta,
    kFirstWarpgroup,
    kAllButFirstWarpgroup,
    kFirstWarps,
    kCount
};

// When asynchronous operations take effect.
enum class Landing { kRandom, kAtOnce, kAtTheEnd, kLastFirst, kCopiesFirst, kArrivalsFirst, kOneCtaLate, kCount };

struct Mbarrier {
    uint32_t offset = 0;
    int expected = 0;   // arrivals of a phase
    int pending = 0;    // of them
    int64_t bytes = 0;  // expected less arrived; below 0 where bytes came before their expectation
    int completed = 0;  // phases
};

// cp.async of 16 bytes.
struct ThreadCopy {
    uint32_t to = 0;
    const void* from = nullptr;
    uint32_t bytes = 0;
    int group = 0;
    bool is_done = false;
};

struct Fiber {
    enum class Wait { kNone, kGeneration, kMbarrier, kCluster };

    void* stack_pointer = nullptr;
    int thread = 0;
    bool is_done = false;
    // What it waits for: a generation or a number of phases other than, or above, `value`.
    Wait wait = Wait::kNone;
    const int* generation = nullptr;
    const Mbarrier* barrier = nullptr;
    int value = 0;

    std::vector<ThreadCopy> copies;
    int copy_group = 0;
    int cluster_arrivals = 0, cluster_waits = 0;
};

// Lanes of a warp that meet. Values of two meetings are kept: a lane may still read when others are at the next one.
struct Meeting {
    uint32_t mask = 0;
    uint32_t came = 0;
    int generation = 0;
    const char* op = nullptr;
    uint64_t values[2][32] = {};
};

// Registers that the tensor cores accumulate into. Until their products are made, the threads' own ones are NaN.
struct Accumulators {
    float* registers[32] = {};
    std::vector<float> values;  // [32, columns / 2]
    int pending = 0;            // products
};

// A wgmma of a warp: a quarter of a warpgroup's.
struct Product {
    std::shared_ptr<Accumulators> to;
    const uint32_t* a_registers[32] = {};
    uint64_t a = 0, b = 0;
    int columns = 0;
    Element element = Element::kHalf;
    bool add = false, a_in_registers = false;
    uint32_t issued = 0;  // lanes
    int group = -1;       // -1: not committed
};

struct Warp {
    std::vector<std::unique_ptr<Meeting>> meetings;
    int alive = 0;
    bool is_starved = false;
    std::deque<Product> products;
    int64_t first_product = 0;  // the number of products[0]
    int64_t issued[32] = {};    // products of a lane
    int groups[32] = {};        // commits of a lane
    std::vector<std::shared_ptr<Accumulators>> accumulators;
};

// Threads or warps that come to a barrier.
struct Counter {
    int expected = 0;
    int came = 0;
    int generation = 0;
};

struct Cta {
    std::vector<Fiber> fibers;
    std::array<Warp, kMaxWarps> warps;
    int alive = 0;  // threads
    Counter all;    // __syncthreads
    int sums[2] = {};
    std::array<Counter, 16> named;
    Counter cluster_join;  // Options::cluster_wait_joins_cta
    std::vector<std::unique_ptr<Mbarrier>> mbarriers;
    uint3 block = {};
    uint32_t rank = 0;
    bool has_started = false, has_exited = false;
    char* arena = nullptr;  // shared memory: the dynamic one, then `__shared__` variables
    char* stacks = nullptr;
    std::vector<uint8_t> in_flight;
};

// An asynchronous operation that has been issued and has not taken effect.
struct Operation {
    int target = 0;  // CTA
    bool is_arrival = false;
    std::function<void()> run;
};

// A `__shared__` variable. Its place is that of the first thread of a launch that comes to it.
struct StaticVariable {
    const char* name = nullptr;
    int line = 0;
    uint32_t offset = 0;
};

struct Machine {
    LaunchShape shape;
    std::vector<StaticVariable> statics;
    uint32_t shared_end = 0;
    const std::function<void()>* thread = nullptr;
    std::vector<std::unique_ptr<Cta>> pool;
    int cluster_size = 1;
    Cta* cta = nullptr;  // whose thread runs
    Fiber* current = nullptr;
    void* scheduler_stack = nullptr;
    std::string failure;
    uint64_t random_state = 0;
    Starved starved = Starved::kNone;
    Landing landing = Landing::kRandom;
    int late_cta = 0;
    int cluster_phase = 0, cluster_came = 0, cluster_alive = 0;
    std::vector<Operation> operations;
};
extern Machine machine;

uint64_t random_bits();
bool one_in(int n);
void restart_launch_numbers();

// Back to the scheduler, until what the current fiber waits for has come.
void to_scheduler();
void wait_generation(const int* generation, int value);

Cta* cta_of(uint32_t address);
char* bytes_at(uint32_t address);
uint32_t full_address(uint32_t address);  // with the CTA in it
bool is_in_flight(const Cta& cta, uint32_t offset, uint32_t bytes);

// All lanes of the warp are at the same instruction.
void converge(const char* op);
void settle_cluster();
// The last one of `counter` goes on and lets the others; true for it.
bool complete_if_last(Counter* counter, int expected);

Mbarrier* live_mbarrier(uint32_t address, const char* what);
void settle_mbarrier(Mbarrier* barrier);

void add_operation(Operation operation);
bool run_one_operation();
// Makes the oldest product of a warp; false if there is none that all lanes have issued.
bool run_product(Cta* cta, int warp);

}  // namespace emulator
