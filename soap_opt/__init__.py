"""soap_opt: the SOAP optimizer, a one-line replacement of torch.optim.Adam."""

from ._version import __version__
from .checkpoint import load_original_state_dict
from .diagnostics import memory_report
from .soap import SOAP

__all__ = ["SOAP", "__version__", "load_original_state_dict", "memory_report"]
