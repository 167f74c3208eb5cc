// soap_opt::step_ on the CPU (csrc/library.cpp).
#pragma once

#include <ATen/core/Tensor.h>

namespace soap_opt {

at::Tensor step_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
                 at::TensorList grams, at::TensorList bases, at::TensorList refresh_offsets, at::TensorList state_steps,
                 const at::Tensor& table, const at::Tensor& scratch, const std::optional<at::Tensor>& grad_scale,
                 at::ArrayRef<double> lr, at::ArrayRef<double> weight_decay, at::ArrayRef<double> numbers);

} // namespace soap_opt
