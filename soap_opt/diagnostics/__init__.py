"""Read-only diagnostics: an optimizer's memory, conflicts between losses, outliers of activations, quality of the bases.

============================  ==========================================================================================
:func:`memory_report`         bytes of SOAP's state, before training or during it
:class:`ConflictMeter`        alignment of several losses' updates within a step, and of updates between steps; any optimizer
:class:`OutlierMeter`         kurtosis, max / median and the share beyond 6 sigma of modules' outputs, layer by layer
:func:`basis_health`          orthogonality, off-diagonal share and spectrum of SOAP's bases, by parameter and mode
============================  ==========================================================================================

All but :func:`memory_report` give a :class:`Table`: a list of rows, printable, ``to_csv(path)``.
"""

from .bases import basis_health
from .conflict import ConflictMeter, alignment, preconditioner_of
from .memory import KINDS, MemoryReport, memory_report
from .outliers import OutlierMeter
from .table import Table

__all__ = [
    "KINDS",
    "ConflictMeter",
    "MemoryReport",
    "OutlierMeter",
    "Table",
    "alignment",
    "basis_health",
    "memory_report",
    "preconditioner_of",
]
