// The Python module of the CUDA kernels: loading it registers them.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <string>

#ifndef RLRP_ARCHES
#define RLRP_ARCHES ""
#endif

namespace py = pybind11;

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "Compiled kernels of captum_rlrp (CUDA)";
  m.def("build_info", [] {
    py::dict info;
    info["cuda"] = std::to_string(CUDART_VERSION / 1000) + "." +
                   std::to_string(CUDART_VERSION % 1000 / 10);
    info["cuda_archs"] = RLRP_ARCHES;
    return info;
  });
}
