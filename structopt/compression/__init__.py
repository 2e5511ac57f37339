"""Compression: fewer bits for each number.

>>> import torch
>>> from structopt import compression
>>> grid = compression.Grid(bits=4, per=compression.PerAxis(0), fit=compression.MSE())
>>> weight = torch.randn(3, 50)
>>> compression.quantize(weight, grid).dequantize().unique().numel() <= 3 * 15
True
"""

from structopt.compression.granularity import Granularity, PerAxis, PerBlock, PerGroup, PerTensor
from structopt.compression.grids import MSE, Fit, Grid, MinMax, Percentile, Steps
from structopt.compression.quantize import Quantized, fake_quantize, fit, quantize

__all__ = [
    "MSE",
    "Fit",
    "Granularity",
    "Grid",
    "MinMax",
    "PerAxis",
    "PerBlock",
    "PerGroup",
    "PerTensor",
    "Percentile",
    "Quantized",
    "Steps",
    "fake_quantize",
    "fit",
    "quantize",
]
