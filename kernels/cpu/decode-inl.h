// Attention of a few rows over stored rows, compiled once per instruction set. A row's visible slots form a
// list in ascending order: the committed ones, then its ancestors and itself. A slot's place in that list is
// its position in the sequence, wherever it stands in memory, and every sum here depends on list places
// alone: a row's result is the same bits alone, in a chain or in a tree.
#if defined(FORETELL_DECODE_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef FORETELL_DECODE_INL_H
#undef FORETELL_DECODE_INL_H
#else
#define FORETELL_DECODE_INL_H
#endif

#include <bit>

#include "kernels/cpu/decode_sequence.h"
#include "kernels/cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kernels::cpu::HWY_NAMESPACE {

// Queries that share a pass over the committed slots: as many as the registers hold. fp64 and odd head sizes
// take them one by one: they need not be fast, and every count is one more function to compile.
constexpr int kQueries = HWY_MAX_BYTES >= 64 ? 6 : 2;
template <class D>
constexpr int kQueriesOf = sizeof(hn::TFromD<D>) == 4 && hn::MaxLanes(D()) > 1 ? kQueries : 1;

// Stored rows of one head: slot t begins at base + t * stride.
template <class T>
struct Slots {
  const T* base;
  int64_t stride;
};

// The four sums over lanes, each in the same order whichever place its vector has.
template <class D>
HWY_INLINE void sum_four(D d, const hn::Vec<D>* x, hn::TFromD<D>* out) {
  if constexpr (sizeof(hn::TFromD<D>) == 4 && hn::MaxLanes(D()) >= 4) {
    const auto a = hn::Add(hn::InterleaveLower(d, x[0], x[1]), hn::InterleaveUpper(d, x[0], x[1]));
    const auto b = hn::Add(hn::InterleaveLower(d, x[2], x[3]), hn::InterleaveUpper(d, x[2], x[3]));
    const hn::Repartition<double, D> pairs;
    const auto low = hn::InterleaveLower(pairs, hn::BitCast(pairs, a), hn::BitCast(pairs, b));
    const auto high = hn::InterleaveUpper(pairs, hn::BitCast(pairs, a), hn::BitCast(pairs, b));
    const auto blocks = hn::Add(hn::BitCast(d, low), hn::BitCast(d, high));
    if constexpr (hn::MaxLanes(D()) == 16) {
      const hn::Half<D> half;
      const auto two = hn::Add(hn::LowerHalf(half, blocks), hn::UpperHalf(half, blocks));
      const hn::Half<decltype(half)> quarter;
      hn::StoreU(hn::Add(hn::LowerHalf(quarter, two), hn::UpperHalf(quarter, two)), quarter, out);
    } else if constexpr (hn::MaxLanes(D()) == 8) {
      const hn::Half<D> half;
      hn::StoreU(hn::Add(hn::LowerHalf(half, blocks), hn::UpperHalf(half, blocks)), half, out);
    } else {
      hn::StoreU(blocks, d, out);
    }
  } else {
    for (int i = 0; i < 4; ++i) out[i] = hn::GetLane(hn::SumOfLanes(d, x[i]));
  }
}

// out[r][t] = q[r] . slot(list[t]) for t in [0, count); list null: t itself. Writes up to 3 elements beyond
// count.
template <int R, class D, class T, class A>
void dot_slots(D d, int64_t width, const A* q, int64_t ldq, const Slots<T>& slots, const int32_t* list,
               int64_t count, A* out, int64_t ldo) {
  const int64_t lanes = hn::Lanes(d);
  for (int64_t t = 0; t < count; t += 4) {
    const T* row[4];
    for (int64_t i = 0; i < 4; ++i) {
      const int64_t at = std::min(t + i, count - 1);
      row[i] = slots.base + (list ? list[at] : at) * slots.stride;
    }
    hn::Vec<D> sum[R][4];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < 4; ++i) sum[r][i] = hn::Zero(d);
    for (int64_t c = 0; c < width; c += lanes) {
      hn::Vec<D> key[4];
#pragma GCC unroll 8
      for (int i = 0; i < 4; ++i) key[i] = load(d, row[i] + c, Whole{});
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const auto query = hn::LoadU(d, q + r * ldq + c);
#pragma GCC unroll 8
        for (int i = 0; i < 4; ++i) sum[r][i] = hn::MulAdd(query, key[i], sum[r][i]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sum_four(d, sum[r], out + r * ldo + t);
  }
}

template <int R, int N, class D, class T, class A>
HWY_INLINE void add_slots_block(D d, const A* weight, int64_t ldw, const Slots<T>& slots, const int32_t* list,
                                int64_t count, A* out, int64_t ldo) {
  const int64_t lanes = hn::Lanes(d);
  hn::Vec<D> sum[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) sum[r][j] = hn::LoadU(d, out + r * ldo + j * lanes);
  for (int64_t t = 0; t < count; ++t) {
    const T* row = slots.base + (list ? list[t] : t) * slots.stride;
    hn::Vec<D> value[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) value[j] = load(d, row + j * lanes, Whole{});
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const auto w = hn::Set(d, weight[r * ldw + t]);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) sum[r][j] = hn::MulAdd(w, value[j], sum[r][j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) hn::StoreU(sum[r][j], d, out + r * ldo + j * lanes);
}

// out[r] += weight[r][t] slot(list[t]), t ascending.
template <int R, class D, class T, class A>
void add_slots(D d, int64_t width, const A* weight, int64_t ldw, const Slots<T>& slots, const int32_t* list,
               int64_t count, A* out, int64_t ldo) {
  const int64_t lanes = hn::Lanes(d);
  int64_t c = 0;
  for (; c + 4 * lanes <= width; c += 4 * lanes)
    add_slots_block<R, 4>(d, weight, ldw, Slots<T>{slots.base + c, slots.stride}, list, count, out + c, ldo);
  for (; c < width; c += lanes)
    add_slots_block<R, 1>(d, weight, ldw, Slots<T>{slots.base + c, slots.stride}, list, count, out + c, ldo);
}

// The sum of x in a fixed order; elements beyond count, up to a multiple of 16, are overwritten with 0.
template <class A>
A sum_list(A* x, int64_t count) {
  const hn::ScalableTag<A> d;
  std::fill(x + count, x + padded(count), A{0});
  auto sum = hn::Zero(d);
  for (int64_t t = 0; t < padded(count); t += static_cast<int64_t>(hn::Lanes(d)))
    sum = hn::Add(sum, hn::LoadU(d, x + t));
  return hn::GetLane(hn::SumOfLanes(d, sum));
}

// A row's own part of the list: ancestors and itself, as slots. Returns their number.
inline int64_t ancestor_slots(uint64_t ancestors, int64_t first_slot, int32_t* list) {
  int64_t count = 0;
  for (; ancestors != 0; ancestors &= ancestors - 1)
    list[count++] = static_cast<int32_t>(first_slot + std::countr_zero(ancestors));
  return count;
}

// Calls fn(d) with vectors whose width divides the head size: full ones, or one lane.
template <class A, class Fn>
HWY_INLINE void with_lanes(int64_t width, Fn&& fn) {
  const hn::ScalableTag<A> full;
  if (width % static_cast<int64_t>(hn::Lanes(full)) == 0) {
    fn(full);
  } else {
    fn(hn::CappedTag<A, 1>());
  }
}

// Calls fn(std::integral_constant<int, count>(), first) for blocks of up to kMost of the task's queries,
// evenly filled.
template <int kMost, class Fn>
HWY_INLINE void for_query_blocks(const DecodeTask& t, Fn&& fn) {
  const int64_t blocks = (t.queries + kMost - 1) / kMost;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t first = t.queries * i / blocks;
    call_with<kMost>(t.queries * (i + 1) / blocks - first,
                     [&](auto count) HWY_ATTR { fn(count, t.first_query + first); });
  }
}

}  // namespace kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
