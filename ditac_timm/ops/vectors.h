// Vectors, as GCC and Clang have them on any processor, and what the kernels need of them. Plain C++.

#pragma once

#include <cstdint>
#include <cstring>

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

namespace ditac {

template <typename T, int lanes>
struct Vector {
  typedef T type __attribute__((vector_size(lanes * sizeof(T))));
};
template <typename T, int lanes>
using Vec = typename Vector<T, lanes>::type;

constexpr int kLanes = 4;
using Real = Vec<double, kLanes>;
using Whole = Vec<int64_t, kLanes>;  // also a mask of Reals: -1 where true

INLINE Real all(double value) { return Real{} + value; }
INLINE Real at_least(Real value, double least) { return value < least ? all(least) : value; }
INLINE Real at_most(Real value, double most) { return value > most ? all(most) : value; }
INLINE Real magnitude(Real value) { return (Real)((Whole)value & INT64_MAX); }

INLINE bool any(Whole mask) { return ((mask[0] | mask[1]) | (mask[2] | mask[3])) != 0; }
INLINE double sum(Real value) { return (value[0] + value[1]) + (value[2] + value[3]); }

INLINE Real gather(const double* from, Whole index) {
  return Real{from[index[0]], from[index[1]], from[index[2]], from[index[3]]};
}

// Adding this to a number of less than 2^51 rounds it to a whole one, which then stands in the sum's lowest bits.
constexpr double kRound = 0x1.8p52;

INLINE Whole whole_in(Real rounded) { return (Whole)rounded - (Whole)all(kRound); }
INLINE Real real_of(Whole value) { return (Real)(value + (Whole)all(kRound)) - kRound; }
INLINE Real power_of_two(Whole exponent) { return (Real)((exponent + 1023) << 52); }

// The k that brings value / 2^k, a positive one, between sqrt(1/2) and sqrt(2).
INLINE Whole nearest_exponent(Real value) {
  constexpr int64_t one = 0x3ff0000000000000, sqrt_half = 0x3fe6a09e667f3bcd;
  return (Whole)((Vec<uint64_t, kLanes>)((Whole)value + (one - sqrt_half)) >> 52) - 1023;
}

}  // namespace ditac
