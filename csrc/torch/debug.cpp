// The debug switch as operators; the flag itself is in mage_core.
#include "core/debug.h"

#include "tensor_checks.h"

namespace mage::binding {

namespace {

bool set_debug(bool on) { return core::debug_flag().exchange(on); }

int64_t debug_flag() { return reinterpret_cast<int64_t>(&core::debug_flag()); }

}  // namespace

MAGE_HOST_IMPL(m) {
    m.impl("set_debug", TORCH_BOX(&set_debug));
    m.impl("debug_flag", TORCH_BOX(&debug_flag));
}

}  // namespace mage::binding
