// sdcore._cpu. Tensors arrive as addresses, sizes and strides; the Python side has checked them.
#include <pybind11/pybind11.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../arguments.h"
#include "delta_combine.h"
#include "group_norm_silu.h"
#include "sliced_wasserstein.h"

namespace py = pybind11;
using sdcore::Address;
using sdcore::at;
using sdcore::Points;
using sdcore::PointsArgument;
using sdcore::to_points;

namespace {


void binned(const PointsArgument& x, const PointsArgument& y, Address directions,
            int64_t directions_count, Address weights_x, Address weights_y, int p, int64_t bins,
            std::optional<std::pair<double, double>> range, Address values, Address table_x,
            Address table_y, Address edges, int threads) {
  const sdcore::BinnedArguments arguments{
      to_points(x),          to_points(y),
      at<void>(directions),  directions_count,
      at<double>(weights_x), at<double>(weights_y),
      p,                     bins,
      range.has_value(),     range ? range->first : 0,
      range ? range->second : 0,
      at<void>(values),      at<void>(table_x),
      at<void>(table_y),     at<void>(edges),
      threads};
  const py::gil_scoped_release release;
  sdcore::binned(arguments);
}

void binned_backward(Address grad, const PointsArgument& points, Address directions,
                     int64_t directions_count, Address weights, Address table, Address edges,
                     int64_t bins, const PointsArgument& out, int threads) {
  const sdcore::BinnedBackwardArguments arguments{
      at<void>(grad),  to_points(points), at<void>(directions), directions_count,
      at<double>(weights), at<void>(table), at<void>(edges),    bins,
      to_points(out),  threads};
  const py::gil_scoped_release release;
  sdcore::binned_backward(arguments);
}

void exact(const PointsArgument& x, const PointsArgument& y, Address directions,
           int64_t directions_count, Address weights_x, Address weights_y, int p, Address grad,
           Address values, Address grad_x, Address grad_y, int threads) {
  const sdcore::ExactArguments arguments{to_points(x),          to_points(y),
                                         at<void>(directions),  directions_count,
                                         at<double>(weights_x), at<double>(weights_y),
                                         p,                     at<void>(grad),
                                         at<void>(values),      at<void>(grad_x),
                                         at<void>(grad_y),      threads};
  const py::gil_scoped_release release;
  sdcore::exact(arguments);
}

// (address, format, stride of the batch, strides of the axes)
using ValuesArgument = std::tuple<Address, std::string, int64_t, std::vector<int64_t>>;
using NumbersArgument = std::pair<Address, int64_t>;  // of doubles, and their stride

sdcore::Values to_values(const ValuesArgument& argument) {
  const auto& [address, format, batch_stride, strides] = argument;
  return {at<void>(address), sdcore::to_format(format), batch_stride, strides};
}

template <void (*run)(const sdcore::DeltaArguments&)>
void delta(const std::array<ValuesArgument, sdcore::kParts>& parts, const ValuesArgument& out,
           const ValuesArgument& out_u, int64_t batch, const std::vector<int64_t>& sizes,
           const std::array<NumbersArgument, 6>& numbers, double strength, double guidance,
           double rescale, const std::array<int, 3>& types, bool guided, int output, bool delta_u,
           int threads) {
  sdcore::DeltaArguments arguments;
  for (size_t i = 0; i < parts.size(); ++i) arguments.parts[i] = to_values(parts[i]);
  arguments.out = to_values(out);
  arguments.out_u = to_values(out_u);
  arguments.batch = batch;
  arguments.sizes = sizes;
  sdcore::Numbers* const places[] = {&arguments.alpha,      &arguments.sigma,
                                     &arguments.next_alpha, &arguments.next_sigma,
                                     &arguments.strengths,  &arguments.guidances};
  for (size_t i = 0; i < numbers.size(); ++i)
    *places[i] = {at<double>(numbers[i].first), numbers[i].second};
  arguments.strength = strength;
  arguments.guidance = guidance;
  arguments.rescale = rescale;
  for (size_t i = 0; i < types.size(); ++i) arguments.types[i] = sdcore::Prediction(types[i]);
  arguments.guided = guided;
  arguments.output = sdcore::Output(output);
  arguments.delta_u = delta_u;
  arguments.threads = threads;
  const py::gil_scoped_release release;
  run(arguments);
}

sdcore::GroupNormArguments to_norm(const std::string& format,
                                   const std::array<int64_t, 4>& sizes, bool last, bool silu,
                                   double eps, const std::array<Address, 9>& tensors, int threads) {
  const auto& [batch, channels, pixels, groups] = sizes;
  const auto& [x, residual, total, out, weight, bias, shift, mean, rstd] = tensors;
  return {sdcore::to_format(format),
          batch,
          channels,
          pixels,
          groups,
          last,
          silu,
          eps,
          at<void>(x),
          at<void>(residual),
          at<void>(total),
          at<void>(out),
          at<double>(weight),
          at<double>(bias),
          at<double>(shift),
          at<double>(mean),
          at<double>(rstd),
          threads};
}

// sizes: batch, channels, pixels, groups. tensors: as in GroupNormArguments.
void group_norm(const std::string& format, const std::array<int64_t, 4>& sizes, bool last,
                bool silu, double eps, const std::array<Address, 9>& tensors, int threads) {
  const auto arguments = to_norm(format, sizes, last, silu, eps, tensors, threads);
  const py::gil_scoped_release release;
  sdcore::group_norm_silu(arguments);
}

// gradients: grad, more, to_x, to_weight, to_bias, to_shift.
void group_norm_backward(const std::string& format, const std::array<int64_t, 4>& sizes, bool last,
                         bool silu, double eps, const std::array<Address, 9>& tensors, int threads,
                         const std::array<Address, 6>& gradients) {
  const auto& [grad, more, to_x, to_weight, to_bias, to_shift] = gradients;
  const sdcore::GroupNormBackwardArguments arguments{
      to_norm(format, sizes, last, silu, eps, tensors, threads),
      at<void>(grad),
      at<void>(more),
      at<void>(to_x),
      at<double>(to_weight),
      at<double>(to_bias),
      at<double>(to_shift)};
  const py::gil_scoped_release release;
  sdcore::group_norm_silu_backward(arguments);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.attr("version") = SDCORE_VERSION;
  m.def("delta_combine", &delta<sdcore::delta_combine>);
  m.def("delta_combine_backward", &delta<sdcore::delta_combine_backward>);
  m.def("group_norm_silu", &group_norm);
  m.def("group_norm_silu_backward", &group_norm_backward);
  m.def("sliced_wasserstein_binned", &binned);
  m.def("sliced_wasserstein_binned_backward", &binned_backward);
  m.def("sliced_wasserstein_exact", &exact);
}
