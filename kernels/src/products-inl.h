// Products of tiles with rows of activations, for one kind of processor; included once for each.
//
// The order of sums: an output is one accumulator, to which the blocks of 32 inputs are added in ascending order, for
// each the minimum times the activations' sum first, then the product of the codes, which is an exact integer. So an
// output has the same bits however many rows and outputs are computed together.

#if defined(KERNELS_PRODUCTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KERNELS_PRODUCTS_INL_H_
#undef KERNELS_PRODUCTS_INL_H_
#else
#define KERNELS_PRODUCTS_INL_H_
#endif

#include <algorithm>
#include <cmath>

#include "blocks.h"
#include "calls.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using Floats = hn::CappedTag<float, 16>;
using Ints = hn::RebindToSigned<Floats>;
using Bytes = hn::Repartition<uint8_t, Floats>;
using SignedBytes = hn::Repartition<int8_t, Floats>;
using Shorts = hn::Repartition<int16_t, Floats>;
using Halves = hn::Rebind<hwy::float16_t, Floats>;
using Vector = hn::Vec<Floats>;

// Numbers in a vector, and vectors in the 32 outputs of a tile.
constexpr size_t kLanes = hn::MaxLanes(Floats());
constexpr size_t kVectors = kBlock / kLanes;
// Processors that multiply bytes and add them to 32-bit sums at once have 32 registers too.
constexpr bool kDotProducts = HWY_TARGET <= HWY_AVX3_DL;
// Blocks between what is computed and what is fetched from memory, where memory is the limit.
constexpr size_t kBlocksAhead = 24;

// Keeps a sum in its register: GCC would compute all products of a block before their sums, for which there is no room.
template <class V>
HWY_INLINE void Pin(V& sum) {
  asm volatile("" : "+x"(sum.raw));
}

HWY_INLINE Vector FromHalves(const uint8_t* from) {
  return hn::PromoteTo(Floats(), hn::LoadU(Halves(), reinterpret_cast<const hwy::float16_t*>(from)));
}

// Codes and scales of one block of 32 numbers.
HWY_INLINE void QuantizeBlock(const Vector (&values)[kVectors], int8_t* codes, float* scales) {
  const Floats df;
  const Ints di;
  Vector most = hn::Abs(values[0]);
#pragma GCC unroll 4
  for (size_t v = 1; v < kVectors; ++v) most = hn::Max(most, hn::Abs(values[v]));
  const float largest = hn::ReduceMax(df, most);
  const Vector inverse = hn::Set(df, largest > 0 ? 127.0f / largest : 0.0f);
  auto sum = hn::Zero(di);
#pragma GCC unroll 4
  for (size_t v = 0; v < kVectors; ++v) {
    const auto rounded = hn::NearestInt(hn::Mul(values[v], inverse));
    sum = hn::Add(sum, rounded);
    const hn::Rebind<int8_t, Floats> narrow;
    hn::StoreU(hn::DemoteTo(narrow, rounded), narrow, codes + v * kLanes);
  }
  scales[0] = largest / 127.0f;
  scales[1] = scales[0] * static_cast<float>(hn::ReduceSum(di, sum));
}

// Writes a block of a row of activations: its codes, or itself in float arithmetic.
HWY_INLINE void WriteBlock(const Vector (&values)[kVectors], const Activations& to, size_t row, size_t block) {
  if (to.in_float) {
    float* plain = to.plain + row * to.inputs + block * kBlock;
    for (size_t v = 0; v < kVectors; ++v) hn::StoreU(values[v], Floats(), plain + v * kLanes);
  } else {
    QuantizeBlock(values, to.codes + to.at(row, block) * kBlock, to.scales + to.at(row, block) * 2);
  }
}

HWY_INLINE void WriteRow(const float* values, const Activations& to, size_t row) {
  for (size_t block = 0; block < to.inputs / kBlock; ++block) {
    Vector loaded[kVectors];
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectors; ++v) loaded[v] = hn::LoadU(Floats(), values + block * kBlock + v * kLanes);
    WriteBlock(loaded, to, row, block);
  }
}

// The RMS norm of a row times `scale`, as activations.
HWY_INLINE void NormRow(const float* values, const float* scale, float epsilon, const Activations& to, size_t row) {
  const Floats df;
  Vector squares = hn::Zero(df);
  for (size_t i = 0; i < to.inputs; i += kLanes) {
    const Vector value = hn::LoadU(df, values + i);
    squares = hn::MulAdd(value, value, squares);
  }
  const float mean = hn::ReduceSum(df, squares) / static_cast<float>(to.inputs);
  const Vector inverse = hn::Set(df, 1.0f / std::sqrt(mean + epsilon));
  for (size_t block = 0; block < to.inputs / kBlock; ++block) {
    Vector normed[kVectors];
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectors; ++v) {
      const size_t i = block * kBlock + v * kLanes;
      normed[v] = hn::Mul(hn::Mul(hn::LoadU(df, values + i), inverse), hn::LoadU(df, scale + i));
    }
    WriteBlock(normed, to, row, block);
  }
}

// The sums of codes times activations of one block, for kRows rows and kColumns vectors of outputs.
template <BlockType kType, size_t kRows, size_t kColumns>
HWY_INLINE void SumCodes(const uint8_t* tile, const int8_t* codes, hn::Vec<Ints> (&sums)[kRows][kColumns]) {
  const Ints di;
  const Bytes du;
  const SignedBytes ds;
  const auto four = [&](size_t row, size_t input) HWY_ATTR {  // the same four activations for each output
    int32_t bytes;
    __builtin_memcpy(&bytes, codes + row * kBlock + input, 4);
    return hn::BitCast(ds, hn::Set(di, bytes));
  };
  constexpr size_t kParts = CodeBytes(kType) / 128;
  if constexpr (kDotProducts) {
#pragma GCC unroll 8
    for (size_t j = 0; j < kParts; ++j) {
      hn::Vec<Bytes> low[kColumns], high[kColumns];
#pragma GCC unroll 4
      for (size_t c = 0; c < kColumns; ++c) {
        const auto packed = hn::LoadU(du, tile + j * 128 + c * 4 * kLanes);
        if constexpr (kType == BlockType::kQ8_0) {
          low[c] = packed;
        } else {
          low[c] = hn::And(packed, hn::Set(du, 15));
          high[c] = hn::And(hn::BitCast(du, hn::ShiftRight<4>(hn::BitCast(Shorts(), packed))), hn::Set(du, 15));
        }
      }
#pragma GCC unroll 8
      for (size_t r = 0; r < kRows; ++r) {
        const auto first = four(r, 4 * j);
#pragma GCC unroll 4
        for (size_t c = 0; c < kColumns; ++c) {
          sums[r][c] = hn::SumOfMulQuadAccumulate(di, low[c], first, j == 0 ? hn::Zero(di) : sums[r][c]);
        }
        if constexpr (kType != BlockType::kQ8_0) {
          const auto second = four(r, 16 + 4 * j);
#pragma GCC unroll 4
          for (size_t c = 0; c < kColumns; ++c) {
            sums[r][c] = hn::SumOfMulQuadAccumulate(di, high[c], second, sums[r][c]);
          }
        }
      }
    }
  } else if constexpr (kType == BlockType::kQ8_0) {
    const Shorts dh;
    const auto ones = hn::Set(dh, 1);
#pragma GCC unroll 8
    for (size_t j = 0; j < kParts; ++j) {
#pragma GCC unroll 4
      for (size_t c = 0; c < kColumns; ++c) {
        const auto packed = hn::LoadU(du, tile + j * 128 + c * 4 * kLanes);
        // Codes without their sign, so that two products fit 16 bits; the activations take the sign.
        const auto code = hn::BitCast(ds, hn::Xor(packed, hn::Set(du, 128)));
        const auto size = hn::BitCast(du, hn::Abs(code));
#pragma GCC unroll 8
        for (size_t r = 0; r < kRows; ++r) {
          const auto turned = hn::IfNegativeThenNegOrUndefIfZero(code, four(r, 4 * j));
          const auto pairs = hn::SatWidenMulPairwiseAdd(dh, size, turned);
          const auto sum = hn::WidenMulPairwiseAdd(di, pairs, ones);
          sums[r][c] = j == 0 ? sum : hn::Add(sums[r][c], sum);
          Pin(sums[r][c]);
        }
      }
    }
  } else {
    // 16 products of a code below 16 and an activation of at most 127 fit 16 bits.
    const Shorts dh;
    hn::Vec<Shorts> pairs[kRows][kColumns];
#pragma GCC unroll 8
    for (size_t j = 0; j < kParts; ++j) {
#pragma GCC unroll 4
      for (size_t c = 0; c < kColumns; ++c) {
        const auto packed = hn::LoadU(du, tile + j * 128 + c * 4 * kLanes);
        const auto low = hn::And(packed, hn::Set(du, 15));
        const auto high = hn::And(hn::BitCast(du, hn::ShiftRight<4>(hn::BitCast(Shorts(), packed))), hn::Set(du, 15));
#pragma GCC unroll 8
        for (size_t r = 0; r < kRows; ++r) {
          const auto both = hn::Add(hn::SatWidenMulPairwiseAdd(dh, low, four(r, 4 * j)),
                                    hn::SatWidenMulPairwiseAdd(dh, high, four(r, 16 + 4 * j)));
          pairs[r][c] = j == 0 ? both : hn::Add(pairs[r][c], both);
          Pin(pairs[r][c]);
        }
      }
    }
#pragma GCC unroll 8
    for (size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (size_t c = 0; c < kColumns; ++c) sums[r][c] = hn::WidenMulPairwiseAdd(di, pairs[r][c], hn::Set(dh, 1));
    }
  }
}

// kRows rows times kColumns vectors of a strip's outputs, into `out` [kRows, stride].
template <BlockType kType, size_t kRows, size_t kColumns, bool kFetch>
HWY_INLINE void MultiplyColumns(const uint8_t* tile, size_t blocks, size_t column, const Activations& x, float* out,
                                size_t stride) {
  const Floats df;
  constexpr size_t kBytes = TileBytes(kType), kCodes = CodeBytes(kType);
  // Unsigned codes of a type without minimums are 8 or 128 too large.
  constexpr bool kHasMinimum = kType != BlockType::kQ8_0 || kDotProducts;
  constexpr float kOffset = kType == BlockType::kQ8_0 ? -128.0f : -8.0f;
  Vector result[kRows][kColumns];
#pragma GCC unroll 8
  for (size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (size_t c = 0; c < kColumns; ++c) result[r][c] = hn::Zero(df);
  }
  for (size_t block = 0; block < blocks; ++block, tile += kBytes) {
    if constexpr (kFetch) {
#pragma GCC unroll 17
      for (size_t line = 0; line < kBytes; line += 64) __builtin_prefetch(tile + kBlocksAhead * kBytes + line);
    }
    hn::Vec<Ints> sums[kRows][kColumns];
    SumCodes<kType, kRows, kColumns>(tile + column * 4 * kLanes, x.codes + block * kGroup * kBlock, sums);
    Vector scale[kColumns], minimum[kColumns];
#pragma GCC unroll 4
    for (size_t c = 0; c < kColumns; ++c) {
      const uint8_t* at = tile + kCodes + (column + c) * 2 * kLanes;
      scale[c] = FromHalves(at);
      if constexpr (kType == BlockType::kQ4_1) minimum[c] = FromHalves(at + 2 * kBlock);
      if constexpr (kType != BlockType::kQ4_1 && kHasMinimum) minimum[c] = hn::Mul(scale[c], hn::Set(df, kOffset));
    }
#pragma GCC unroll 8
    for (size_t r = 0; r < kRows; ++r) {
      const float* scales = x.scales + (block * kGroup + r) * 2;
      const Vector unit = hn::Set(df, scales[0]), sum = hn::Set(df, scales[1]);
#pragma GCC unroll 4
      for (size_t c = 0; c < kColumns; ++c) {
        if constexpr (kHasMinimum) result[r][c] = hn::MulAdd(minimum[c], sum, result[r][c]);
        result[r][c] = hn::MulAdd(hn::ConvertTo(df, sums[r][c]), hn::Mul(scale[c], unit), result[r][c]);
      }
    }
  }
#pragma GCC unroll 8
  for (size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (size_t c = 0; c < kColumns; ++c) hn::StoreU(result[r][c], df, out + r * stride + (column + c) * kLanes);
  }
}

// How many vectors of outputs are computed together for so many rows: what the registers hold.
constexpr size_t ColumnsFor(size_t rows) { return kDotProducts || rows == 3 || rows == 4 ? 2 : rows <= 2 ? 4 : 1; }

// kRows rows times the 32 outputs of a strip.
template <BlockType kType, size_t kRows, bool kFetch>
HWY_NOINLINE void MultiplyStrip(const uint8_t* strip, size_t blocks, const Activations& x, float* out, size_t stride) {
  constexpr size_t kColumns = ColumnsFor(kRows);
  for (size_t column = 0; column < kVectors; column += kColumns) {
    // The first columns of a strip bring all of it into the cache.
    if (kFetch && column == 0) {
      MultiplyColumns<kType, kRows, kColumns, true>(strip, blocks, column, x, out, stride);
    } else {
      MultiplyColumns<kType, kRows, kColumns, false>(strip, blocks, column, x, out, stride);
    }
  }
}

// The weight of a tile, as a float.
inline float Weight(const uint8_t* tile, BlockType type, size_t output, size_t input) {
  const auto half = [&](size_t at) {
    hwy::float16_t value;
    __builtin_memcpy(&value, tile + at + 2 * output, 2);
    return hwy::F32FromF16(value);
  };
  const float scale = half(CodeBytes(type));
  if (type == BlockType::kQ8_0) {
    return scale * static_cast<float>(static_cast<int>(tile[input / 4 * 128 + output * 4 + input % 4]) - 128);
  }
  const uint8_t both = tile[input % 16 / 4 * 128 + output * 4 + input % 4];
  const int code = input < 16 ? both & 15 : both >> 4;
  if (type == BlockType::kQ4_0) return scale * static_cast<float>(code - 8);
  return std::fma(scale, static_cast<float>(code), half(CodeBytes(type) + 2 * kBlock));
}

// The reference: the same outputs from float activations, input by input.
inline void MultiplyInFloat(const Tiles& matrix, size_t tile, const Activations& x, size_t rows, float* out,
                            size_t stride) {
  const Floats df;
  const uint8_t* strip = matrix.strip(tile);
  for (size_t row = 0; row < rows; ++row) std::fill_n(out + row * stride, kBlock, 0.0f);
  for (size_t block = 0; block < matrix.blocks(); ++block, strip += TileBytes(matrix.type)) {
    for (size_t input = 0; input < kBlock; ++input) {
      HWY_ALIGN float weights[kBlock];
      for (size_t output = 0; output < kBlock; ++output) weights[output] = Weight(strip, matrix.type, output, input);
      for (size_t row = 0; row < rows; ++row) {
        const Vector value = hn::Set(df, x.plain[row * x.inputs + block * kBlock + input]);
        for (size_t i = 0; i < kBlock; i += kLanes) {
          float* sum = out + row * stride + i;
          hn::StoreU(hn::MulAdd(value, hn::Load(df, weights + i), hn::LoadU(df, sum)), df, sum);
        }
      }
    }
  }
}

template <BlockType kType, bool kFetch>
HWY_INLINE void MultiplyRows(const uint8_t* strip, size_t blocks, const Activations& x, size_t rows, float* out,
                             size_t stride) {
  static_assert(kGroup == 6);
  switch (rows) {
    case 1: return MultiplyStrip<kType, 1, kFetch>(strip, blocks, x, out, stride);
    case 2: return MultiplyStrip<kType, 2, kFetch>(strip, blocks, x, out, stride);
    case 3: return MultiplyStrip<kType, 3, kFetch>(strip, blocks, x, out, stride);
    case 4: return MultiplyStrip<kType, 4, kFetch>(strip, blocks, x, out, stride);
    case 5: return MultiplyStrip<kType, 5, kFetch>(strip, blocks, x, out, stride);
    default: return MultiplyStrip<kType, 6, kFetch>(strip, blocks, x, out, stride);
  }
}

// `rows` rows times the strips `first`..`last` of the matrix; `finish(row, rows, tile, results)` gets the results
// [rows, 32] of each strip, and may keep no pointer to them.
template <BlockType kType, class Finish>
void MultiplyTyped(const Tiles& matrix, size_t first, size_t last, const Activations& x, size_t rows,
                   const Finish& finish) {
  HWY_ALIGN float results[kGroup * kBlock];
  for (size_t tile = first; tile < last; ++tile) {
    const uint8_t* strip = matrix.strip(tile);
    for (size_t row = 0; row < rows; row += kGroup) {
      const size_t count = std::min(kGroup, rows - row);
      const Activations some = x.from(row);
      if (x.in_float) {
        MultiplyInFloat(matrix, tile, some, count, results, kBlock);
      } else if (rows <= kGroup) {
        MultiplyRows<kType, true>(strip, matrix.blocks(), some, count, results, kBlock);
      } else {
        MultiplyRows<kType, false>(strip, matrix.blocks(), some, count, results, kBlock);
      }
      finish(row, count, tile, results);
    }
  }
}

template <class Finish>
void Multiply(const Tiles& matrix, size_t first, size_t last, const Activations& x, size_t rows, const Finish& finish) {
  switch (matrix.type) {
    case BlockType::kQ4_0: return MultiplyTyped<BlockType::kQ4_0>(matrix, first, last, x, rows, finish);
    case BlockType::kQ4_1: return MultiplyTyped<BlockType::kQ4_1>(matrix, first, last, x, rows, finish);
    case BlockType::kQ8_0: return MultiplyTyped<BlockType::kQ8_0>(matrix, first, last, x, rows, finish);
  }
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace kernels
HWY_AFTER_NAMESPACE();

#endif
