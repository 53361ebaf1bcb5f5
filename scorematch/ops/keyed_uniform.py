"""Random numbers that depend on what they are for, not on when or where they are drawn."""

import torch
from torch import Tensor

from .. import _extension
from ._checks import check_dense, shape

_DTYPES = (torch.float32, torch.float64)


def keyed_uniform(samples: Tensor, count: int, *, seed: int, stream: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform numbers in [0, 1), each a function of (seed, stream, samples[n], j) alone.

    Element (n, j) is word j mod 4 of Philox4x32-10 under the key `seed` at the counter (j div 4, samples[n], stream),
    its upper 24 bits divided by 2^24. It does not depend on the batch, its order, the device or the dtype.

    Args:
        samples: the number of the sample that each row is for, int64 `[N]`; 0 <= samples < 2^32. A value beyond is an
            error on the CPU and gives a row of NaN on CUDA.
        count: numbers for each sample, 0 <= count <= 2^34.
        seed: 0 <= seed < 2^63.
        stream: which of the independent sequences of a seed; 0 <= stream < 2^63.
        dtype: torch.float32 or torch.float64, with the same values.

    Returns:
        A new contiguous tensor `[N, count]` on the device of `samples`.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: there are no kernels for the device.

    References:
        Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011.
    """
    if not isinstance(samples, Tensor):
        raise TypeError(f"samples must be a torch.Tensor, got {type(samples).__name__}")
    if samples.dtype != torch.int64:
        raise TypeError(f"samples is {samples.dtype}, expected torch.int64")
    check_dense("samples", samples)
    missing = None if samples.is_cpu else _extension.missing_kernel_message(samples.device)
    if missing is not None:
        raise RuntimeError(f"samples is on {samples.device}, but {missing}")
    if samples.dim() != 1:
        raise ValueError(f"samples has shape {shape(samples)}, expected [N]")
    for name, value, limit in (("count", count, 2**34 + 1), ("seed", seed, 2**63), ("stream", stream, 2**63)):
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        if not 0 <= value < limit:
            raise ValueError(f"{name} must be at least 0 and less than {limit}, got {value}")
    if dtype not in _DTYPES:
        raise TypeError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    return torch.ops.scorematch.keyed_uniform.default(samples, count, seed, stream, dtype)


@torch.library.register_fake("scorematch::keyed_uniform")
def _(samples: Tensor, count: int, seed: int, stream: int, dtype: torch.dtype) -> Tensor:
    return samples.new_empty((samples.shape[0], count), dtype=dtype)
