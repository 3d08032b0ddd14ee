// The Python module sdcore._cuda. It knows no torch: tensors arrive as addresses and sizes, and a
// stream as an integer. Importing it needs neither a GPU nor a driver.
#include <pybind11/pybind11.h>

#include "ceilings.h"
#include "devices.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

py::list architectures() {
  py::list list;
  for (const int architecture : {SDCORE_CUDA_ARCHS}) list.append(architecture);
  return list;
}

py::list devices() {
  py::list list;
  for (const sdcore::Device& device : sdcore::devices()) {
    list.append(py::dict("name"_a = device.name,
                         "compute_capability"_a = py::make_tuple(device.major, device.minor),
                         "multiprocessors"_a = device.multiprocessors,
                         "shared_memory_per_block"_a = device.shared_memory_per_block,
                         "l2_bytes"_a = device.l2_bytes, "memory_bytes"_a = device.memory_bytes));
  }
  return list;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.attr("version") = SDCORE_VERSION;
  m.attr("architectures") = architectures();
  m.def("devices", &devices);
  m.def("shared_atomics", &sdcore::shared_atomics, "out"_a, "bins"_a, "updates_per_thread"_a,
        "blocks"_a, "threads"_a, "seed"_a, "device"_a, "stream"_a);
  m.def("shared_gathers", &sdcore::shared_gathers, "table"_a, "bins"_a, "out"_a,
        "reads_per_thread"_a, "blocks"_a, "threads"_a, "seed"_a, "device"_a, "stream"_a);
}
