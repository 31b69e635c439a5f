// Attention of one new token a sequence over the cache.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "few_rows.h"
#include "thread_pool.h"
#include "vector_math.h"

namespace mindrlhf {

// Shapes of the operands as AttentionStep in decode_steps.cpp has them.
struct Attention {
  int64_t kv_heads, queries, size, columns;  // N, G, D, S
  const int32_t* starts;
  int64_t column;
  const float *bias, *cos, *sin;
  float *keys, *values;

  int64_t slots() const { return kv_heads * (queries + 2) * size; }

  // One key/value head of one sequence.
  //
  // fused: (G + 2, D) of the head, without bias; mixed: (G, D).
  void Head(int64_t sequence, int64_t head, const float* fused, float* mixed, Buffer& turned, Buffer& memory) const {
    const int64_t offset = head * (queries + 2) * size, position = column - starts[sequence];
    auto* q = static_cast<float*>(turned.AtLeast((queries + 2) * size * sizeof(float)));
    for (int64_t slot = 0; slot < queries + 2; ++slot) {
      Turn(fused + slot * size, offset + slot * size, position * slots() + offset + slot * size, q + slot * size);
    }
    float* of_keys = keys + (sequence * kv_heads + head) * columns * size;
    float* of_values = values + (sequence * kv_heads + head) * columns * size;
    std::copy_n(q + queries * size, size, of_keys + column * size);
    std::copy_n(q + (queries + 1) * size, size, of_values + column * size);
    const int64_t first = starts[sequence], seen = column + 1 - first, filled = RoundUp(queries, kTileRows);
    const int64_t length = PackedLength<Float32>(size);
    auto* packed = static_cast<float*>(memory.AtLeast(filled * (length + seen) * sizeof(float)));
    float* scores = packed + filled * length;
    std::fill_n(packed, filled * (length + seen), 0.0f);
    for (int64_t query = 0; query < queries; ++query) PackRow<Float32>(q + query * size, size, packed + query * length);
    FewRows<Float32>(of_keys + first * size, size, packed, queries, scores, seen, 0, seen);
    for (int64_t query = 0; query < queries; ++query) {
      float* of_query = scores + query * seen;
      Softmax(of_query, Largest(of_query, seen), seen, of_query);
    }
    for (int64_t query = 0; query < queries; query += kTileRows) {
      const int64_t some = std::min<int64_t>(kTileRows, queries - query);
      Mix(scores + query * seen, some, seen, of_values + first * size, mixed + query * size);
    }
  }

 private:
  // One vector of D numbers: bias added, turned by its position (a slot of the tables); pairs are half a vector apart.
  void Turn(const float* x, int64_t slot, int64_t angle, float* to) const {
    const int64_t half = size / 2;
    for (int64_t i = 0; i < half; ++i) {
      const float a = x[i] + bias[slot + i], b = x[half + i] + bias[slot + half + i];
      to[i] = a * cos[angle + i] - b * sin[angle + i];
      to[half + i] = b * cos[angle + half + i] + a * sin[angle + half + i];
    }
  }

  // Sums of values, weighted by `count` rows of weights, of which there are kTileRows (seen,) in memory.
  void Mix(const float* weights, int64_t count, int64_t seen, const float* of_values, float* mixed) const {
    constexpr int kVectors = 4;  // so that there are sums enough to keep the processor busy
    for (int64_t i = 0; i < size; i += kVectors * kLanes) {
      __m512 sums[kTileRows][kVectors];
      for (auto& of_row : sums) std::fill_n(of_row, kVectors, _mm512_setzero_ps());
      __mmask16 lanes[kVectors];
      for (int part = 0; part < kVectors; ++part) lanes[part] = FirstLanes(std::max<int64_t>(0, size - i - part * kLanes));
      for (int64_t past = 0; past < seen; ++past) {
        const float* value = of_values + past * size + i;
        for (int part = 0; part < kVectors; ++part) {
          const __m512 v = _mm512_maskz_loadu_ps(lanes[part], value + part * kLanes);
          for (int row = 0; row < kTileRows; ++row) {
            sums[row][part] = _mm512_fmadd_ps(_mm512_set1_ps(weights[row * seen + past]), v, sums[row][part]);
          }
        }
      }
      for (int64_t row = 0; row < count; ++row) {
        for (int part = 0; part < kVectors; ++part) {
          _mm512_mask_storeu_ps(mixed + row * size + i + part * kLanes, lanes[part], sums[row][part]);
        }
      }
    }
  }
};

}  // namespace mindrlhf
