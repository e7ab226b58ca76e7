#pragma once

#include <stdexcept>
#include <string>

namespace mage {

// The one exception type of the library. The message reads
// "<op>: <argument> must be <expected>, got <actual>".
class Error : public std::runtime_error {
public:
    explicit Error(const std::string& message) : std::runtime_error(message) {}
};

}  // namespace mage
