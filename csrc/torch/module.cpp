// _C: what is not a tensor op. No torch here; importing it imports the package, which loads the operator libraries.
#include <pybind11/pybind11.h>

#include <string>

#include "core/cpu_isa.h"
#include "mage/append_kv.h"
#include "mage/kernel_info.h"

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
#else
    facts["cuda"] = py::none();
#endif
    facts["cpu_isa"] = mage::core::cpu_isa_name(mage::core::cpu_isa());
    return facts;
}

// What was compiled, whether or not this machine runs it.
py::dict variants() {
    py::dict compiled;
    py::list isas;
    for (const char* isa : {MAGE_ISA_LIST}) isas.append(isa);
    compiled["cpu"] = isas;
    py::list kernels;
#if defined(MAGE_CUDA_VERSION)
    for (const std::string& name : mage::cuda::kernel_names()) kernels.append(name);
#endif
    compiled["cuda"] = kernels;
    return compiled;
}

#if defined(MAGE_CUDA_VERSION)
py::list kernel_infos() {
    py::list infos;
    for (const mage::KernelInfo& info : mage::cuda::kernel_infos()) {
        py::dict entry;
        entry["name"] = info.name;
        entry["registers"] = info.registers;
        entry["local_bytes"] = info.local_bytes;
        entry["static_shared_bytes"] = info.static_shared_bytes;
        entry["dynamic_shared_bytes"] = info.dynamic_shared_bytes;
        entry["threads"] = info.threads;
        entry["blocks_per_sm"] = info.blocks_per_sm;
        infos.append(entry);
    }
    return infos;
}

py::dict as_dict(const mage::LaunchPlan& plan) {
    py::dict entry;
    entry["grid"] = py::make_tuple(plan.grid[0], plan.grid[1], plan.grid[2]);
    entry["block"] = py::make_tuple(plan.block[0], plan.block[1], plan.block[2]);
    entry["shared_bytes"] = plan.shared_bytes;
    return entry;
}

py::dict append_kv_plan(int64_t batch, int64_t q_len, int64_t num_kv_heads, int64_t head_dim, int64_t element_bytes) {
    mage::AppendKvParams params;
    params.num_requests = batch;
    params.num_rows = q_len;
    params.num_kv_heads = num_kv_heads;
    params.head_dim = head_dim;
    params.dtype = element_bytes == 4 ? mage::DType::kFloat32 : mage::DType::kBFloat16;
    return as_dict(mage::cuda::append_kv_plan(params));
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
    py::module_::import("mage_ext._library").attr("load")();
    m.def("build_facts", &build_facts, "What this build was made of: a dict of strings, None where it has none.");
    m.def("variants", &variants, "Compiled instruction sets and kernels, by backend.");
#if defined(MAGE_CUDA_VERSION)
    m.def(
        "kernel_infos", &kernel_infos,
        "Registers, local and shared memory and occupancy of every kernel on the current device; needs a Hopper GPU.");
    m.def("append_kv_plan", &append_kv_plan, py::arg("batch"), py::arg("q_len"), py::arg("num_kv_heads"),
          py::arg("head_dim"), py::arg("element_bytes"), "How append_kv would be launched.");
#endif
}
