// The Python module sdcore._cuda. It knows no torch: tensors arrive as addresses and sizes, and a
// stream as an integer. Importing it needs neither a GPU nor a driver.
#include <pybind11/pybind11.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../arguments.h"
#include "ceilings.h"
#include "devices.h"
#include "sliced_wasserstein.h"

namespace py = pybind11;
using namespace pybind11::literals;
using sdcore::Address;
using sdcore::at;
using sdcore::Place;
using sdcore::Points;
using sdcore::PointsArgument;
using sdcore::to_points;

namespace {

using DirectionsArgument = std::tuple<Address, int64_t>;
// (masses, totals, bits, pitch, chunks)
using HistogramsArgument = std::tuple<Address, Address, int, int64_t, int64_t>;
// (points, weights, histograms, first chunk, chunks, group)
using SideArgument =
    std::tuple<PointsArgument, Address, HistogramsArgument, int64_t, int64_t, int64_t>;
// ("found" or "given", address) or ("box", low, high)
using EndsArgument = std::tuple<std::string, Address, double, double>;
using PlaceArgument = std::tuple<int, Address>;  // (device, stream)

sdcore::Directions to_directions(const DirectionsArgument& argument) {
  return {at<void>(std::get<0>(argument)), std::get<1>(argument)};
}

sdcore::Ends to_ends(const EndsArgument& argument) {
  const auto& [kind, address, low, high] = argument;
  if (kind == "found") return {sdcore::Ends::found, at<void>(address), 0, 0};
  if (kind == "given") return {sdcore::Ends::given, at<void>(address), 0, 0};
  if (kind == "box") return {sdcore::Ends::box, nullptr, low, high};
  throw py::value_error("unknown ends " + kind);
}

sdcore::Histograms to_histograms(const HistogramsArgument& argument) {
  const auto& [masses, totals, bits, pitch, chunks] = argument;
  return {at<void>(masses), at<unsigned long long>(totals), bits, pitch, chunks};
}

Place to_place(const PlaceArgument& argument) {
  return {std::get<0>(argument), std::get<1>(argument)};
}

void range(const std::vector<PointsArgument>& sides, const DirectionsArgument& directions,
           Address extremes, const PlaceArgument& place) {
  std::vector<Points> points;
  for (const PointsArgument& side : sides) points.push_back(to_points(side));
  sdcore::sliced_wasserstein_range(points.data(), static_cast<int>(points.size()),
                                   to_directions(directions), at<void>(extremes),
                                   to_place(place));
}

py::tuple plan(int64_t n, int64_t others, int64_t dim, int64_t batch, int64_t directions,
               int64_t bins, bool weighted, bool is_double, int device) {
  const sdcore::HistogramPlan plan = sdcore::sliced_wasserstein_plan(
      n, others, dim, batch, directions, bins, weighted, is_double, device);
  return py::make_tuple(plan.chunks, plan.pitch, plan.parts, plan.group, plan.bits);
}

void histogram(const std::vector<SideArgument>& sides, const DirectionsArgument& directions,
               const EndsArgument& ends, int64_t bins, Address finished,
               const PlaceArgument& place) {
  std::vector<sdcore::Side> found;
  for (const auto& [points, weights, out, first, chunks, group] : sides) {
    found.push_back(
        {to_points(points), at<double>(weights), to_histograms(out), first, chunks, group});
  }
  sdcore::sliced_wasserstein_histogram(found.data(), static_cast<int>(found.size()),
                                       to_directions(directions), to_ends(ends), bins,
                                       at<unsigned>(finished), to_place(place));
}

void solve(const HistogramsArgument& x, const HistogramsArgument& y, bool one_y,
           const DirectionsArgument& directions, int64_t dim, const EndsArgument& ends,
           int64_t batch, int64_t bins, int p, Address values, std::optional<double> scale,
           Address table_x, Address table_y, Address edges, Address costs, Address finished,
           Address moments, bool is_double, const PlaceArgument& place) {
  const sdcore::SolveArguments arguments{
      to_histograms(x),  to_histograms(y),  one_y,
      to_directions(directions), dim,       to_ends(ends),
      batch,             bins,              p,
      at<void>(values),  scale.has_value(), scale.value_or(1),
      at<void>(table_x), at<void>(table_y), at<void>(edges),
      at<double>(costs), at<unsigned>(finished), at<double>(moments),
      is_double};
  sdcore::sliced_wasserstein_solve(arguments, to_place(place));
}

void gather(Address grad, std::array<int64_t, 2> grad_stride, const PointsArgument& points,
            const DirectionsArgument& directions, Address weights, double mass, Address table,
            Address edges, int64_t bins, const PointsArgument& out, const PlaceArgument& place) {
  const sdcore::GatherArguments arguments{
      at<void>(grad),      {grad_stride[0], grad_stride[1]}, to_points(points),
      to_directions(directions), at<double>(weights),        mass,
      at<void>(table),     at<void>(edges),                  bins,
      to_points(out)};
  sdcore::sliced_wasserstein_gather(arguments, to_place(place));
}

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
  m.attr("sliced_wasserstein_part") = sdcore::kPart;
  m.def("sliced_wasserstein_plan", &plan);
  m.def("sliced_wasserstein_range", &range);
  m.def("sliced_wasserstein_histogram", &histogram);
  m.def("sliced_wasserstein_solve", &solve);
  m.def("sliced_wasserstein_gather", &gather);
  m.def("shared_atomics", &sdcore::shared_atomics, "out"_a, "bins"_a, "updates_per_thread"_a,
        "blocks"_a, "threads"_a, "seed"_a, "device"_a, "stream"_a);
  m.def("shared_gathers", &sdcore::shared_gathers, "table"_a, "bins"_a, "out"_a,
        "reads_per_thread"_a, "blocks"_a, "threads"_a, "seed"_a, "device"_a, "stream"_a);
}
