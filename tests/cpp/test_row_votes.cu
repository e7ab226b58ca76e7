#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "gpu.h"
#include "mage/error.h"
#include "row_votes_cases.h"

namespace mage::test {
namespace {

// Inputs of a case on the device, and outputs and workspace full of NaN.
struct DeviceVotes {
    explicit DeviceVotes(const VoteBuffers& host)
        : row_mass(host.row_mass),
          lengths(host.lengths),
          mask(host.mask),
          votes(poison(host.votes.size() * 4)),
          union_size(poison(host.union_size.size() * 4)),
          coverage(poison(host.coverage.size() * 4)),
          workspace(poison(row_votes_workspace(host.params.num_requests, host.params.num_kv_heads,
                                               host.params.num_units, host.params.num_rows))),
          params(host.params) {
        params.row_mass = row_mass.data();
        params.prefix_lens = lengths.data();
        params.row_mask = host.mask.empty() ? nullptr : reinterpret_cast<const bool*>(mask.data());
        params.votes = reinterpret_cast<int32_t*>(votes.data());
        params.union_size = reinterpret_cast<int32_t*>(union_size.data());
        params.coverage = reinterpret_cast<float*>(coverage.data());
        params.workspace = workspace.data();
        params.workspace_bytes = static_cast<int64_t>(workspace.get().size());
    }

    static std::vector<unsigned char> poison(size_t bytes) { return std::vector<unsigned char>(bytes, 0xff); }

    void poison_again() {
        for (DeviceArray<unsigned char>* array : {&votes, &union_size, &coverage, &workspace})
            array->set(poison(array->get().size()));
    }

    DeviceCall call() {
        return {[this](cudaStream_t stream) { cuda::row_votes(params, stream); }, [this] { poison_again(); },
                [this] { return bytes_in(votes, union_size, coverage); }};
    }

    template <typename T>
    static std::vector<T> values(const DeviceArray<unsigned char>& array) {
        const std::vector<unsigned char> bytes = array.get();
        std::vector<T> result(bytes.size() / sizeof(T));
        std::memcpy(result.data(), bytes.data(), bytes.size());
        return result;
    }

    DeviceArray<float> row_mass;
    DeviceArray<int32_t> lengths;
    DeviceArray<char> mask;
    DeviceArray<unsigned char> votes, union_size, coverage, workspace;
    RowVotesParams params;
};

// Votes and union exactly; coverage within float32 sums of at most 256 terms on either side.
void expect_votes(const DeviceVotes& device, const VoteBuffers& expected) {
    EXPECT_EQ(DeviceVotes::values<int32_t>(device.votes), expected.votes);
    EXPECT_EQ(DeviceVotes::values<int32_t>(device.union_size), expected.union_size);
    const std::vector<float> coverage = DeviceVotes::values<float>(device.coverage);
    for (size_t i = 0; i < coverage.size(); ++i)
        EXPECT_NEAR(coverage[i], expected.coverage[i], expected.coverage[i] * 0x1p-15f) << i;
}

class RowVotesCuda : public testing::TestWithParam<VoteCase> {};

TEST_P(RowVotesCuda, AgreesWithTheCpu) {
    MAGE_NEEDS_GPU();
    VoteBuffers buffers = vote_buffers(GetParam());
    buffers.bind();
    DeviceVotes device(buffers);
    cpu::row_votes(buffers.params);
    cuda::row_votes(device.params, nullptr);
    expect_votes(device, buffers);
}

TEST_P(RowVotesCuda, GivesTheSameBitsAgain) {
    MAGE_NEEDS_GPU();
    VoteBuffers buffers = vote_buffers(GetParam());
    buffers.bind();
    DeviceVotes device(buffers);
    expect_equal_runs(device.call(), 6);
}

INSTANTIATE_TEST_SUITE_P(Cases, RowVotesCuda, testing::ValuesIn(vote_cases()),
                         [](const auto& info) { return info.param.name; });

// Where the first share is not on 16 bytes, rows are read one by one.
TEST(RowVotesCudaAlignment, ChangesNoBit) {
    MAGE_NEEDS_GPU();
    VoteBuffers buffers = vote_buffers({"aligned", 1, 2, 500, 40, 16, 20, Shares::kRandom, {7900}});
    buffers.bind();
    cpu::row_votes(buffers.params);
    DeviceVotes device(buffers);
    cuda::row_votes(device.params, nullptr);
    expect_votes(device, buffers);
    const std::vector<unsigned char> coverage = device.coverage.get();
    std::vector<float> moved(buffers.row_mass.size() + 1, NAN);
    std::copy(buffers.row_mass.begin(), buffers.row_mass.end(), moved.begin() + 1);
    const DeviceArray<float> unaligned(moved);
    device.params.row_mass = unaligned.data() + 1;
    device.poison_again();
    cuda::row_votes(device.params, nullptr);
    expect_votes(device, buffers);
    EXPECT_EQ(device.coverage.get(), coverage);
}

// A captured call follows the shares and lengths that are in the buffers when the graph runs, again and again.
TEST(RowVotesCudaGraph, ReplaysWithNewShares) {
    MAGE_NEEDS_GPU();
    const VoteCase captured = {"captured", 2, 2, 600, 40, 16, 25, Shares::kRandom, {9600, 4000}};
    VoteCase replayed = captured;
    replayed.shares = Shares::kQuarters;
    replayed.lengths = {5000, 9599};
    VoteBuffers buffers = vote_buffers(captured), other = vote_buffers(replayed);
    buffers.bind();
    other.bind();
    cpu::row_votes(other.params);
    DeviceVotes device(buffers);

    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
    ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
    for (int call = 0; call < 3; ++call) cuda::row_votes(device.params, stream);
    ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
    ASSERT_EQ(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
    device.row_mass.set(other.row_mass);
    device.lengths.set(other.lengths);
    for (int run = 0; run < 3; ++run) {
        device.poison_again();
        ASSERT_EQ(cudaGraphLaunch(exec, stream), cudaSuccess);
        ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
        expect_votes(device, other);
    }
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    cudaStreamDestroy(stream);
}

// In one launch, by boxes of the copy engine and one by one, and in two: of many units, and of many rows.
const VoteCase kLaunchCases[] = {
    {"OneLaunch", 2, 2, 600, 40, 16, 25, Shares::kRandom, {9600, 4000}, 8},
    {"OneLaunchOddRows", 2, 2, 600, 42, 16, 25, Shares::kRandom, {9600, 4000}, 7},
    {"TwoLaunches", 2, 2, 2300, 40, 16, 25, Shares::kRandom, {36800, 20000}, 8},
    {"TwoLaunchesOfManyRows", 2, 1, 300, 264, 16, 20, Shares::kRandom, {4800, 3000}, 8},
};

TEST(RowVotesCudaRuns, AreBitwiseEqual) {
    MAGE_NEEDS_GPU();
    for (const VoteCase& c : kLaunchCases) {
        SCOPED_TRACE(c.name);
        DeviceVotes device(vote_buffers(c));
        expect_equal_runs(device.call(), 100);
    }
}

TEST(RowVotesCudaStreams, RunAtOnce) {
    MAGE_NEEDS_GPU();
    DeviceVotes one_launch(vote_buffers(kLaunchCases[0])), two(vote_buffers(kLaunchCases[2])),
        other_two(vote_buffers(kLaunchCases[3]));
    expect_equal_at_once(two.call(), other_two.call());
    expect_equal_at_once(two.call(), one_launch.call());
}

// Every input may come from a kernel that lets this one start early.
TEST(RowVotesCudaOverlap, WaitsForEveryInput) {
    MAGE_NEEDS_GPU();
    for (const VoteCase& c : kLaunchCases) {
        VoteBuffers buffers = vote_buffers(c);
        buffers.bind();
        cpu::row_votes(buffers.params);
        DeviceVotes device(buffers);
        LateInputs late;
        late.add("row_mass", device.row_mass);
        late.add("prefix_lens", device.lengths, 0);
        late.add("row_mask", device.mask, 0);
        SCOPED_TRACE(c.name);
        late.expect_awaited(device.call());
        if (HasFatalFailure()) return;
        expect_votes(device, buffers);
    }
}

// What is written may still be read by a kernel that lets this one start early; of empty prefixes too.
TEST(RowVotesCudaOverlap, WaitsForReaders) {
    MAGE_NEEDS_GPU();
    for (VoteCase c : kLaunchCases) {
        for (const bool empty : {false, true}) {
            c.lengths = {0, empty ? 0 : c.lengths[1]};
            SCOPED_TRACE(c.name + (empty ? ", empty" : ""));
            DeviceVotes device(vote_buffers(c));
            LateReads late;
            late.add("votes", device.votes);
            late.add("union_size", device.union_size);
            late.add("coverage", device.coverage);
            late.add("workspace", device.workspace);
            late.expect_awaited(device.call());
            if (HasFatalFailure()) return;
        }
    }
}

TEST(RowVotesCudaErrors, NameTheArgument) {
    MAGE_NEEDS_GPU();
    const VoteBuffers buffers(1, 1, 4, 6, 16);
    DeviceVotes device(buffers);
    const auto message_with = [&](auto change) -> std::string {
        RowVotesParams params = device.params;
        change(params);
        try {
            cuda::row_votes(params, nullptr);
        } catch (const Error& error) {
            return error.what();
        }
        return "";
    };
    EXPECT_EQ(message_with([](auto&) {}), "");
    EXPECT_EQ(message_with([](auto& p) { p.k = 8; }), "row_votes: k must be a multiple of g = 16 >= 0, got 8");
    EXPECT_EQ(message_with([](auto& p) { --p.workspace_bytes; }),
              "row_votes: workspace must have at least 104 bytes, got 103");
    EXPECT_EQ(message_with([](auto& p) { p.workspace = static_cast<char*>(p.workspace) + 8; }),
              "row_votes: workspace must be aligned to 16 bytes, got a base 8 bytes past it");
    EXPECT_NE(message_with([](auto& p) { p.workspace = nullptr; }).find("got a null pointer"), std::string::npos);
}

}  // namespace
}  // namespace mage::test
