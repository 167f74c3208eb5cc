"""Every number of soap_opt/cuda/columns.py by its name there (X, DEPTH, EPS ..), as a constant, which is all that a kernel may
read of a module."""

import triton.language as tl

from ..cuda import columns

vars().update({name: tl.constexpr(value) for name, value in vars(columns).items() if name.isupper() and isinstance(value, int)})
