"""Every number of soap_opt/cuda/columns.py under its name there (X, DEPTH, EPS ..), as a constant: a Triton kernel may read
no other globals."""

import triton.language as tl

from ..cuda import columns

vars().update({name: tl.constexpr(value) for name, value in vars(columns).items() if name.isupper() and isinstance(value, int)})
