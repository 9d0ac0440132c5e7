// What a thread's registers can do: the instruction that the products of bytes rest on, and nothing else.

#if defined(KERNELS_PEAK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KERNELS_PEAK_INL_H_
#undef KERNELS_PEAK_INL_H_
#else
#define KERNELS_PEAK_INL_H_
#endif

#include "hwy/highway.h"
#include "products-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kernels {
namespace HWY_NAMESPACE {

// Multiplies bytes `turns` times in each of 10 chains, more than the instruction's latency asks for. Gives the number
// of multiply-adds.
uint64_t MultiplyBytes(uint64_t turns) {
  constexpr size_t kChains = 10;
  const Ints di;
  const Shorts dh;
  const Bytes du;
  const SignedBytes ds;
  hn::Vec<Ints> chains[kChains];
#pragma GCC unroll 10
  for (size_t c = 0; c < kChains; ++c) chains[c] = hn::Set(di, static_cast<int32_t>(c));
  const auto factor = hn::Set(ds, 1);
  for (uint64_t turn = 0; turn < turns; ++turn) {
#pragma GCC unroll 10
    for (size_t c = 0; c < kChains; ++c) {
      if constexpr (kDotProducts) {
        chains[c] = hn::SumOfMulQuadAccumulate(di, hn::BitCast(du, factor), factor, chains[c]);
      } else {
        chains[c] = hn::BitCast(di, hn::SatWidenMulPairwiseAdd(dh, hn::BitCast(du, chains[c]), factor));
      }
    }
  }
  auto all = hn::Zero(di);
#pragma GCC unroll 10
  for (size_t c = 0; c < kChains; ++c) all = hn::Add(all, chains[c]);
  // A compiler leaves out what nobody reads.
  volatile int32_t read = hn::ReduceSum(di, all);
  (void)read;
  return turns * kChains * hn::MaxLanes(du);
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace kernels
HWY_AFTER_NAMESPACE();

#endif
