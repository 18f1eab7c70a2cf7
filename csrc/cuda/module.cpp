// The Python module of the CUDA kernels: loading it registers them. See csrc/module.cpp.
#include <Python.h>
#include <cuda_runtime_api.h>

#include <string>

#ifndef RLRP_ARCHES
#define RLRP_ARCHES ""
#endif

namespace {

PyObject* build_info(PyObject*, PyObject*) {
  const std::string version =
      std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  return Py_BuildValue("{ssss}", "cuda", version.c_str(), "cuda_archs", RLRP_ARCHES);
}

PyMethodDef methods[] = {{"build_info", build_info, METH_NOARGS, nullptr},
                         {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C_cuda", "Compiled kernels of captum_rlrp (CUDA)", -1,
                      methods,               nullptr,   nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C_cuda() { return PyModule_Create(&module); }
