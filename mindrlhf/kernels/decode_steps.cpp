// The two halves of a decoder layer, and the logits, for one new token a sequence: custom operators of MindSpore.
//
// With few rows MindSpore's products read weights at half the speed of memory, and each of the twenty small
// operations around them passes over its operands. Here a half layer is one operator: normalisation, product,
// rotary positions, the new entry of the cache, attention over the columns there are, product, residual. What tensor
// parallelism must add up over ranks stays outside, between the operators; one rank of a group adds the residual.
//
// float32 throughout; the operators whose names end in Rounded round the operands of products to bfloat16.
// Sequences that have ended take no part: their results are zeros, their cache stays as it is. The operators
// write into the cache, which MindSpore need not know: a layer's next step depends on this one's result.
//
// Letters: B sequences, H hidden, N key/value heads of this rank, G queries of each, D numbers of a head, S columns of
// the cache, F = N (G + 2) D, I intermediate, V vocabulary of this rank. Built by mindrlhf/kernels/library.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

#include "decode_attention.h"
#include "few_rows.h"
#include "thread_pool.h"
#include "vector_math.h"

namespace {

using namespace mindrlhf;

constexpr int64_t kBlock = 16 * kLanes;  // of a vocabulary
constexpr int64_t kOutputsAtOnce = 8 * kTileOutputs;

const float* Floats(void* data) { return static_cast<const float*>(data); }

// The residual, on the rank that adds it.
const float* Residual(void* x, void* adds) { return *static_cast<const bool*>(adds) ? Floats(x) : nullptr; }

// What the operators keep between calls.
struct Scratch {
  Scratch() : scores(SharedPool().size()), queries(SharedPool().size()) {}
  Buffer packed, wide, mixed;
  std::vector<Buffer> scores, queries;  // of each thread
};

// A step of one operator: what all three have in common.
template <class Kind>
class Step {
 public:
  using Stored = typename Kind::Stored;

  // `ended`: (B,) of bool.
  Step(Scratch& scratch, int64_t batch, const void* ended) : scratch_(scratch) {
    for (int64_t row = 0; row < batch; ++row) {
      if (!static_cast<const bool*>(ended)[row]) rows_.push_back(row);
    }
  }

  int64_t count() const { return rows_.size(); }
  int64_t row(int64_t index) const { return rows_[index]; }

  // Rows of x that go on, x / sqrt(mean(x^2) + eps) * weight, packed.
  const Stored* Normed(const float* x, int64_t hidden, const float* weight, float eps) {
    auto* normed = static_cast<float*>(scratch_.mixed.AtLeast(count() * hidden * sizeof(float)));
    for (int64_t index = 0; index < count(); ++index) {
      const float *from = x + row(index) * hidden;
      const float scale = 1.0f / std::sqrt(Dot(from, from, hidden) / hidden + eps);
      for (int64_t i = 0; i < hidden; ++i) normed[index * hidden + i] = from[i] * (scale * weight[i]);
    }
    return Packed(normed, hidden, hidden);
  }

  // Rows of `columns` numbers, `stride` apart, in the memory of operands; rows that fill up the last tile are zeros.
  const Stored* Packed(const float* rows, int64_t columns, int64_t stride) {
    const int64_t length = PackedLength<Kind>(columns), filled = RoundUp(count(), kTileRows);
    auto* packed = static_cast<Stored*>(scratch_.packed.AtLeast(filled * length * sizeof(Stored)));
    for (int64_t index = 0; index < count(); ++index) PackRow<Kind>(rows + index * stride, columns, packed + index * length);
    std::fill(packed + count() * length, packed + filled * length, Stored{0});
    return packed;
  }

  // y = x W^T by all threads; x packed, W (outputs, inputs), y (count, outputs).
  void Product(const Stored* x, const float* weights, int64_t inputs, int64_t outputs, float* y) {
    Run(CeilDiv(outputs, kOutputsAtOnce), [&](int piece, int) {
      const int64_t first = piece * kOutputsAtOnce, last = std::min(first + kOutputsAtOnce, outputs);
      FewRows<Kind>(weights, inputs, x, count(), y, outputs, first, last);
      return 0;
    });
  }

  // The same into rows of the result, (B, outputs), plus the same rows of `residual`, if there is one; rows of
  // sequences that have ended become zero.
  void Result(const Stored* x, const float* weights, int64_t inputs, int64_t outputs, int64_t batch,
              const float* residual, float* result) {
    const bool all = count() == batch;
    float* y = all ? result : static_cast<float*>(scratch_.wide.AtLeast(count() * outputs * sizeof(float)));
    Product(x, weights, inputs, outputs, y);
    if (!all) std::fill(result, result + batch * outputs, 0.0f);
    for (int64_t index = 0; index < count(); ++index) {
      float* to = result + row(index) * outputs;
      if (!all) std::copy_n(y + index * outputs, outputs, to);
      if (residual != nullptr) std::transform(to, to + outputs, residual + row(index) * outputs, to, std::plus<float>());
    }
  }

  void Run(int64_t pieces, const std::function<int(int, int)>& work) {
    if (count() > 0) SharedPool().Run(static_cast<int>(pieces), work);
  }

 private:
  Scratch& scratch_;
  std::vector<int64_t> rows_;
};

template <class Work>
int WithScratch(const Work& work) {
  return Exclusively([&] {
    static Scratch* scratch = new Scratch;
    work(*scratch);
  });
}

// The last interval of positive length, of those laid end to end, that begins at or before `target`; 0 if there is none.
int64_t IntervalOf(const float* lengths, int64_t count, float target) {
  double begin = 0.0;
  int64_t i = 0, found = -1;
  while (i + kBlock < count) {  // blocks that end before the target
    const double end = begin + Sum(lengths + i, kBlock);
    if (!(end <= target)) break;
    begin = end;
    i += kBlock;
  }
  const int64_t scanned = i;
  for (; i < count && begin <= target; begin += lengths[i++]) {
    if (lengths[i] > 0.0f) found = i;
  }
  for (i = scanned; found < 0 && i-- > 0;) {  // rounding can put the target behind all of them
    if (lengths[i] > 0.0f) found = i;
  }
  return std::max<int64_t>(found, 0);
}

template <class Kind>
int RunAttention(void** data, int64_t** shapes) {
  const int64_t batch = shapes[0][0], hidden = shapes[0][1], fused_size = shapes[6][0];
  Attention attention;
  attention.kv_heads = shapes[11][0] / batch;
  attention.columns = shapes[11][1];
  attention.size = shapes[11][2];
  attention.queries = fused_size / (attention.kv_heads * attention.size) - 2;
  attention.starts = static_cast<const int32_t*>(data[2]);
  attention.column = *static_cast<const int32_t*>(data[3]);
  attention.bias = Floats(data[7]);
  attention.cos = Floats(data[8]);
  attention.sin = Floats(data[9]);
  attention.keys = static_cast<float*>(data[11]);
  attention.values = static_cast<float*>(data[12]);
  const int64_t heads = attention.kv_heads, per_head = attention.queries * attention.size;
  return WithScratch([&](Scratch& scratch) {
    Step<Kind> step(scratch, batch, data[1]);
    auto* fused = static_cast<float*>(scratch.wide.AtLeast(batch * fused_size * sizeof(float)));
    step.Product(step.Normed(Floats(data[0]), hidden, Floats(data[4]), *Floats(data[5])), Floats(data[6]), hidden,
                 fused_size, fused);
    auto* mixed = static_cast<float*>(scratch.mixed.AtLeast(batch * heads * per_head * sizeof(float)));
    step.Run(step.count() * heads, [&](int piece, int member) {
      const int64_t index = piece / heads, head = piece % heads;
      attention.Head(step.row(index), head, fused + index * fused_size + head * (fused_size / heads),
                     mixed + piece * per_head, scratch.queries[member], scratch.scores[member]);
      return 0;
    });
    const auto* packed = step.Packed(mixed, heads * per_head, heads * per_head);
    step.Result(packed, Floats(data[10]), heads * per_head, hidden, batch, Residual(data[0], data[13]),
                static_cast<float*>(data[14]));
  });
}

template <class Kind>
int RunFeedForward(void** data, int64_t** shapes) {
  const int64_t batch = shapes[0][0], hidden = shapes[0][1], intermediate = shapes[5][1];
  return WithScratch([&](Scratch& scratch) {
    Step<Kind> step(scratch, batch, data[1]);
    const auto* x = step.Normed(Floats(data[0]), hidden, Floats(data[2]), *Floats(data[3]));
    const int64_t outputs = 2 * intermediate;
    auto* gate_up = static_cast<float*>(scratch.wide.AtLeast(batch * outputs * sizeof(float)));
    step.Run(CeilDiv(intermediate, kOutputsAtOnce), [&](int piece, int) {
      const int64_t first = piece * kOutputsAtOnce, last = std::min(first + kOutputsAtOnce, intermediate);
      for (int64_t half : {int64_t{0}, intermediate}) {
        FewRows<Kind>(Floats(data[4]), hidden, x, step.count(), gate_up, outputs, half + first, half + last);
      }
      for (int64_t index = 0; index < step.count(); ++index) {
        float* gate = gate_up + index * outputs + first;
        SwiGlu(gate, gate + intermediate, last - first, gate);
      }
      return 0;
    });
    const auto* packed = step.Packed(gate_up, intermediate, outputs);
    step.Result(packed, Floats(data[5]), intermediate, hidden, batch, Residual(data[0], data[6]),
                static_cast<float*>(data[7]));
  });
}

template <class Kind>
int RunLogits(void** data, int64_t** shapes) {
  const int64_t batch = shapes[0][0], hidden = shapes[0][1], vocab = shapes[4][0];
  return WithScratch([&](Scratch& scratch) {
    Step<Kind> step(scratch, batch, data[1]);
    const auto* x = step.Normed(Floats(data[0]), hidden, Floats(data[2]), *Floats(data[3]));
    step.Result(x, Floats(data[4]), hidden, vocab, batch, nullptr, static_cast<float*>(data[5]));
  });
}

}  // namespace

extern "C" {

// x (B, H), ended (B,) bool, starts (B,) int32 first column of each sequence, column () int32 where the tokens stand,
// norm (H,), eps (1,), qkv (F, H), bias (F,), cos and sin (positions, F), out (H, N G D), keys and values (B N, S, D),
// which get the new column, adds () bool -> (B, H), this rank's part of the attention's result, plus x if it adds it.
int AttentionStep(int, void** data, int*, int64_t** shapes, const char**, void*, void*) {
  return RunAttention<Float32>(data, shapes);
}

// x (B, H), ended (B,), norm (H,), eps (1,), gate and up (2 I, H), down (H, I), adds () -> (B, H), as above.
int FeedForwardStep(int, void** data, int*, int64_t** shapes, const char**, void*, void*) {
  return RunFeedForward<Float32>(data, shapes);
}

// x (B, H), ended (B,), norm (H,), eps (1,), head (V, H) -> logits (B, V).
int LogitsStep(int, void** data, int*, int64_t** shapes, const char**, void*, void*) {
  return RunLogits<Float32>(data, shapes);
}

// logits (B, V) -> softmax (B, V); of the largest logit the first place (B,) int32, the logit (B,), and
// log(sum(exp(logit - largest))) (B,).
int TokenProbabilities(int, void** data, int*, int64_t** shapes, const char**, void*, void*) {
  const int64_t rows = shapes[0][0], vocab = shapes[0][1];
  return Exclusively([&] {
    SharedPool().Run(static_cast<int>(rows), [&](int row, int) {
      const float *logits = Floats(data[0]) + row * vocab, largest = Largest(logits, vocab);
      const int64_t place = std::find(logits, logits + vocab, largest) - logits;
      static_cast<int32_t*>(data[2])[row] = static_cast<int32_t>(place % vocab);  // where all are NaN, 0
      static_cast<float*>(data[3])[row] = largest;
      const float sum = Softmax(logits, largest, vocab, static_cast<float*>(data[1]) + row * vocab);
      static_cast<float*>(data[4])[row] = std::log(sum);
      return 0;
    });
  });
}

// probabilities (B, V) -> their sums (B,).
int RowSums(int, void** data, int*, int64_t** shapes, const char**, void*, void*) {
  const int64_t rows = shapes[0][0], vocab = shapes[0][1];
  for (int64_t row = 0; row < rows; ++row) {
    static_cast<float*>(data[1])[row] = Sum(Floats(data[0]) + row * vocab, vocab);
  }
  return 0;
}

// probabilities and logits (B, V), target (B,) -> ids (B,) int32 at which their cumulative sum reaches the
// target, and their logits (B,).
int LookUp(int, void** data, int*, int64_t** shapes, const char**, void*, void*) {
  const int64_t rows = shapes[0][0], vocab = shapes[0][1];
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t id = IntervalOf(Floats(data[0]) + row * vocab, vocab, Floats(data[2])[row]);
    static_cast<int32_t*>(data[3])[row] = static_cast<int32_t>(id);
    static_cast<float*>(data[4])[row] = Floats(data[1])[row * vocab + id];
  }
  return 0;
}

#ifdef __AVX512BF16__
int AttentionStepRounded(int, void** data, int*, int64_t** shapes, const char**, void*, void*) {
  return RunAttention<BFloat16>(data, shapes);
}

int FeedForwardStepRounded(int, void** data, int*, int64_t** shapes, const char**, void*, void*) {
  return RunFeedForward<BFloat16>(data, shapes);
}

int LogitsStepRounded(int, void** data, int*, int64_t** shapes, const char**, void*, void*) {
  return RunLogits<BFloat16>(data, shapes);
}
#endif
}
