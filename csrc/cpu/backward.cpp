// backward, with g = dL/dy:
//   dU_j = s g_j B_j^T and s g Bg, stored as dH (project);   dx = (dH A^T + s g Bg Ag) * dropout factor (expand)
//   dB_j = s U_j^T g_j, dBg^T = s (x' Ag^T)^T g;   dA_n = x'_n^T dH_n, dAg = (s g Bg)^T x'   (weight_gradient)
//
// g is read once for dU and dB, then x once for dA while dx is written: an item is one chunk of columns for one segment of
// tokens. The chunks' parts of dU meet in `partial` and are added in the order of the chunks. Weight gradients are summed
// in a fixed tree: kTokens tokens in registers, those blocks within a segment, segments in their order. It does not depend
// on the number of threads; neither does any other sum.
#include "backward_few.h"
#include "expand.h"
#include "gradient_totals.h"
#include "project.h"

namespace gralora::cpu::GRALORA_ISA {
namespace {

template <class Acc>
struct Backward {
  explicit Backward(const BackwardParams& params) : p(params) {}

  const BackwardParams& p;
  const Shape& s = p.shape;
  const int64_t ranks = s.r + s.h, row = s.k * s.r + s.h;  // of u and dH
  const Mask no_mask = Mask(Dropout{}), mask = Mask(p.dropout);
  const Project<Acc> from_g{s.M,
                            s.k,
                            s.r,
                            s.h,
                            p.grad_y,
                            no_mask,
                            transposed(p.adapter.B),
                            blocks_of_rows(p.adapter.B_general, s.M / s.k),
                            Acc(p.scaling)};
  // U again, where forward did not keep it
  const Project<Acc> from_x{
      s.N, s.k, s.r, s.h, p.x, mask, p.adapter.A, blocks_of_rows(transposed(p.adapter.A_general), s.N / s.k), Acc(1)};
  const Expand<Acc> to_x{
      s.N,    s.k,  s.r,    s.h,     transposed(p.adapter.A), blocks_of_columns(p.adapter.A_general, s.N / s.k),
      Acc(1), mask, Rows{}, p.grad_x};
  const WeightGradient<Acc> gradient{s.k, s.r, s.h};

  Scratch scratch;
  Totals<Acc> dB{from_g.cut,      s.r,      s.h,
                 from_g.chunks(), p.grad.B, transposed(blocks_of_rows(p.grad.B_general, s.M / s.k)),
                 Acc(p.scaling)};
  Totals<Acc> dA{
      from_x.cut, s.r, s.h, from_x.chunks(), transposed(p.grad.A), blocks_of_columns(p.grad.A_general, s.N / s.k),
      Acc(1)};
  const bool want_x = p.grad_x.data != nullptr, want_H = want_x || dA.wanted();
  const bool remake_U = dB.wanted() && p.u == nullptr;

  static constexpr int64_t kSplit = 192;  // from this many tokens on there are two segments at least

  // Segments depend on T alone. A wave of them gives every thread one, or a share of the chunks.
  const int64_t wanted_segments = s.T < kSplit ? 1 : round_up(ceil_div(s.T, kSegment), 2);
  const int64_t segment_tokens = larger(round_up(ceil_div(s.T, wanted_segments), kMaxRows), kMaxRows);
  const int64_t segments = ceil_div(s.T, segment_tokens);
  const int64_t wave = segments >= p.threads
                           ? int64_t(p.threads)
                           : smaller(segments, ceil_div(4 * p.threads, smaller(from_g.chunks(), from_x.chunks())));
  const int64_t wave_tokens = wave * segment_tokens;
  const int64_t panels_size = larger(to_x.panels_size(kChunk), larger(from_g.panels_size(1), from_x.panels_size(1)));
  const int64_t block_tokens = smaller(kTokens, s.T);
  const int64_t gradient_ranks_size = round_up(ranks * segment_tokens, kWidth<Acc>);
  const int64_t expand_ranks_size = round_up(ranks * block_tokens, kWidth<Acc>) + kWidth<Acc>;
  const PerThread<Acc> buffers{scratch, p.threads,
                               larger(from_g.sums(), panels_size) + gradient_ranks_size + expand_ranks_size +
                                   Block<Acc>::size(block_tokens) + (segments == 1 ? ranks * kChunk : 0)};
  Acc* partial = scratch.take<Acc>(larger(want_H ? from_g.chunks() : 0, remake_U ? from_x.chunks() : 0) * wave_tokens *
                                   from_g.sums());
  Acc* dH = scratch.take<Acc>(want_H ? wave_tokens * row : 0);
  Acc* remade = scratch.take<Acc>(remake_U ? wave_tokens * row : 0);

  // One thread's scratch
  struct Buffers {
    Acc *panels, *gradient_ranks, *expand_ranks, *sums;
    Block<Acc> block;  // of g or x
  };
  Buffers of(int thread) const {
    Acc* panels = buffers.of(thread);
    Acc* gradient_ranks = panels + larger(from_g.sums(), panels_size);
    Acc* expand_ranks = gradient_ranks + gradient_ranks_size;
    Acc* block = expand_ranks + expand_ranks_size;
    return {panels, gradient_ranks, expand_ranks, block + Block<Acc>::size(block_tokens), {block, block_tokens}};
  }

  void run() {
    if (segments != 1) dB.reserve(scratch, wave), dA.reserve(scratch, wave);
    int64_t first = 0;
    do {  // once also where there are no tokens: the gradients are zeros then
      const int64_t count = smaller(wave, segments - first);
      if (count % p.threads == 0 || count >= 4 * p.threads)
        run_by_tokens(first, count);
      else
        run_by_columns(first, count);
      if (segments != 1) finish(dB, first, count), finish(dA, first, count);
      first += wave;
    } while (first < segments);
  }

  // A segment of tokens, `index` of its wave; its rows of `partial`, u and dH begin at `row`.
  struct Segment {
    bool first;
    int64_t index, t0, row, tokens;
  };
  Segment segment(int64_t wave_first, int64_t index) const {
    const int64_t t0 = (wave_first + index) * segment_tokens;
    return {wave_first == 0, index, t0, index * segment_tokens, smaller(segment_tokens, s.T - t0)};
  }

  // Each thread takes segments through everything.
  void run_by_tokens(int64_t wave_first, int64_t count) {
    parallel_items(count, p.threads, [&](int64_t index, int thread) {
      const Segment g = segment(wave_first, index);
      const Buffers b = of(thread);
      if (remake_U) {
        for (int64_t chunk = 0; chunk < from_x.chunks(); chunk++) project_U(g, chunk, b);
        for (int64_t m = 0; m < g.tokens; m++) reduce(from_x, g.row + m, remade, b);
      }
      for (int64_t chunk = 0; chunk < from_g.chunks(); chunk++) pass_g(g, chunk, b);
      if (!want_H) return;
      for (int64_t m = 0; m < g.tokens; m++) reduce(from_g, g.row + m, dH, b);
      for (int64_t chunk = 0; chunk < from_x.chunks(); chunk++) pass_x(g, chunk, b);
    });
  }

  // Threads share the chunks of all segments.
  void run_by_columns(int64_t wave_first, int64_t count) {
    const auto for_chunks = [&](const Project<Acc>& of_chunks, auto&& f) {
      parallel_items(count * of_chunks.chunks(), p.threads, [&](int64_t item, int thread) {
        f(segment(wave_first, item / of_chunks.chunks()), item % of_chunks.chunks(), of(thread));
      });
    };
    const int64_t rows = smaller(count * segment_tokens, s.T - wave_first * segment_tokens);
    const auto reduce_all = [&](const Project<Acc>& project, Acc* to) {
      parallel_items(rows, rows < 16 ? 1 : p.threads,
                     [&](int64_t m, int thread) { reduce(project, m, to, of(thread)); });
    };
    if (remake_U) {
      for_chunks(from_x, [&](const Segment& g, int64_t chunk, Buffers b) { project_U(g, chunk, b); });
      reduce_all(from_x, remade);
    }
    for_chunks(from_g, [&](const Segment& g, int64_t chunk, Buffers b) { pass_g(g, chunk, b); });
    if (!want_H) return;
    reduce_all(from_g, dH);
    for_chunks(from_x, [&](const Segment& g, int64_t chunk, Buffers b) { pass_x(g, chunk, b); });
  }

  void finish(const Totals<Acc>& totals, int64_t wave_first, int64_t count) const {
    if (!totals.wanted()) return;
    parallel_items(totals.chunks, p.threads, [&](int64_t chunk, int) {
      totals.finish(wave_first == 0, wave_first + count >= segments, count, chunk);
    });
  }

  void reduce(const Project<Acc>& project, int64_t m, Acc* to, Buffers b) const {
    project.reduce(partial, wave_tokens, m, b.panels, to + m * row);
  }

  void project_U(const Segment& g, int64_t chunk, Buffers b) const {
    const auto panels = from_x.read_panels(chunk, 1, g.tokens, b.panels);
    for_blocks(g, [&](int64_t m, int64_t tokens) { project_block(from_x, panels, chunk, g, m, tokens, b); });
  }

  void pass_g(const Segment& g, int64_t chunk, Buffers b) const {
    typename Project<Acc>::Panels panels;
    const Acc* u = remake_U ? remade + g.row * row : static_cast<const Acc*>(p.u) + g.t0 * row;
    if (want_H) panels = from_g.read_panels(chunk, 1, g.tokens, b.panels);
    if (dB.wanted()) gradient.read_ranks(u, from_g.cut.block(chunk), g.tokens, b.gradient_ranks);
    Acc* sums = segments == 1 ? b.sums : dB.slot(g.first, g.index, chunk);
    for_blocks(g, [&](int64_t m, int64_t tokens) {
      if (want_H)
        project_block(from_g, panels, chunk, g, m, tokens, b);
      else
        read(from_g, chunk, g.t0 + m, tokens, b);
      if (dB.wanted())
        gradient.add(b.gradient_ranks, g.tokens, m, tokens, b.block.rows, from_g.cut.length(chunk), m > 0, sums, {});
    });
    if (dB.wanted() && segments == 1) dB.write(chunk, sums);
  }

  void pass_x(const Segment& g, int64_t chunk, Buffers b) const {
    const int64_t block = from_x.cut.block(chunk), column = from_x.cut.first(chunk), columns = from_x.cut.length(chunk);
    const Acc* h = dH + g.row * row;
    typename Expand<Acc>::Panels panels;
    if (want_x) panels = to_x.read_panels(block, column, columns, g.tokens, b.panels);
    if (dA.wanted()) gradient.read_ranks(h, block, g.tokens, b.gradient_ranks);
    Acc* sums = segments == 1 ? b.sums : dA.slot(g.first, g.index, chunk);
    for_blocks(g, [&](int64_t m, int64_t tokens) {
      if (dA.wanted() || mask.on) read(from_x, chunk, g.t0 + m, tokens, b);
      if (dA.wanted())
        gradient.add(b.gradient_ranks, g.tokens, m, tokens, b.block.rows, columns, m > 0, sums,
                     next_block(from_x, chunk, g, m, tokens));
      if (want_x) expand_block(panels, block, column, columns, g.t0 + m, h + m * row, tokens, b);
    });
    if (dA.wanted() && segments == 1) dA.write(chunk, sums);
  }

  template <class F>
  static void for_blocks(const Segment& g, F&& f) {
    for (int64_t m = 0; m < g.tokens; m += kTokens) f(m, smaller(kTokens, g.tokens - m));
  }

  // What follows a block of a segment: the next tokens, or the first ones of the next chunk
  Prefetch next_block(const Project<Acc>& from, int64_t chunk, const Segment& g, int64_t m, int64_t tokens) const {
    if (m + 2 * tokens <= g.tokens) return Prefetch::of(from.x, g.t0 + m + tokens, from.cut.column(chunk));
    if (chunk + 1 < from.chunks()) return Prefetch::of(from.x, g.t0, from.cut.column(chunk + 1));
    return {};
  }

  void read(const Project<Acc>& from, int64_t chunk, int64_t t, int64_t tokens, Buffers b) const {
    read_block<Acc>(from.x, t, tokens, from.cut.column(chunk), from.cut.length(chunk), from.width, from.mask, b.block);
  }

  // Reads tokens m.. of a segment's chunk, and leaves their part of the ranks in `partial`.
  void project_block(const Project<Acc>& from, const typename Project<Acc>::Panels& panels, int64_t chunk,
                     const Segment& g, int64_t m0, int64_t tokens, Buffers b) const {
    read(from, chunk, g.t0 + m0, tokens, b);
    Prefetch prefetch = next_block(from, chunk, g, m0, tokens);
    for_row_groups(tokens, [&](auto mr, int64_t m) {
      constexpr int MR = decltype(mr)::value;
      from.template add_rows<MR>(panels, 0, from.cut.length(chunk), b.block.rows + m * kRow<Acc>, false,
                                 partial + (chunk * wave_tokens + g.row + m0 + m) * from.sums(), prefetch);
      prefetch.data += MR * prefetch.row;
    });
  }

  // dx of a block of tokens
  void expand_block(const typename Expand<Acc>::Panels& panels, int64_t block, int64_t column, int64_t columns,
                    int64_t t, const Acc* h, int64_t tokens, Buffers b) const {
    to_x.read_ranks(h, block, tokens, b.expand_ranks);
    for_dtype<Acc>(p.grad_x.dtype, [&](auto* type) {
      using X = std::remove_pointer_t<decltype(type)>;
      for_row_groups(tokens, [&](auto mr, int64_t m) {
        constexpr int MR = decltype(mr)::value;
        to_x.template run_rows<MR, X>(panels, t + m, block, column, columns, b.expand_ranks + m * ranks,
                                      b.block.draws + m * kChunk, {});
      });
    });
  }
};

template <class Acc>
void run(const BackwardParams& p) {
  if (BackwardFew<Acc>::fits(p)) return BackwardFew<Acc>{p}.run();
  Backward<Acc>(p).run();
}

}  // namespace

void backward(const BackwardParams& p) {
  if constexpr (kHasFloat64) {
    if (p.accumulate_f64) return run<double>(p);
  }
  run<float>(p);
}

}  // namespace gralora::cpu::GRALORA_ISA
