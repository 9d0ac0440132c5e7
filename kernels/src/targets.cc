// Compiles the code for each kind of processor that it is written for, and chooses one of them.
#include "calls.h"

// Highway compiles for these, and for the baseline of x86-64, for which we have no code.
#undef HWY_DISABLED_TARGETS
#define HWY_DISABLED_TARGETS (~(HWY_AVX3_DL | HWY_AVX2 | HWY_SSE2))
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "targets.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#if HWY_TARGET != HWY_SSE2
#include "layer-inl.h"
#include "peak-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kernels {
namespace HWY_NAMESPACE {

const Target kTarget = {
    HWY_TARGET == HWY_AVX2 ? "avx2" : "avx512-vnni", RunLayer, RunHead, LookUp, WorkspaceOf, MultiplyBytes};

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace kernels
HWY_AFTER_NAMESPACE();
#endif

#if HWY_ONCE
#include <cpuid.h>

namespace kernels {
namespace {

// The register state that the operating system saves, as XGETBV tells it.
uint32_t SavedState() noexcept {
  uint32_t low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

constexpr uint32_t Bits() { return 0; }
template <class... Rest>
constexpr uint32_t Bits(uint32_t bit, Rest... rest) {
  return 1U << bit | Bits(rest...);
}

// CPUID's bits. Leaf 1, ECX: FMA, OSXSAVE, AVX, F16C. Leaf 7, EBX: BMI1, AVX2, BMI2; AVX-512 F, DQ, CD, BW, VL.
// Leaf 7, ECX: VBMI, VBMI2, GFNI, VAES, VPCLMULQDQ, VNNI, BITALG, VPOPCNTDQ: all that Highway's target may use.
constexpr uint32_t kLeaf1 = Bits(12U, 27U, 28U, 29U);
constexpr uint32_t kAvx2 = Bits(3U, 5U, 8U);
constexpr uint32_t kAvx512 = Bits(16U, 17U, 28U, 30U, 31U);
constexpr uint32_t kAvx512More = Bits(1U, 6U, 8U, 9U, 10U, 11U, 12U, 14U);
// XGETBV's bits: the halves of AVX's registers, and AVX-512's masks and registers.
constexpr uint32_t kAvxState = Bits(1U, 2U);
constexpr uint32_t kAvx512State = Bits(1U, 2U, 5U, 6U, 7U);

constexpr bool HasAll(uint32_t present, uint32_t wanted) { return (present & wanted) == wanted; }

}  // namespace

const Target* ChooseTarget() noexcept {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) == 0 || !HasAll(ecx, kLeaf1)) return nullptr;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0 || !HasAll(ebx, kAvx2)) return nullptr;
  const uint32_t saved = SavedState();
  if (HasAll(ebx, kAvx512) && HasAll(ecx, kAvx512More) && HasAll(saved, kAvx512State)) return &N_AVX3_DL::kTarget;
  return HasAll(saved, kAvxState) ? &N_AVX2::kTarget : nullptr;
}

}  // namespace kernels
#endif
