#pragma once

#include <torch/csrc/stable/ops.h>

#include "core/debug.h"
#include "tensor_checks.h"

// What bindings need for the debug switch: whether it is on, and host copies of the values to check (core/debug.h).
namespace mage::binding {

// The switch lives in mage_ops; mage_ops_cuda has its own copy of mage_core and asks for the address once.
inline bool debug_enabled() {
#if defined(MAGE_BACKEND_CUDA)
    static const std::atomic<bool>* flag = [] {
        StableIValue stack[1] = {0};
        TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("mage::debug_flag", "", stack, TORCH_ABI_VERSION));
        return reinterpret_cast<const std::atomic<bool>*>(torch::stable::detail::to<int64_t>(stack[0]));
    }();
    return flag->load(std::memory_order_relaxed);
#else
    return core::debug_enabled();
#endif
}

// A contiguous copy on the host (the tensor itself where it is one). Waits for the device.
class HostCopy {
public:
    explicit HostCopy(const Tensor& t)
        : copy_(torch::stable::contiguous(
              t.is_cpu() ? t : torch::stable::to(t, torch::stable::Device(torch::headeronly::DeviceType::CPU)))) {}

    const int32_t* ints() const { return static_cast<const int32_t*>(copy_.const_data_ptr()); }
    const float* floats() const { return static_cast<const float*>(copy_.const_data_ptr()); }
    int64_t count() const { return copy_.numel(); }

private:
    Tensor copy_;
};

// Lengths in [0, high].
inline void debug_check_lengths(const char* op, const char* name, const Tensor& lengths, int64_t high) {
    const HostCopy values(lengths);
    core::check_values(op, name, values.ints(), values.count(), 0, high);
}

// Pages of the first lengths[b] tokens of each request inside the pool.
inline void debug_check_pages(const char* op, PageTable table, const Tensor& block_table, const Tensor& lengths) {
    const HostCopy pages(block_table), values(lengths);
    table.block_table = pages.ints();
    table.stride_request = block_table.size(1);
    core::check_pages(op, table, block_table.size(0), values.ints());
}

// Positions [start[b], start[b] + num_rows) that are written, see core/debug.h.
inline void debug_check_written_pages(const char* op, PageTable table, const Tensor& block_table, const Tensor& start,
                                      int64_t num_rows) {
    const HostCopy pages(block_table), values(start);
    table.block_table = pages.ints();
    table.stride_request = block_table.size(1);
    core::check_written_pages(op, table, block_table.size(0), values.ints(), num_rows);
}

}  // namespace mage::binding
