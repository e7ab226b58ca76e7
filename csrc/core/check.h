#pragma once

#include <cstdint>
#include <sstream>

#include "mage/error.h"

// MAGE_CHECK(condition, "op: argument must be ", expected, ", got ", actual): throws mage::Error with all parts joined.
#define MAGE_CHECK(condition, ...)                                \
    do {                                                          \
        if (!(condition)) ::mage::core::throw_error(__VA_ARGS__); \
    } while (0)

namespace mage::core {

template <typename... Parts>
[[noreturn]] void throw_error(const Parts&... parts) {
    std::ostringstream message;
    (message << ... << parts);
    throw Error(message.str());
}

inline void check_range(const char* op, const char* name, int64_t value, int64_t low, int64_t high) {
    MAGE_CHECK(value >= low && value <= high, op, ": ", name, " must be in [", low, ", ", high, "], got ", value);
}

inline void check_page_size(const char* op, const char* name, int64_t tokens) {
    MAGE_CHECK(tokens == 1 || tokens == 16 || tokens == 32 || tokens == 64 || tokens == 128 || tokens == 256, op, ": ",
               name, " must have pages of 1, 16, 32, 64, 128 or 256 tokens, got ", tokens);
}

}  // namespace mage::core
