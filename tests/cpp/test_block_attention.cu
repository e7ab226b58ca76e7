#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "attention_gpu.h"
#include "mage/block_attention.h"

namespace mage::test {
namespace {

class BlockAttentionCuda : public testing::TestWithParam<AttentionCase> {};

TEST_P(BlockAttentionCuda, EqualsTheNaiveLoop) {
    MAGE_NEEDS_GPU();
    AttentionBuffers buffers(GetParam());
    const AttentionOnDevice device(buffers, cuda::block_attention_workspace(buffers.params));
    cuda::block_attention(device.params, nullptr);
    device.fetch(buffers);
    MAGE_EXPECT_CUDA_ATTENTION(buffers);
}

INSTANTIATE_TEST_SUITE_P(Cases, BlockAttentionCuda, testing::ValuesIn(cuda_attention_cases()),
                         [](const auto& info) { return info.param.name; });

AttentionCase named_case(const std::string& name) {
    for (const AttentionCase& c : cuda_attention_cases()) {
        if (c.name == name) return c;
    }
    throw std::runtime_error("no case " + name);
}

// Lengths that are out of range count as the nearest that are not.
TEST(BlockAttentionCudaLengths, AreClamped) {
    MAGE_NEEDS_GPU();
    for (const RowCount& r : kRowCounts) {
        AttentionBuffers buffers(near_lengths(r));
        AttentionOnDevice device(buffers, cuda::block_attention_workspace(buffers.params));
        device.seq_lens.set(kFarLengths);
        cuda::block_attention(device.params, nullptr);
        device.fetch(buffers);
        MAGE_EXPECT_CUDA_ATTENTION(buffers);
    }
}

DeviceCall call_of(AttentionOnDevice& device) {
    return {[&](cudaStream_t stream) { cuda::block_attention(device.params, stream); }, [&] { device.poison(); },
            [&] { return bytes_in(device.out, device.lse); }};
}

TEST(BlockAttentionCudaRuns, AreBitwiseEqual) {
    MAGE_NEEDS_GPU();
    for (const char* name : {"Rows224Bf16D128", "Rows192Fp16D64", "SplitBy64", "Streams", "PageOf1Rows128"}) {
        SCOPED_TRACE(name);
        const AttentionBuffers buffers(named_case(name), false);
        AttentionOnDevice device(buffers, cuda::block_attention_workspace(buffers.params));
        expect_equal_runs(call_of(device), 100);
    }
}

// With fixed splits a request's result is that which it has alone, whatever bounds the lengths of its batch.
void expect_alone_as_in_batch(bool own_max_seq_len) {
    for (const std::string split : {"64", "128", "320"}) {
        for (const std::string shape : {"", "Rows128", "Rows224"}) {
            const AttentionCase c = named_case("SplitBy" + split + shape);
            AttentionBuffers buffers(c);
            AttentionOnDevice device(buffers, cuda::block_attention_workspace(buffers.params));
            cuda::block_attention(device.params, nullptr);
            device.fetch(buffers);
            const std::vector<char> out = buffers.out;
            const std::vector<float> lse = buffers.lse;
            const size_t out_size = out.size() / c.seq_lens.size(), lse_size = lse.size() / c.seq_lens.size();
            for (size_t b = 0; b < c.seq_lens.size(); ++b) {
                device.poison();
                const int64_t longest =
                    own_max_seq_len ? std::max<int64_t>(1, c.seq_lens[b]) : device.params.max_seq_len;
                cuda::block_attention(alone(device.params, static_cast<int64_t>(b), longest), nullptr);
                device.fetch(buffers);
                const std::string what = c.name + " request " + std::to_string(b);
                EXPECT_EQ(std::memcmp(buffers.out.data(), out.data() + b * out_size, out_size), 0) << what;
                EXPECT_EQ(std::memcmp(buffers.lse.data(), lse.data() + b * lse_size, lse_size * sizeof(float)), 0)
                    << what;
            }
        }
    }
}

TEST(BlockAttentionCudaSplits, MakeARequestIndependentOfItsBatch) {
    MAGE_NEEDS_GPU();
    expect_alone_as_in_batch(false);
}

TEST(BlockAttentionCudaSplits, MakeARequestIndependentOfMaxSeqLen) {
    MAGE_NEEDS_GPU();
    expect_alone_as_in_batch(true);
}

// Two shapes that graphs are captured with, of one max_seq_len: balanced and fixed splits.
AttentionCase graph_case(int64_t split_tokens, std::vector<int32_t> lens, uint32_t seed) {
    AttentionCase c = {"Graph", std::move(lens), 32, 7, 1, 128, 16, DType::kBFloat16};
    c.split_tokens = split_tokens;
    c.max_seq_len = 600;
    c.seed = seed;
    c.stair = 16;
    return c;
}

// A captured call follows the lengths, tables and tokens that are in the buffers when the graph runs.
TEST(BlockAttentionCudaGraph, ReplaysWithNewLengths) {
    MAGE_NEEDS_GPU();
    for (const int64_t split_tokens : {0, 64}) {
        AttentionBuffers captured(graph_case(split_tokens, {77, 0, 130}, 1));
        AttentionOnDevice device(captured, cuda::block_attention_workspace(captured.params));
        Streams streams;
        streams.capture([&](cudaStream_t stream) { cuda::block_attention(device.params, stream); });
        device.fetch(captured);
        for (const float lse : captured.lse) ASSERT_TRUE(std::isnan(lse)) << "capturing must not run the kernel";
        streams.replay();
        device.fetch(captured);
        MAGE_EXPECT_CUDA_ATTENTION(captured);
        const std::vector<std::vector<int32_t>> batches = {{600, 1, 0}, {0, 0, 0}, {64, 599, 600}};
        for (size_t i = 0; i < batches.size(); ++i) {
            AttentionBuffers other(graph_case(split_tokens, batches[i], static_cast<uint32_t>(i) + 2));
            device.set(other);
            device.poison();
            streams.replay();
            device.fetch(other);
            MAGE_EXPECT_CUDA_ATTENTION(other);
        }
    }
}

TEST(BlockAttentionCudaStreams, RunAtOnce) {
    MAGE_NEEDS_GPU();
    AttentionBuffers first(named_case("Rows224Bf16D128")), second(named_case("Rows128Fp16D64"));
    const AttentionOnDevice first_device(first, cuda::block_attention_workspace(first.params));
    const AttentionOnDevice second_device(second, cuda::block_attention_workspace(second.params));
    const Streams streams;
    for (int i = 0; i < 10; ++i) {
        cuda::block_attention(first_device.params, streams.first);
        cuda::block_attention(second_device.params, streams.second);
    }
    first_device.fetch(first);
    second_device.fetch(second);
    MAGE_EXPECT_CUDA_ATTENTION(first);
    MAGE_EXPECT_CUDA_ATTENTION(second);
}

// Calls that follow one another on a stream may share a workspace, although their launches overlap.
TEST(BlockAttentionCudaStreams, CallsInARowShareAWorkspace) {
    MAGE_NEEDS_GPU();
    AttentionBuffers first(named_case("Rows224Bf16D128")), second(named_case("Rows192Bf16D128"));
    AttentionOnDevice first_device(first, cuda::block_attention_workspace(first.params));
    AttentionOnDevice second_device(second, cuda::block_attention_workspace(second.params));
    const bool larger = first_device.params.workspace_bytes > second_device.params.workspace_bytes;
    BlockAttentionParams& smaller = larger ? second_device.params : first_device.params;
    smaller.workspace = (larger ? first_device.params : second_device.params).workspace;
    const Streams streams;
    for (int i = 0; i < 10; ++i) {
        cuda::block_attention(first_device.params, streams.first);
        cuda::block_attention(second_device.params, streams.first);
    }
    first_device.fetch(first);
    second_device.fetch(second);
    MAGE_EXPECT_CUDA_ATTENTION(first);
    MAGE_EXPECT_CUDA_ATTENTION(second);
}

// Every input may come from a kernel that lets this one start early.
TEST(BlockAttentionCudaOverlap, WaitsForEveryInput) {
    MAGE_NEEDS_GPU();
    for (const RowCount& r : kRowCounts) {
        for (const int32_t page : {1, 16}) {
            for (const int64_t split_tokens : {0, 64}) {
                AttentionCase c = {"Late", {300, 0, 77},         r.queries, r.heads,
                                   1,      page == 1 ? 128 : 64, page,      DType::kBFloat16};
                c.split_tokens = split_tokens;
                c.stair = 4;
                SCOPED_TRACE(std::string(r.name) + " page " + std::to_string(page) + " split " +
                             std::to_string(split_tokens));
                const AttentionBuffers buffers(c, false);
                AttentionOnDevice device(buffers, cuda::block_attention_workspace(buffers.params));
                LateInputs late;
                add_inputs(device, &late);
                late.expect_awaited(call_of(device));
                if (HasFatalFailure()) return;
            }
        }
    }
}

// What is written may still be read by a kernel that lets this one start early.
TEST(BlockAttentionCudaOverlap, WaitsForReaders) {
    MAGE_NEEDS_GPU();
    for (const RowCount& r : kRowCounts) {
        for (const int64_t split_tokens : {0, 64}) {
            for (const std::vector<int32_t>& lens : kEmptySlots) {
                AttentionCase c = {"Read", lens, r.queries, r.heads, 1, 64, 16, DType::kBFloat16};
                c.split_tokens = split_tokens;
                c.max_seq_len = 300;
                SCOPED_TRACE(std::string(r.name) + " split " + std::to_string(split_tokens) + " first length " +
                             std::to_string(lens[0]));
                const AttentionBuffers buffers(c, false);
                AttentionOnDevice device(buffers, cuda::block_attention_workspace(buffers.params));
                LateReads late;
                add_outputs(device, &late);
                late.expect_awaited(call_of(device));
                if (HasFatalFailure()) return;
            }
        }
    }
}

TEST(BlockAttentionCudaErrors, NameTheArgument) {
    MAGE_NEEDS_GPU();
    AttentionBuffers buffers(named_case("Causal"));
    const AttentionOnDevice device(buffers, cuda::block_attention_workspace(buffers.params));
    const auto expect_error = [&](const BlockAttentionParams& bad, const std::string& message) {
        expect_cuda_error([&] { cuda::block_attention(bad, nullptr); }, "block_attention: " + message);
    };
    BlockAttentionParams bad = device.params;
    bad.dtype = DType::kFloat32;
    expect_error(bad, "q must be bfloat16 or float16 on CUDA, got float32");
    for (const int64_t dim : {8, 96}) {
        bad = device.params;
        bad.head_dim = dim;
        bad.workspace_bytes = int64_t{1} << 40;
        expect_error(bad, "the head dim of q must be 64 or 128 on CUDA, got " + std::to_string(dim));
    }
    bad = device.params;
    bad.workspace_bytes -= 1;
    expect_error(bad, "workspace must have at least " + std::to_string(device.params.workspace_bytes) + " bytes, got " +
                          std::to_string(device.params.workspace_bytes - 1));
    bad = device.params;
    bad.split_tokens = 32;
    bad.workspace_bytes = int64_t{1} << 40;
    expect_error(bad, "split_tokens must be 0 or a positive multiple of 64, got 32");
    bad = device.params;
    bad.max_seq_len = 161;
    bad.workspace_bytes = int64_t{1} << 40;
    expect_error(bad, "block_table must have pages for max_seq_len = 161 tokens, got 5 pages of 32");
    bad = device.params;
    bad.softmax_scale = INFINITY;
    expect_error(bad, "softmax_scale must be finite, got inf");
    device.fetch(buffers);
    for (const float lse : buffers.lse) ASSERT_TRUE(std::isnan(lse)) << "nothing may be written";
    bad = device.params;
    bad.num_requests = 0;
    cuda::block_attention(bad, nullptr);
    device.fetch(buffers);
    for (const float lse : buffers.lse) ASSERT_TRUE(std::isnan(lse)) << "no request, no output";
}

}  // namespace
}  // namespace mage::test
