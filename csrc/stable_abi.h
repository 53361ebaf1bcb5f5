// The oldest libtorch the binaries load into. Defined in a header that every source includes first, not on the
// command line: under it, the pybind11 bundled with torch 2.11 refuses to compile.
#pragma once
#define TORCH_TARGET_VERSION 0x020b000000000000  // 2.11
#include <torch/csrc/stable/library.h>
