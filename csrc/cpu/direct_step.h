// soap_opt._C.step_: torch.ops.soap_opt.step_ past the dispatcher, for Python.
#pragma once

#include <Python.h>

namespace soap_opt {

// step_(params, grads, .., scratch, grad_scale, lr, weight_decay, options): the operator's arguments in its order, every list a
// Python list. Returns the outcomes, or None, with nothing done, where the call must go through the dispatcher: something is
// not a tensor, of a subclass or not on the CPU, or a mode or transform wants to see the operator.
PyObject* direct_step(PyObject* module, PyObject* const* arguments, Py_ssize_t count);

} // namespace soap_opt
