#include "core/debug.h"

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

void check_pages(const char* op, const PageTable& table, int64_t num_requests, const int32_t* begin,
                 const int32_t* count) {
    for (int64_t request = 0; request < num_requests; ++request) {
        const int64_t first = begin ? begin[request] : 0, end = first + count[request];
        for (int64_t page = first / table.page_size; page * table.page_size < end; ++page) {
            const int32_t id = table.block_table[request * table.stride_request + page];
            MAGE_CHECK(id >= 0 && id < table.num_pages, op, ": block_table[", request, ", ", page, "] must be in [0, ",
                       table.num_pages, "), got ", id);
        }
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
                MAGE_CHECK(unit > previous && unit < tail / g, op, ": indices[", request, ", ", head, ", ", i,
                           "] must be in [", previous + 1, ", ", tail / g, "), got ", unit);
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
