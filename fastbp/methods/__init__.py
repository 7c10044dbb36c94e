"""The four published methods and plain backprop: one file each, its module docstring is the method's card."""

from fastbp.method import Method
from fastbp.methods.backprop import Backprop
from fastbp.methods.ddg import DDG
from fastbp.methods.decorrelated import DecorrelatedBP
from fastbp.methods.highway import HighwayBP
from fastbp.methods.layerdropback import LayerDropBack

METHODS: dict[str, type[Method]] = {
    "bp": Backprop,
    "ldb": LayerDropBack,
    "dbp": DecorrelatedBP,
    "highway": HighwayBP,
    "ddg": DDG,
}

__all__ = ["DDG", "METHODS", "Backprop", "DecorrelatedBP", "HighwayBP", "LayerDropBack"]
