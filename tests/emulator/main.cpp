// The GPU tests of tests/cpp on the emulator. Beside GoogleTest's arguments:
//
//   --seed=N       the first seed; --gtest_repeat=R runs R seeds from it on
//   --join         barrier.cluster.wait joins all warps of a CTA (Options::cluster_wait_joins_cta)
//   --kernels      at the end, the launches of each kernel
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "emulator.h"
#include "kernels/kernel_list.h"

namespace {

class Seeds : public testing::EmptyTestEventListener {
public:
    explicit Seeds(uint64_t first) : first_(first) {}

private:
    void OnTestIterationStart(const testing::UnitTest&, int iteration) override {
        emulator::options.seed = first_ + static_cast<uint64_t>(iteration);
    }
    void OnTestStart(const testing::TestInfo&) override { emulator::begin_test(); }

    uint64_t first_;
};

void print_launches() {
    std::vector<mage::cuda::KernelEntry> all = {mage::cuda::append_kv_kernel()};
    for (const auto& kernels :
         {mage::cuda::block_attention_kernels(), mage::cuda::merge_attention_kernels(), mage::cuda::row_votes_kernels(),
          mage::cuda::select_kv_kernels(), mage::cuda::token_confidence_kernels(), mage::cuda::token_mass_kernels()})
        all.insert(all.end(), kernels.begin(), kernels.end());
    for (const auto& kernel : all)
        printf("%8ld %s\n", static_cast<long>(emulator::launches_of(kernel.function)), kernel.name);
}

}  // namespace

int main(int argc, char** argv) {
    testing::InitGoogleTest(&argc, argv);
    bool lists_kernels = false;
    for (int i = 1; i < argc; ++i) {
        if (strncmp(argv[i], "--seed=", 7) == 0) {
            emulator::options.seed = strtoull(argv[i] + 7, nullptr, 10);
        } else if (strcmp(argv[i], "--join") == 0) {
            emulator::options.cluster_wait_joins_cta = true;
        } else if (strcmp(argv[i], "--kernels") == 0) {
            lists_kernels = true;
        } else {
            fprintf(stderr, "unknown argument: %s\n", argv[i]);
            return 2;
        }
    }
    testing::UnitTest::GetInstance()->listeners().Append(new Seeds(emulator::options.seed));
    const int status = RUN_ALL_TESTS();
    if (lists_kernels) print_launches();
    return status;
}
