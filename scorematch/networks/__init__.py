"""Networks for data scores and noise-conditional classifiers."""

from .conv import ConvBackbone
from .denoiser import Denoiser
from .mlp import MLPBackbone
from .unet import UNetBackbone

__all__ = ["ConvBackbone", "Denoiser", "MLPBackbone", "UNetBackbone"]
