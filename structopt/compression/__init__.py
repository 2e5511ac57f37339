"""Compression: fewer bits for each number, and a file that one can weigh.

>>> import torch
>>> from structopt import compression
>>> grid = compression.Grid(bits=4, per=compression.PerAxis(0), fit=compression.MSE())
>>> weight = torch.randn(3, 50)
>>> compression.quantize(weight, grid).dequantize().unique().numel() <= 3 * 15
True
"""

from structopt.compression.codes import Coded, Codes, put_, quantize_weights, share_weights
from structopt.compression.coding import decode, encode, entropy_bits
from structopt.compression.container import Report, Row, load, save
from structopt.compression.granularity import Granularity, PerAxis, PerBlock, PerGroup, PerTensor
from structopt.compression.grids import MSE, Fit, Grid, MinMax, Percentile, Steps
from structopt.compression.huffman import canonical_words, huffman_lengths
from structopt.compression.quantize import Quantized, fake_quantize, fit, quantize
from structopt.compression.sharing import Shared, Tie, share, tie

__all__ = [
    "MSE",
    "Coded",
    "Codes",
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
    "Report",
    "Row",
    "Shared",
    "Steps",
    "Tie",
    "canonical_words",
    "decode",
    "encode",
    "entropy_bits",
    "fake_quantize",
    "fit",
    "huffman_lengths",
    "load",
    "put_",
    "quantize",
    "quantize_weights",
    "save",
    "share",
    "share_weights",
    "tie",
]
