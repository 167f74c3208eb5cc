"""Arguments of the operators of csrc/library.cpp, and calls with them."""

import torch
from comparison import RAGGED, random_basis, random_gradients, random_params

import soap_opt
from soap_opt import cpu
from soap_opt.layout import layout_of, memory_order
from soap_opt.options import Options
from soap_opt.refresh_operator import refresh_bases_

OPS = torch.ops.soap_opt


def layouts_of(tensors, **options):
    options = {
        "max_precond_dim": 10000,
        "merge_dims": False,
        "precondition_1d": False,
        "data_format": "channels_first",
        **options,
    }
    return tuple(layout_of(tuple(x.shape), memory_order(x), **options) for x in tensors)


def step_arguments(shapes=RAGGED, param_dtype=torch.float32, dtype=torch.float32):
    """Arguments of step_ by name, for parameters in the middle of a run."""
    torch.manual_seed(0)
    params = random_params(shapes, dtype=param_dtype)
    layouts = layouts_of(params)
    sizes = [d for layout in layouts for d in layout.sizes]
    grams = [torch.randn(d, d + 2, dtype=dtype) for d in sizes]
    table = cpu.layout_table(layouts)
    return {
        "params": params,
        "grads": random_gradients(shapes, 1, dtype=param_dtype)[0],
        "exp_avgs": [torch.randn(shape, dtype=dtype) for shape in shapes],
        "exp_avg_sqs": [torch.rand(shape, dtype=dtype) for shape in shapes],
        "grams": [x @ x.mT for x in grams],
        "bases": [random_basis(d, dtype) for d in sizes],
        "refresh_offsets": [torch.tensor(i % 3) for i, _ in enumerate(sizes)],
        "state_steps": [torch.tensor(4.0) for _ in params],
        "layouts": table,
        "scratch": torch.zeros(OPS.scratch_numel(table, torch.get_num_threads(), dtype), dtype=dtype),
        "grad_scale": None,
        "lr": 0.01,
        "weight_decay": 0.01,
        "options": Options(betas=(0.9, 0.95), precondition_frequency=3).step_row(),
    }


POSITIONAL = 11  # the arguments of step_ before its keywords


def call_step(arguments):
    values = list(arguments.items())
    return OPS.step_(*(value for _, value in values[:POSITIONAL]), **dict(values[POSITIONAL:]))


def call_directly(arguments):
    """The same call past the dispatcher; None where it has to be call_step's."""
    *tensors, lr, weight_decay, options = arguments.values()
    return soap_opt._C.step_(*tensors, [lr], [weight_decay], options)


def tensors_in(arguments):
    for name, value in arguments.items():
        if name != "scratch":
            for i, x in enumerate(value if isinstance(value, list) else [value]):
                if torch.is_tensor(x):
                    yield f"{name}[{i}]", x


def snapshot(arguments):
    return {name: x.clone() for name, x in tensors_in(arguments)}


def assert_same_tensors(arguments, before):
    for name, x in tensors_in(arguments):
        assert torch.equal(x, before[name]), name


def gram_arguments(shapes=RAGGED, grad_dtype=torch.float32, dtype=torch.float32, grad_scale=None, beta=0.9):
    arguments = step_arguments(shapes, grad_dtype, dtype)
    return [*(arguments[name] for name in ("grads", "grams", "layouts", "scratch")), grad_scale, beta]


def refresh_(grams, bases, tolerance=-1.0):
    """The operator; its orders and rotations."""
    refreshed, _ = refresh_bases_(grams, bases, tolerance)
    return [result.order for result in refreshed], [result.rotation for result in refreshed]
