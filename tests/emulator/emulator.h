#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <string>

// The machine that runs kernels on the CPU, as kernels (cuda_names.h, shim/) and the runtime (runtime.cpp) reach it.
// Every CUDA thread is a fiber, and one thread of the operating system runs them all, so that a seed gives the same
// interleaving every time. What PTX leaves open is drawn at random; what it forbids ends the launch with an exception.
namespace emulator {

struct Options {
    uint64_t seed = 1;
    // barrier.cluster.wait lets a warp pass only when all warps of its CTA have come to it. PTX does not say so, but
    // compute-sanitizer's racecheck behaves like that, and a kernel that relies on the opposite hangs there.
    bool cluster_wait_joins_cta = false;
    // What the device says that it has.
    int multiprocessors = 132;
};
extern Options options;

// The launches that follow draw from the seed anew; predecessors that an earlier failure left behind are forgotten.
void begin_test();

// --- Launches
// ---------------------------------------------------------------------------------------------------------

struct LaunchShape {
    dim3 grid, block;
    uint32_t shared_bytes = 0;
    uint32_t cluster = 1;
};

// Runs all CTAs of a launch, cluster after cluster in random order. Throws std::runtime_error with the report.
void run_grid(const LaunchShape& shape, const std::function<void()>& thread);

// Runs threads one after the other, each to its end, within whatever runs now: for kernels that synchronise nothing.
void run_plain_grid(dim3 grid, dim3 block, const std::function<void()>& thread);

// Submits a kernel to a stream, or to the graph that is captured from it. `overlaps`: a launch with programmatic stream
// serialisation, which may start before its predecessor is done.
void submit(cudaStream_t stream, const void* kernel, bool overlaps, std::function<void()> run);

// A kernel of the tests that lets its successor start at once: it takes effect when the successor waits for it.
void submit_late(cudaStream_t stream, std::function<void()> run);

// griddepcontrol.wait: the predecessor is done now.
void dependency_wait();

// Launches of a kernel so far.
int64_t launches_of(const void* kernel);

// --- Threads
// ----------------------------------------------------------------------------------------------------------

uint3 thread_index();
uint3 block_index();
dim3 block_dim();
dim3 grid_dim();
int lane();
uint32_t cluster_rank();
uint32_t cluster_index();

// Ends the launch with a report that names the thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// --- Shared memory
// ----------------------------------------------------------------------------------------------------

// An address: 18 bits of offset, above them the CTA of the cluster plus one, or 0 for the own one.
void* dynamic_shared();
// The `__shared__` variable of that name and line, at the same place in every CTA of the launch.
void* static_shared(const char* name, int line, size_t bytes);
uint32_t address_of(const void* pointer);
uint32_t cluster_address(uint32_t address, uint32_t rank);

// Where bytes lie that a thread reads or writes now. Fails if an asynchronous copy to them is in flight.
char* settled(uint32_t address, int bytes, const char* what);

// --- Barriers
// ---------------------------------------------------------------------------------------------------------

// All lanes of `mask` meet; out[i] is what lane i gave.
void collective(uint32_t mask, uint64_t value, const char* op, uint64_t (&out)[32]);
// __syncthreads; returns the sum of the values.
int sync_cta(int value);
void named_barrier(uint32_t id, uint32_t threads, bool waits);
void cluster_arrive();
void cluster_wait();

void mbarrier_init(uint32_t address, uint32_t arrivals);
void mbarrier_arrive(uint32_t address, uint32_t transaction_bytes);
void mbarrier_arrive_remote(uint32_t address);
void mbarrier_wait(uint32_t address, uint32_t parity);

// --- Asynchronous copies and tensor cores
// -----------------------------------------------------------------------------

// `write(destination)` is called at some time; then the bytes are counted on the barrier, which is of the same CTA.
void copy_async(uint32_t to, uint32_t bytes, uint32_t barrier, std::function<void(char*)> write);
void copy_shared_async(uint32_t to, uint32_t from, uint32_t bytes, uint32_t barrier);

void cp_async(uint32_t to, const void* from, uint32_t bytes);
void cp_async_commit();
void cp_async_wait(int pending);

enum class Element { kHalf, kBfloat16 };
// D[64, columns] (+)= A[64, 16] B[16, columns]. `a_registers`: A is in registers and B MN-major, else both are K-major
// in shared memory.
void wgmma(float* d, const uint32_t* a_registers, uint64_t a, uint64_t b, int columns, Element element, bool add);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending);

}  // namespace emulator
