// What a decoder layer does between its products, forward and backward: custom operators of MindSpore on CPU.
//
// MindSpore has an operation for each sum and product, and each passes over memory; these pass once.
//
// float32 throughout. Built by mindrlhf/kernels/library.py.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>

#include "rows.h"
#include "vector_math.h"

namespace {

using namespace mindrlhf;

float InverseRootMeanSquare(const float* x, int64_t size, float eps) {
  return 1.0f / std::sqrt(Dot(x, x, size) / size + eps);
}

// One row of the gradients of normalisation; adds to d_weight.
void NormaliseBack(const float* x, const float* weight, const float* dy, float eps, int64_t size, float* dx,
                   float* d_weight) {
  const float scale = InverseRootMeanSquare(x, size, eps);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < size; i += kLanes) {
    const __m512 product = _mm512_mul_ps(LoadFirst(dy + i, size - i), LoadFirst(x + i, size - i));
    sum = _mm512_fmadd_ps(product, LoadFirst(weight + i, size - i), sum);
  }
  const float along = _mm512_reduce_add_ps(sum) * scale * scale * scale / size;
  for (int64_t i = 0; i < size; ++i) {
    d_weight[i] += dy[i] * x[i] * scale;
    dx[i] = dy[i] * scale * weight[i] - x[i] * along;
  }
}

// Gradients of gate * sigmoid(gate) * up.
void SwiGluBack(const float* gate, const float* up, const float* dy, int64_t count, float* d_gate, float* d_up) {
  const __m512 one = _mm512_set1_ps(1.0f);
  for (int64_t i = 0; i < count; i += kLanes) {
    const __mmask16 lanes = FirstLanes(count - i);
    const __m512 g = LoadFirst(gate + i, count - i), u = LoadFirst(up + i, count - i);
    const __m512 d = LoadFirst(dy + i, count - i), sigmoid = Sigmoid(g);
    const __m512 slope = _mm512_mul_ps(sigmoid, _mm512_fmadd_ps(g, _mm512_sub_ps(one, sigmoid), one));
    _mm512_mask_storeu_ps(d_gate + i, lanes, _mm512_mul_ps(d, _mm512_mul_ps(u, slope)));
    _mm512_mask_storeu_ps(d_up + i, lanes, _mm512_mul_ps(d, _mm512_mul_ps(g, sigmoid)));
  }
}

// The halves (a, b) of a row of x by its angles. Back: those of the gradient.
void RotateVector(const float* x, const float* cos, const float* sin, int64_t size, bool back, float* y) {
  const int64_t half = size / 2;
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t count = half - i;
    const __mmask16 lanes = FirstLanes(count);
    const __m512 a = LoadFirst(x + i, count), b = LoadFirst(x + half + i, count);
    const __m512 sin_a = LoadFirst(sin + i, count), sin_b = LoadFirst(sin + half + i, count);
    const __m512 a_cos = _mm512_mul_ps(a, LoadFirst(cos + i, count));
    const __m512 b_cos = _mm512_mul_ps(b, LoadFirst(cos + half + i, count));
    _mm512_mask_storeu_ps(y + i, lanes, back ? _mm512_fmadd_ps(b, sin_b, a_cos) : _mm512_fnmadd_ps(b, sin_a, a_cos));
    _mm512_mask_storeu_ps(y + half + i, lanes,
                          back ? _mm512_fnmadd_ps(a, sin_a, b_cos) : _mm512_fmadd_ps(a, sin_b, b_cos));
  }
}

int RotateRows(void** data, int64_t** shapes, bool back) {
  const int64_t size = shapes[0][1];
  return EachRow(shapes[0][0], size, [&](int64_t row) {
    const int64_t at = row * size;
    RotateVector(Read(data[0]) + at, Read(data[1]) + at, Read(data[2]) + at, size, back, Write(data[3]) + at);
  });
}

}  // namespace

extern "C" {

// Threads that share the work of all operators; called before the first.
void SetThreads(int count) { thread_count = std::max(1, count); }

// x (n, H), weight (1, H), eps (1,) -> x / sqrt(mean(x^2) + eps) * weight (n, H).
int Normalise(int, void** data, int*, int64_t** shapes, const char**, void*, void*) {
  const int64_t size = shapes[0][1];
  const float *weight = Read(data[1]), eps = *Read(data[2]);
  return EachRow(shapes[0][0], size, [&](int64_t row) {
    const float* x = Read(data[0]) + row * size;
    const float scale = InverseRootMeanSquare(x, size, eps);
    for (int64_t i = 0; i < size; ++i) Write(data[3])[row * size + i] = x[i] * (scale * weight[i]);
  });
}

// x (n, H), weight (1, H), eps (1,), dy (n, H) -> dx (n, H), dweight (1, H).
int NormaliseGradient(int, void** data, int*, int64_t** shapes, const char**, void*, void*) {
  const int64_t rows = shapes[0][0], size = shapes[0][1], step = RowsAtOnce(size), pieces = CeilDiv(rows, step);
  return Exclusively([&] {
    static Buffer& buffer = *new Buffer;
    auto* sums = static_cast<float*>(buffer.AtLeast(pieces * size * sizeof(float)));
    std::fill_n(sums, pieces * size, 0.0f);
    SharedPool().Run(static_cast<int>(pieces), [&](int piece, int) {
      for (int64_t row = piece * step; row < std::min(rows, (piece + 1) * step); ++row) {
        NormaliseBack(Read(data[0]) + row * size, Read(data[1]), Read(data[3]) + row * size, *Read(data[2]), size,
                      Write(data[4]) + row * size, sums + piece * size);
      }
      return 0;
    });
    float* d_weight = Write(data[5]);
    std::fill_n(d_weight, size, 0.0f);
    for (int64_t piece = 0; piece < pieces; ++piece) {
      std::transform(d_weight, d_weight + size, sums + piece * size, d_weight, std::plus<float>());
    }
  });
}

// gate, up (n, I) -> gate * sigmoid(gate) * up (n, I).
int SwiGluRows(int, void** data, int*, int64_t** shapes, const char**, void*, void*) {
  const int64_t size = shapes[0][1];
  return EachRow(shapes[0][0], size, [&](int64_t row) {
    SwiGlu(Read(data[0]) + row * size, Read(data[1]) + row * size, size, Write(data[2]) + row * size);
  });
}

// gate, up, dy (n, I) -> their gradients (n, I).
int SwiGluGradient(int, void** data, int*, int64_t** shapes, const char**, void*, void*) {
  const int64_t size = shapes[0][1];
  return EachRow(shapes[0][0], size, [&](int64_t row) {
    const int64_t at = row * size;
    SwiGluBack(Read(data[0]) + at, Read(data[1]) + at, Read(data[2]) + at, size, Write(data[3]) + at,
               Write(data[4]) + at);
  });
}

// scores (B * heads * Q, T), attention mask (B, Q, T), added to the scores of each head -> softmax of rows.
int MaskedSoftmax(int, void** data, int*, int64_t** shapes, const char**, void*, void*) {
  const int64_t rows = shapes[0][0], size = shapes[0][1], query_length = shapes[1][1];
  const int64_t of_sequence = rows / shapes[1][0];
  return EachRow(rows, size, [&](int64_t row) {
    const float* mask = Read(data[1]) + (row / of_sequence * query_length + row % query_length) * size;
    float* y = Write(data[2]) + row * size;
    std::transform(mask, mask + size, Read(data[0]) + row * size, y, std::plus<float>());
    Softmax(y, Largest(y, size), size, y);
  });
}

// y and dy (n, T) -> y (dy - sum(dy y)) (n, T).
int SoftmaxGradient(int, void** data, int*, int64_t** shapes, const char**, void*, void*) {
  const int64_t size = shapes[0][1];
  return EachRow(shapes[0][0], size, [&](int64_t row) {
    const float *y = Read(data[0]) + row * size, *dy = Read(data[1]) + row * size;
    const float total = Dot(y, dy, size);
    for (int64_t i = 0; i < size; ++i) Write(data[2])[row * size + i] = y[i] * (dy[i] - total);
  });
}

// x, cos, sin (n, D) -> x cos + (-b, a) sin for the halves (a, b) of x.
int Rotate(int, void** data, int*, int64_t** shapes, const char**, void*, void*) {
  return RotateRows(data, shapes, false);
}

// dy, cos, sin (n, D) -> dx.
int RotateGradient(int, void** data, int*, int64_t** shapes, const char**, void*, void*) {
  return RotateRows(data, shapes, true);
}
}
