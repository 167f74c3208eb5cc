"""Reads only: what an optimizer holds, where its losses pull against each other, what becomes of a model's activations.

============================  ==========================================================================================
:func:`memory_report`         bytes of SOAP's state, before training or during it
:class:`ConflictMeter`        alignment of several losses' updates within a step, and of updates between steps; any optimizer
:class:`OutlierMeter`         kurtosis, max / median and what is beyond 6 sigma of a module's outputs, layer by layer
:func:`basis_health`          SOAP's bases: orthogonality, what is off the diagonal, spectrum; by parameter and mode
============================  ==========================================================================================

All but the first give a :class:`Table`: a list of rows, printable, ``to_csv(path)``.
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
