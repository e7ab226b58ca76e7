#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <vector>

#include "core/cuda/device_info.h"
#include "gpu.h"
#include "mage/append_kv.h"
#include "mage/block_attention_rows.h"
#include "mage/merge_attention.h"
#include "mage/row_votes.h"
#include "mage/select_kv.h"
#include "mage/token_confidence.h"
#include "mage/token_mass.h"
#include "sparse_attention_cases.h"

namespace {

// What the runtime is pretended to say, on any machine, while `pretends`.
struct {
    bool pretends = false;
    cudaError_t status = cudaSuccess;
    int major = 0, minor = 0;
} said;

}  // namespace

// The linker gives these to callers of the functions that they are named after (CMakeLists.txt).
extern "C" {
cudaError_t __real_cudaGetDevice(int* device);
cudaError_t __real_cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

cudaError_t __wrap_cudaGetDevice(int* device) {
    if (!said.pretends) return __real_cudaGetDevice(device);
    *device = 0;
    return said.status;
}

cudaError_t __wrap_cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    if (!said.pretends) return __real_cudaDeviceGetAttribute(value, attribute, device);
    *value = attribute == cudaDevAttrComputeCapabilityMajor ? said.major : said.minor;
    return said.status;
}
}

namespace mage::test {
namespace {

class RequireHopper : public testing::Test {
protected:
    void TearDown() override { said = {}; }

    static std::string error_of(const std::function<void()>& call) {
        try {
            call();
        } catch (const Error& error) {
            return error.what();
        }
        return "";
    }

    // Every way to the kernels says what is missing, and whose call it was.
    static void expect_refused(const std::string& message) {
        SparseBuffers sparse({{"", {20}, 2, 2, 1, 64, 16, DType::kBFloat16}, 16});
        SparseBlockAttentionParams lists = sparse.params;
        lists.attention.workspace_bytes = int64_t{1} << 40;
        std::vector<float> mass(4);
        BlockAttentionMassParams units;
        units.attention = lists.attention;
        units.mass = mass.data();
        BlockAttentionRowsParams rows;
        rows.attention = lists.attention;
        rows.row_mass = mass.data();
        const std::vector<std::pair<std::string, std::function<void()>>> calls = {
            {"append_kv", [] { cuda::append_kv({}, nullptr); }},
            {"block_attention", [&] { cuda::block_attention(lists.attention, nullptr); }},
            {"block_attention_mass", [&] { cuda::block_attention_mass(units, nullptr); }},
            {"block_attention_rows", [&] { cuda::block_attention_rows(rows, nullptr); }},
            {"sparse_block_attention", [&] { cuda::sparse_block_attention(lists, nullptr); }},
            {"token_mass", [] { cuda::token_mass({}, nullptr); }},
            {"row_votes", [] { cuda::row_votes({}, nullptr); }},
            {"select_kv", [] { cuda::select_kv({}, nullptr); }},
            {"merge_attention", [] { cuda::merge_attention({}, nullptr); }},
            {"token_confidence", [] { cuda::token_confidence({}, nullptr); }},
            {"kernel_infos", [] { cuda::kernel_infos(); }},
        };
        for (const auto& [op, call] : calls) EXPECT_EQ(error_of(call), op + ": " + message);
    }
};

TEST_F(RequireHopper, NamesAnotherGpu) {
    for (const auto& [major, minor] : {std::pair(8, 0), std::pair(8, 9), std::pair(9, 1), std::pair(10, 0)}) {
        said = {true, cudaSuccess, major, minor};
        expect_refused("the GPU must be a Hopper (compute capability 9.0), got " + std::to_string(major) + "." +
                       std::to_string(minor));
    }
    said = {true, cudaSuccess, 9, 0};
    EXPECT_EQ(error_of([] { core::require_hopper("op"); }), "");
}

TEST_F(RequireHopper, SaysThatThereIsNone) {
    for (const cudaError_t status : {cudaErrorNoDevice, cudaErrorInsufficientDriver}) {
        said = {true, status, 0, 0};
        expect_refused(std::string("cudaGetDevice(&device) failed: ") + cudaGetErrorString(status));
    }
}

}  // namespace
}  // namespace mage::test
