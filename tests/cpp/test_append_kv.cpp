#include <gtest/gtest.h>

#include "append_kv_cases.h"
#include "core/parallel.h"

namespace mage::test {
namespace {

class AppendKv : public testing::TestWithParam<AppendKvCase> {};

TEST_P(AppendKv, WritesWhatTheContractSays) {
    const AppendKvCase& c = GetParam();
    for (const int threads : {1, 3}) {
        core::set_num_threads(threads);
        AppendKvBuffers buffers(c);
        buffers.bind(buffers.input.data(), buffers.pool.data(), c.block_table.data(), c.start.data());
        cpu::append_kv(buffers.params);
        EXPECT_EQ(buffers.pool, buffers.expected);
    }
    core::set_num_threads(0);
}

INSTANTIATE_TEST_SUITE_P(Cases, AppendKv, testing::ValuesIn(append_kv_cases()),
                         [](const auto& info) { return info.param.name; });

TEST(AppendKvEmpty, NoRequestsAndNoRows) {
    AppendKvParams params;
    params.num_kv_heads = 1;
    params.head_dim = 8;
    params.pages.page_size = 16;
    params.num_rows = 4;
    cpu::append_kv(params);
    params.num_rows = 0;
    params.num_requests = 3;
    cpu::append_kv(params);  // would read null pointers if it touched anything
}

}  // namespace
}  // namespace mage::test
