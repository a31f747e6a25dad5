// The flow of one field and its gradient: the closed form of cpab.flow_with_slope, four points at a time. Plain C++.
//
// A trajectory is its first, partial cell, one search on a clock that shows the crossing times of whole cells, and its
// last, partial cell. Its gradient goes the same way back, and into the sums of the clock: O(1) a point, too.

#pragma once

#include "vectors.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

namespace ditac {

const double kAtRest = std::sqrt(std::numeric_limits<double>::min());
const double kLargestGrowth = std::log(std::numeric_limits<double>::max()) - 1;

// A polynomial and its derivative, from the highest coefficient down.
template <int n>
INLINE std::pair<Real, Real> polynomial(const double (&coefficients)[n], Real x) {
  Real value = all(coefficients[0]), derivative = Real{};
  for (int i = 1; i < n; ++i) {
    derivative = derivative * x + value;
    value = value * x + coefficients[i];
  }
  return {value, derivative};
}

// distance * log(exit_speed / speed) / (exit_speed - speed), and its derivatives with respect to both speeds.
struct Crossing {
  Real time, by_speed, by_exit_speed;
};

INLINE Crossing cross(Real distance, Real speed, Real exit_speed) {
  // log(exit_speed / speed) = k log 2 + 2 artanh(ratio), where |ratio| <= 0.172; where k = 0 the ratio cancels.
  constexpr double terms[] = {
      1.0 / 19, 1.0 / 17, 1.0 / 15, 1.0 / 13, 1.0 / 11, 1.0 / 9, 1.0 / 7, 1.0 / 5, 1.0 / 3, 1.0};
  const Whole k = nearest_exponent(exit_speed / speed);
  const Real scaled = speed * power_of_two(k), total = exit_speed + scaled, ratio = (exit_speed - scaled) / total;
  const auto [series, by_square] = polynomial(terms, ratio * ratio);  // artanh(ratio) / ratio
  const Real scale = 2 * distance / total, over = scale / total, slope = 2 * ratio * by_square;
  const Real difference = exit_speed - speed;
  const Real time = distance * (2 * ratio * series + real_of(k) * M_LN2) / difference;
  const Whole near = k == 0;
  return {
      near ? scale * series : time,
      near ? over * (-series - 2 * exit_speed / total * slope) : (time - distance / speed) / difference,
      near ? over * (-series + 2 * speed / total * slope) : (distance / exit_speed - time) / difference};
}

// Integral of exp(slope * t) over the duration, its derivative with respect to slope, and exp(slope * duration).
struct Growth {
  Real integral, by_slope, factor;
};

INLINE Growth grow(Real slope, Real duration) {
  // exp(z) = 2^k exp(rest), |rest| <= 0.347.
  constexpr double terms[] = {  // of (exp(rest) - 1) / rest
      1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
      1.0 / 720,        1.0 / 120,       1.0 / 24,       1.0 / 6,       1.0 / 2,      1.0};
  constexpr double ln2_high = 0x1.62e42fee00000p-1, ln2_low = 0x1.a39ef35793c76p-33;
  const Real z = at_least(at_most(slope * duration, kLargestGrowth), -kLargestGrowth);
  const Real rounded = z * M_LOG2E + kRound, whole = rounded - kRound;
  const Whole k = whole_in(rounded);
  const Real rest = (z - whole * ln2_high) - whole * ln2_low;
  const auto [series, by_rest] = polynomial(terms, rest);
  const Real power = power_of_two(k), factor = power + power * (rest * series);
  const Whole near = k == 0;
  return {
      near ? duration * series : (factor - 1) / slope,
      near ? duration * duration * by_rest : (factor * (z - 1) + 1) / (slope * slope), factor};
}

// A field, and the clock that a trajectory's crossings of whole cells are read from.
struct Field {
  double width;
  int64_t cells;
  std::vector<double> velocities, knots, slopes, clock;
  std::vector<double> by_speed, by_exit_speed;             // derivatives of each cell's crossing time; 0 if none crosses
  std::vector<double> integral, integral_by_slope, factor;  // growth in each cell for trajectories that stay in it

  Field(std::vector<double> velocities_, double a, double b)
      : cells(static_cast<int64_t>(velocities_.size()) - 1), velocities(std::move(velocities_)) {
    width = (b - a) / static_cast<double>(cells);
    for (int64_t k = 0; k <= cells; ++k) knots.push_back(k == cells ? b : a + width * static_cast<double>(k));
    clock.push_back(0.0);
    for (int64_t begin = 0; begin < cells; begin += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, cells - begin);
      Real left = Real{}, right = Real{};
      for (int64_t i = 0; i < count; ++i) left[i] = velocities[begin + i], right[i] = velocities[begin + i + 1];
      const Real slope = (right - left) / width;
      const Growth growth = grow(slope, all(1.0));
      const Crossing crossing = cross(all(width), magnitude(left), magnitude(right));
      const Whole crossed = (left * right > 0) & (magnitude(left) > kAtRest) & (magnitude(right) > kAtRest) &
          (crossing.time < 2);
      for (int64_t i = 0; i < count; ++i) {
        slopes.push_back(slope[i]);
        integral.push_back(growth.integral[i]);
        integral_by_slope.push_back(growth.by_slope[i]);
        factor.push_back(growth.factor[i]);
        by_speed.push_back(crossed[i] ? crossing.by_speed[i] : 0.0);
        by_exit_speed.push_back(crossed[i] ? crossing.by_exit_speed[i] : 0.0);
        clock.push_back(clock.back() + (crossed[i] ? crossing.time[i] : 2.0));  // longer than the time there is
      }
    }
  }
};

// Gradients with respect to a field's parts, summed over nodes.
struct FieldGradient {
  std::vector<double> velocities, slopes, clock;
  explicit FieldGradient(int64_t cells) : velocities(cells + 1, 0.0), slopes(cells, 0.0), clock(cells + 1, 0.0) {}

  void add(const FieldGradient& other) {
    for (size_t i = 0; i < velocities.size(); ++i) velocities[i] += other.velocities[i];
    for (size_t i = 0; i < slopes.size(); ++i) slopes[i] += other.slopes[i];
    for (size_t i = 0; i < clock.size(); ++i) clock[i] += other.clock[i];
  }

  // All of it as the gradient of the velocities.
  const std::vector<double>& of_velocities(const Field& field) {
    double later = 0.0;
    for (int64_t cell = field.cells - 1; cell >= 0; --cell) {
      later += clock[cell + 1];
      const double sign = field.velocities[cell] > 0 ? 1.0 : -1.0;
      velocities[cell] += sign * later * field.by_speed[cell] - slopes[cell] / field.width;
      velocities[cell + 1] += sign * later * field.by_exit_speed[cell] + slopes[cell] / field.width;
    }
    return velocities;
  }
};

// The flow from four points of one cell for a unit of time, forward and, given gradients of its two results, backward.
struct Trajectory {
  const Field& field;
  int64_t cell;
  Real x, velocity, y, slope;
  Whole exits;  // which leave the cell; for all others, what follows means nothing
  Real direction, duration, entry, last_slope;
  Whole exit_knot, last, entry_knot;
  Crossing first;
  Growth growth;

  INLINE Trajectory(const Field& f, int64_t cell_, Real x_) : field(f), cell(cell_), x(x_) {
    const double left = f.velocities[cell], right = f.velocities[cell + 1];
    velocity = (left * (f.knots[cell + 1] - x) + right * (x - f.knots[cell])) / f.width;
    y = x + velocity * f.integral[cell];
    slope = all(f.factor[cell]);
    const Whole moving_right = velocity > 0, moving_left = ~moving_right;
    const bool way_left = left < -kAtRest && cell > 0, way_right = right > kAtRest && cell + 1 < f.cells;
    exits = magnitude(velocity) > kAtRest;
    exits &= (moving_right & -int64_t{way_right}) | (moving_left & -int64_t{way_left});
    if (!any(exits)) return;
    const Real distance = moving_right ? f.knots[cell + 1] - x : x - f.knots[cell];
    first = cross(distance, magnitude(velocity), moving_right ? all(std::abs(right)) : all(std::abs(left)));
    exits &= first.time < 1;
    if (!any(exits)) return;
    direction = moving_right ? all(1.0) : all(-1.0);
    exit_knot = cell - moving_right;
    const Real end = (moving_right ? all(f.clock[cell + 1]) : all(f.clock[cell])) + direction * (1 - first.time);
    last = Whole{} - 1;
    for (int64_t k = 0; k <= f.cells; ++k) last -= f.clock[k] <= end;
    const Whole nearest = exit_knot + moving_left;  // the cell beyond the exit
    last = moving_right ? (last > nearest ? last : nearest) : (last < nearest ? last : nearest);
    last = last < 0 ? Whole{} : last;
    last = last >= f.cells ? Whole{} + (f.cells - 1) : last;
    entry_knot = last - moving_left;
    duration = direction * (end - gather(f.clock.data(), entry_knot));
    last_slope = gather(f.slopes.data(), last);
    entry = gather(f.velocities.data(), entry_knot);
    growth = grow(last_slope, duration);
    y = exits ? gather(f.knots.data(), entry_knot) + entry * growth.integral : y;
    slope = exits ? growth.factor * entry / velocity : slope;
  }

  INLINE void backward(Real grad_y, Real grad_slope, FieldGradient& out) const {
    const Real no = Real{};
    Real grad_velocity = grad_y * field.integral[cell];
    const Real grad_growth = field.slopes[cell] < kLargestGrowth ? grad_slope * slope : no;  // else it is held
    const Real grad_own_slope = grad_y * velocity * field.integral_by_slope[cell] + grad_growth;
    if (!any(exits)) {
      out.slopes[cell] += sum(grad_own_slope);
    } else {
      const Real grad_growth = last_slope * duration < kLargestGrowth ? grad_slope * slope : no;
      const Real grad_duration = direction * (grad_y * entry * growth.factor + grad_growth * last_slope);
      const Real grad_entry = grad_y * growth.integral + grad_slope * slope / entry;
      const Real grad_last_slope = grad_y * entry * growth.by_slope + grad_growth * duration;
      const Real grad_exit = grad_duration * first.by_exit_speed;
      grad_velocity = exits ? -grad_duration * first.by_speed - grad_slope * slope / velocity : grad_velocity;
      out.slopes[cell] += sum(exits ? no : grad_own_slope);
      for (int i = 0; i < kLanes; ++i) {
        if (!exits[i]) continue;
        out.velocities[entry_knot[i]] += grad_entry[i];
        out.slopes[last[i]] += grad_last_slope[i];
        out.clock[exit_knot[i]] += grad_duration[i];
        out.clock[entry_knot[i]] -= grad_duration[i];
        out.velocities[exit_knot[i]] -= grad_exit[i];
      }
    }
    const Real share = (x - field.knots[cell]) / field.width;
    out.velocities[cell] += sum(grad_velocity * (1 - share));
    out.velocities[cell + 1] += sum(grad_velocity * share);
  }
};

}  // namespace ditac
