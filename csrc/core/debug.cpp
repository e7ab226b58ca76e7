#include "core/debug.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "core/check.h"

namespace mage::core {
namespace {

bool is_on_at_start() {
    const char* value = std::getenv("MAGE_DEBUG");
    return value && std::strcmp(value, "1") == 0;
}

// Pages of the positions [begin, end) of one request, each in [lowest, num_pages).
void check_page_range(const char* op, const PageTable& table, int64_t request, int64_t begin, int64_t end,
                      int64_t lowest) {
    for (int64_t page = begin / table.page_size; page * table.page_size < end; ++page) {
        const int32_t id = table.block_table[request * table.stride_request + page];
        MAGE_CHECK(id >= lowest && id < table.num_pages, op, ": block_table[", request, ", ", page, "] must be in [",
                   lowest, ", ", table.num_pages, "), got ", id);
    }
}

}  // namespace

std::atomic<bool>& debug_flag() {
    static std::atomic<bool> flag{is_on_at_start()};
    return flag;
}

void check_values(const char* op, const char* name, const int32_t* values, int64_t count, int64_t low, int64_t high) {
    for (int64_t i = 0; i < count; ++i) {
        MAGE_CHECK(values[i] >= low && values[i] <= high, op, ": ", name, "[", i, "] must be in [", low, ", ", high,
                   "], got ", values[i]);
    }
}

void check_nondecreasing(const char* op, const char* name, const int32_t* values, int64_t rows, int64_t count) {
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t i = 1; i < count; ++i) {
            const int32_t value = values[row * count + i], previous = values[row * count + i - 1];
            MAGE_CHECK(value >= previous, op, ": ", name, "[", row, ", ", i, "] must be >= ", previous,
                       ", the entry before it, got ", value);
        }
    }
}

void check_pages(const char* op, const PageTable& table, int64_t num_requests, const int32_t* lengths) {
    for (int64_t request = 0; request < num_requests; ++request)
        check_page_range(op, table, request, 0, lengths[request], 0);
}

void check_written_pages(const char* op, const PageTable& table, int64_t num_requests, const int32_t* start,
                         int64_t num_rows) {
    const int64_t room = static_cast<int64_t>(table.max_pages) * table.page_size;
    for (int64_t request = 0; request < num_requests; ++request) {
        const int64_t first = start[request];
        if (first + num_rows <= 0) continue;
        MAGE_CHECK(first >= 0 && first <= room, op, ": start[", request, "] must be in [0, ", room, "] (or at most ",
                   -num_rows, " to write nothing), got ", first);
        check_page_range(op, table, request, first, std::min(first + num_rows, room), -1);
    }
}

void check_lists(const char* op, const int32_t* indices, const int32_t* counts, const int32_t* tail_start,
                 int64_t num_requests, int64_t num_kv_heads, int64_t capacity, int64_t g) {
    for (int64_t request = 0; request < num_requests; ++request) {
        const int32_t tail = tail_start[request];
        MAGE_CHECK(tail >= 0 && tail % g == 0, op, ": tail_start[", request, "] must be a multiple of g = ", g,
                   " >= 0, got ", tail);
        for (int64_t head = 0; head < num_kv_heads; ++head) {
            const int64_t row = request * num_kv_heads + head;
            MAGE_CHECK(counts[row] >= 0 && counts[row] <= capacity, op, ": counts[", request, ", ", head,
                       "] must be in [0, ", capacity, "], got ", counts[row]);
            int64_t previous = -1;
            for (int64_t i = 0; i < counts[row]; ++i) {
                const int32_t unit = indices[row * capacity + i];
                MAGE_CHECK(unit >= 0 && unit < tail / g, op, ": indices[", request, ", ", head, ", ", i,
                           "] must be in [0, ", tail / g, "), got ", unit);
                MAGE_CHECK(unit > previous, op, ": indices[", request, ", ", head, ", ", i,
                           "] must be above the entry before it, ", previous, ", got ", unit);
                previous = unit;
            }
        }
    }
}

void check_shares(const char* op, const char* name, const float* values, int64_t count, float low) {
    for (int64_t i = 0; i < count; ++i) {
        const float value = std::isnan(values[i]) ? NAN : values[i];  // one spelling, whatever its sign
        MAGE_CHECK(value >= low, op, ": ", name, " must have values >= ", low, " that are not NaN, got ", value,
                   " at element ", i);
    }
}

}  // namespace mage::core
