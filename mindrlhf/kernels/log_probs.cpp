// Log-softmax over a vocabulary, forward and backward: custom operators of MindSpore on CPU.
//
// Each passes over the logits once or twice and stores none of the arrays of their size that MindSpore's own
// operations would need. float32 throughout. Built by mindrlhf/kernels/library.py.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "rows.h"
#include "vector_math.h"

namespace {

using namespace mindrlhf;

const int32_t* ReadInt(void* data) { return static_cast<const int32_t*>(data); }

// settings (2,): what the logits are multiplied by, and how many columns are real.
struct Settings {
  explicit Settings(void* data) : scale(Read(data)[0]), columns(static_cast<int64_t>(Read(data)[1])) {}
  const float scale;
  const int64_t columns;
};

constexpr float kNothing = -1.0e9f;  // the largest of no logits; its exponential is 0 beside any real one

}  // namespace

extern "C" {

// logits (n, V), tokens (n,) int32, settings -> largest, sum of exp(x - largest), sum of exp(x - largest) (x -
// largest), x of the token (n, 1) each, for x the scaled logits of the real columns.
int LogitSums(int, void** data, int*, int64_t** shapes, const char**, void*, void*) {
  const int64_t size = shapes[0][1];
  const Settings settings(data[2]);
  return EachRow(shapes[0][0], size, [&](int64_t row) {
    const float* logits = Read(data[0]) + row * size;
    const int64_t count = settings.columns;
    const float largest = count > 0 ? settings.scale * Largest(logits, count) : kNothing;
    const __m512 scale = _mm512_set1_ps(settings.scale), most = _mm512_set1_ps(largest);
    __m512 sum = _mm512_setzero_ps(), weighted = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += kLanes) {
      const __mmask16 lanes = FirstLanes(count - i);
      const __m512 x = _mm512_fmsub_ps(LoadFirst(logits + i, count - i), scale, most);
      const __m512 exp = _mm512_maskz_mov_ps(lanes, Exp(x));
      sum = _mm512_add_ps(sum, exp);
      weighted = _mm512_mask3_fmadd_ps(exp, x, weighted, lanes);
    }
    Write(data[3])[row] = largest;
    Write(data[4])[row] = _mm512_reduce_add_ps(sum);
    Write(data[5])[row] = _mm512_reduce_add_ps(weighted);
    Write(data[6])[row] = settings.scale * logits[ReadInt(data[1])[row]];
  });
}

// logits (n, V), tokens (n,) int32, settings, and (n, 5): largest, 1 / total, a, b, c -> the gradient (n, V):
// scale (p (a - b (x - largest)) + c at the token), p = exp(x - largest) / total; 0 in columns that are not real.
int LogitsGradient(int, void** data, int*, int64_t** shapes, const char**, void*, void*) {
  const int64_t size = shapes[0][1];
  const Settings settings(data[2]);
  return EachRow(shapes[0][0], size, [&](int64_t row) {
    const float *logits = Read(data[0]) + row * size, *of_row = Read(data[3]) + row * 5;
    float* result = Write(data[4]) + row * size;
    const int64_t count = settings.columns;
    const __m512 scale = _mm512_set1_ps(settings.scale), most = _mm512_set1_ps(of_row[0]);
    const __m512 share = _mm512_set1_ps(settings.scale * of_row[1]);
    const __m512 a = _mm512_set1_ps(of_row[2]), b = _mm512_set1_ps(of_row[3]);
    for (int64_t i = 0; i < count; i += kLanes) {
      const __m512 x = _mm512_fmsub_ps(LoadFirst(logits + i, count - i), scale, most);
      const __m512 slope = _mm512_fnmadd_ps(b, x, a);
      _mm512_mask_storeu_ps(result + i, FirstLanes(count - i), _mm512_mul_ps(_mm512_mul_ps(Exp(x), share), slope));
    }
    std::fill(result + count, result + size, 0.0f);
    result[ReadInt(data[1])[row]] += settings.scale * of_row[4];
  });
}
}
