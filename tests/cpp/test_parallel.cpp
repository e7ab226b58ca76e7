#include <gtest/gtest.h>

#include <atomic>
#include <stdexcept>
#include <vector>

#include "core/parallel.h"
#include "mage/error.h"

namespace mage::core {
namespace {

TEST(Parallel, CoversEachItemOnce) {
    for (const int threads : {1, 2, 3, 7}) {
        set_num_threads(threads);
        for (const int64_t count : {0, 1, 2, 5, 100, 1001}) {
            for (const int64_t grain : {0, 1, 3, 1000}) {
                std::vector<std::atomic<int>> seen(count);
                parallel_for(count, grain, [&](int64_t begin, int64_t end) {
                    for (int64_t i = begin; i < end; ++i) ++seen[i];
                });
                for (int64_t i = 0; i < count; ++i) ASSERT_EQ(seen[i], 1) << threads << " " << count << " " << grain;
            }
        }
    }
    set_num_threads(0);
}

TEST(Parallel, RespectsGrain) {
    set_num_threads(4);
    std::atomic<int> calls{0};
    parallel_for(100, 60, [&](int64_t begin, int64_t end) {
        ++calls;
        EXPECT_GE(end - begin, 50);
    });
    EXPECT_EQ(calls, 2);
    set_num_threads(0);
}

TEST(Parallel, NestedRunsSerially) {
    set_num_threads(2);
    std::atomic<int64_t> sum{0};
    parallel_for(4, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            parallel_for(10, 1, [&](int64_t b, int64_t e) { sum += e - b; });
        }
    });
    EXPECT_EQ(sum, 40);
    set_num_threads(0);
}

TEST(Parallel, RethrowsFromAThread) {
    set_num_threads(2);
    EXPECT_THROW(parallel_for(8, 1,
                              [](int64_t, int64_t end) {
                                  if (end == 8) throw std::out_of_range("last");
                              }),
                 std::out_of_range);
    set_num_threads(0);
}

TEST(Parallel, SourceIsAskedUntilFixed) {
    set_num_threads_source([] { return 3; });
    EXPECT_EQ(num_threads(), 3);
    set_num_threads(5);
    EXPECT_EQ(num_threads(), 5);
    set_num_threads(0);
    EXPECT_EQ(num_threads(), 3);
    set_num_threads_source(nullptr);
    EXPECT_GE(num_threads(), 1);
    EXPECT_THROW(set_num_threads(-1), Error);
}

}  // namespace
}  // namespace mage::core
