"""fastbp: four published methods that make backpropagation cheaper, behind one protocol, for torch.

Start with `fastbp.method` (the protocol), then `fastbp.run` (the one training loop); each method is one file in
`fastbp.methods` whose docstring is its card.
"""

from fastbp.chain import Chain, Residual
from fastbp.method import (
    EpochPlan,
    GradientEstimator,
    Method,
    WrappingEstimator,
    ablations,
    method_from_dict,
    nest,
    parts,
)
from fastbp.methods import DDG, METHODS, Backprop, DecorrelatedBP, HighwayBP, LayerDropBack
from fastbp.recurrent import Recurrent
from fastbp.views import as_chain

__version__ = "0.1.0"

__all__ = [
    "DDG",
    "METHODS",
    "Backprop",
    "Chain",
    "DecorrelatedBP",
    "EpochPlan",
    "GradientEstimator",
    "HighwayBP",
    "LayerDropBack",
    "Method",
    "Recurrent",
    "Residual",
    "WrappingEstimator",
    "ablations",
    "as_chain",
    "method_from_dict",
    "nest",
    "parts",
]
