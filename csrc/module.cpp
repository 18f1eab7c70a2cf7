// The Python module: loading it registers the ops; the rest of it says how it was built.
#include <pybind11/pybind11.h>

#include "memory.h"

#ifndef RLRP_FLAGS
#define RLRP_FLAGS ""
#endif

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of captum_rlrp (CPU)";
  py::class_<rlrp::Memory, std::shared_ptr<rlrp::Memory>>(m, "Memory")
      .def(py::init<>())
      .def("__enter__",
           [](const std::shared_ptr<rlrp::Memory>& memory) {
             memory->enter();
             return memory;
           })
      .def("__exit__", [](rlrp::Memory& memory, const py::args&) { memory.leave(); })
      .def("size", &rlrp::Memory::size);
  m.def("build_info", [] {
    py::dict info;
#if defined(__clang__)
    info["compiler"] = "clang " __clang_version__;
#else
    info["compiler"] = "gcc " __VERSION__;
#endif
    info["flags"] = RLRP_FLAGS;
    return info;
  });
}
