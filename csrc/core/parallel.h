#pragma once

#include <cstdint>
#include <functional>

namespace mage::core {

// Calls body(begin, end) on disjoint ranges that cover [0, count), each of at least `grain` items where count allows,
// on up to num_threads() threads, and returns when all are done. The ranges depend on count, grain and num_threads()
// alone. Called from inside a body it runs serially. The first exception of a body is rethrown here.
void parallel_for(int64_t count, int64_t grain, const std::function<void(int64_t begin, int64_t end)>& body);

// Threads that parallel_for uses: the number set, else what the source says, else the number of processors.
int num_threads();

// n >= 1 fixes the number; 0 goes back to the source.
void set_num_threads(int n);

// A function asked at every parallel_for, so that a host framework's own setting is followed without copying it.
void set_num_threads_source(int (*source)());

}  // namespace mage::core
