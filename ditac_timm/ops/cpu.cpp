// The operators for the CPU. reference.py defines what they compute and how tables are laid out; cpu.py builds this.
//
// A lookup is one 8-byte load of (intercept, slope) and one multiply-add an element. The lines lie in the first-level
// cache. Eight scalar loads beat a gather instruction (0.43 against 0.97 ns an element on Zen 3), so vectors are taken
// apart for them and put together again. The vectors are the compiler's (GCC and Clang on any processor), in a lookup
// eight lanes everywhere, and the last few elements go through the same code in a padded buffer: no result depends on
// where an element lies.
//
// The gradient of the table is a histogram of g and g * (position within the bin), in float64, one for each thread,
// added up in the order of threads: equal runs with as many threads give equal bits.

#include "flow.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

namespace {

using at::Tensor;
using ditac::Field;
using ditac::FieldGradient;
using ditac::Real;
using ditac::Trajectory;
using ditac::kLanes;
template <typename T>
using Vec = ditac::Vec<T, 8>;
using Settings = std::tuple<std::string, double, double, int64_t>;  // version, a, b, bins
using Domain = at::ArrayRef<double>;

// --- Vectors of eight -------------------------------------------------------------------------------------------------

template <typename A, typename X>
INLINE Vec<A> load(const X* from) {
  Vec<A> out;
  if constexpr (std::is_same_v<A, X>) {
    std::memcpy(&out, from, sizeof(out));
  } else if constexpr (std::is_same_v<A, float> && std::is_same_v<X, at::BFloat16>) {
    Vec<uint16_t> upper;
    std::memcpy(&upper, from, sizeof(upper));
    out = (Vec<float>)(__builtin_convertvector(upper, Vec<uint32_t>) << 16);
  } else {
    for (int i = 0; i < 8; ++i) out[i] = static_cast<A>(from[i]);
  }
  return out;
}

template <typename A, typename X>
INLINE void store(X* to, Vec<A> values) {
  if constexpr (std::is_same_v<A, X>) {
    std::memcpy(to, &values, sizeof(values));
  } else if constexpr (std::is_same_v<A, float> && std::is_same_v<X, at::BFloat16>) {
    const Vec<uint32_t> bits = (Vec<uint32_t>)values;
    Vec<uint32_t> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    rounded = values == values ? rounded : Vec<uint32_t>{} + 0x7fc0;
    const auto upper = __builtin_convertvector(rounded, Vec<uint16_t>);
    std::memcpy(to, &upper, sizeof(upper));
  } else {
    for (int i = 0; i < 8; ++i) to[i] = static_cast<X>(values[i]);
  }
}

// --- Tables -----------------------------------------------------------------------------------------------------------

// Where a table's rows lie, as reference.Layout: a row is a bin, the first and the last are all beyond the nodes.
struct Layout {
  int64_t left, bins, right, rows, nodes;
  double width, low, high;
  double origin, offset;  // position = (x - origin) / width + offset, exact at a where `leaky` jumps

  Layout(std::string_view version, double a, double b, int64_t bins_on_domain) : bins(bins_on_domain) {
    constexpr double reach = 6.0;  // of GELU, as reference._GELU_REACH
    width = (b - a) / static_cast<double>(bins);
    const auto pieces = [&](double distance) {
      return std::max<int64_t>(static_cast<int64_t>(std::ceil(distance / width - 1e-9)), 0);
    };
    left = version == "ditac" || version == "ge" ? pieces(a + reach) : 0;
    right = version == "ditac" ? pieces(reach - b) : 0;
    low = a - static_cast<double>(left) * width;
    high = b + static_cast<double>(right) * width;
    origin = left ? 0.0 : low;
    offset = left ? 1 - low / width : 1.0;
    rows = left + bins + right + 2;
    nodes = left + bins + right + 3;
  }

  int64_t node(int64_t bin) const {  // left node of a bin; a and b stand twice
    return bin + (bin >= left) + (bin >= left + bins);
  }
};

template <typename A>
struct Line {
  A intercept, slope;
};

// Of each row, the straight line of the activation in x, or that of its derivative in the position, which is finite.
template <typename A>
std::unique_ptr<Line<A>[]> make_lines(const A* table, const Layout& at, bool derivative) {
  std::unique_ptr<Line<A>[]> lines(new Line<A>[at.rows]);
  const A* values = table + (derivative ? at.nodes : 0);
  const A step = derivative ? A(1) : static_cast<A>(at.width), begin = derivative ? A(1) : static_cast<A>(at.low);
  const int64_t ends[] = {0, at.left, at.left + at.bins, at.left + at.bins + at.right};
  for (int piece = 0; piece < 3; ++piece) {  // a and b stand twice
    const A* node = values + piece;
    for (int32_t bin = static_cast<int32_t>(ends[piece]); bin < ends[piece + 1]; ++bin) {
      const A slope = (node[bin + 1] - node[bin]) / step;
      lines[bin + 1] = {node[bin] - slope * (static_cast<A>(bin) * step + begin), slope};
    }
  }
  const A *slopes = table + at.nodes, first = slopes[0], last = slopes[at.nodes - 1];
  lines[0] = derivative ? Line<A>{first, 0} : Line<A>{table[0] - first * begin, first};
  lines[at.rows - 1] =
      derivative ? Line<A>{last, 0} : Line<A>{table[at.nodes - 1] - last * static_cast<A>(at.high), last};
  return lines;
}

// Eight positions in bins, their rows (also one by one), and the rows' lines. NaN goes to the first or the last row.
template <typename A>
struct Found {
  Vec<A> position, intercept, slope;
  Vec<int32_t> row;
  uint32_t rows[8];
};

template <typename A>
INLINE Vec<A> keep_within(Vec<A> position, A last) {  // NaN stays
  const Vec<A> zero = Vec<A>{}, kept = position < zero ? zero : position;
  return kept > last ? zero + last : kept;
}

template <typename A>
INLINE Found<A> find(Vec<A> x, const Line<A>* lines, A origin, A scale, A offset, A last) {
  Found<A> found;
  found.position = (x - origin) * scale + offset;
  if constexpr (std::is_same_v<A, float>) {
    // Bits of floats that are not negative are in the order of the floats, and negative ones are negative; so whole
    // numbers are compared, which takes one instruction where floats and their NaN take two.
    Vec<int32_t> bits = (Vec<int32_t>)found.position;
    const Vec<int32_t> most = (Vec<int32_t>)(Vec<float>{} + last), zero = {};
    bits = bits < most ? bits : most;
    bits = bits > zero ? bits : zero;
    found.row = __builtin_convertvector((Vec<float>)bits, Vec<int32_t>);
    typedef uint64_t Four __attribute__((vector_size(32)));
    for (int i = 0; i < 4; ++i) {  // two at a time
      const uint64_t two = ((Four)found.row)[i];
      found.rows[2 * i] = static_cast<uint32_t>(two), found.rows[2 * i + 1] = two >> 32;
    }
    typedef double Pairs __attribute__((vector_size(32)));
    typedef double Pair __attribute__((may_alias));  // moved, never used as a number
    const auto pair = [&](int i) INLINE_LAMBDA { return reinterpret_cast<const Pair*>(lines)[found.rows[i]]; };
    const Vec<float> a = (Vec<float>)Pairs{pair(0), pair(1), pair(4), pair(5)};
    const Vec<float> b = (Vec<float>)Pairs{pair(2), pair(3), pair(6), pair(7)};
#if defined(__clang__) || __GNUC__ >= 12
    found.intercept = __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14);
    found.slope = __builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
#else
    found.intercept = __builtin_shuffle(a, b, Vec<int32_t>{0, 2, 8, 10, 4, 6, 12, 14});
    found.slope = __builtin_shuffle(a, b, Vec<int32_t>{1, 3, 9, 11, 5, 7, 13, 15});
#endif
  } else {
    found.row = __builtin_convertvector(keep_within(found.position, last), Vec<int32_t>);
    found.row = found.row > 0 ? found.row : Vec<int32_t>{};  // what a NaN becomes depends on the processor
    for (int i = 0; i < 8; ++i) {
      found.rows[i] = found.row[i];
      found.intercept[i] = lines[found.rows[i]].intercept;
      found.slope[i] = lines[found.rows[i]].slope;
    }
  }
  return found;
}

// --- Lookup -----------------------------------------------------------------------------------------------------------

constexpr int64_t kGrain = 8192;  // elements that are worth another thread

// Divides [0, size) among at most as many tasks as there are threads, in multiples of `unit`; returns how many there are.
template <typename F>
int64_t divide(int64_t size, int64_t grain, int64_t unit, const F& task) {
  const int64_t tasks = std::max<int64_t>(std::min<int64_t>(at::get_num_threads(), (size + grain - 1) / grain), 1);
  const int64_t share = (size / tasks + unit - 1) / unit * unit;
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t from = std::min(i * share, size);
      task(i, from, i + 1 == tasks ? size : std::min(from + share, size));
    }
  });
  return tasks;
}

// A tensor in the dtype and layout of another; copied where it has not got them.
Tensor laid_out(const Tensor& tensor, const Tensor& like) {
  if (tensor.scalar_type() == like.scalar_type() && tensor.strides() == like.strides()) return tensor;
  return at::empty_like(like).copy_(tensor);
}

template <typename A, typename X>
void lookup_span(
    const X* x, X* y, int64_t size, const Line<A>* lines, const Layout& at, A least) {
  const A origin = static_cast<A>(at.origin), scale = static_cast<A>(1 / at.width), offset = static_cast<A>(at.offset);
  const A last = static_cast<A>(at.rows - 1);
  const auto eight = [&](const X* from, X* to) INLINE_LAMBDA {
    const Vec<A> value = load<A>(from);
    const Found<A> found = find<A>(value, lines, origin, scale, offset, last);
    const Vec<A> kept = value < least ? Vec<A>{} + least : value;  // -inf times a slope of 0 would be NaN
    store<A>(to, found.slope * kept + found.intercept);
  };
  int64_t i = 0;
  for (; i + 8 <= size; i += 8) eight(x + i, y + i);
  if (i < size) {
    X from[8] = {}, to[8];
    std::copy(x + i, x + size, from);
    eight(from, to);
    std::copy(to, to + (size - i), y + i);
  }
}

template <typename A, typename X, bool need_x, bool need_table>
void backward_span(
    const X* grad, const X* x, X* grad_x, int64_t size, const Line<A>* lines, const Layout& at,
    double* sums) {
  const A origin = static_cast<A>(at.origin), scale = static_cast<A>(1 / at.width), offset = static_cast<A>(at.offset);
  const A last = static_cast<A>(at.rows - 1);
  typedef double Two __attribute__((vector_size(16), may_alias));
  const auto eight = [&](const X* from_grad, const X* from, X* to) INLINE_LAMBDA {
    const Vec<A> g = load<A>(from_grad), value = load<A>(from);
    const Found<A> found = find<A>(value, lines, origin, scale, offset, last);
    if constexpr (need_x) {
      store<A>(to, (found.slope * keep_within(found.position, last) + found.intercept) * g);
    }
    if constexpr (need_table) {
      const Vec<A> weighted = g * (found.position - __builtin_convertvector(found.row, Vec<A>));
      const auto add = [&](int i, Two pair) INLINE_LAMBDA {
        Two* bin = reinterpret_cast<Two*>(sums) + found.rows[i];
        *bin += pair;
      };
      const Vec<double> totals = __builtin_convertvector(g, Vec<double>);
      const Vec<double> moments = __builtin_convertvector(weighted, Vec<double>);
      add(0, Two{totals[0], moments[0]}), add(1, Two{totals[1], moments[1]});
      add(2, Two{totals[2], moments[2]}), add(3, Two{totals[3], moments[3]});
      add(4, Two{totals[4], moments[4]}), add(5, Two{totals[5], moments[5]});
      add(6, Two{totals[6], moments[6]}), add(7, Two{totals[7], moments[7]});
    }
  };
  int64_t i = 0;
  for (; i + 8 <= size; i += 8) eight(grad + i, x + i, grad_x + i);
  if (i < size) {
    X from_grad[8] = {}, from[8] = {}, to[8];  // a gradient of 0 adds nothing to any bin
    std::copy(grad + i, grad + size, from_grad);
    std::copy(x + i, x + size, from);
    eight(from_grad, from, to);
    if constexpr (need_x) std::copy(to, to + (size - i), grad_x + i);
  }
}

// From the sums of g and g * position, per row, to the gradient of the table; as reference._node_gradient.
template <typename A>
void node_gradient(const double* sums, const Layout& at, A* out) {
  std::vector<double> values(at.nodes, 0.0);
  for (int64_t bin = 0; bin < at.rows - 2; ++bin) {
    const double total = sums[2 * (bin + 1)], weighted = sums[2 * (bin + 1) + 1];
    values[at.node(bin)] += total - weighted;
    values[at.node(bin) + 1] += weighted;
  }
  const double *first = sums, *last = sums + 2 * (at.rows - 1);
  values[0] += first[0];
  values[at.nodes - 1] += last[0];
  for (int64_t node = 0; node < at.nodes; ++node) out[node] = static_cast<A>(values[node]);
  std::fill(out + at.nodes, out + 2 * at.nodes, A(0));
  out[at.nodes] = static_cast<A>((first[1] - first[0]) * at.width);  // counted from one bin before the first node
  out[2 * at.nodes - 1] += static_cast<A>(last[1] * at.width);
}

// The dtype that x is read in: its own, unless that is one of float32 and float64 and the table is of the other.
at::ScalarType readable(const Tensor& x, const Tensor& table) {
  const auto dtype = x.scalar_type();
  const bool narrow = dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
  TORCH_CHECK_VALUE(
      narrow || dtype == at::kDouble, "x must be float64, float32, float16 or bfloat16, but is ", dtype, ".");
  return narrow == (table.scalar_type() == at::kFloat) ? dtype : table.scalar_type();
}

// Calls f with a value of the table's type, and one of x's.
template <typename F>
void for_dtypes(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case at::kDouble: return f(double{}, double{});
    case at::kFloat: return f(float{}, float{});
    case at::kBFloat16: return f(float{}, at::BFloat16{});
    default: return f(float{}, at::Half{});
  }
}

Layout layout_of(const Tensor& table, std::string_view version, Domain domain, int64_t bins) {
  const Layout at(version, domain[0], domain[1], bins);
  TORCH_CHECK_VALUE(
      table.dim() == 2 && table.size(0) == 2 && table.size(1) == at.nodes, "table must have the shape (2, ", at.nodes,
      "), but has ", table.sizes(), ".");
  return at;
}

template <typename A, typename X>
void lookup_in_parallel(const Tensor& x, Tensor& y, const Line<A>* lines, const Layout& at, std::string_view version) {
  const bool ends_in_zero = version == "ditac" || version == "ge";
  const A least = ends_in_zero ? static_cast<A>(at.low - at.width) : -std::numeric_limits<A>::infinity();
  const X* in = x.const_data_ptr<X>();
  X* out = y.mutable_data_ptr<X>();
  divide(x.numel(), kGrain, 8, [&](int64_t, int64_t begin, int64_t end) {
    lookup_span<A, X>(in + begin, out + begin, end - begin, lines, at, least);
  });
}

Tensor lookup(const Tensor& x, const Tensor& table, std::string_view version, Domain domain, int64_t bins) {
  const Layout at = layout_of(table, version, domain, bins);
  Tensor y = at::empty_like(x, x.options().dtype(readable(x, table)));
  const Tensor from = laid_out(x, y), rows = table.contiguous();
  for_dtypes(y, [&](auto table_type, auto x_type) {
    using A = decltype(table_type);
    const auto lines = make_lines<A>(rows.const_data_ptr<A>(), at, false);
    lookup_in_parallel<A, decltype(x_type)>(from, y, lines.get(), at, version);
  });
  return y.to(x.scalar_type());
}

std::tuple<Tensor, Tensor> lookup_backward(
    const Tensor& grad, const Tensor& x, const Tensor& table, std::string_view version, Domain domain, int64_t bins,
    bool need_x, bool need_table) {
  const Layout at = layout_of(table, version, domain, bins);
  Tensor grad_x = at::empty_like(x, x.options().dtype(readable(x, table)));
  Tensor grad_table = need_table ? at::empty({2, at.nodes}, table.options()) : at::empty({0}, table.options());
  const Tensor from = laid_out(x, grad_x), from_grad = laid_out(grad, grad_x), rows = table.contiguous();
  for_dtypes(grad_x, [&](auto table_type, auto x_type) {
    using A = decltype(table_type);
    using X = decltype(x_type);
    const auto lines = make_lines<A>(rows.const_data_ptr<A>(), at, true);
    const auto span = !need_table ? backward_span<A, X, true, false>
                      : need_x    ? backward_span<A, X, true, true>
                                  : backward_span<A, X, false, true>;
    const X *g = from_grad.const_data_ptr<X>(), *in = from.const_data_ptr<X>();
    X* out = grad_x.mutable_data_ptr<X>();
    std::vector<std::vector<double>> sums(need_table ? at::get_num_threads() : 0);
    const int64_t tasks = divide(x.numel(), kGrain, 8, [&](int64_t task, int64_t begin, int64_t end) {
      if (need_table) sums[task].assign(2 * at.rows, 0.0);
      span(g + begin, in + begin, out + begin, end - begin, lines.get(), at, need_table ? sums[task].data() : nullptr);
    });
    if (!need_table) return;
    for (int64_t task = 1; task < tasks; ++task) {
      for (size_t i = 0; i < sums[0].size(); ++i) sums[0][i] += sums[task][i];
    }
    node_gradient<A>(sums[0].data(), at, grad_table.mutable_data_ptr<A>());
  });
  return {need_x ? grad_x.to(x.scalar_type()) : at::empty({0}, x.options()), grad_table};
}

// --- Tabulate ---------------------------------------------------------------------------------------------------------

// What does not depend on the velocities: Phi and phi at the domain's nodes (and some more, so that kLanes can be read
// from each), and all columns outside the domain.
struct Fixed {
  std::vector<double> cdf, pdf;
  std::vector<double> left[2], right[2];
};

double normal_cdf(double x) { return std::erfc(-x * std::sqrt(0.5)) / 2; }
double normal_pdf(double x) { return std::exp(-x * x / 2) / std::sqrt(2 * M_PI); }

std::shared_ptr<const Fixed> fixed_nodes(const Settings& settings) {
  static std::mutex mutex;
  static std::map<Settings, std::shared_ptr<const Fixed>> kept;
  const std::lock_guard<std::mutex> lock(mutex);
  auto& fixed = kept[settings];
  if (fixed) return fixed;
  const auto& [version, a, b, bins] = settings;
  const Layout at(version, a, b, bins);
  auto made = std::make_shared<Fixed>();
  for (int64_t i = 0; i <= bins + kLanes; ++i) {
    const double x = a + at.width * static_cast<double>(i);
    made->cdf.push_back(normal_cdf(x));
    made->pdf.push_back(normal_pdf(x));
  }
  const auto gelu = [](std::vector<double>* columns, double x) {
    columns[0].push_back(x * normal_cdf(x));
    columns[1].push_back(normal_cdf(x) + x * normal_pdf(x));
  };
  for (int64_t i = 0; i <= at.left; ++i) gelu(made->left, at.low + at.width * static_cast<double>(i));
  for (int64_t i = 0; i <= at.right; ++i) gelu(made->right, b + at.width * static_cast<double>(i));
  if (version == "leaky") {
    constexpr double slope = 0.01;  // as reference.LEAKY_SLOPE
    made->left[0] = {slope * a}, made->left[1] = {slope};
    made->right[0] = {b}, made->right[1] = {1.0};
  } else {  // GELU's limits, from where it has reached them
    made->left[0][0] = made->left[1][0] = 0.0;
    made->right[0].back() = at.high, made->right[1].back() = 1.0;
  }
  return fixed = made;
}

constexpr int64_t kNodeGrain = 4096;  // nodes that are worth another thread
constexpr double kLargest = 1e36;     // as reference.LARGEST

// Calls task(number of the task, cell, first node, number of nodes, the nodes) for the domain's nodes, at most kLanes
// neighbours of one cell at a time. Each cell has its left node, the last one b as well. Returns the number of tasks.
template <typename F>
int64_t divide_nodes(const Settings& settings, int64_t cells, const F& task) {
  const double a = std::get<1>(settings), b = std::get<2>(settings);
  const int64_t bins = std::get<3>(settings), share = bins / cells;
  const double width = (b - a) / static_cast<double>(bins);
  const auto node_at = [&](int64_t node) { return node == bins ? b : a + width * static_cast<double>(node); };
  return divide(cells, std::max<int64_t>(kNodeGrain / share, 1), 1, [&](int64_t number, int64_t begin, int64_t end) {
    for (int64_t cell = begin; cell < end; ++cell) {
      const int64_t stop = (cell + 1) * share + (cell + 1 == cells);
      for (int64_t node = cell * share; node < stop; node += kLanes) {
        const int64_t last = std::min(node + kLanes, stop) - 1;
        Real x;
        for (int i = 0; i < kLanes; ++i) x[i] = node_at(std::min(node + i, last));
        task(number, cell, node, last - node + 1, x);
      }
    }
  });
}

INLINE Real load_four(const std::vector<double>& from, int64_t index) {
  Real values;
  std::memcpy(&values, from.data() + index, sizeof(values));
  return values;
}

INLINE void store_some(double* to, Real values, int64_t count) {
  if (count == kLanes) {
    std::memcpy(to, &values, sizeof(values));
  } else {
    std::memcpy(to, &values, count * sizeof(double));
  }
}

INLINE Real load_some(const double* from, int64_t count) {  // zeros beyond them
  Real values = {};
  if (count == kLanes) {
    std::memcpy(&values, from, sizeof(values));
  } else {
    std::memcpy(&values, from, count * sizeof(double));
  }
  return values;
}

// In float64, of which a float32 table is a copy: half as much to compile.
void tabulate_into(const Field& field, const Settings& settings, double* out) {
  const auto& [version, a, b, bins] = settings;
  const Layout at(version, a, b, bins);
  const auto fixed = fixed_nodes(settings);
  const bool times_cdf = version == "ditac";
  double *values = out + at.left + 1, *slopes = values + at.nodes;
  divide_nodes(settings, field.cells, [&](int64_t, int64_t cell, int64_t node, int64_t count, Real x) INLINE_LAMBDA {
    const Trajectory flow(field, cell, x);
    Real value = flow.y, slope = flow.slope;
    if (times_cdf) {
      const Real cdf = load_four(fixed->cdf, node), pdf = load_four(fixed->pdf, node);
      slope = slope * cdf + value * pdf;
      value *= cdf;
    }
    store_some(values + node, value, count);
    store_some(slopes + node, ditac::at_most(slope, kLargest), count);
  });
  for (int row = 0; row < 2; ++row) {
    double *middle = row ? slopes : values, *left = middle - at.left - 1, *right = middle + bins + 1;
    if (version == "inf") {
      left[0] = middle[0], right[0] = middle[bins];
    } else {
      std::copy(fixed->left[row].begin(), fixed->left[row].end(), left);
      std::copy(fixed->right[row].begin(), fixed->right[row].end(), right);
    }
  }
}

Tensor make_table(const Field& field, const Settings& settings, const at::TensorOptions& options) {
  const auto& [version, a, b, bins] = settings;
  Tensor table = at::empty({2, Layout(version, a, b, bins).nodes}, options.dtype(at::kDouble));
  tabulate_into(field, settings, table.mutable_data_ptr<double>());
  return table.to(options.dtype().toScalarType());
}

Field field_of(const Tensor& velocities, Domain domain) {
  const Tensor given = velocities.to(at::kDouble).contiguous();
  const double* first = given.const_data_ptr<double>();
  return Field(std::vector<double>(first, first + given.numel()), domain[0], domain[1]);
}

Settings settings_of(std::string_view version, Domain domain, int64_t bins) {
  return {std::string(version), domain[0], domain[1], bins};
}

Tensor tabulate(const Tensor& velocities, std::string_view version, Domain domain, int64_t bins) {
  return make_table(field_of(velocities, domain), settings_of(version, domain, bins), velocities.options());
}

std::vector<double> tabulate_gradient(const double* grad, const Field& field, const Settings& settings) {
  const auto& [version, a, b, bins] = settings;
  const Layout at(version, a, b, bins);
  const auto fixed = fixed_nodes(settings);
  const bool times_cdf = version == "ditac", own_ends = version == "inf";
  const double *by_value = grad + at.left + 1, *by_slope = by_value + at.nodes;
  std::vector<FieldGradient> sums(at::get_num_threads(), FieldGradient(field.cells));
  const int64_t last = bins;
  const int64_t tasks =
      divide_nodes(settings, field.cells, [&](int64_t task, int64_t cell, int64_t node, int64_t count, Real x) INLINE_LAMBDA {
        Real g = load_some(by_value + node, count), g_slope = load_some(by_slope + node, count);
        const auto twin = [&](int64_t lane, int64_t column) {  // these columns stand twice
          g[lane] += by_value[column], g_slope[lane] += by_slope[column];
        };
        if (own_ends && node == 0) twin(0, -1);
        if (own_ends && node + count > last) twin(count - 1, last + 1);
        if (times_cdf) {
          const Real cdf = load_four(fixed->cdf, node), pdf = load_four(fixed->pdf, node);
          g = g * cdf + g_slope * pdf;
          g_slope *= cdf;
        }
        if (ditac::any((g != 0) | (g_slope != 0))) Trajectory(field, cell, x).backward(g, g_slope, sums[task]);
      });
  for (int64_t task = 1; task < tasks; ++task) sums[0].add(sums[task]);
  return sums[0].of_velocities(field);
}

Tensor tabulate_backward(
    const Tensor& grad, const Tensor& velocities, std::string_view version, Domain domain, int64_t bins) {
  const Settings settings = settings_of(version, domain, bins);
  const Field field = field_of(velocities, domain);
  const Tensor given = grad.to(at::kDouble).contiguous();
  const auto total = tabulate_gradient(given.const_data_ptr<double>(), field, settings);
  Tensor out = at::empty({field.cells + 1}, velocities.options().dtype(at::kDouble));
  std::copy(total.begin(), total.end(), out.mutable_data_ptr<double>());
  return out.to(velocities.scalar_type());
}

// Lines of thetas met before. The key holds the values themselves, so nothing here goes stale.
template <typename A>
std::shared_ptr<const Line<A>[]> remembered_lines(
    const Tensor& theta, const Tensor& basis, const Settings& settings, const Layout& at, Domain domain) {
  static constexpr size_t most = 1024;
  static std::mutex mutex;
  static std::unordered_map<std::string, std::shared_ptr<const Line<A>[]>> kept;
  const auto& [version, a, b, bins] = settings;
  std::string key = version;
  const auto append = [&](const void* from, size_t size) { key.append(static_cast<const char*>(from), size); };
  const auto dtype = theta.scalar_type();
  for (const double number : {a, b, static_cast<double>(bins), static_cast<double>(dtype)}) append(&number, 8);
  for (const Tensor& given : {theta.contiguous(), basis.contiguous()}) append(given.const_data_ptr(), given.nbytes());
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = kept.find(key);
    if (found != kept.end()) return found->second;
  }
  const Tensor velocities = theta.to(basis.scalar_type()).unsqueeze(-1).mul(basis).sum(-2);  // as cpab.velocities_in
  const Tensor table = make_table(field_of(velocities, domain), settings, velocities.options());
  std::shared_ptr<const Line<A>[]> lines = make_lines<A>(table.const_data_ptr<A>(), at, false);
  const std::lock_guard<std::mutex> lock(mutex);
  if (kept.size() >= most) kept.clear();
  return kept[key] = lines;
}

// `lookup` in the table of `tabulate`, for calls that need no gradient.
Tensor evaluate(
    const Tensor& x, const Tensor& theta, const Tensor& basis, std::string_view version, Domain domain, int64_t bins) {
  const Settings settings = settings_of(version, domain, bins);
  const Layout at(version, domain[0], domain[1], bins);
  Tensor y = at::empty_like(x, x.options().dtype(readable(x, basis)));
  const Tensor from = laid_out(x, y);
  for_dtypes(y, [&](auto table_type, auto x_type) {
    using A = decltype(table_type);
    const auto lines = remembered_lines<A>(theta, basis, settings, at, domain);
    lookup_in_parallel<A, decltype(x_type)>(from, y, lines.get(), at, version);
  });
  return y.to(x.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(ditac, CPU, m) {
  m.impl("tabulate", tabulate);
  m.impl("tabulate_backward", tabulate_backward);
  m.impl("lookup", lookup);
  m.impl("lookup_backward", lookup_backward);
  m.impl("evaluate", evaluate);
}
