// What the operators compute of plain vectors, in AVX-512.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace mindrlhf {

constexpr int64_t kLanes = 16;

constexpr int64_t RoundUp(int64_t number, int64_t multiple) { return (number + multiple - 1) / multiple * multiple; }

inline __mmask16 FirstLanes(int64_t count) { return count >= kLanes ? 0xffff : (1u << count) - 1; }

inline __m512 LoadFirst(const float* from, int64_t count) { return _mm512_maskz_loadu_ps(FirstLanes(count), from); }

// exp by Cephes' polynomial: x = n log 2 + r with |r| <= log(2) / 2, within 2 units in the last place.
// 0 below -104; NaN stays NaN, which the order of the operands decides.
inline __m512 Exp(__m512 x) {
  x = _mm512_min_ps(_mm512_set1_ps(88.7f), _mm512_max_ps(_mm512_set1_ps(-150.0f), x));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  }
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(p, n);
}

inline float Dot(const float* a, const float* b, int64_t count) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i += kLanes) {
    sum = _mm512_fmadd_ps(LoadFirst(a + i, count - i), LoadFirst(b + i, count - i), sum);
  }
  return _mm512_reduce_add_ps(sum);
}

inline float Largest(const float* numbers, int64_t count) {
  __m512 most = _mm512_set1_ps(numbers[0]);
  for (int64_t i = 0; i < count; i += kLanes) {
    const __mmask16 lanes = FirstLanes(count - i);
    most = _mm512_mask_max_ps(most, lanes, most, _mm512_maskz_loadu_ps(lanes, numbers + i));
  }
  return _mm512_reduce_max_ps(most);
}

inline float Sum(const float* numbers, int64_t count) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i += kLanes) sum = _mm512_add_ps(sum, LoadFirst(numbers + i, count - i));
  return _mm512_reduce_add_ps(sum);
}

// exp(scores - largest) / their sum, which it gives; may be in place.
inline float Softmax(const float* scores, float largest, int64_t count, float* weights) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i += kLanes) {
    const __mmask16 lanes = FirstLanes(count - i);
    const __m512 x = _mm512_sub_ps(_mm512_maskz_loadu_ps(lanes, scores + i), _mm512_set1_ps(largest));
    const __m512 exp = _mm512_maskz_mov_ps(lanes, Exp(x));
    _mm512_mask_storeu_ps(weights + i, lanes, exp);
    sum = _mm512_add_ps(sum, exp);
  }
  const float total = _mm512_reduce_add_ps(sum), scale = 1.0f / total;
  for (int64_t i = 0; i < count; ++i) weights[i] *= scale;
  return total;
}

inline __m512 Sigmoid(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_div_ps(one, _mm512_add_ps(one, Exp(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

// gate * sigmoid(gate) * up, which may be in place.
inline void SwiGlu(const float* gate, const float* up, int64_t count, float* result) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const __mmask16 lanes = FirstLanes(count - i);
    const __m512 g = _mm512_maskz_loadu_ps(lanes, gate + i), u = _mm512_maskz_loadu_ps(lanes, up + i);
    _mm512_mask_storeu_ps(result + i, lanes, _mm512_mul_ps(_mm512_mul_ps(g, Sigmoid(g)), u));
  }
}

}  // namespace mindrlhf
