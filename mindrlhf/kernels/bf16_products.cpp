// Matrix products with bfloat16 operands and float32 results, as custom operators of MindSpore on CPU.
//
// MindSpore has no bfloat16 product on CPU, but ships oneDNN, which has one for processors with AVX512-BF16 or
// AMX, and beats that of float32. float32 operands are rounded to bfloat16 (to the nearest, ties to even; NaN
// stays NaN, what is below the normal numbers becomes 0); sums and results are float32.
//
// oneDNN's headers are not in MindSpore's package, so what is used of its C interface, which is the same in all
// 3.x, is declared here. MindSpore builds it to be given a thread pool, which its C interface cannot: without
// one each call runs on its own thread. So the result is cut into blocks, and a pool of threads takes them.
//
// Built by mindrlhf/kernels/library.py. An operator gives 0, or a number that MindSpore reports as failure.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <tuple>
#include <vector>

#include "thread_pool.h"

extern "C" {
struct dnnl_engine;
struct dnnl_stream;
struct dnnl_memory;
struct dnnl_memory_desc;
struct dnnl_primitive;
struct dnnl_primitive_desc;
struct dnnl_primitive_attr;
struct dnnl_exec_arg {
  int arg;
  dnnl_memory* memory;
};
int dnnl_engine_create(dnnl_engine**, int kind, size_t index);
int dnnl_stream_create(dnnl_stream**, dnnl_engine*, unsigned flags);
int dnnl_stream_wait(dnnl_stream*);
int dnnl_memory_desc_create_with_strides(dnnl_memory_desc**, int ndims, const int64_t* dims, int type,
                                         const int64_t* strides);
int dnnl_memory_desc_destroy(dnnl_memory_desc*);
size_t dnnl_memory_desc_get_size(const dnnl_memory_desc*);
int dnnl_memory_create(dnnl_memory**, const dnnl_memory_desc*, dnnl_engine*, void* data);
int dnnl_memory_set_data_handle(dnnl_memory*, void* data);
int dnnl_matmul_primitive_desc_create(dnnl_primitive_desc**, dnnl_engine*, const dnnl_memory_desc* a,
                                      const dnnl_memory_desc* b, const dnnl_memory_desc* bias,
                                      const dnnl_memory_desc* c, const dnnl_primitive_attr*);
const dnnl_memory_desc* dnnl_primitive_desc_query_md(const dnnl_primitive_desc*, int what, int index);
int dnnl_primitive_desc_destroy(dnnl_primitive_desc*);
int dnnl_primitive_create(dnnl_primitive**, const dnnl_primitive_desc*);
int dnnl_primitive_execute(const dnnl_primitive*, dnnl_stream*, int count, const dnnl_exec_arg*);
int dnnl_primitive_attr_create(dnnl_primitive_attr**);
int dnnl_primitive_attr_set_scratchpad_mode(dnnl_primitive_attr*, int mode);
int dnnl_threadpool_interop_set_max_concurrency(int);
}

namespace {

using namespace mindrlhf;

constexpr int kCpu = 1, kInOrder = 1, kBFloat16 = 2, kFloat32 = 3, kScratchOfCaller = 1;
constexpr int kArgA = 1, kArgB = 33, kArgC = 17, kArgScratch = 80, kQueryScratch = 136;
constexpr int64_t kRoundAtOnce = 1 << 16;  // elements

using BFloat16 = uint16_t;

void Check(int status) {
  if (status != 0) throw status;
}

__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16"))) void RoundSome(const float* from, BFloat16* to,
                                                                                int64_t count) {
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = count - i >= 16 ? 0xffff : (1u << (count - i)) - 1;
    const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, from + i));
    _mm256_mask_storeu_epi16(to + i, mask, (__m256i)rounded);
  }
}

// Sizes of C (m, n) = A (m, k) B (k, n), and whether A or B lies there transposed.
struct Sizes {
  int64_t m, k, n;
  bool a_transposed, b_transposed;
  bool operator<(const Sizes& other) const {
    return std::tie(m, k, n, a_transposed, b_transposed) <
           std::tie(other.m, other.k, other.n, other.a_transposed, other.b_transposed);
  }
};

// One block of the result: some rows of it, or some columns.
class Block {
 public:
  Block(dnnl_engine* engine, const Sizes& whole, int64_t row, int64_t rows, int64_t column, int64_t columns)
      : a_offset_(row * (whole.a_transposed ? 1 : whole.k)),
        b_offset_(column * (whole.b_transposed ? whole.k : 1)),
        c_offset_(row * whole.n + column) {
    const int64_t a_row = whole.a_transposed ? 1 : whole.k, a_column = whole.a_transposed ? whole.m : 1;
    const int64_t b_row = whole.b_transposed ? 1 : whole.n, b_column = whole.b_transposed ? whole.k : 1;
    dnnl_memory_desc* a = Describe(rows, whole.k, kBFloat16, a_row, a_column);
    dnnl_memory_desc* b = Describe(whole.k, columns, kBFloat16, b_row, b_column);
    dnnl_memory_desc* c = Describe(rows, columns, kFloat32, whole.n, 1);
    dnnl_primitive_attr* attributes;
    Check(dnnl_primitive_attr_create(&attributes));
    Check(dnnl_primitive_attr_set_scratchpad_mode(attributes, kScratchOfCaller));
    dnnl_primitive_desc* description;
    Check(dnnl_matmul_primitive_desc_create(&description, engine, a, b, nullptr, c, attributes));
    Check(dnnl_primitive_create(&primitive_, description));
    const dnnl_memory_desc* scratch = dnnl_primitive_desc_query_md(description, kQueryScratch, 0);
    scratch_bytes_ = dnnl_memory_desc_get_size(scratch);
    Check(dnnl_memory_create(&a_, a, engine, nullptr));
    Check(dnnl_memory_create(&b_, b, engine, nullptr));
    Check(dnnl_memory_create(&c_, c, engine, nullptr));
    Check(dnnl_memory_create(&scratch_, scratch, engine, nullptr));
    Check(dnnl_primitive_desc_destroy(description));
    for (dnnl_memory_desc* one : {a, b, c}) Check(dnnl_memory_desc_destroy(one));
  }

  int Run(dnnl_stream* stream, const BFloat16* a, const BFloat16* b, float* c, Buffer& scratch) const {
    int status = dnnl_memory_set_data_handle(a_, const_cast<BFloat16*>(a) + a_offset_);
    status |= dnnl_memory_set_data_handle(b_, const_cast<BFloat16*>(b) + b_offset_);
    status |= dnnl_memory_set_data_handle(c_, c + c_offset_);
    status |= dnnl_memory_set_data_handle(scratch_, scratch.AtLeast(scratch_bytes_ + 64));
    const dnnl_exec_arg arguments[] = {{kArgA, a_}, {kArgB, b_}, {kArgC, c_}, {kArgScratch, scratch_}};
    status |= dnnl_primitive_execute(primitive_, stream, 4, arguments);
    return status | dnnl_stream_wait(stream);
  }

 private:
  static dnnl_memory_desc* Describe(int64_t rows, int64_t columns, int type, int64_t row, int64_t column) {
    const int64_t dims[] = {rows, columns}, strides[] = {row, column};
    dnnl_memory_desc* description;
    Check(dnnl_memory_desc_create_with_strides(&description, 2, dims, type, strides));
    return description;
  }

  const int64_t a_offset_, b_offset_, c_offset_;
  size_t scratch_bytes_ = 0;
  dnnl_primitive* primitive_ = nullptr;
  dnnl_memory *a_ = nullptr, *b_ = nullptr, *c_ = nullptr, *scratch_ = nullptr;
};

// All that lives between calls. Made once and never destroyed: its threads run until the process ends.
class Products {
 public:
  Products() : streams_(SharedPool().size()), scratch_(SharedPool().size()) {
    Check(dnnl_engine_create(&engine_, kCpu, 0));
    for (dnnl_stream*& stream : streams_) Check(dnnl_stream_create(&stream, engine_, kInOrder));
  }

  // A float32 operand, rounded into the memory of `slot`.
  const BFloat16* Rounded(const void* from, int64_t count, int slot) {
    const auto* source = static_cast<const float*>(from);
    auto* rounded = static_cast<BFloat16*>(operands_[slot].AtLeast(count * sizeof(BFloat16)));
    SharedPool().Run(static_cast<int>(CeilDiv(count, kRoundAtOnce)), [&](int piece, int) {
      const int64_t first = piece * kRoundAtOnce;
      RoundSome(source + first, rounded + first, std::min(kRoundAtOnce, count - first));
      return 0;
    });
    return rounded;
  }

  void Multiply(const Sizes& sizes, const BFloat16* a, const BFloat16* b, void* c) {
    const std::vector<Block>& blocks = Cut(sizes);
    Check(SharedPool().Run(static_cast<int>(blocks.size()), [&](int piece, int member) {
      return blocks[piece].Run(streams_[member], a, b, static_cast<float*>(c), scratch_[member]);
    }));
  }

 private:
  const std::vector<Block>& Cut(const Sizes& sizes) {
    const auto found = cuts_.find(sizes);
    if (found != cuts_.end()) return found->second;
    const bool by_rows = sizes.m >= sizes.n;
    const int64_t length = by_rows ? sizes.m : sizes.n;
    const int64_t step = CeilDiv(CeilDiv(length, SharedPool().size()), 16) * 16;  // more blocks are no faster
    std::vector<Block> blocks;
    Check(dnnl_threadpool_interop_set_max_concurrency(1));
    for (int64_t first = 0; first < length; first += step) {
      const int64_t size = std::min(step, length - first);
      if (by_rows) {
        blocks.emplace_back(engine_, sizes, first, size, 0, sizes.n);
      } else {
        blocks.emplace_back(engine_, sizes, 0, sizes.m, first, size);
      }
    }
    return cuts_.emplace(sizes, std::move(blocks)).first->second;
  }

  dnnl_engine* engine_ = nullptr;
  std::vector<dnnl_stream*> streams_;
  std::vector<Buffer> scratch_;
  Buffer operands_[3];
  std::map<Sizes, std::vector<Block>> cuts_;
};

int WithProducts(const std::function<void(Products&)>& work) {
  int status = 0;
  const int failed = Exclusively([&] {
    static Products* products = new Products;  // never destroyed, as its threads
    try {
      work(*products);
    } catch (int of_onednn) {
      status = of_onednn;
    }
  });
  return failed | status;
}

}  // namespace

extern "C" {

// x (m, k), weight (n, k) -> x weight^T (m, n).
int RowsProduct(int, void** data, int*, int64_t** shapes, const char**, void*, void*) {
  const int64_t m = shapes[0][0], k = shapes[0][1], n = shapes[1][0];
  return WithProducts([&](Products& products) {
    const BFloat16* x = products.Rounded(data[0], m * k, 0);
    const BFloat16* weight = products.Rounded(data[1], n * k, 1);
    products.Multiply({m, k, n, false, true}, x, weight, data[2]);
  });
}

// dy (m, n), x (m, k), weight (n, k) -> dx = dy weight (m, k) and dweight = dy^T x (n, k).
int RowsProductGradient(int, void** data, int*, int64_t** shapes, const char**, void*, void*) {
  const int64_t m = shapes[0][0], n = shapes[0][1], k = shapes[1][1];
  return WithProducts([&](Products& products) {
    const BFloat16* dy = products.Rounded(data[0], m * n, 0);
    const BFloat16* x = products.Rounded(data[1], m * k, 1);
    const BFloat16* weight = products.Rounded(data[2], n * k, 2);
    products.Multiply({m, n, k, false, false}, dy, weight, data[3]);
    products.Multiply({n, m, k, true, false}, dy, x, data[4]);
  });
}
}
