// The Python module: loading it registers the ops. Besides, it hands out working memory and says how it was built.
//
// By Python's limited API alone, so that one build serves every Python from 3.10 on.
#include <Python.h>

#include "cpu/simd.h"
#include "memory.h"

#ifndef RLRP_FLAGS
#define RLRP_FLAGS ""
#endif

namespace {

using rlrp::Memory;

// A capsule holds a share of the memory: tensors that lie in it may outlive it.
std::shared_ptr<Memory>* held(PyObject* capsule) {
  return static_cast<std::shared_ptr<Memory>*>(PyCapsule_GetPointer(capsule, nullptr));
}

PyObject* memory_new(PyObject*, PyObject*) {
  auto* memory = new std::shared_ptr<Memory>(std::make_shared<Memory>());
  return PyCapsule_New(memory, nullptr, [](PyObject* capsule) { delete held(capsule); });
}

PyObject* memory_enter(PyObject*, PyObject* capsule) {
  auto* memory = held(capsule);
  if (memory == nullptr) return nullptr;
  (*memory)->enter();
  Py_RETURN_NONE;
}

PyObject* memory_leave(PyObject*, PyObject* capsule) {
  auto* memory = held(capsule);
  if (memory == nullptr) return nullptr;
  (*memory)->leave();
  Py_RETURN_NONE;
}

PyObject* memory_size(PyObject*, PyObject* capsule) {
  auto* memory = held(capsule);
  return memory == nullptr ? nullptr : PyLong_FromLongLong((*memory)->size());
}

PyObject* build_info(PyObject*, PyObject*) {
#if defined(__clang__)
  const char* compiler = "clang " __clang_version__;
#else
  const char* compiler = "gcc " __VERSION__;
#endif
  return Py_BuildValue("{ssssss}", "compiler", compiler, "flags", RLRP_FLAGS, "instructions",
                       rlrp::simd::instructions());
}

PyMethodDef methods[] = {{"memory_new", memory_new, METH_NOARGS, nullptr},
                         {"memory_enter", memory_enter, METH_O, nullptr},
                         {"memory_leave", memory_leave, METH_O, nullptr},
                         {"memory_size", memory_size, METH_O, nullptr},
                         {"build_info", build_info, METH_NOARGS, nullptr},
                         {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C",    "Compiled kernels of captum_rlrp (CPU)", -1,
                      methods,               nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
