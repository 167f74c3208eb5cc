"""Triton kernels of the fused CUDA path, one file per stage; README.md explains the tables that they read.

In the tree this folder stands beside the package and ``soap_opt/kernels`` is a link to it, so that a clone works like an
install. Under a second name every kernel would exist, and be compiled, twice.
"""

if __name__ != "soap_opt.kernels":
    raise ImportError(f"import soap_opt.kernels, not {__name__}")
