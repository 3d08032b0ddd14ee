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
#include "sliced_wasserstein_exact.h"
#include "sort.h"

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
// (factor, offset, low, high), or None
using RescaleArgument = std::optional<std::array<double, 4>>;
// (points, rescale, weights, histograms, first chunk, chunks, group)
using SideArgument = std::tuple<PointsArgument, RescaleArgument, Address, HistogramsArgument,
                                int64_t, int64_t, int64_t>;
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

sdcore::Rescale to_rescale(const RescaleArgument& argument) {
  if (!argument) return {};
  const auto& [factor, offset, low, high] = *argument;
  return {true,
          {static_cast<float>(factor), static_cast<float>(offset), static_cast<float>(low),
           static_cast<float>(high)},
          {factor, offset, low, high}};
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
  for (const auto& [points, rescale, weights, out, first, chunks, group] : sides) {
    found.push_back({to_points(points), to_rescale(rescale), at<double>(weights),
                     to_histograms(out), first, chunks, group});
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
            const RescaleArgument& rescale, const DirectionsArgument& directions,
            Address weights, double mass, Address table, Address edges, int64_t bins,
            const PointsArgument& out, const PlaceArgument& place) {
  const sdcore::GatherArguments arguments{
      at<void>(grad),      {grad_stride[0], grad_stride[1]}, to_points(points),
      to_rescale(rescale), to_directions(directions),        at<double>(weights),
      mass,                at<void>(table),                  at<void>(edges),
      bins,                to_points(out)};
  sdcore::sliced_wasserstein_gather(arguments, to_place(place));
}

using PassArgument = std::tuple<int64_t, int64_t, int64_t>;           // (first, slots, directions)
using KeptArgument = std::tuple<Address, Address, int64_t, bool>;     // (values, levels, count, one)
// (slopes, places, bits, count)
using BucketedArgument = std::tuple<Address, Address, int, int64_t>;
// (keys, kept, number, bucketed, cursors, moments)
using SortedArgument =
    std::tuple<Address, KeptArgument, Address, BucketedArgument, Address, Address>;

sdcore::Pass to_pass(const PassArgument& argument) {
  const auto& [first, slots, directions] = argument;
  return {first, slots, directions};
}

sdcore::Kept to_kept(const KeptArgument& argument) {
  const auto& [values, levels, count, one] = argument;
  return {at<void>(values), at<double>(levels), count, one};
}

sdcore::Bucketed to_bucketed(const BucketedArgument& argument) {
  const auto& [slopes, places, bits, count] = argument;
  return {at<void>(slopes), at<uint16_t>(places), bits, count};
}

sdcore::SortedSide to_sorted(const SortedArgument& argument) {
  const auto& [keys, kept, number, bucketed, cursors, moments] = argument;
  const auto& [slopes, places, bits, count] = bucketed;
  return {at<void>(keys),         to_kept(kept),         at<uint32_t>(number),
          at<void>(slopes),       at<uint16_t>(places),  at<uint32_t>(cursors),
          bits,                   at<double>(moments),   count};
}

int sort(const std::array<Address, 2>& keys, const std::array<Address, 2>& payload, int key_bytes,
         int64_t count, int bits, Address workspace, size_t bytes, const PlaceArgument& place) {
  const sdcore::SortBuffers buffers{{at<void>(keys[0]), at<void>(keys[1])},
                                    {at<void>(payload[0]), at<void>(payload[1])},
                                    key_bytes,
                                    count};
  return sdcore::radix_sort(buffers, bits, at<void>(workspace), bytes, to_place(place));
}

void make_grid(Address extremes, const KeptArgument& kept, const std::array<Address, 2>& weights,
               const std::array<int64_t, 2>& count, int64_t batch, int64_t directions, int bits,
               Address exponents, Address poison, bool is_double, const PlaceArgument& place) {
  sdcore::sliced_wasserstein_grid({at<void>(extremes),
                                   to_kept(kept),
                                   {at<double>(weights[0]), at<double>(weights[1])},
                                   {count[0], count[1]},
                                   batch,
                                   directions,
                                   bits,
                                   at<int>(exponents),
                                   at<int>(poison),
                                   is_double},
                                  to_place(place));
}

void keys(const PointsArgument& points, const DirectionsArgument& directions,
          const PassArgument& pass, int bits, Address exponents, Address poison, Address keys,
          Address number, const PlaceArgument& place) {
  sdcore::sliced_wasserstein_keys(
      {to_points(points), to_directions(directions), to_pass(pass), bits, at<int>(exponents),
       at<int>(poison), at<void>(keys), at<uint32_t>(number)},
      to_place(place));
}

void project(const PointsArgument& points, const DirectionsArgument& directions,
             const PassArgument& pass, Address out, const PlaceArgument& place) {
  sdcore::sliced_wasserstein_project(to_points(points), to_directions(directions), to_pass(pass),
                                     at<void>(out), to_place(place));
}

void levels(Address number, Address weights, int64_t count, const PassArgument& pass,
            Address levels, Address totals, const PlaceArgument& place) {
  sdcore::sliced_wasserstein_levels(at<uint32_t>(number), at<double>(weights), count,
                                    to_pass(pass), at<double>(levels), at<void>(totals),
                                    to_place(place));
}

void transport(const SortedArgument& x, const SortedArgument& y, const PassArgument& pass,
               int bits, Address exponents, Address poison, int p, Address costs, Address totals,
               Address values, bool is_double, const PlaceArgument& place) {
  sdcore::sliced_wasserstein_transport(
      {to_sorted(x), to_sorted(y), to_pass(pass), bits, at<int>(exponents), at<int>(poison), p,
       at<double>(costs), at<void>(totals), at<void>(values), is_double},
      to_place(place));
}

void unpack(const BucketedArgument& from, int64_t slots, Address out, bool finite, bool is_double,
            const PlaceArgument& place) {
  sdcore::sliced_wasserstein_unpack(to_bucketed(from), slots, at<void>(out), finite, is_double,
                                    to_place(place));
}

void pull(const BucketedArgument& from, const DirectionsArgument& directions, int64_t dim,
          const PassArgument& pass, Address grad, double scale, Address weights, Address out,
          bool is_double, const PlaceArgument& place) {
  sdcore::sliced_wasserstein_pull(
      {to_bucketed(from), to_directions(directions), dim, to_pass(pass), at<void>(grad), scale,
       at<double>(weights), at<void>(out), is_double},
      to_place(place));
}

void small(Address x, Address y, int64_t slots, int64_t count, int p, Address values,
           Address slopes, float unknown, const PlaceArgument& place) {
  sdcore::sliced_wasserstein_small({at<float>(x), at<float>(y), slots, count, p,
                                    at<float>(values), at<float>(slopes), unknown},
                                   to_place(place));
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
  m.def("radix_sort_workspace", &sdcore::radix_sort_workspace);
  m.def("radix_sort", &sort);
  m.def("sliced_wasserstein_grid", &make_grid);
  m.def("sliced_wasserstein_keys", &keys);
  m.def("sliced_wasserstein_project", &project);
  m.def("sliced_wasserstein_prefix_chunks", &sdcore::prefix_chunks);
  m.def("sliced_wasserstein_levels", &levels);
  m.def("sliced_wasserstein_transport_blocks", &sdcore::transport_blocks);
  m.def("sliced_wasserstein_transport", &transport);
  m.def("sliced_wasserstein_bucket_bits", &sdcore::bucket_bits);
  m.def("sliced_wasserstein_can_pull_buckets", &sdcore::can_pull_buckets);
  m.def("sliced_wasserstein_unpack", &unpack);
  m.def("sliced_wasserstein_pull", &pull);
  m.def("sliced_wasserstein_most_small_points", &sdcore::most_small_points);
  m.def("sliced_wasserstein_small", &small);
  m.def("shared_atomics", &sdcore::shared_atomics, "out"_a, "bins"_a, "updates_per_thread"_a,
        "blocks"_a, "threads"_a, "seed"_a, "device"_a, "stream"_a);
  m.def("shared_gathers", &sdcore::shared_gathers, "table"_a, "bins"_a, "out"_a,
        "reads_per_thread"_a, "blocks"_a, "threads"_a, "seed"_a, "device"_a, "stream"_a);
}
