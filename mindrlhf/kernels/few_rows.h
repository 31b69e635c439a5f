// Products of a few rows with a whole weight, y = x W^T, at the speed of memory.
//
// A decode step multiplies a handful of rows with every weight of the model, so each weight is used a handful of
// times: what counts is that it comes from memory once, in order, and early enough. Tiles of 6 outputs by 4 rows keep
// 24 sums in registers; while one tile is computed, the weights of the next are fetched into the second cache, spread
// over all of its time. Measured on two cores that copy 31 GB/s: 28 to 30 GB/s with 8 rows, 18 to 22 with 16,
// where arithmetic decides (160 GFLOP/s); without fetching ahead 15 to 19 and 12 to 14.
//
// Written for AVX-512: 16 lanes, 32 registers.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "vector_math.h"

namespace mindrlhf {

constexpr int kTileOutputs = 6, kTileRows = 4;

// Operands as they are. `kWidth` numbers are multiplied at a time.
struct Float32 {
  using Stored = float;  // an element of a packed row
  using Vector = __m512;
  static constexpr int64_t kWidth = kLanes;
  static Vector Weights(const float* from) { return _mm512_loadu_ps(from); }
  static Vector Weights(const float* from, int64_t count) { return LoadFirst(from, count); }
  static Vector Row(const Stored* from) { return _mm512_loadu_ps(from); }
  static __m512 MultiplyAdd(__m512 sum, Vector a, Vector b) { return _mm512_fmadd_ps(a, b, sum); }
  static void Pack(__m512 numbers, Stored* to) { _mm512_storeu_ps(to, numbers); }
};

#ifdef __AVX512BF16__
// Operands rounded to bfloat16; products and sums are float32.
struct BFloat16 {
  using Stored = uint16_t;
  using Vector = __m512bh;
  static constexpr int64_t kWidth = 2 * kLanes;
  static Vector Weights(const float* from) {
    return _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + kLanes), _mm512_loadu_ps(from));
  }
  static Vector Weights(const float* from, int64_t count) {
    const __m512 high = count > kLanes ? LoadFirst(from + kLanes, count - kLanes) : _mm512_setzero_ps();
    return _mm512_cvtne2ps_pbh(high, LoadFirst(from, count));
  }
  static Vector Row(const Stored* from) { return (Vector)_mm512_loadu_si512(from); }
  static __m512 MultiplyAdd(__m512 sum, Vector a, Vector b) { return _mm512_dpbf16_ps(sum, a, b); }
  static void Pack(__m512 numbers, Stored* to) {
    const __m256bh rounded = _mm512_cvtneps_pbh(numbers);
    std::memcpy(to, &rounded, sizeof(rounded));
  }
};
#endif

// Numbers from one packed row to the next: a multiple of what is multiplied at a time, filled up with zeros.
template <class Kind>
int64_t PackedLength(int64_t count) {
  return RoundUp(count, Kind::kWidth);
}

template <class Kind>
void PackRow(const float* row, int64_t count, typename Kind::Stored* packed) {
  for (int64_t i = 0; i < PackedLength<Kind>(count); i += kLanes) {
    Kind::Pack(i < count ? LoadFirst(row + i, count - i) : _mm512_setzero_ps(), packed + i);
  }
}

// The sums of 16 vectors, in their order: pairs are added crosswise until each lane holds one.
inline __m512 SumEach(const __m512 (&vectors)[kLanes]) {
  __m512 by_two[8], by_four[4], by_eight[2];
  for (int i = 0; i < 8; ++i) {
    const __m512 a = vectors[2 * i], b = vectors[2 * i + 1];
    by_two[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(by_two[2 * i]), b = _mm512_castps_pd(by_two[2 * i + 1]);
    by_four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  const auto across = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  for (int i = 0; i < 2; ++i) by_eight[i] = across(by_four[2 * i], by_four[2 * i + 1]);
  return across(by_eight[0], by_eight[1]);
}

// `kOutputs` rows of W times `kTileRows` packed rows, into the first `count` rows of y; fetches `kLines` lines of
// memory from `ahead` on each time.
template <class Kind, int kOutputs, int kLines>
void Tile(const float* weights, int64_t inputs, const typename Kind::Stored* rows, float* y, int64_t outputs,
          int64_t count, const float* ahead) {
  constexpr int kSums = kOutputs * kTileRows;
  const int64_t packed = PackedLength<Kind>(inputs), whole = inputs / Kind::kWidth * Kind::kWidth;
  __m512 sums[kSums];
  for (__m512& sum : sums) sum = _mm512_setzero_ps();
  const auto multiply = [&](int64_t i, auto load) {
    typename Kind::Vector x[kTileRows];
    for (int row = 0; row < kTileRows; ++row) x[row] = Kind::Row(rows + row * packed + i);
    for (int output = 0; output < kOutputs; ++output) {
      auto w = load(weights + output * inputs + i);
      asm("" : "+v"(w));  // one load, not one for each of the rows
      for (int row = 0; row < kTileRows; ++row) {
        __m512& sum = sums[row * kOutputs + output];
        sum = Kind::MultiplyAdd(sum, w, x[row]);
      }
    }
  };
  for (int64_t i = 0; i < whole; i += Kind::kWidth) {
    for (int line = 0; line < kLines; ++line) __builtin_prefetch(ahead + line * kLanes, 0, 2);
    ahead += kLines * kLanes;
    multiply(i, [](const float* from) { return Kind::Weights(from); });
  }
  if (whole < inputs) multiply(whole, [&](const float* from) { return Kind::Weights(from, inputs - whole); });
  float results[RoundUp(kSums, kLanes)];
  for (int64_t first = 0; first < kSums; first += kLanes) {
    __m512 some[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) some[i] = first + i < kSums ? sums[first + i] : _mm512_setzero_ps();
    _mm512_storeu_ps(results + first, SumEach(some));
  }
  for (int64_t row = 0; row < count; ++row) std::copy_n(results + row * kOutputs, kOutputs, y + row * outputs);
}

// Columns `first` .. `last - 1` of y = x W^T.
//
// x: `count` packed rows, up to a multiple of kTileRows of memory; W: (outputs, inputs); y: (count, outputs).
template <class Kind>
void FewRows(const float* weights, int64_t inputs, const typename Kind::Stored* x, int64_t count, float* y,
             int64_t outputs, int64_t first, int64_t last) {
  constexpr int kLines = kTileOutputs * Kind::kWidth / kLanes;  // of one tile, each time
  const int64_t packed = PackedLength<Kind>(inputs), tiles = (count + kTileRows - 1) / kTileRows;
  const auto whole = tiles == 1   ? Tile<Kind, kTileOutputs, kLines>
                     : tiles == 2 ? Tile<Kind, kTileOutputs, kLines / 2>
                                  : Tile<Kind, kTileOutputs, kLines / 3>;
  const int64_t lines = kLines / std::min<int64_t>(tiles, 3) * (inputs / Kind::kWidth);
  for (int64_t output = first; output < last;) {
    const bool full = last - output >= kTileOutputs;
    const float* from = weights + output * inputs;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t row = tile * kTileRows, used = std::min<int64_t>(kTileRows, count - row);
      const float* ahead = from + kTileOutputs * inputs + tile * lines * kLanes;
      const auto run = full ? whole : Tile<Kind, 1, 0>;
      run(from, inputs, x + row * packed, y + row * outputs + output, outputs, used, ahead);
    }
    output += full ? kTileOutputs : 1;
  }
}

}  // namespace mindrlhf
