// Attention over keys and values in tiles of 16 positions, for one kind of processor; included once for each.
//
// The order of sums: the positions of a sequence are cut into chunks of 128, counted from its first. A chunk has its own
// largest score, its own sum of weights and its own weighted values; chunks are merged in ascending order. So a
// position's result is the same whoever computes which chunk, and whatever is computed beside it.

#if defined(KERNELS_ATTENTION_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KERNELS_ATTENTION_INL_H_
#undef KERNELS_ATTENTION_INL_H_
#else
#define KERNELS_ATTENTION_INL_H_
#endif

#include <algorithm>
#include <cfloat>

#include "calls.h"
#include "hwy/highway.h"
#include "products-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kernels {
namespace HWY_NAMESPACE {

// Vectors in a tile's 16 positions.
constexpr size_t kTileVectors = kTile / kLanes;
// Queries that are computed together: what the registers hold.
constexpr size_t kMostQueries = kDotProducts ? 12 : 6;

// exp(x) for x <= 88, to 2 units in the last place; below -87.3 the smallest normal number. Polynomial of Cephes' expf.
HWY_INLINE Vector Exp(Vector x) {
  const Floats df;
  const Ints di;
  x = hn::Max(x, hn::Set(df, -87.3f));
  const Vector power = hn::Round(hn::Mul(x, hn::Set(df, 1.44269504088896341f)));
  x = hn::NegMulAdd(power, hn::Set(df, 0.693359375f), x);
  x = hn::NegMulAdd(power, hn::Set(df, -2.12194440e-4f), x);
  Vector y = hn::Set(df, 1.9875691500e-4f);
  y = hn::MulAdd(y, x, hn::Set(df, 1.3981999507e-3f));
  y = hn::MulAdd(y, x, hn::Set(df, 8.3334519073e-3f));
  y = hn::MulAdd(y, x, hn::Set(df, 4.1665795894e-2f));
  y = hn::MulAdd(y, x, hn::Set(df, 1.6666665459e-1f));
  y = hn::MulAdd(y, x, hn::Set(df, 5.0000001201e-1f));
  y = hn::Add(hn::MulAdd(y, hn::Mul(x, x), x), hn::Set(df, 1.0f));
  const auto exponent = hn::ShiftLeft<23>(hn::Add(hn::NearestInt(power), hn::Set(di, 127)));
  return hn::Mul(y, hn::BitCast(df, exponent));
}

// gate / (1 + exp(-gate)) * up
HWY_INLINE Vector SiluTimes(Vector gate, Vector up) {
  const Floats df;
  const Vector power = Exp(hn::Min(hn::Neg(gate), hn::Set(df, 88.0f)));
  return hn::Mul(hn::Div(gate, hn::Add(hn::Set(df, 1.0f), power)), up);
}

HWY_INLINE Vector Load(const float* from) { return hn::LoadU(Floats(), from); }
HWY_INLINE Vector Load(const hwy::float16_t* from) { return hn::PromoteTo(Floats(), hn::LoadU(Halves(), from)); }

inline void Store(float value, float* to) { *to = value; }
inline void Store(float value, hwy::float16_t* to) { *to = hwy::F16FromF32(value); }

// A head's query or key, rotated to its position, times `factor`.
HWY_INLINE void Rotate(const float* from, const float* cos, const float* sin, size_t head_dim, float factor,
                       float* to) {
  const Floats df;
  const Vector unit = hn::Set(df, factor);
  const size_t half = head_dim / 2;
  for (size_t i = 0; i < half; i += kLanes) {
    const Vector a = hn::LoadU(df, from + i), b = hn::LoadU(df, from + half + i);
    const Vector c = hn::LoadU(df, cos + i), s = hn::LoadU(df, sin + i);
    hn::StoreU(hn::Mul(unit, hn::NegMulAdd(b, s, hn::Mul(a, c))), df, to + i);
    hn::StoreU(hn::Mul(unit, hn::MulAdd(a, s, hn::Mul(b, c))), df, to + half + i);
  }
}

// Writes the keys and values of one position, all heads, from the projection's output of that position.
template <class T>
void KeepPosition(const LayerCall& call, size_t row, size_t step) {
  const Cache& cache = call.cache;
  const size_t head_dim = cache.head_dim, position = call.past(row) + step, lane = position % kTile;
  const size_t width = (call.heads + 2 * cache.kv_heads) * head_dim;
  const float* projected = call.projected + (row * call.width + step) * width;
  const float* cos = call.cos + position * (head_dim / 2);
  const float* sin = call.sin + position * (head_dim / 2);
  HWY_ALIGN float key[kMostHeadDim];
  for (size_t head = 0; head < cache.kv_heads; ++head) {
    const size_t tile = cache.at(row, position, head);
    T* keys = static_cast<T*>(cache.keys) + tile + lane;
    T* values = static_cast<T*>(cache.values) + tile + lane * head_dim;
    Rotate(projected + (call.heads + head) * head_dim, cos, sin, head_dim, 1.0f, key);
    const float* value = projected + (call.heads + cache.kv_heads + head) * head_dim;
    if constexpr (sizeof(T) == 2) {
      const Halves dh;
      for (size_t i = 0; i < head_dim; i += kLanes) {
        HWY_ALIGN hwy::float16_t some[kLanes];
        hn::StoreU(hn::DemoteTo(dh, hn::LoadU(Floats(), key + i)), dh, some);
        for (size_t k = 0; k < kLanes; ++k) keys[(i + k) * kTile] = some[k];
        hn::StoreU(hn::DemoteTo(dh, hn::LoadU(Floats(), value + i)), dh, values + i);
      }
    } else {
      for (size_t i = 0; i < head_dim; ++i) {
        keys[i * kTile] = key[i];
        values[i] = value[i];
      }
    }
  }
}

// What a query has seen so far: [head_dim] weighted values, then the largest score and the sum of weights.
inline size_t StateSize(size_t head_dim) { return head_dim + kLanes; }

// The scores [kQueries, kChunk] of kVectorsAtOnce vectors of positions from `keys` on.
template <size_t kQueries, size_t kVectorsAtOnce, class T>
HWY_INLINE void Scores(const float* queries, const T* keys, size_t stride, size_t head_dim, float* scores) {
  const Floats df;
  Vector sums[kQueries][kVectorsAtOnce];
#pragma GCC unroll 12
  for (size_t q = 0; q < kQueries; ++q) {
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectorsAtOnce; ++v) sums[q][v] = hn::Zero(df);
  }
  for (size_t i = 0; i < head_dim; ++i) {
    Vector key[kVectorsAtOnce];
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectorsAtOnce; ++v) {
      key[v] = Load(keys + v / kTileVectors * stride + i * kTile + v % kTileVectors * kLanes);
    }
#pragma GCC unroll 12
    for (size_t q = 0; q < kQueries; ++q) {
      const Vector query = hn::Set(df, queries[q * head_dim + i]);
#pragma GCC unroll 4
      for (size_t v = 0; v < kVectorsAtOnce; ++v) sums[q][v] = hn::MulAdd(query, key[v], sums[q][v]);
    }
  }
#pragma GCC unroll 12
  for (size_t q = 0; q < kQueries; ++q) {
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectorsAtOnce; ++v) hn::StoreU(sums[q][v], df, scores + q * kChunk + v * kLanes);
  }
}

// Adds the weighted values of `count` positions: kVectorsAtOnce vectors of a head's dimensions, from `values` on.
template <size_t kQueries, size_t kVectorsAtOnce, class T>
HWY_INLINE void WeightedValues(const float* weights, const T* values, size_t stride, size_t head_dim, size_t count,
                               float* out, size_t out_stride) {
  const Floats df;
  Vector sums[kQueries][kVectorsAtOnce];
#pragma GCC unroll 12
  for (size_t q = 0; q < kQueries; ++q) {
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectorsAtOnce; ++v) sums[q][v] = hn::Zero(df);
  }
  for (size_t first = 0; first < count; first += kTile, values += stride) {
    const size_t here = std::min(kTile, count - first);
    for (size_t i = 0; i < here; ++i) {
      Vector value[kVectorsAtOnce];
#pragma GCC unroll 4
      for (size_t v = 0; v < kVectorsAtOnce; ++v) value[v] = Load(values + i * head_dim + v * kLanes);
#pragma GCC unroll 12
      for (size_t q = 0; q < kQueries; ++q) {
        const Vector weight = hn::Set(df, weights[q * kChunk + first + i]);
#pragma GCC unroll 4
        for (size_t v = 0; v < kVectorsAtOnce; ++v) sums[q][v] = hn::MulAdd(weight, value[v], sums[q][v]);
      }
    }
  }
#pragma GCC unroll 12
  for (size_t q = 0; q < kQueries; ++q) {
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectorsAtOnce; ++v) hn::StoreU(sums[q][v], df, out + q * out_stride + v * kLanes);
  }
}

// The weights of one query's scores, in place: the first `valid` of `padded` are exponentials, the others 0. Returns the
// largest score and the sum of the weights in `state`.
HWY_INLINE void Softmax(float* scores, size_t valid, size_t padded, float* state) {
  const Floats df;
  const Vector lowest = hn::Set(df, -FLT_MAX);
  Vector most = lowest;
  for (size_t i = 0; i < padded; i += kLanes) {
    const auto mask = hn::FirstN(df, valid > i ? valid - i : 0);
    const Vector score = hn::IfThenElse(mask, hn::LoadU(df, scores + i), lowest);
    hn::StoreU(score, df, scores + i);
    most = hn::Max(most, score);
  }
  const float largest = hn::ReduceMax(df, most);
  const Vector shift = hn::Set(df, largest);
  Vector sum = hn::Zero(df);
  for (size_t i = 0; i < padded; i += kLanes) {
    const auto mask = hn::FirstN(df, valid > i ? valid - i : 0);
    const Vector weight = hn::IfThenElseZero(mask, Exp(hn::Sub(hn::LoadU(df, scores + i), shift)));
    hn::StoreU(weight, df, scores + i);
    sum = hn::Add(sum, weight);
  }
  state[0] = largest;
  state[1] = hn::ReduceSum(df, sum);
}

// One chunk of one KV head, for kQueries rotated queries [kQueries, head_dim]: `valid` of its positions count for each.
// `keys` and `values` are the chunk's first tiles, `stride` numbers apart from the next ones. Fills [kQueries] states.
template <size_t kQueries, class T>
HWY_NOINLINE void AttendChunk(const float* queries, const T* keys, const T* values, size_t stride, size_t head_dim,
                              const size_t* valid, float* states) {
  HWY_ALIGN float scores[kQueries * kChunk];
  size_t most = 0;
  for (size_t q = 0; q < kQueries; ++q) most = std::max(most, valid[q]);
  const size_t tiles = (most + kTile - 1) / kTile;
  constexpr size_t kWide = kDotProducts ? (kQueries <= 6 ? 4 : 2) : (kQueries <= 3 ? 4 : 2);
  constexpr size_t kWideTiles = kWide / kTileVectors;
  size_t tile = 0;
  for (; tile + kWideTiles <= tiles; tile += kWideTiles) {
    Scores<kQueries, kWide>(queries, keys + tile * stride, stride, head_dim, scores + tile * kTile);
  }
  for (; tile < tiles; ++tile) {
    Scores<kQueries, kTileVectors>(queries, keys + tile * stride, stride, head_dim, scores + tile * kTile);
  }
  const size_t size = StateSize(head_dim);
  for (size_t q = 0; q < kQueries; ++q) {
    Softmax(scores + q * kChunk, valid[q], tiles * kTile, states + q * size + head_dim);
  }
  constexpr size_t kDims = kQueries <= (kDotProducts ? 6 : 3) ? 4 : 2;
  size_t dim = 0;
  for (; dim + kDims * kLanes <= head_dim; dim += kDims * kLanes) {
    WeightedValues<kQueries, kDims>(scores, values + dim, stride, head_dim, most, states + dim, size);
  }
  for (; dim < head_dim; dim += kLanes) {
    WeightedValues<kQueries, 1>(scores, values + dim, stride, head_dim, most, states + dim, size);
  }
}

template <class T>
HWY_INLINE void AttendQueries(size_t queries, const float* rotated, const T* keys, const T* values, size_t stride,
                              size_t head_dim, const size_t* valid, float* states) {
#define KERNELS_CASE(n) \
  case n: return AttendChunk<n>(rotated, keys, values, stride, head_dim, valid, states);
  switch (queries) {
    KERNELS_CASE(1)
    KERNELS_CASE(2)
    KERNELS_CASE(3)
    KERNELS_CASE(4)
    KERNELS_CASE(5)
    KERNELS_CASE(6)
    default: break;
  }
  if constexpr (kMostQueries > 6) {
    switch (queries) {
      KERNELS_CASE(7)
      KERNELS_CASE(8)
      KERNELS_CASE(9)
      KERNELS_CASE(10)
      KERNELS_CASE(11)
      KERNELS_CASE(12)
      default: break;
    }
  }
#undef KERNELS_CASE
}

// Adds a chunk's state to what the earlier chunks gave.
HWY_INLINE void Merge(const float* chunk, size_t head_dim, float* state) {
  const Floats df;
  const float largest = std::max(state[head_dim], chunk[head_dim]);
  const Vector before = Exp(hn::Set(df, state[head_dim] - largest));
  const Vector now = Exp(hn::Set(df, chunk[head_dim] - largest));
  for (size_t i = 0; i < head_dim; i += kLanes) {
    const Vector kept = hn::Mul(before, hn::LoadU(df, state + i));
    hn::StoreU(hn::MulAdd(now, hn::LoadU(df, chunk + i), kept), df, state + i);
  }
  const float kept = hn::GetLane(before) * state[head_dim + 1];
  state[head_dim + 1] = std::fma(hn::GetLane(now), chunk[head_dim + 1], kept);
  state[head_dim] = largest;
}

// Divides the weighted values by the sum of the weights: a head's output.
HWY_INLINE void Finish(const float* state, size_t head_dim, float* out) {
  const Floats df;
  const Vector inverse = hn::Set(df, 1.0f / state[head_dim + 1]);
  for (size_t i = 0; i < head_dim; i += kLanes) hn::StoreU(hn::Mul(hn::LoadU(df, state + i), inverse), df, out + i);
}

// How many of a chunk's positions a query at `position` sees.
inline size_t Seen(size_t position, size_t chunk) {
  return position < chunk * kChunk ? 0 : std::min(kChunk, position + 1 - chunk * kChunk);
}

// Numbers that a thread needs: rotated queries, two sets of states, for the positions of a span.
constexpr size_t kSpan = 16;

inline size_t SpanQueries(const LayerCall& call) { return std::min(kSpan, call.width) * call.group(); }

inline size_t Workspace(const LayerCall& call) {
  const size_t head_dim = call.cache.head_dim;
  return SpanQueries(call) * (head_dim + 2 * StateSize(head_dim)) + kMostQueries * kLanes;
}

// The rotated queries of `count` positions from `step` on, of one KV head: [count, group, head_dim].
inline void RotateQueries(const LayerCall& call, size_t row, size_t head, size_t step, size_t count, float* queries) {
  const size_t head_dim = call.cache.head_dim, group = call.group();
  const size_t width = (call.heads + 2 * call.cache.kv_heads) * head_dim;
  for (size_t p = 0; p < count; ++p) {
    const size_t position = call.past(row) + step + p;
    const float* from = call.projected + (row * call.width + step + p) * width + head * group * head_dim;
    for (size_t g = 0; g < group; ++g) {
      Rotate(from + g * head_dim, call.cos + position * (head_dim / 2), call.sin + position * (head_dim / 2), head_dim,
             call.scale, queries + (p * group + g) * head_dim);
    }
  }
}

// One chunk for all queries of `count` positions from `position` on; `states` [count, group] of the chunk alone.
template <class T>
void AttendPositions(const LayerCall& call, size_t row, size_t head, size_t position, size_t count, size_t chunk,
                     const float* queries, float* states) {
  const Cache& cache = call.cache;
  const size_t group = call.group(), total = count * group, head_dim = cache.head_dim;
  const size_t first = cache.at(row, chunk * kChunk, head);
  const T* keys = static_cast<const T*>(cache.keys) + first;
  const T* values = static_cast<const T*>(cache.values) + first;
  for (size_t query = 0; query < total; query += kMostQueries) {
    const size_t some = std::min(kMostQueries, total - query);
    size_t valid[kMostQueries];
    for (size_t q = 0; q < some; ++q) valid[q] = Seen(position + (query + q) / group, chunk);
    AttendQueries(some, queries + query * head_dim, keys, values, cache.kv_heads * cache.tile(), head_dim, valid,
                  states + query * StateSize(head_dim));
  }
}

// The attention of one KV head for `count` positions of a row from `step` on, into `attended`.
template <class T>
void AttendSpan(const LayerCall& call, size_t row, size_t head, size_t step, size_t count, float* workspace) {
  const size_t head_dim = call.cache.head_dim, group = call.group(), size = StateSize(head_dim);
  const size_t position = call.past(row) + step;
  float* queries = workspace;
  float* states = queries + SpanQueries(call) * head_dim;
  float* chunk_states = states + SpanQueries(call) * size;
  RotateQueries(call, row, head, step, count, queries);
  const size_t chunks = (position + count - 1) / kChunk + 1;
  for (size_t chunk = 0; chunk < chunks; ++chunk) {
    // Positions before this chunk have seen all of theirs.
    const size_t skipped = position < chunk * kChunk ? chunk * kChunk - position : 0;
    float* into = (chunk == 0 ? states : chunk_states) + skipped * group * size;
    AttendPositions<T>(call, row, head, position + skipped, count - skipped, chunk,
                       queries + skipped * group * head_dim, into);
    if (chunk == 0) continue;
    for (size_t q = skipped * group; q < count * group; ++q)
      Merge(chunk_states + q * size, head_dim, states + q * size);
  }
  for (size_t q = 0; q < count * group; ++q) {
    const size_t at = row * call.width + step + q / group;
    Finish(states + q * size, head_dim, call.attended + (at * call.heads + head * group + q % group) * head_dim);
  }
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace kernels
HWY_AFTER_NAMESPACE();

#endif
