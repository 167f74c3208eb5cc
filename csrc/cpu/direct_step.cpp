#include "direct_step.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/MaybeOwned.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include "step.h"

// On its way from Python through the dispatcher a list of tensors is copied three times, and for each of its tensors the GIL is
// taken when the last copy goes. For 2,000 tensors of 4 x 4, which come with 22,000 tensors, this was a third of a step
// (bench/README.md, What was tried). Here the step reads the tensors where Python has them.

namespace soap_opt {
namespace {

using c10::DispatchKey;
using c10::DispatchKeySet;

bool is_empty(DispatchKeySet keys) { return keys.highestFunctionalityKey() == DispatchKey::Undefined; }

// Whether Python or the dispatcher would call something before, or instead of, the kernel for the CPU: a mode, functorch, a
// tracer.
bool is_watched() {
  return at::impl::torch_function_mode_enabled() || !is_empty(c10::impl::tls_local_dispatch_key_set().included_ -
                                                              c10::default_included_set - c10::autocast_dispatch_keyset);
}

// Whether the dispatcher would call the kernel for the CPU with this tensor as it is.
bool is_plain(const at::Tensor& x) {
  // Keys of which the operator falls through, or whose work it does itself (bump_versions, in_order)
  constexpr DispatchKeySet passed = c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset |
                                    DispatchKeySet({DispatchKey::CPU, DispatchKey::Negative});
  return x.is_cpu() && is_empty(x.key_set() - passed);
}

// Whether a tensor, and of no subclass, which may override functions. (torch's Parameter and Buffer do not.)
bool is_exact(PyObject* object) { return THPVariable_Check(object) && THPVariable_CheckExact(object); }

// The items of a list or tuple, which may change while the step runs without the GIL
THPObjectPtr tuple_of(PyObject* items, const char* name) {
  TORCH_CHECK_TYPE(PyList_Check(items) || PyTuple_Check(items), "step_: ", name, " must be a list, not ",
                   Py_TYPE(items)->tp_name);
  THPObjectPtr tuple(PySequence_Tuple(items));
  if (!tuple) throw python_error();
  return tuple;
}

// The tensors of a Python list. Made and destroyed with the GIL.
class Borrowed {
 public:
  Borrowed(PyObject* list, const char* name) : Borrowed(tuple_of(list, name)) { // so that ~Borrowed runs if this throws
    const Py_ssize_t n = PyTuple_GET_SIZE(owner_.get());
    tensors_.reserve(n);
    for (Py_ssize_t i = 0; i < n && plain_; ++i) {
      PyObject* item = PyTuple_GET_ITEM(owner_.get(), i);
      plain_ = is_exact(item); // (the dispatcher's error for what is no tensor is known to SOAP, which says what to do)
      if (!plain_) return;
      tensors_.push_back(Traits::createBorrow(THPVariable_Unpack(item)));
      plain_ = is_plain(tensors_.back());
    }
  }
  Borrowed(const Borrowed&) = delete;
  ~Borrowed() {
    for (at::Tensor& tensor : tensors_) Traits::destroyBorrow(tensor);
  }
  operator at::TensorList() const { return tensors_; }
  bool plain() const { return plain_; }

 private:
  using Traits = c10::MaybeOwnedTraits<at::Tensor>;
  explicit Borrowed(THPObjectPtr owner) : owner_(std::move(owner)) {}

  THPObjectPtr owner_;
  std::vector<at::Tensor> tensors_; // count as no references
  bool plain_ = true;
};

std::vector<double> numbers_of(PyObject* list, const char* name) {
  const THPObjectPtr tuple = tuple_of(list, name);
  std::vector<double> numbers(PyTuple_GET_SIZE(tuple.get()));
  for (size_t i = 0; i < numbers.size(); ++i) {
    numbers[i] = PyFloat_AsDouble(PyTuple_GET_ITEM(tuple.get(), i));
    if (PyErr_Occurred()) throw python_error();
  }
  return numbers;
}

} // namespace

PyObject* direct_step(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 14, "step_ takes 14 arguments, not ", count);
  if (is_watched()) Py_RETURN_NONE;
  const Borrowed params(arguments[0], "params"), grads(arguments[1], "grads"), exp_avgs(arguments[2], "exp_avgs"),
      exp_avg_sqs(arguments[3], "exp_avg_sqs"), grams(arguments[4], "grams"), bases(arguments[5], "bases"),
      refresh_offsets(arguments[6], "refresh_offsets"), state_steps(arguments[7], "state_steps");
  for (const auto* list : {&params, &grads, &exp_avgs, &exp_avg_sqs, &grams, &bases, &refresh_offsets, &state_steps})
    if (!list->plain()) Py_RETURN_NONE;
  const bool scaled = arguments[10] != Py_None;
  if (!is_exact(arguments[8]) || !is_exact(arguments[9]) || (scaled && !is_exact(arguments[10]))) Py_RETURN_NONE;
  const at::Tensor &table = THPVariable_Unpack(arguments[8]), &scratch = THPVariable_Unpack(arguments[9]);
  if (!is_plain(table) || !is_plain(scratch)) Py_RETURN_NONE;
  const auto grad_scale = scaled ? std::optional(THPVariable_Unpack(arguments[10])) : std::nullopt;
  const std::vector<double> lr = numbers_of(arguments[11], "lr"), weight_decay = numbers_of(arguments[12], "weight_decay"),
                            options = numbers_of(arguments[13], "options");
  at::Tensor outcomes;
  {
    const pybind11::gil_scoped_release no_gil;
    RECORD_FUNCTION("soap_opt::step_", std::vector<c10::IValue>()); // a row in torch.profiler, as the dispatcher's
    const at::AutoDispatchBelowADInplaceOrView below;
    outcomes = step_(params, grads, exp_avgs, exp_avg_sqs, grams, bases, refresh_offsets, state_steps, table, scratch,
                     grad_scale, lr, weight_decay, options);
  }
  return THPVariable_Wrap(outcomes);
  END_HANDLE_TH_ERRORS
}

} // namespace soap_opt
