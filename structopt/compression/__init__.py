"""Compression: fewer bits for each number, and a file that one can weigh.

>>> import torch
>>> from structopt import compression
>>> grid = compression.Grid(bits=4, per=compression.PerAxis(0), fit=compression.MSE())
>>> weight = torch.randn(3, 50)
>>> compression.quantize(weight, grid).dequantize().unique().numel() <= 3 * 15
True
"""

from structopt.compression.activations import Blend, blend_activations, separate_activations
from structopt.compression.adaround import adaround, adaround_weights
from structopt.compression.adjusting import correct_biases_, equalize
from structopt.compression.bounding import Bounded, clip_activations, threshold_activations
from structopt.compression.codes import Coded, Codes, put_, quantize_weights, share_weights
from structopt.compression.coding import decode, encode, entropy_bits
from structopt.compression.container import load, save
from structopt.compression.convert import Conversion, convert, routes_on
from structopt.compression.convert_ao import TorchAO
from structopt.compression.convert_onnx import ONNXRuntime
from structopt.compression.convert_parts import Converted, Route
from structopt.compression.convert_routes import Float, IntMM, Sparse24
from structopt.compression.folding import fold_batch_norms, merge_layers
from structopt.compression.gptq import gptq, gptq_weights
from structopt.compression.granularity import Granularity, PerAxis, PerBlock, PerGroup, PerTensor
from structopt.compression.grids import MSE, Fit, Grid, LeastSquares, MinMax, Percentile, Steps
from structopt.compression.huffman import canonical_words, huffman_lengths
from structopt.compression.in_turn import share_weight_vectors
from structopt.compression.inputs import RoundInput, calibrate, round_inputs
from structopt.compression.levels import Levels, NormalFloat
from structopt.compression.links import removable
from structopt.compression.lowrank import factorize, spectra
from structopt.compression.merging import merge_branches, merge_pair
from structopt.compression.mixed import MixedBits, mix_bits
from structopt.compression.qat import PACT, QAT, LearnedClip, LearnedStep, prepare_qat
from structopt.compression.quantize import Quantized, fake_quantize, fit, quantize
from structopt.compression.ranks import SVD, Depthwise, Form, Spatial, Tucker
from structopt.compression.rate import LearnedCode, Rated, RatePenalty, prepare_rate
from structopt.compression.report import Report, Row
from structopt.compression.shallower import Linearise, Shallower, shallower
from structopt.compression.sharing import Shared, Tie, share, tie
from structopt.compression.slopes import linearising
from structopt.compression.smoothing import smooth_inputs
from structopt.compression.straight import Link, merge_links
from structopt.compression.targets import Energy, Error, Target, Weights
from structopt.compression.vectors import SharedVectors, share_vectors
from structopt.compression.zeros import Skipped, SkipZeros, Zeros, input_zeros, skip_zeros

__all__ = [
    "MSE",
    "PACT",
    "QAT",
    "SVD",
    "Blend",
    "Bounded",
    "Coded",
    "Codes",
    "Conversion",
    "Converted",
    "Depthwise",
    "Energy",
    "Error",
    "Fit",
    "Float",
    "Form",
    "Granularity",
    "Grid",
    "IntMM",
    "LearnedClip",
    "LearnedCode",
    "LearnedStep",
    "LeastSquares",
    "Levels",
    "Linearise",
    "Link",
    "MinMax",
    "MixedBits",
    "NormalFloat",
    "ONNXRuntime",
    "PerAxis",
    "PerBlock",
    "PerGroup",
    "PerTensor",
    "Percentile",
    "Quantized",
    "RatePenalty",
    "Rated",
    "Report",
    "RoundInput",
    "Route",
    "Row",
    "Shallower",
    "Shared",
    "SharedVectors",
    "SkipZeros",
    "Skipped",
    "Sparse24",
    "Spatial",
    "Steps",
    "Target",
    "Tie",
    "TorchAO",
    "Tucker",
    "Weights",
    "Zeros",
    "adaround",
    "adaround_weights",
    "blend_activations",
    "calibrate",
    "canonical_words",
    "clip_activations",
    "convert",
    "correct_biases_",
    "decode",
    "encode",
    "entropy_bits",
    "equalize",
    "factorize",
    "fake_quantize",
    "fit",
    "fold_batch_norms",
    "gptq",
    "gptq_weights",
    "huffman_lengths",
    "input_zeros",
    "linearising",
    "load",
    "merge_branches",
    "merge_layers",
    "merge_links",
    "merge_pair",
    "mix_bits",
    "prepare_qat",
    "prepare_rate",
    "put_",
    "quantize",
    "quantize_weights",
    "removable",
    "round_inputs",
    "routes_on",
    "save",
    "separate_activations",
    "shallower",
    "share",
    "share_vectors",
    "share_weight_vectors",
    "share_weights",
    "skip_zeros",
    "smooth_inputs",
    "spectra",
    "threshold_activations",
    "tie",
]
