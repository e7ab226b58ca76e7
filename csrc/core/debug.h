#pragma once

#include <atomic>
#include <cstdint>

#include "mage/types.h"

// The debug switch and the checks that it turns on: of values that live on the device, which kernels otherwise clamp or
// skip.
//
// The bindings call these with host copies of their tensors before anything is written. Each names the first bad value:
// "<op>: <argument>[<index>] must be <expected>, got <actual>".
namespace mage::core {

// Off at start, or on if the environment variable MAGE_DEBUG is 1.
std::atomic<bool>& debug_flag();

inline bool debug_enabled() { return debug_flag().load(std::memory_order_relaxed); }

// Each of values [count] is in [low, high].
void check_values(const char* op, const char* name, const int32_t* values, int64_t count, int64_t low, int64_t high);

// values [rows, count] does not descend within a row (kv_lens).
void check_nondecreasing(const char* op, const char* name, const int32_t* values, int64_t rows, int64_t count);

// Every page that holds one of the first lengths[b] tokens of a request is inside the pool. The lengths fit the table,
// whose block_table is a host copy.
void check_pages(const char* op, const PageTable& table, int64_t num_requests, const int32_t* lengths);

// Where requests write the positions [start[b], start[b] + num_rows). What a caller drops on purpose is right: a
// request that ends before position 0, rows past its table, and a page of -1, which says that there is none. Host
// copies again.
void check_written_pages(const char* op, const PageTable& table, int64_t num_requests, const int32_t* start,
                         int64_t num_rows);

// Lists of select_kv: counts in [0, capacity]; tail_start a multiple of g, >= 0; the first counts units of indices [B,
// Hkv, capacity] strictly ascending within [0, tail_start / g).
void check_lists(const char* op, const int32_t* indices, const int32_t* counts, const int32_t* tail_start,
                 int64_t num_requests, int64_t num_kv_heads, int64_t capacity, int64_t g);

// No NaN, and nothing below `low` (-infinity for log-shares), among values [count].
void check_shares(const char* op, const char* name, const float* values, int64_t count, float low);

}  // namespace mage::core
