// _C: what is not a tensor op. No torch here; importing it imports the package, which loads the operator libraries.
#include <pybind11/pybind11.h>

#include "core/cpu_isa.h"
#include "core/parallel.h"

namespace py = pybind11;

namespace {

py::dict build_facts() {
    py::dict facts;
    facts["version"] = MAGE_VERSION;
    facts["torch"] = MAGE_TORCH_VERSION;
    facts["build_type"] = MAGE_BUILD_TYPE;
    facts["compiler"] = MAGE_COMPILER;
#if defined(MAGE_CUDA_VERSION)
    facts["cuda"] = MAGE_CUDA_VERSION;
    facts["cuda_arch"] = "sm_90a";
#else
    facts["cuda"] = py::none();
    facts["cuda_arch"] = py::none();
#endif
    return facts;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    py::module_::import("mage_ext._library").attr("load")();
    m.def("build_facts", &build_facts, "What this build was made of: a dict of strings, None where it has none.");
    m.def("cpu_isa", [] { return mage::core::cpu_isa_name(mage::core::cpu_isa()); },
          "Instruction set that the CPU backend runs with on this processor.");
}
