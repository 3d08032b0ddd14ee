#include "delta_combine.h"

#include <cmath>
#include <utility>

#include "parallel.h"
#include "points.h"
#include "simd.h"

namespace sdcore {
namespace {

constexpr int64_t kBlock = 1024;       // values read, combined and written at a time
constexpr int64_t kTaskValues = 8192;  // of a task: some 10 microseconds

// What each output is made with: a branch is target + to_source * source + to_adapted * adapted +
// to_state * state, and what comes out to_p * (the branches, guided) + to_sample * sample.
struct Slopes {
  double to_source, to_adapted, to_state, to_p, to_sample, guidance;
};

double of(const Numbers& numbers, int64_t b) {
  return numbers.data ? numbers.data[b * numbers.stride] : 1;
}

// (X, P): the clean latents are X * sample + P * prediction.
std::pair<double, double> clean(Prediction type, double a, double s) {
  switch (type) {
    case Prediction::epsilon: return {1 / a, -s / a};
    case Prediction::v: return {a / (a * a + s * s), -s / std::sqrt(a * a + s * s)};
    default: return {0, 1};
  }
}

Slopes slopes(const DeltaArguments& args, int64_t b) {
  const double a = of(args.alpha, b), s = of(args.sigma, b);
  const double next_a = of(args.next_alpha, b), next_s = of(args.next_sigma, b);
  const double strength = args.strength * of(args.strengths, b);
  Slopes found{-strength, strength, 0, 1, 0, args.guidance * of(args.guidances, b)};
  const auto [type_t, type_s, type_a] = args.types;
  const auto [x_t, p_t] = clean(type_t, a, s);
  if (type_t != type_s || type_t != type_a) {
    const auto [x_s, p_s] = clean(type_s, a, s);
    const auto [x_a, p_a] = clean(type_a, a, s);
    found.to_source = -strength * (p_s / p_t);
    found.to_adapted = strength * (p_a / p_t);
    found.to_state = strength * ((x_a - x_s) / p_t);
  }
  if (args.output == Output::x0) {
    found.to_p = p_t;
    found.to_sample = x_t;
  } else if (args.output == Output::next) {
    const bool noise = type_t == Prediction::epsilon;  // what is predicted
    found.to_p = next_a * p_t + next_s * (noise ? 1 : -a * p_t / s);
    found.to_sample = next_a * x_t + next_s * (noise ? 0 : (1 - a * x_t) / s);
  }
  return found;
}

// A run of values that lie evenly in every tensor: in sample b, count of the innermost axis.
struct Run {
  int64_t b, row, first, count;
};

// Rows of the innermost axis, by the sizes of the outer ones.
int64_t rows_of(const DeltaArguments& args) {
  int64_t rows = 1;
  for (size_t axis = 0; axis + 1 < args.sizes.size(); ++axis) rows *= args.sizes[axis];
  return rows;
}

// The tensor's values of a run, as points with one coordinate.
Points at(const DeltaArguments& args, const Values& values, const Run& run) {
  int64_t offset = run.b * values.batch_stride, row = run.row;
  for (size_t axis = args.sizes.size() - 1; axis-- > 0;) {
    offset += row % args.sizes[axis] * values.strides[axis];
    row /= args.sizes[axis];
  }
  const int64_t step = values.strides.back();
  offset += run.first * step;
  const int64_t bytes = values.format == Format::float64   ? 8
                        : values.format == Format::float32 ? 4
                                                           : 2;
  return {static_cast<char*>(values.data) + offset * bytes, values.format, 1, run.count, 1,
          {0, step, 1}};
}

template <typename Real>
const Real* read(const DeltaArguments& args, const Values& values, const Run& run, Real* buffer) {
  load(at(args, values, run), 0, 0, run.count, run.count, buffer);
  return buffer;
}

template <typename Real>
void write(const DeltaArguments& args, const Values& values, const Run& run, const Real* buffer) {
  store(at(args, values, run), 0, 0, run.count, run.count, buffer);
}

// value += factor * other
template <typename Real>
SDCORE_CLONES void add(Real* value, Real factor, const Real* other, int64_t count) {
  for (int64_t i = 0; i < count; ++i) value[i] += factor * other[i];
}

// value += factor * (other - another): of equal ones nothing.
template <typename Real>
SDCORE_CLONES void add_difference(Real* value, Real factor, const Real* other, const Real* another,
                                  int64_t count) {
  for (int64_t i = 0; i < count; ++i) value[i] += factor * (other[i] - another[i]);
}

// value = u + guidance * (value - u)
template <typename Real>
SDCORE_CLONES void guide(Real* value, Real guidance, const Real* u, int64_t count) {
  for (int64_t i = 0; i < count; ++i) value[i] = u[i] + guidance * (value[i] - u[i]);
}

template <typename Real>
SDCORE_CLONES void scale(Real* value, Real factor, int64_t count) {
  for (int64_t i = 0; i < count; ++i) value[i] *= factor;
}

template <typename Real>
SDCORE_CLONES void scaled(Real* out, Real factor, const Real* value, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = factor * value[i];
}

// One branch, its side being 0 or 1.
template <typename Real>
void branch(const DeltaArguments& args, const Slopes& by, const Run& run, int side, Real* value) {
  Real other[kBlock], another[kBlock];
  read(args, args.parts[kTarget + side], run, value);
  if (!args.parts[kSource + side].data) return;
  read(args, args.parts[kSource + side], run, other);
  read(args, args.parts[kAdapted + side], run, another);
  if (!args.parts[kState].data) {
    add_difference(value, Real(by.to_adapted), another, other, run.count);
    return;
  }
  add(value, Real(by.to_source), other, run.count);
  add(value, Real(by.to_adapted), another, run.count);
  add(value, Real(by.to_state), read(args, args.parts[kState], run, other), run.count);
}

// Calls task(run, number of the task) for all values of a sample, in blocks.
template <typename Task>
void for_runs(const DeltaArguments& args, int64_t b, int64_t task, const Task& body) {
  const int64_t inner = args.sizes.back(), rows = rows_of(args);
  if (inner >= kTaskValues) {
    const int64_t parts = ceil_div(inner, kTaskValues), row = task / parts;
    const int64_t end = std::min(inner, (task % parts + 1) * kTaskValues);
    for (int64_t first = task % parts * kTaskValues; first < end; first += kBlock)
      body(Run{b, row, first, std::min(kBlock, end - first)});
    return;
  }
  const int64_t each = kTaskValues / inner;
  for (int64_t row = task * each; row < std::min(rows, (task + 1) * each); ++row)
    for (int64_t first = 0; first < inner; first += kBlock)
      body(Run{b, row, first, std::min(kBlock, inner - first)});
}

int64_t tasks_of(const DeltaArguments& args) {
  const int64_t inner = args.sizes.back(), rows = rows_of(args);
  if (inner >= kTaskValues) return rows * ceil_div(inner, kTaskValues);
  return ceil_div(rows, kTaskValues / inner);
}

// Number, mean, and squares of what values are off it.
struct Moments {
  double count = 0, mean = 0, square = 0;

  void add(const Moments& more) {
    if (more.count == 0) return;
    const double total = count + more.count, gap = more.mean - mean;
    square += more.square + gap * gap * count * more.count / total;
    mean += gap * more.count / total;
    count = total;
  }

  template <typename Real>
  void add(const Real* values, int64_t number) {
    Moments more;
    more.count = double(number);
    for (int64_t i = 0; i < number; ++i) more.mean += values[i];
    more.mean /= more.count;
    for (int64_t i = 0; i < number; ++i)
      more.square += (values[i] - more.mean) * (values[i] - more.mean);
    add(more);
  }
};

// By what each sample's guided prediction is multiplied.
template <typename Real>
std::vector<double> rescaling(const DeltaArguments& args, int64_t tasks) {
  std::vector<std::array<Moments, 2>> parts(args.batch * tasks);
  parallel_for(args.batch * tasks, args.threads, [&](int64_t task) {
    const int64_t b = task / tasks;
    const Slopes by = slopes(args, b);
    for_runs(args, b, task % tasks, [&](const Run& run) {
      Real c[kBlock], u[kBlock];
      branch(args, by, run, 0, c);
      parts[task][0].add(c, run.count);
      branch(args, by, run, 1, u);
      guide(c, Real(by.guidance), u, run.count);
      parts[task][1].add(c, run.count);
    });
  });
  std::vector<double> found(args.batch);
  for (int64_t b = 0; b < args.batch; ++b) {
    Moments wanted, there;
    for (int64_t task = b * tasks; task < (b + 1) * tasks; ++task) {
      wanted.add(parts[task][0]);
      there.add(parts[task][1]);
    }
    found[b] = args.rescale * std::sqrt(wanted.square / there.square) + (1 - args.rescale);
  }
  return found;
}

template <typename Real>
void combine(const DeltaArguments& args) {
  const int64_t tasks = tasks_of(args);
  std::vector<double> factors;
  if (args.rescale != 0) factors = rescaling<Real>(args, tasks);
  parallel_for(args.batch * tasks, args.threads, [&](int64_t task) {
    const int64_t b = task / tasks;
    const Slopes by = slopes(args, b);
    for_runs(args, b, task % tasks, [&](const Run& run) {
      Real c[kBlock], u[kBlock], sample[kBlock];
      const bool steps = args.output != Output::prediction;
      if (steps) read(args, args.parts[kSample], run, sample);
      const auto finish = [&](Real* value, const Values& out) {
        if (steps) {
          scale(value, Real(by.to_p), run.count);
          add(value, Real(by.to_sample), sample, run.count);
        }
        write(args, out, run, value);
      };
      branch(args, by, run, 0, c);
      if (args.parts[kTargetU].data) {
        branch(args, by, run, 1, u);
        if (args.guided)
          guide(c, Real(by.guidance), u, run.count);
        else
          finish(u, args.out_u);
      }
      if (!factors.empty()) scale(c, Real(factors[b]), run.count);
      finish(c, args.out);
    });
  });
}

template <typename Real>
void combine_backward(const DeltaArguments& args) {
  const int64_t tasks = tasks_of(args);
  parallel_for(args.batch * tasks, args.threads, [&](int64_t task) {
    const int64_t b = task / tasks;
    const Slopes by = slopes(args, b);
    for_runs(args, b, task % tasks, [&](const Run& run) {
      Real c[kBlock], u[kBlock], out[kBlock];
      read(args, args.out, run, c);
      if (args.out_u.data)
        read(args, args.out_u, run, u);
      else
        std::fill(u, u + run.count, Real(0));
      const auto put = [&](Which which, double factor, const Real* value) {
        if (!args.parts[which].data) return;
        scaled(out, Real(factor), value, run.count);
        write(args, args.parts[which], run, out);
      };
      if (args.parts[kSample].data) {
        scaled(out, Real(by.to_sample), c, run.count);
        add(out, Real(by.to_sample), u, run.count);
        write(args, args.parts[kSample], run, out);
      }
      const double for_u = args.guided ? (1 - by.guidance) * by.to_p : by.to_p;
      const double for_c = args.guided ? by.guidance * by.to_p : by.to_p;
      const Real* grad_u = args.guided ? c : u;
      put(kTarget, for_c, c);
      put(kTargetU, for_u, grad_u);
      put(kSource, for_c * by.to_source, c);
      put(kSourceU, for_u * by.to_source, grad_u);
      put(kAdapted, for_c * by.to_adapted, c);
      put(kAdaptedU, for_u * by.to_adapted, grad_u);
      if (args.guided) {  // where both have a delta, the sum of their weights, which cancel
        put(kState, (args.delta_u ? 1 : by.guidance) * by.to_p * by.to_state, c);
      } else {
        if (args.delta_u) add(c, Real(1), u, run.count);
        put(kState, for_c * by.to_state, c);
      }
    });
  });
}

bool in_double(const DeltaArguments& args) { return args.out.format == Format::float64; }

}  // namespace

void delta_combine(const DeltaArguments& args) {
  in_double(args) ? combine<double>(args) : combine<float>(args);
}

void delta_combine_backward(const DeltaArguments& args) {
  in_double(args) ? combine_backward<double>(args) : combine_backward<float>(args);
}

}  // namespace sdcore
