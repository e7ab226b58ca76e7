#pragma once

namespace mage::core {

// Throws unless the current device runs sm_90a code (compute capability 9.0). The first line of every launcher: without
// it a wrong GPU shows as "no kernel image" at the launch.
void require_hopper(const char* op);

}  // namespace mage::core
