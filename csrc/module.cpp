// Importing scorematch._C runs the static registrations linked beside it; the module itself only reports the build.
#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include "cpu/instruction_set.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts about the build of scorematch's kernels, which importing this module registers with torch.";
  m.attr("torch_version") = TORCH_VERSION;
  m.attr("compiler") = __VERSION__;
  m.attr("instruction_set") = scorematch::name_of(scorematch::instruction_set());
}
