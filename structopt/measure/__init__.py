"""What a network costs, on paper and on this machine.

>>> import torch
>>> from structopt import measure
>>> measure.cost(torch.nn.Linear(28 * 28, 10), torch.zeros(1, 28 * 28)).macs
7840
"""

from structopt.measure.comparison import compare, pareto
from structopt.measure.costs import Cost, cost
from structopt.measure.counters import energy, energy_source
from structopt.measure.layers import per_layer
from structopt.measure.resources import file_bytes, peak_memory
from structopt.measure.table import Measured, Table
from structopt.measure.timing import Timing, latency
from structopt.measure.widths import free_widths

__all__ = [
    "Cost",
    "Measured",
    "Table",
    "Timing",
    "compare",
    "cost",
    "energy",
    "energy_source",
    "file_bytes",
    "free_widths",
    "latency",
    "pareto",
    "peak_memory",
    "per_layer",
]
