"""TF32 stays off for a verdict and comes back after it, whichever names of torch's it was set by."""

import subprocess
import sys

PROGRAM = """
import os
import torch
from torch.backends import cuda, cudnn, mkldnn
from scorematch.attacks.precision import allow_tf32, full_precision

SETTINGS = '''
pass
cuda.matmul.allow_tf32 = cudnn.allow_tf32 = True
cudnn.allow_tf32 = False
torch.set_float32_matmul_precision("high")
torch.set_float32_matmul_precision("medium")
torch.backends.fp32_precision = "tf32"
torch.backends.fp32_precision = "ieee"
cuda.matmul.fp32_precision = "tf32"
cudnn.fp32_precision = "tf32"
cudnn.conv.fp32_precision = "ieee"
cudnn.rnn.fp32_precision = "ieee"
mkldnn.matmul.fp32_precision = "bf16"
'''
OLD = (torch.get_float32_matmul_precision, lambda: cuda.matmul.allow_tf32, lambda: cudnn.allow_tf32)

def readable(read):
    try:
        return read()
    except RuntimeError:
        return None

def found():
    named = (torch.backends, cuda.matmul, cudnn, cudnn.conv, cudnn.rnn, mkldnn.matmul)
    return [one.fp32_precision for one in named], [readable(read) for read in OLD]

def cuda_precision():
    return [one.fp32_precision for one in (cuda.matmul, cudnn.conv, cudnn.rnn)]

def check(setting):
    exec(setting)
    before = found()
    with full_precision(torch.device("cuda")):
        assert cuda_precision() == ["ieee"] * 3
        for read, was in zip(OLD, before[1]):
            assert was is None or readable(read) is not None, "the model could read it before"
    assert found() == before, (found(), before)
    for allowed in (True, False):
        allow_tf32(allowed)
        assert cuda_precision() == ["tf32" if allowed else "ieee"] * 3
        assert found()[1] == ["high" if allowed else "highest", allowed, allowed]

for setting in SETTINGS.strip().splitlines():
    if os.fork() == 0:  # what was set once cannot be unset
        check(setting)
        os._exit(0)
    assert os.wait()[1] == 0, setting
"""


def test_every_setting_comes_back() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)
