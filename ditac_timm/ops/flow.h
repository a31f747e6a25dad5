// The flow of one field and its gradient: the closed form of cpab.flow_with_slope, a point at a time. Plain C++.
//
// A trajectory is its first, partial cell, one search on a clock that shows the crossing times of whole cells, and its
// last, partial cell. Its gradient goes the same way back, and into the sums of the clock: O(1) a point, too.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

namespace ditac {

const double kAtRest = std::sqrt(std::numeric_limits<double>::min());
const double kLargestGrowth = std::log(std::numeric_limits<double>::max()) - 1;

// distance * log(exit_speed / speed) / (exit_speed - speed), and its derivatives with respect to both speeds.
struct Crossing {
  double time, by_speed, by_exit_speed;
};

inline Crossing cross(double distance, double speed, double exit_speed) {
  const double total = speed + exit_speed, difference = exit_speed - speed, ratio = difference / total;
  if (std::abs(ratio) < 0.02) {  // by a series: artanh(ratio) / ratio, and its derivative
    const double square = ratio * ratio, scale = 2 * distance / total;
    const double series = 1 + square * (1.0 / 3 + square * (1.0 / 5 + square * (1.0 / 7 + square / 9)));
    const double slope = ratio * (2.0 / 3 + square * (4.0 / 5 + square * (6.0 / 7 + square * 8 / 9)));
    const double over = scale / total;
    return {
        scale * series, over * (-series - 2 * exit_speed / total * slope), over * (-series + 2 * speed / total * slope)};
  }
  const double time = distance * std::log(exit_speed / speed) / difference;
  return {time, (time - distance / speed) / difference, (distance / exit_speed - time) / difference};
}

// Integral of exp(slope * t) over the duration, its derivative with respect to slope, and exp(slope * duration).
struct Growth {
  double integral, by_slope, factor;
};

inline Growth grow(double slope, double duration) {
  const double z = std::min(slope * duration, kLargestGrowth), factor = std::exp(z);
  if (std::abs(z) < 0.1) {  // by the series of (e^z - 1) / z, and of its derivative
    constexpr double terms[] = {1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0};
    double value = 0.0, derivative = 0.0;
    for (const double term : terms) {
      derivative = derivative * z + value;
      value = value * z + term;
    }
    return {duration * value, duration * duration * derivative, factor};
  }
  return {(factor - 1) / slope, (factor * (z - 1) + 1) / (slope * slope), factor};
}

// A field, and the clock that a trajectory's crossings of whole cells are read from.
struct Field {
  double width;
  int64_t cells;
  std::vector<double> velocities, knots, slopes, clock;
  std::vector<Crossing> crossings;
  std::vector<Growth> whole;  // of each cell, for trajectories that stay in it
  std::vector<char> crossed;  // cells that some trajectory crosses within the time

  Field(std::vector<double> velocities_, double a, double b)
      : cells(static_cast<int64_t>(velocities_.size()) - 1), velocities(std::move(velocities_)) {
    width = (b - a) / static_cast<double>(cells);
    for (int64_t k = 0; k <= cells; ++k) knots.push_back(k == cells ? b : a + width * static_cast<double>(k));
    clock.push_back(0.0);
    for (int64_t cell = 0; cell < cells; ++cell) {
      const double v = velocities[cell], w = velocities[cell + 1];
      slopes.push_back((w - v) / width);
      whole.push_back(grow(slopes.back(), 1.0));
      Crossing crossing{2.0, 0.0, 0.0};  // longer than the time there is: never left again
      if (v * w > 0 && std::abs(v) > kAtRest && std::abs(w) > kAtRest) {
        crossing = cross(width, std::abs(v), std::abs(w));
      }
      const bool within = crossing.time < 2;
      crossed.push_back(within);
      crossings.push_back(within ? crossing : Crossing{2.0, 0.0, 0.0});
      clock.push_back(clock.back() + crossings.back().time);
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
      if (field.crossed[cell]) {
        const double sign = field.velocities[cell] > 0 ? 1.0 : -1.0;
        velocities[cell] += sign * later * field.crossings[cell].by_speed;
        velocities[cell + 1] += sign * later * field.crossings[cell].by_exit_speed;
      }
      velocities[cell] -= slopes[cell] / field.width;
      velocities[cell + 1] += slopes[cell] / field.width;
    }
    return velocities;
  }
};

// The flow from x in a cell for a unit of time, forward and, given gradients of its two results, backward.
struct Trajectory {
  const Field& field;
  int64_t cell, exit_knot, last, entry_knot;
  double x, velocity, direction, duration;
  Crossing first;
  Growth growth;
  bool exits;
  double y, slope;

  Trajectory(const Field& f, int64_t cell_, double x_) : field(f), cell(cell_), last(cell_), entry_knot(0), x(x_) {
    const double left = f.velocities[cell], right = f.velocities[cell + 1];
    velocity = (left * (f.knots[cell + 1] - x) + right * (x - f.knots[cell])) / f.width;
    const bool moving_right = velocity > 0;
    direction = moving_right ? 1.0 : -1.0;
    exit_knot = cell + moving_right;
    const double exit_velocity = f.velocities[exit_knot];
    exits = std::abs(velocity) > kAtRest && exit_velocity * direction > kAtRest && exit_knot > 0 && exit_knot < f.cells;
    if (exits) {
      first = cross(direction * (f.knots[exit_knot] - x), std::abs(velocity), std::abs(exit_velocity));
      exits = first.time < 1;
    }
    if (!exits) {
      duration = 1.0;
      growth = f.whole[cell];
      y = x + velocity * growth.integral;
      slope = growth.factor;
      return;
    }
    const double end = f.clock[exit_knot] + direction * (1 - first.time);
    last = std::upper_bound(f.clock.begin(), f.clock.end(), end) - f.clock.begin() - 1;
    last = moving_right ? std::max(last, exit_knot) : std::min(last, exit_knot - 1);
    last = std::min(std::max<int64_t>(last, 0), f.cells - 1);
    entry_knot = last + !moving_right;
    duration = direction * (end - f.clock[entry_knot]);
    growth = grow(f.slopes[last], duration);
    y = f.knots[entry_knot] + f.velocities[entry_knot] * growth.integral;
    slope = growth.factor * f.velocities[entry_knot] / velocity;
  }

  void backward(double grad_y, double grad_slope, FieldGradient& out) const {
    const double last_slope = field.slopes[last];
    const bool bounded = last_slope * duration < kLargestGrowth;  // else the factor is held
    const double grad_growth = bounded ? grad_slope * slope : 0.0;
    double grad_velocity;
    if (!exits) {
      grad_velocity = grad_y * growth.integral;
      out.slopes[cell] += grad_y * velocity * growth.by_slope + grad_growth;
    } else {
      const double entry = field.velocities[entry_knot];
      out.velocities[entry_knot] += grad_y * growth.integral + grad_slope * slope / entry;
      out.slopes[last] += grad_y * entry * growth.by_slope + grad_growth * duration;
      const double grad_duration = grad_y * entry * growth.factor + grad_growth * last_slope;
      out.clock[exit_knot] += direction * grad_duration;
      out.clock[entry_knot] -= direction * grad_duration;
      out.velocities[exit_knot] -= direction * grad_duration * first.by_exit_speed;
      grad_velocity = -direction * grad_duration * first.by_speed - grad_slope * slope / velocity;
    }
    const double share = (x - field.knots[cell]) / field.width;
    out.velocities[cell] += grad_velocity * (1 - share);
    out.velocities[cell + 1] += grad_velocity * share;
  }
};

}  // namespace ditac
