// The Python module chatglm_ov._native: packing for conversion, kernels for tests and measurements.
//
// The same file is the OpenVINO extension library (extension.cpp).
#include <nanobind/nanobind.h>

#include "bindings.h"

NB_MODULE(_native, module) {
    module.doc() = "Packing and kernels of chatglm_ov, and the OpenVINO extension with its operations.";
    chatglm::bind_attention(module);
    chatglm::bind_isa(module);
    chatglm::bind_limit(module);
    chatglm::bind_packing(module);
    chatglm::bind_team(module);
    chatglm::bind_tiles(module);
    chatglm::bind_fully_connected(module);
}
