"""Networks for data scores and noise-conditional classifiers."""

from .conv import ConvBackbone
from .denoiser import Denoiser, EmbeddedDenoiser
from .mlp import MLPBackbone
from .unet import UNetBackbone

__all__ = ["ConvBackbone", "Denoiser", "EmbeddedDenoiser", "MLPBackbone", "UNetBackbone"]
