// soap_opt._C_cuda, an importable module without functions: loading it registers the CUDA implementations of operators that
// soap_opt._C declares. It is a module of its own, so that the CPU engine works where the CUDA build fails.

#include <Python.h>

extern "C" PyObject* PyInit__C_cuda(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
