// The CUDA refresh's host code and kernels as operators on CPU tensors, torch.ops.soap_opt_fibers.*: everything of
// csrc/cuda but the GPU. The kernels run on fibers, ATen's products on the CPU.

#include <ATen/ATen.h>
#include <torch/library.h>

#include "fibers.h"

#include "../../csrc/cuda/refresh_basis.cu"

#define SOAP_OPT_BATCH_NUMEL 20000 // several batches of small matrices too: two of 100, three of 75
#undef TORCH_LIBRARY_IMPL // its CUDA registration; what it registers is registered below under another name
#define TORCH_LIBRARY_IMPL(name, device, m) [[maybe_unused]] static void unused_registration(torch::Library& m)
#include "../../csrc/cuda/refresh_basis_host.cpp"

#include <tuple>

namespace {

// After `configure`: how many kernels were launched since
int64_t launches() { return fibers::counts().launches; }

void configure(int64_t seed, int64_t shared_limit) {
  fibers::options().seed = seed;
  fibers::options().shared_limit = shared_limit;
  fibers::counts() = {};
}

} // namespace

TORCH_LIBRARY(soap_opt_fibers, m) {
  m.def(
      "refresh_basis_(Tensor[] grams, Tensor(a!)[] bases, Tensor(b!)[] orders, Tensor(c!)[] rotations, "
      "Tensor(d!) outcomes, float tolerance=-1.0, Tensor? due=None) -> ()");
  m.def("init_basis(Tensor[] grams) -> Tensor[]", &soap_opt::cuda::init_basis);
  m.def("configure(int seed, int shared_limit) -> ()", &configure);
  m.def("launches() -> int", &launches);
  m.impl("refresh_basis_", c10::DispatchKey::CPU, &soap_opt::cuda::refresh_basis_);
}
