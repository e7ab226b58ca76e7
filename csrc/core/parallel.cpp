#include "core/parallel.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>

#include "core/check.h"

namespace mage::core {

namespace {

std::atomic<int> fixed_threads{0};
std::atomic<int (*)()> threads_source{nullptr};

}  // namespace

int num_threads() {
    if (const int fixed = fixed_threads.load()) return fixed;
    if (auto* source = threads_source.load()) return std::max(1, source());
    return std::max(1, omp_get_num_procs());
}

void set_num_threads(int n) {
    MAGE_CHECK(n >= 0, "set_num_threads: n must be at least 0, got ", n);
    fixed_threads.store(n);
}

void set_num_threads_source(int (*source)()) { threads_source.store(source); }

// NOTE: OpenMP rather than a pool of our own: torch's wheels bring libgomp under its usual soname, so the loader gives
// both the same copy. A second pool would compete with torch's threads, which spin for a while after each region.
void parallel_for(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
    if (count <= 0) return;
    grain = std::max<int64_t>(grain, 1);
    const int64_t threads = std::min<int64_t>(num_threads(), (count + grain - 1) / grain);
    if (threads <= 1 || omp_in_parallel()) {
        body(0, count);
        return;
    }
    std::exception_ptr error;
    std::mutex error_mutex;
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
        // The runtime may give fewer threads than asked; the ranges stay the same and are dealt out in turn.
        for (int64_t part = omp_get_thread_num(); part < threads; part += omp_get_num_threads()) {
            const int64_t begin = count * part / threads;
            const int64_t end = count * (part + 1) / threads;
            try {
                if (begin < end) body(begin, end);
            } catch (...) {
                const std::lock_guard<std::mutex> lock(error_mutex);
                if (!error) error = std::current_exception();
            }
        }
    }
    if (error) std::rethrow_exception(error);
}

}  // namespace mage::core
