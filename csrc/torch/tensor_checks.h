#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <string>

#include "core/check.h"
#include "mage/stream.h"
#include "mage/types.h"

// Checks of tensor arguments. Each throws "<op>: <argument> must be <expected>, got <actual>" and is called once, at
// the tensor boundary, before anything is allocated or written.
//
// A binding <op>.cpp is compiled into mage_ops, and again with MAGE_BACKEND_CUDA into mage_ops_cuda if
// csrc/kernels/<op>/ exists. MAGE_BACKEND_IMPL(m) registers the kernels of the backend at hand; MAGE_HOST_IMPL(m) those
// of ops without tensors, once.
#if defined(MAGE_BACKEND_CUDA)
#define MAGE_BACKEND_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(mage, CUDA, m)
#define MAGE_HOST_IMPL(m) [[maybe_unused]] static void mage_unused_host_impl(torch::stable::detail::StableLibrary& m)
#else
#define MAGE_BACKEND_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(mage, CPU, m)
#define MAGE_HOST_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(mage, CompositeExplicitAutograd, m)
#endif

namespace mage::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_text(const Tensor& t) {
    std::string text = "[";
    for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
    return text + "]";
}

inline std::string device_text(const Tensor& t) {
    if (t.is_cpu()) return "cpu";
    return (t.is_cuda() ? "cuda:" : "device ") + std::to_string(t.get_device_index());
}

// Names as Python spells them.
inline const char* dtype_text(ScalarType type) {
    switch (type) {
        case ScalarType::Float:
            return "float32";
        case ScalarType::Double:
            return "float64";
        case ScalarType::Half:
            return "float16";
        case ScalarType::BFloat16:
            return "bfloat16";
        case ScalarType::Byte:
            return "uint8";
        case ScalarType::Char:
            return "int8";
        case ScalarType::Short:
            return "int16";
        case ScalarType::Int:
            return "int32";
        case ScalarType::Long:
            return "int64";
        case ScalarType::Bool:
            return "bool";
        default:
            return torch::headeronly::toString(type);
    }
}

inline void check_device(const char* op, const char* name, const Tensor& t, const Tensor& first) {
    MAGE_CHECK(t.defined(), op, ": ", name, " must be a tensor, got None");
    MAGE_CHECK(t.device() == first.device(), op, ": ", name, " must be on ", device_text(first),
               " like the first argument, got ", device_text(t));
}

inline void check_rank(const char* op, const char* name, const Tensor& t, int64_t rank) {
    MAGE_CHECK(t.dim() == rank, op, ": ", name, " must be a tensor of rank ", rank, ", got shape ", shape_text(t));
}

// `dims` spells the expected sizes, e.g. "[B, max_pages]".
inline void check_shape(const char* op, const char* name, const Tensor& t, const char* dims,
                        std::initializer_list<int64_t> expected) {
    bool same = t.dim() == static_cast<int64_t>(expected.size());
    std::string text;
    int64_t i = 0;
    for (const int64_t size : expected) {
        same = same && t.size(i) == size;
        text += (i++ ? ", " : "") + std::to_string(size);
    }
    MAGE_CHECK(same, op, ": ", name, " must be of shape ", dims, " = [", text, "], got ", shape_text(t));
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType expected) {
    MAGE_CHECK(t.scalar_type() == expected, op, ": ", name, " must be ", dtype_text(expected), ", got ",
               dtype_text(t.scalar_type()));
}

// The dtype of a floating-point argument: bfloat16, float16 or float32.
inline DType check_float(const char* op, const char* name, const Tensor& t) {
    switch (t.scalar_type()) {
        case ScalarType::Float:
            return DType::kFloat32;
        case ScalarType::Half:
            return DType::kFloat16;
        case ScalarType::BFloat16:
            return DType::kBFloat16;
        default:
            core::throw_error(op, ": ", name, " must be bfloat16, float16 or float32, got ",
                              dtype_text(t.scalar_type()));
    }
}

inline void check_contiguous(const char* op, const char* name, const Tensor& t) {
    MAGE_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous, got a strided view of shape ", shape_text(t));
}

inline void check_last_stride(const char* op, const char* name, const Tensor& t) {
    const int64_t last = t.dim() - 1;
    MAGE_CHECK(t.size(last) <= 1 || t.stride(last) == 1, op, ": ", name, " must be of last stride 1, got ",
               t.stride(last));
}

// A stride that is never used (of a dimension of size 0 or 1) may hold anything; kernels get 0.
inline int64_t used_stride(const Tensor& t, int64_t dim) { return t.size(dim) > 1 ? t.stride(dim) : 0; }

// Rows that are read and written as 16-byte vectors: last stride 1; base, other strides and row multiples of 16 bytes.
inline void check_vector_rows(const char* op, const char* name, const Tensor& t) {
    check_last_stride(op, name, t);
    const auto bytes = static_cast<int64_t>(t.element_size());
    const int64_t last = t.dim() - 1;
    MAGE_CHECK(t.size(last) * bytes % 16 == 0, op, ": ", name,
               " must have a last dimension of a multiple of 16 bytes, got ", t.size(last), " elements of ", bytes,
               " bytes");
    const auto address = reinterpret_cast<uintptr_t>(t.const_data_ptr());
    MAGE_CHECK(address % 16 == 0, op, ": ", name, " must be aligned to 16 bytes, got a base ", address % 16,
               " bytes past it");
    for (int64_t dim = 0; dim < last; ++dim) {
        const int64_t stride_bytes = used_stride(t, dim) * bytes;
        MAGE_CHECK(stride_bytes % 16 == 0 && stride_bytes < (int64_t{1} << 40), op, ": ", name,
                   " must have strides of a multiple of 16 bytes and less than 2^40 bytes, got ", stride_bytes,
                   " bytes in dimension ", dim);
    }
}

// A paged pool [pages, page, Hkv, D] that is read, on the device and of the dtype of `like`.
inline PagedPool check_pool(const char* op, const char* name, const Tensor& pool, const Tensor& like) {
    check_device(op, name, pool, like);
    check_rank(op, name, pool, 4);
    check_dtype(op, name, pool, like.scalar_type());
    core::check_page_size(op, name, pool.size(1));
    check_vector_rows(op, name, pool);
    return {pool.const_data_ptr(), used_stride(pool, 0), used_stride(pool, 1), used_stride(pool, 2)};
}

// The same for a pool that is written: no two of its elements may share memory by a stride of 0.
inline PagedPool check_mutable_pool(const char* op, const char* name, const Tensor& pool, const Tensor& like) {
    const PagedPool checked = check_pool(op, name, pool, like);
    for (int64_t dim = 0; dim < 3; ++dim) {
        MAGE_CHECK(pool.size(dim) <= 1 || pool.stride(dim) > 0, op, ": ", name,
                   " must be writable, got a stride of 0 in dimension ", dim);
    }
    return checked;
}

// block_table [B, max_pages] int32 over `pool`.
inline PageTable check_page_table(const char* op, const Tensor& block_table, const Tensor& pool, int64_t num_requests) {
    check_device(op, "block_table", block_table, pool);
    check_rank(op, "block_table", block_table, 2);
    check_dtype(op, "block_table", block_table, ScalarType::Int);
    const int64_t max_pages = block_table.size(1);
    check_shape(op, "block_table", block_table, "[B, max_pages]", {num_requests, max_pages});
    check_last_stride(op, "block_table", block_table);
    MAGE_CHECK(max_pages * pool.size(1) <= (int64_t{1} << 30), op, ": block_table must span at most 2^30 tokens, got ",
               max_pages, " pages of ", pool.size(1));
    PageTable table;
    table.block_table = static_cast<const int32_t*>(block_table.const_data_ptr());
    table.stride_request = used_stride(block_table, 0);
    table.max_pages = static_cast<int32_t>(max_pages);
    table.page_size = static_cast<int32_t>(pool.size(1));
    table.num_pages = pool.size(0);
    return table;
}

// A vector [B] of int32, e.g. seq_lens.
inline const int32_t* check_int32_vector(const char* op, const char* name, const Tensor& t, const Tensor& first,
                                         int64_t num_requests) {
    check_device(op, name, t, first);
    check_dtype(op, name, t, ScalarType::Int);
    check_shape(op, name, t, "[B]", {num_requests});
    check_contiguous(op, name, t);
    return static_cast<const int32_t*>(t.const_data_ptr());
}

// Scratch of at least `bytes` bytes, uint8 [W]; what it holds does not matter.
inline void check_workspace(const char* op, const Tensor& workspace, const Tensor& first, int64_t bytes) {
    check_device(op, "workspace", workspace, first);
    check_dtype(op, "workspace", workspace, ScalarType::Byte);
    check_rank(op, "workspace", workspace, 1);
    check_contiguous(op, "workspace", workspace);
    MAGE_CHECK(workspace.numel() >= bytes, op, ": workspace must have at least ", bytes, " bytes, got ",
               workspace.numel());
}

// Memory between a tensor's first and last element: all of a contiguous one, none of one that is not given.
struct NamedTensor {
    const char* name;
    const Tensor* tensor;

    NamedTensor(const char* of, const Tensor& t) : name(of), tensor(&t) {}
    NamedTensor(const char* of, const std::optional<Tensor>& t) : name(of), tensor(t.has_value() ? &*t : nullptr) {}

    uintptr_t begin() const { return reinterpret_cast<uintptr_t>(tensor->const_data_ptr()); }
    uintptr_t end() const {
        int64_t last = 0;
        for (int64_t dim = 0; dim < tensor->dim(); ++dim) last += (tensor->size(dim) - 1) * tensor->stride(dim);
        return begin() + static_cast<uintptr_t>((last + 1) * static_cast<int64_t>(tensor->element_size()));
    }
    bool is_empty() const { return tensor == nullptr || tensor->numel() == 0; }
    bool overlaps(const NamedTensor& other) const {
        return !is_empty() && !other.is_empty() && begin() < other.end() && other.begin() < end();
    }
};

// What is written lies in memory of its own, apart from each other and from what is read.
inline void check_own_memory(const char* op, std::initializer_list<NamedTensor> outputs,
                             std::initializer_list<NamedTensor> inputs) {
    const auto check = [op](const NamedTensor& output, const NamedTensor& other) {
        MAGE_CHECK(!output.overlaps(other), op, ": ", output.name, " must have memory of its own, got some of ",
                   other.name);
    };
    for (auto output = outputs.begin(); output != outputs.end(); ++output) {
        for (auto other = outputs.begin(); other != output; ++other) check(*output, *other);
        for (const NamedTensor& input : inputs) check(*output, input);
    }
}

#if defined(MAGE_BACKEND_CUDA)
inline CudaStream current_stream(const Tensor& t) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    return static_cast<CudaStream>(stream);
}
#endif

}  // namespace mage::binding
