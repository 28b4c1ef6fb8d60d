// merge: W[a*H + p, b*V + c] (+)= s * ( sum_q L[a][b*rb + q, p] * R[b][a*rb + q, c]  +  sum_c' Lg[p', c'] * Rg[c', c''] )
//
// W is cut into k x k blocks [H, V]. Two orientations give the same sum: rows of W along M (L = B, R = A^T), or along N
// (L = A, R = B), whichever makes the columns of W unit stride. W is read and written once, in runs along its rows; the
// only memory besides is R as a panel (r elements per column of W). Each weight is one sum in a fixed order, rounded once.
#include "panels.h"

namespace gralora::cpu::GRALORA_ISA {
namespace {

template <class Acc>
struct Merge {
  static constexpr int64_t kTileRows = 4 * kMaxRows;

  int64_t rows, columns, k, r, h;  // of W in this orientation
  Param W;
  const Panels<Acc>& L;   // [k, r, rows/k]
  const Panels<Acc>& Lg;  // [k, h, rows/k]
  const Panels<Acc>& R;   // [k, r, columns/k]
  const Panels<Acc>& Rg;  // [k, h, columns/k]
  Acc scale;
  bool accumulate;

  template <class Y>
  void run(int threads) const {
    const int64_t H = rows / k, tiles = ceil_div(H, kTileRows), ranks = r / k + h;
    const ThreadBuffers<Acc> buffers(threads, kMaxRows * ranks);
    parallel_items(k * tiles, threads, [&](int64_t item, int thread) {
      const int64_t a = item / tiles, first = item % tiles * kTileRows;
      for_row_groups(smaller(kTileRows, H - first), [&](auto mr, int64_t m0) {
        for (int64_t b = 0; b < k; b++) merge_rows<decltype(mr)::value, Y>(a, b, first + m0, buffers.of(thread));
      });
    });
  }

 private:
  // left[c][m] = the ranks of row p + m that meet column block b, then the general ranks
  template <int MR>
  void gather_left(int64_t a, int64_t b, int64_t p, Acc* left) const {
    const int64_t rb = r / k;
    const auto gather = [&](const Panels<Acc>& panels, int64_t rank0, int64_t ranks, Acc* to) {
      for (int m = 0; m < MR; m++) {
        const Acc* from = panels.at(a, rank0, p + m);
        for (int64_t c = 0; c < ranks; c++) to[c * MR + m] = from[c * panels.ld()];
      }
    };
    gather(L, b * rb, rb, left);
    if (h > 0) gather(Lg, 0, h, left + rb * MR);
  }

  template <int MR, class Y>
  void merge_rows(int64_t a, int64_t b, int64_t p, Acc* left) const {
    const int64_t V = columns / k, rb = r / k;
    gather_left<MR>(a, b, p, left);
    Y* to = static_cast<Y*>(W.data) + (a * (rows / k) + p) * W.row_stride + b * V * W.column_stride;
    for_column_tiles<Acc>(round_up(V, kWidth<Acc>), [&](auto nv, int64_t c) {
      constexpr int NV = decltype(nv)::value;
      Vec<Acc> acc[MR][NV] = {};
      multiply<Acc, MR, NV>(rb, left, 1, MR, R.at(b, a * rb, c), R.ld(), acc);
      if (h > 0) multiply<Acc, MR, NV>(h, left + rb * MR, 1, MR, Rg.at(b, 0, c), Rg.ld(), acc);
      if (W.column_stride == 1 && c + NV * kWidth<Acc> <= V) {
        add_tile<MR, NV, Y>(acc, to + c);
        return;
      }
      for (int m = 0; m < MR; m++)
        for (int v = 0; v < NV; v++) add_elements<Y>(acc[m][v], to + m * W.row_stride, c + v * kWidth<Acc>, V);
    });
  }

  // All weights of the tile are loaded before one is stored: see Expand::store_tile.
  template <int MR, int NV, class Y>
  void add_tile(Vec<Acc> (&delta)[MR][NV], Y* to) const {
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 2
      for (int v = 0; v < NV; v++) {
        delta[m][v] *= scale;
        if (accumulate) delta[m][v] += load<Acc>(to + m * W.row_stride + v * kWidth<Acc>);
      }
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 2
      for (int v = 0; v < NV; v++) store<Acc>(to + m * W.row_stride + v * kWidth<Acc>, delta[m][v]);
  }

  template <class Y>
  void add_elements(Vec<Acc> delta, Y* row, int64_t c, int64_t V) const {
    for (int64_t i = 0; i < smaller(kWidth<Acc>, V - c); i++) {
      Y& weight = row[(c + i) * W.column_stride];
      const Acc add = scale * delta[i];
      weight = from_acc<Y>(accumulate ? Acc(to_acc<Acc>(weight) + add) : add);
    }
  }
};

template <class Acc>
void run(const MergeParams& p) {
  const int64_t N = p.shape.N, M = p.shape.M, k = p.shape.k, r = p.shape.r, h = p.shape.h;
  const bool along_N = p.weight.column_stride != 1 && p.weight.row_stride == 1;
  Panels<Acc> At, Ag, B, Bgt;
  At.prepare(transposed(p.adapter.A), k, r, N / k, M, p.threads);
  B.prepare(p.adapter.B, k, r, M / k, N, p.threads);
  if (h > 0) {
    Ag.prepare(blocks_of_columns(p.adapter.A_general, N / k), k, h, N / k, M, p.threads);
    Bgt.prepare(transposed(blocks_of_rows(p.adapter.B_general, M / k)), k, h, M / k, N, p.threads);
  }
  const auto run_oriented = [&](const Merge<Acc>& merge) {
    for_dtype<Acc>(p.weight.dtype,
                   [&](auto* type) { merge.template run<std::remove_pointer_t<decltype(type)>>(p.threads); });
  };
  if (along_N)
    run_oriented({N, M, k, r, h, transposed(p.weight), At, Ag, B, Bgt, Acc(p.scaling), p.accumulate});
  else
    run_oriented({M, N, k, r, h, p.weight, B, Bgt, At, Ag, Acc(p.scaling), p.accumulate});
}

}  // namespace

void merge(const MergeParams& p) {
  if constexpr (kHasFloat64) {
    if (p.accumulate_f64) return run<double>(p);
  }
  run<float>(p);
}

}  // namespace gralora::cpu::GRALORA_ISA
