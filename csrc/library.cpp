// Every operator of soap_opt, on one page. Importing soap_opt._C registers them as torch.ops.soap_opt.*;
// csrc/cpu and csrc/cuda implement them, soap_opt/_ext.py adds the fake kernels.
//
// Lists run over parameters p. The Grams of all parameters are one flat list, parameter after parameter, in the order of their
// preconditioned modes; so are the bases. d = size of a mode. State is float32, or float64 for float64 parameters.

#include <Python.h>
#include <torch/library.h>
#include <torch/version.h>

#include <cstdlib>

#include "cpu/direct_step.h"
#include "cpu/simd.h"

TORCH_LIBRARY(soap_opt, m) {
  // Steps 1 to 6 of SOAP for n parameters that are initialised. Returns outcomes [n] int32: -1 where the gradient was not
  // finite or its squared norm was above a quarter of the largest number, and neither parameter nor state changed; else how
  // many of the parameter's bases could not be refreshed and stay as they were. Written tensors get another autograd version.
  //   params[p], grads[p], exp_avgs[p], exp_avg_sqs[p]  [*shape]
  //   grams[], bases[]                                  [d, d] contiguous
  //   refresh_offsets[]                                 0-d int64
  //   state_steps[p]                                    0-d float32
  //   layouts                                           [*] int64, csrc/cpu/layout.h
  //   lr, weight_decay                                  one number, or one for each parameter
  //   options                                           the fields of StepOptions, csrc/cpu/step_arguments.h, in their order
  //   scratch                                           [>= scratch_numel(layouts, threads, dtype)] of the state's dtype
  m.def(
      "step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] grams, "
      "Tensor(e!)[] bases, Tensor[] refresh_offsets, Tensor(f!)[] state_steps, Tensor layouts, Tensor(g!) scratch, "
      "Tensor? grad_scale, *, float[1] lr, float[1] weight_decay, float[] options) -> Tensor");

  // Step 5 alone, for the first gradient: G <- beta G + (1 - beta) (gradient contracted with itself over all modes but one).
  // Returns ||gradient||^2 [n] float64; where this is not finite, the gradient's Grams do not change. grads[p] [*shape] of any
  // floating dtype are divided by grad_scale; grams[] [d, d] have scratch's dtype.
  m.def(
      "gram_ema_(Tensor[] grads, Tensor(a!)[] grams, Tensor layouts, Tensor(b!) scratch, Tensor? grad_scale, float beta) -> "
      "Tensor");

  // Elements of scratch that step_ or gram_ema_ needs for these layouts with this many threads and state of this dtype.
  m.def("scratch_numel(Tensor layouts, int threads, ScalarType dtype) -> int");

  // One QR power iteration for each of a ragged set of matrices: P = G Q, e = diag(Q^T P), Q' = qr(columns of P by falling
  // e).Q. Writes the basis, the permutation, the rotation Q^T Q' and the outcome of each matrix: 0 kept, 1 refreshed, 2 failed.
  // A matrix keeps its basis, with identities as permutation and rotation, in three cases: tolerance >= 0 and
  // off(Q^T G Q) <= tolerance ||Q^T G Q||_F (kept); the matrix is not due (kept); G or Q is not finite, or Q' is not orthogonal
  // within orthogonality_bound, csrc/cpu/loops.h (failed). So whatever the Gram is, only orthogonal bases are written. On CUDA
  // the device decides all of this: the host waits for nothing.
  //   grams[], bases[], rotations[]  [d, d] contiguous
  //   orders[]                       [d] int64 contiguous
  //   outcomes                       [n] int32. 0 on entry: order and rotation are identities already, and the matrix costs
  //                                  next to nothing if it is not due; -1 otherwise
  //   due                            [n] bool on the matrices' device; without it all matrices are due
  m.def(
      "refresh_basis_(Tensor[] grams, Tensor(a!)[] bases, Tensor(b!)[] orders, Tensor(c!)[] rotations, "
      "Tensor(d!) outcomes, float tolerance=-1.0, Tensor? due=None) -> ()");

  // Q = flip(eigh(G + 1e-30 I)) of every G [d, d], largest eigenvalue first; in float64 where float32 does not converge, and
  // an empty tensor where float64 does not converge either.
  m.def("init_basis(Tensor[] grams) -> Tensor[]");
}

// Loading the module registers the operators. It has one function, a shorter way to one of them, and two constants: the version
// of the torch that it was built with, whose binary interface it depends on, and the instruction set that the engine runs with.
extern "C" PyObject* PyInit__C(void) {
  if (soap_opt::allowed_isa_level() < 0) {
    PyErr_Format(PyExc_ValueError, "SOAP_OPT_CPU_CAPABILITY must be default, avx2 or avx512, got '%s'",
                 std::getenv("SOAP_OPT_CPU_CAPABILITY"));
    return nullptr;
  }
  static PyMethodDef functions[] = {
      {"step_", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(soap_opt::direct_step)), METH_FASTCALL, nullptr},
      {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module != nullptr &&
      (PyModule_AddStringConstant(module, "torch_version", TORCH_VERSION) != 0 ||
       PyModule_AddStringConstant(module, "cpu_capability", soap_opt::isa_names[soap_opt::isa_level()]) != 0)) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
