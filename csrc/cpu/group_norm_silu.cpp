#include "group_norm_silu.h"

#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "parallel.h"
#include "points.h"
#include "simd.h"

namespace sdcore {
namespace {

constexpr int64_t kBlock = 1024;        // pixels of a channel that are read at a time
constexpr int64_t kTaskValues = 16384;  // of a task: what it reads twice stays in the cache
constexpr int kFew = 64;                // values added up before their sum is kept as a double

// Values that lie side by side: pixels of one channel, or all channels of a pixel.
struct Run {
  int64_t offset, count;
};

// How values are divided among tasks: parts of each channel's pixels, or of all channels'.
struct Division {
  const GroupNormArguments& args;
  int64_t pixels, parts;  // of a part; parts of the pixels

  explicit Division(const GroupNormArguments& arguments) : args(arguments) {
    pixels = args.last ? std::max<int64_t>(1, kTaskValues / args.channels) : kTaskValues;
    parts = ceil_div(args.pixels, pixels);
  }
  int64_t tasks() const { return args.batch * parts * (args.last ? 1 : args.channels); }
  // Of a task: its sample, its part, the channel it begins with, and how many it has.
  int64_t channels() const { return args.last ? args.channels : 1; }
  int64_t b(int64_t task) const { return task / (parts * (args.last ? 1 : args.channels)); }
  int64_t part(int64_t task) const { return task % parts; }
  int64_t channel(int64_t task) const { return args.last ? 0 : task / parts % args.channels; }
  int64_t first(int64_t task) const { return part(task) * pixels; }
  int64_t end(int64_t task) const { return std::min(args.pixels, first(task) + pixels); }
  int64_t widest() const { return args.last ? args.channels : std::min(kBlock, args.pixels); }
  // Where a channel of a part of a sample has its sums.
  int64_t place(int64_t b, int64_t part, int64_t channel) const {
    return (b * parts + part) * args.channels + channel;
  }

  template <typename Body>
  void for_runs(int64_t task, const Body& body) const {
    if (args.last) {
      for (int64_t p = first(task); p < end(task); ++p)
        body(Run{(b(task) * args.pixels + p) * args.channels, args.channels});
      return;
    }
    const int64_t row = (b(task) * args.channels + channel(task)) * args.pixels;
    for (int64_t p = first(task); p < end(task); p += kBlock)
      body(Run{row + p, std::min(kBlock, end(task) - p)});
  }
};

// Rows of numbers that nobody has written yet.
template <typename Real, int kRows>
class Scratch {
 public:
  explicit Scratch(int64_t count) : count_(count), data_(new Real[kRows * count]) {}
  Real* operator[](int row) { return data_.get() + row * count_; }

 private:
  int64_t count_;
  std::unique_ptr<Real[]> data_;
};

Points at(const GroupNormArguments& args, const void* data, const Run& run) {
  const int64_t bytes = args.format == Format::float64   ? 8
                        : args.format == Format::float32 ? 4
                                                         : 2;
  char* const first = static_cast<char*>(const_cast<void*>(data)) + run.offset * bytes;
  return {first, args.format, 1, run.count, 1, {0, 1, 1}};
}

template <typename Real>
void read(const GroupNormArguments& args, const void* data, const Run& run, Real* buffer) {
  load(at(args, data, run), 0, 0, run.count, run.count, buffer);
}

template <typename Real>
void write(const GroupNormArguments& args, void* data, const Run& run, const Real* buffer) {
  store(at(args, data, run), 0, 0, run.count, run.count, buffer);
}

template <typename Real>
SDCORE_INLINE typename Simd<Real>::Vector loaded(const Real* from) {
  typename Simd<Real>::Vector found;
  std::memcpy(&found, from, sizeof found);
  return found;
}

template <typename Real>
SDCORE_INLINE double sum_of_lanes(const typename Simd<Real>::Vector& lanes) {
  double found = 0;
  for (int lane = 0; lane < Simd<Real>::width; ++lane) found += double(lanes[lane]);
  return found;
}

template <typename Real>
SDCORE_CLONES double sum(const Real* value, int64_t count) {
  constexpr int width = Simd<Real>::width;
  typename Simd<Real>::Vector total{};
  int64_t i = 0;
  for (; i + width <= count; i += width) total += loaded(value + i);
  double found = sum_of_lanes<Real>(total);
  for (; i < count; ++i) found += double(value[i]);
  return found;
}

template <typename Real>
SDCORE_CLONES void multiply(Real* value, const Real* by, int64_t count) {
  for (int64_t i = 0; i < count; ++i) value[i] *= by[i];
}

// Takes a number off each value, and adds up what is left.
template <typename Real>
SDCORE_CLONES double subtract_and_sum(Real* value, Real other, int64_t count) {
  constexpr int width = Simd<Real>::width;
  typename Simd<Real>::Vector total{};
  int64_t i = 0;
  for (; i + width <= count; i += width) {
    const auto off = loaded(value + i) - other;
    std::memcpy(value + i, &off, sizeof off);
    total += off;
  }
  double found = sum_of_lanes<Real>(total);
  for (; i < count; ++i) found += double(value[i] -= other);
  return found;
}

template <typename Real>
SDCORE_CLONES double sum_of_squares_off(const Real* value, Real mean, int64_t count) {
  constexpr int width = Simd<Real>::width;
  typename Simd<Real>::Vector total{};
  int64_t i = 0;
  for (; i + width <= count; i += width) {
    const auto off = loaded(value + i) - mean;
    total += off * off;
  }
  double found = sum_of_lanes<Real>(total);
  for (; i < count; ++i) found += double((value[i] - mean) * (value[i] - mean));
  return found;
}

// Below, kStep is 1 where each value of a run has a number of its own, of its channel, and 0 where
// there is one for all.
template <typename Real>
SDCORE_CLONES void square_off(Real* value, const Real* mean, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const Real off = value[i] - mean[i];
    value[i] = off * off;
  }
}

template <int kStep, typename Real>
SDCORE_CLONES void add(Real* value, const Real* other, int64_t count) {
  for (int64_t i = 0; i < count; ++i) value[i] += other[i * kStep];
}

template <typename Real>
SDCORE_CLONES void subtract(Real* value, const Real* other, int64_t count) {
  for (int64_t i = 0; i < count; ++i) value[i] -= other[i];
}

// The sums of a task's channels.
template <typename Real>
class Sums {
 public:
  Sums(bool last, int64_t channels) : last_(last), total_(channels), few_(last ? channels : 0) {}

  void add(const Real* value, int64_t count) {
    if (!last_) {
      total_[0] += sum(value, count);
      return;
    }
    sdcore::add<1>(few_.data(), value, count);
    if (++rows_ == kFew) flush();
  }
  const std::vector<double>& found() {
    flush();
    return total_;
  }

 private:
  void flush() {
    for (size_t c = 0; c < few_.size(); ++c) total_[c] += double(few_[c]);
    std::fill(few_.begin(), few_.end(), Real(0));
    rows_ = 0;
  }

  bool last_;
  int rows_ = 0;
  std::vector<double> total_;
  std::vector<Real> few_;
};

// e to the power of each value, to some 1e-7 of it; of what would overflow, or be no normal number,
// the largest or least that is none of it. NaN stays.
SDCORE_INLINE Simd<float>::Vector exponential(const Simd<float>::Vector& power_of_e) {
  using Vector = Simd<float>::Vector;
  using Index = Simd<float>::Index;
  const Vector low = Vector{} - 87.0f, high = Vector{} + 88.0f;
  Vector x = power_of_e < low ? low : power_of_e;
  x = x > high ? high : x;
  const Vector magic = Vector{} + 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded
  const Vector n = (x * 1.44269504f + magic) - magic;
  // ln 2 in two parts, of which the first has few digits, so that n times it is exact.
  const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vector p = Vector{} + 1.9875691500e-4f;  // Cephes' polynomial
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Index power = (__builtin_convertvector(n, Index) + 127) << 23;
  Vector factor;
  std::memcpy(&factor, &power, sizeof factor);
  return p * factor;
}

SDCORE_INLINE Simd<double>::Vector exponential(const Simd<double>::Vector& x) {
  Simd<double>::Vector found;
  for (int lane = 0; lane < Simd<double>::width; ++lane) found[lane] = std::exp(x[lane]);
  return found;
}

// 1 / (1 + e^-z)
template <typename Real>
SDCORE_CLONES void sigmoid(const Real* z, Real* out, int64_t count) {
  constexpr int width = Simd<Real>::width;
  int64_t i = 0;
  for (; i + width <= count; i += width) {
    const auto found = Real(1) / (Real(1) + exponential(-loaded(z + i)));
    std::memcpy(out + i, &found, sizeof found);
  }
  if (i < count) {
    typename Simd<Real>::Vector rest{};
    std::memcpy(&rest, z + i, (count - i) * sizeof(Real));
    rest = Real(1) / (Real(1) + exponential(-rest));
    std::memcpy(out + i, &rest, (count - i) * sizeof(Real));
  }
}

// What normalizes the values of each channel of a task; room for a whole vector after the last.
template <typename Real>
struct Norm {
  std::vector<Real> center, rest, scale, weight, bias;

  explicit Norm(int64_t channels) {
    for (auto* one : {&center, &rest, &scale, &weight, &bias}) {
      one->resize(channels + Simd<Real>::width);
    }
  }
};

template <int kStep, typename Real>
SDCORE_CLONES void normalize(Real* value, const Real* center, const Real* rest, const Real* scale,
                             int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    value[i] = ((value[i] - center[i * kStep]) - rest[i * kStep]) * scale[i * kStep];
}

template <int kStep, typename Real>
SDCORE_CLONES void affine(const Real* value, const Real* weight, const Real* bias, Real* out,
                          int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = value[i] * weight[i * kStep] + bias[i * kStep];
}

// The same for values that lie side by side.
template <typename Real>
struct Vectors {
  typename Simd<Real>::Vector center, rest, scale, weight, bias;
};

template <int kStep, typename Real>
SDCORE_INLINE Vectors<Real> vectors_of(const Norm<Real>& norm, int64_t i) {
  const auto of = [i](const std::vector<Real>& from) {
    if constexpr (kStep == 1) return loaded(from.data() + i);
    return typename Simd<Real>::Vector{} + from[0];
  };
  return {of(norm.center), of(norm.rest), of(norm.scale), of(norm.weight), of(norm.bias)};
}

template <bool kSilu, typename Real>
SDCORE_INLINE typename Simd<Real>::Vector activated(const typename Simd<Real>::Vector& value,
                                                     const Vectors<Real>& by) {
  const auto z = ((value - by.center) - by.rest) * by.scale * by.weight + by.bias;
  if constexpr (kSilu) return z / (Real(1) + exponential(-z));
  return z;
}

// Values to what comes of them, in one pass.
template <int kStep, bool kSilu, typename Real>
SDCORE_CLONES void activate(Real* value, const Norm<Real>& norm, int64_t count) {
  constexpr int width = Simd<Real>::width;
  Vectors<Real> by = vectors_of<kStep>(norm, 0);
  int64_t i = 0;
  for (; i + width <= count; i += width) {
    if constexpr (kStep == 1) by = vectors_of<kStep>(norm, i);
    const auto found = activated<kSilu, Real>(loaded(value + i), by);
    std::memcpy(value + i, &found, sizeof found);
  }
  if (i == count) return;
  if constexpr (kStep == 1) by = vectors_of<kStep>(norm, i);
  typename Simd<Real>::Vector rest{};
  std::memcpy(&rest, value + i, (count - i) * sizeof(Real));
  rest = activated<kSilu, Real>(rest, by);
  std::memcpy(value + i, &rest, (count - i) * sizeof(Real));
}

// grad times the derivative of SiLU at z, of which s is the sigmoid
template <typename Real>
SDCORE_CLONES void slope(Real* grad, const Real* z, const Real* s, int64_t count) {
  for (int64_t i = 0; i < count; ++i) grad[i] *= s[i] * (1 + z[i] * (1 - s[i]));
}

// out = scale * (weight * grad - common - along * normal)
template <int kStep, typename Real>
SDCORE_CLONES void pulled(const Real* grad, const Real* normal, const Real* scale,
                          const Real* weight, const Real* common, const Real* along, Real* out,
                          int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    out[i] = scale[i * kStep] * (weight[i * kStep] * grad[i] - common[i * kStep] -
                                 along[i * kStep] * normal[i]);
}

// The values that are normalized: x, or x, the shift and the residual as their sum is rounded and
// written. ``shift``: of the run's channels.
template <int kStep, typename Real>
void read_total(const GroupNormArguments& args, const Run& run, const Real* shift, Real* value,
                Real* other, bool written) {
  if (!args.residual) {
    read(args, args.x, run, value);
    return;
  }
  if (!written) {
    read(args, args.x, run, value);
    read(args, args.residual, run, other);
    if (args.shift) add<kStep>(value, shift, run.count);
    add<1>(value, other, run.count);
    write(args, args.total, run, value);
  }
  read(args, args.total, run, value);
}

// What is added to a channel of a sample, where it is not in the sum with a residual.
double shift_of(const GroupNormArguments& args, int64_t b, int64_t channel) {
  return args.shift && !args.residual ? args.shift[b * args.channels + channel] : 0;
}

// The first value of each group, from x or total, [batch, groups].
template <typename Real>
std::vector<Real> origins(const GroupNormArguments& args) {
  std::vector<Real> found(args.batch * args.groups);
  const int64_t width = args.channels / args.groups;
  for (int64_t i = 0; i < int64_t(found.size()); ++i) {
    const int64_t b = i / args.groups, c = i % args.groups * width;
    const Run run{b * args.channels * args.pixels + (args.last ? c : c * args.pixels), 1};
    const Real shift = args.shift ? Real(args.shift[b * args.channels + c]) : Real(0);
    Real other;
    read_total<0>(args, run, &shift, &found[i], &other, false);
  }
  return found;
}

template <typename Real>
Norm<Real> norm_of(const Division& by, int64_t task, const std::vector<Real>& origin) {
  const GroupNormArguments& args = by.args;
  const int64_t b = by.b(task), width = args.channels / args.groups;
  Norm<Real> norm(by.channels());
  for (int64_t i = 0; i < by.channels(); ++i) {
    const int64_t c = by.channel(task) + i, group = b * args.groups + c / width;
    const double off = args.mean[group] - shift_of(args, b, c);
    const double exact = double(origin[group]) + off;
    norm.center[i] = Real(exact);
    norm.rest[i] = Real(exact - double(norm.center[i]));
    norm.scale[i] = Real(args.rstd[group]);
    norm.weight[i] = args.weight ? Real(args.weight[c]) : Real(1);
    norm.bias[i] = args.bias ? Real(args.bias[c]) : Real(0);
  }
  return norm;
}

// What a task finds of its values less their group's origin: the mean of each of its channels, and
// the sum of squares off it.
struct Found {
  double *means, *squares;
};

// Of one channel, a block at a time, which is read once.
template <typename Real>
void find_of_channel(const Division& by, int64_t task, Real origin, Real shift, Found found) {
  Scratch<Real, 2> scratch(by.widest());
  Real *const value = scratch[0], *const other = scratch[1];
  double there = 0;
  by.for_runs(task, [&](const Run& run) {
    read_total<0>(by.args, run, &shift, value, other, false);
    const double number = double(run.count);
    const double of_run = subtract_and_sum(value, origin, run.count) / number;
    const double gap = of_run - *found.means, share = number / (there + number);
    *found.squares +=
        sum_of_squares_off(value, Real(of_run), run.count) + gap * gap * there * share;
    *found.means += gap * share;
    there += number;
  });
}

// Of all channels of some pixels, which are read twice.
template <typename Real>
void find_of_pixels(const Division& by, int64_t task, const Real* origin, const Real* shift,
                    Found found) {
  const int64_t count = by.channels();
  Scratch<Real, 2> scratch(by.widest());
  Real *const value = scratch[0], *const other = scratch[1];
  Sums<Real> sums(true, count), about(true, count);
  by.for_runs(task, [&](const Run& run) {
    read_total<1>(by.args, run, shift, value, other, false);
    subtract(value, origin, run.count);
    sums.add(value, run.count);
  });
  const double pixels = double(by.end(task) - by.first(task));
  const auto& added = sums.found();
  std::vector<Real> mean(count);
  for (int64_t c = 0; c < count; ++c) {
    found.means[c] = added[c] / pixels;
    mean[c] = Real(found.means[c]);
  }
  by.for_runs(task, [&](const Run& run) {
    read_total<1>(by.args, run, shift, value, other, true);
    subtract(value, origin, run.count);
    square_off(value, mean.data(), run.count);
    about.add(value, run.count);
  });
  const auto& off = about.found();
  std::copy(off.begin(), off.end(), found.squares);
}

template <int kStep, typename Real>
void statistics(const Division& by, const std::vector<Real>& origin) {
  const GroupNormArguments& args = by.args;
  const int64_t width = args.channels / args.groups;
  std::vector<double> means(args.batch * by.parts * args.channels), squares(means.size());
  parallel_for(by.tasks(), args.threads, [&](int64_t task) {
    const int64_t b = by.b(task), channel = by.channel(task), count = by.channels();
    std::vector<Real> from(count), shift(count);
    for (int64_t i = 0; i < count; ++i) {
      from[i] = origin[b * args.groups + (channel + i) / width];
      if (args.shift) shift[i] = Real(args.shift[b * args.channels + channel + i]);
    }
    const int64_t place = by.place(b, by.part(task), channel);
    const Found found{&means[place], &squares[place]};
    if constexpr (kStep == 0) {
      find_of_channel(by, task, from[0], shift[0], found);
    } else {
      find_of_pixels(by, task, from.data(), shift.data(), found);
    }
  });
  for (int64_t i = 0; i < args.batch * args.groups; ++i) {
    const int64_t b = i / args.groups, c = i % args.groups * width;
    const double all = double(args.pixels) * double(width);
    const auto for_parts = [&](const auto& body) {
      for (int64_t part = 0; part < by.parts; ++part)
        for (int64_t k = c; k < c + width; ++k) {
          const int64_t place = by.place(b, part, k);
          const int64_t end = std::min(args.pixels, (part + 1) * by.pixels);
          body(double(end - part * by.pixels), means[place] + shift_of(args, b, k),
               squares[place]);
        }
    };
    double mean = 0, square = 0;
    for_parts([&](double count, double of_part, double) { mean += count * of_part; });
    mean /= all;
    for_parts([&](double count, double of_part, double squares_of_part) {
      square += squares_of_part + count * (of_part - mean) * (of_part - mean);
    });
    args.mean[i] = mean;
    args.rstd[i] = 1 / std::sqrt(square / all + args.eps);
  }
}

template <int kStep, typename Real>
void forward(const GroupNormArguments& args) {
  const Division by(args);
  const auto origin = origins<Real>(args);
  statistics<kStep>(by, origin);
  parallel_for(by.tasks(), args.threads, [&](int64_t task) {
    Scratch<Real, 2> scratch(by.widest());
    Real *const value = scratch[0], *const other = scratch[1];
    const Norm<Real> norm = norm_of(by, task, origin);
    by.for_runs(task, [&](const Run& run) {
      read_total<kStep, Real>(args, run, nullptr, value, other, true);
      if (args.silu)
        activate<kStep, true>(value, norm, run.count);
      else
        activate<kStep, false>(value, norm, run.count);
      write(args, args.out, run, value);
    });
  });
}

// The normalized values of a run, and the gradient to what SiLU is taken of.
template <int kStep, typename Real>
void slopes(const GroupNormBackwardArguments& args, const Run& run, const Norm<Real>& norm,
            Real* normal, Real* grad, Real* z, Real* s) {
  read(args.forward, args.forward.x, run, normal);
  read(args.forward, args.grad, run, grad);
  normalize<kStep>(normal, norm.center.data(), norm.rest.data(), norm.scale.data(), run.count);
  if (!args.forward.silu) return;
  affine<kStep>(normal, norm.weight.data(), norm.bias.data(), z, run.count);
  sigmoid(z, s, run.count);
  slope(grad, z, s, run.count);
}

template <int kStep, typename Real>
void backward(const GroupNormBackwardArguments& args) {
  const GroupNormArguments& given = args.forward;
  const Division by(given);
  const auto origin = origins<Real>(given);
  const int64_t width = given.channels / given.groups;
  // Of each channel of each part: the gradient's sum, that of it times the normalized values, and
  // that of these alone.
  std::vector<std::array<double, 3>> sums(given.batch * by.parts * given.channels);
  const auto with_runs = [&](int64_t task, const auto& body) {
    Scratch<Real, 4> scratch(by.widest());
    const Norm<Real> norm = norm_of(by, task, origin);
    by.for_runs(task, [&](const Run& run) {
      slopes<kStep>(args, run, norm, scratch[0], scratch[1], scratch[2], scratch[3]);
      body(run, norm, scratch[0], scratch[1], scratch[2]);
    });
  };
  parallel_for(by.tasks(), given.threads, [&](int64_t task) {
    const int64_t count = by.channels();
    Sums<Real> plain(given.last, count), times(given.last, count), normals(given.last, count);
    with_runs(task, [&](const Run& run, const Norm<Real>&, Real* normal, Real* grad, Real*) {
      plain.add(grad, run.count);
      if (args.to_shift) normals.add(normal, run.count);
      multiply(grad, normal, run.count);
      times.add(grad, run.count);
    });
    const int64_t place = by.place(by.b(task), by.part(task), by.channel(task));
    const auto &p = plain.found(), &t = times.found(), &n = normals.found();
    for (int64_t c = 0; c < count; ++c) sums[place + c] = {p[c], t[c], n[c]};
  });
  std::vector<double> commons(given.batch * given.groups), alongs(commons.size());
  for (int64_t i = 0; i < int64_t(commons.size()); ++i) {
    const int64_t b = i / given.groups;
    const double all = double(given.pixels) * double(width);
    std::vector<std::array<double, 3>> of(width);
    for (int64_t k = 0; k < width; ++k) {
      const int64_t c = i % given.groups * width + k;
      for (int64_t part = 0; part < by.parts; ++part)
        for (int kind = 0; kind < 3; ++kind) of[k][kind] += sums[by.place(b, part, c)][kind];
      const double w = given.weight ? given.weight[c] : 1;
      commons[i] += w * of[k][0] / all;
      alongs[i] += w * of[k][1] / all;
    }
    for (int64_t k = 0; k < width; ++k) {
      const int64_t c = i % given.groups * width + k, place = b * given.channels + c;
      const double w = given.weight ? given.weight[c] : 1;
      if (args.to_bias) args.to_bias[place] = of[k][0];
      if (args.to_weight) args.to_weight[place] = of[k][1];
      if (args.to_shift)
        args.to_shift[place] = given.rstd[i] * (w * of[k][0] - double(given.pixels) * commons[i] -
                                                alongs[i] * of[k][2]);
    }
  }
  if (!args.to_x) return;
  parallel_for(by.tasks(), given.threads, [&](int64_t task) {
    std::vector<Real> common(by.channels()), along(by.channels());
    for (int64_t i = 0; i < by.channels(); ++i) {
      const int64_t group = by.b(task) * given.groups + (by.channel(task) + i) / width;
      common[i] = Real(commons[group]);
      along[i] = Real(alongs[group]);
    }
    with_runs(task, [&](const Run& run, const Norm<Real>& norm, Real* normal, Real* grad, Real* z) {
      pulled<kStep>(grad, normal, norm.scale.data(), norm.weight.data(), common.data(),
                    along.data(), z, run.count);
      if (args.more) {
        read(given, args.more, run, normal);
        add<1>(z, normal, run.count);
      }
      write(given, args.to_x, run, z);
    });
  });
}

}  // namespace

void group_norm_silu(const GroupNormArguments& args) {
  if (args.format == Format::float64)
    args.last ? forward<1, double>(args) : forward<0, double>(args);
  else
    args.last ? forward<1, float>(args) : forward<0, float>(args);
}

void group_norm_silu_backward(const GroupNormBackwardArguments& args) {
  const bool last = args.forward.last;
  if (args.forward.format == Format::float64)
    last ? backward<1, double>(args) : backward<0, double>(args);
  else
    last ? backward<1, float>(args) : backward<0, float>(args);
}

}  // namespace sdcore
