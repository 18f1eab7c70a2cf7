// The torch-free cores on their own: checked against plain loops, from several threads at once, so that
// the sanitizers see them. Built and run by scripts/sanitize.sh and by test_cores.py.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "core/axes.h"
#include "core/half.h"
#include "core/pooling.h"
#include "core/rows.h"

using namespace rlrp;

#define EXPECT(condition)                                                \
  do {                                                                   \
    if (!(condition)) {                                                  \
      std::fprintf(stderr, "line %d: %s\n", __LINE__, #condition);       \
      std::exit(1);                                                      \
    }                                                                    \
  } while (0)

// Every position of a simplified layout must be one element of the original, and all of them once.
void check_axes() {
  const int64_t size[3] = {4, 3, 5};
  const int64_t contiguous[3] = {15, 5, 1}, last[3] = {1, 20, 4}, broadcast[3] = {1, 0, 0};
  const int64_t* const same[2] = {contiguous, contiguous};
  EXPECT(simplify<2>(3, size, same).rank == 1);
  const int64_t* const permuted[2] = {last, last};
  EXPECT(simplify<2>(3, size, permuted).rank == 1);
  const int64_t* const mixed[3] = {contiguous, last, broadcast};
  const Axes<3> axes = simplify<3>(3, size, mixed);
  EXPECT(axes.numel() == 60);
  std::vector<int> seen(60, 0);
  for (int64_t i = 0; i < 60; ++i) {
    int64_t o[3];
    axes.offsets(i, o);
    ++seen[o[0]];
    const int64_t c = o[0] / 15, h = o[0] / 5 % 3, w = o[0] % 5;
    EXPECT(o[1] == c + 20 * h + 4 * w);
    EXPECT(o[2] == c);
  }
  for (int count : seen) EXPECT(count == 1);
  for (int64_t start = 0; start < 60; start += 7) {  // the rows from there on, in the same order
    Rows<3> rows(axes, start);
    for (int64_t i = start / axes.row() * axes.row(); i < 60; i += axes.row(), rows.next()) {
      int64_t o[3];
      axes.offsets(i, o);
      for (int k = 0; k < 3; ++k) EXPECT(rows.offset[k] == o[k]);
    }
  }
  EXPECT(simplify<3>(0, size, mixed).numel() == 1);
}

// Parts cover every element once, none reaches too far, and packs begin where parts do.
void check_parts() {
  const int64_t size[3] = {3, 40, 64};
  const int64_t dense[3] = {2560, 64, 1}, far[3] = {64, 1000000, 1}, columns[3] = {0, 1, 0};
  const int64_t* const strides[3] = {dense, far, columns};
  const Axes<3> axes = simplify<3>(3, size, strides);
  for (const int64_t most : {40, 300, 5000, 2000000, 100000000}) {
    std::vector<int> seen(axes.numel(), 0);
    int count = 0;
    in_parts(axes, most, [&](const Axes<3>& part, const Offsets<3>& from) {
      ++count;
      for (int64_t i = 0; i < part.numel(); ++i) {
        int64_t o[3];
        part.offsets(i, o);
        for (int k = 0; k < 3; ++k) EXPECT(o[k] < most);
        const int64_t at = from.of[0] + o[0];
        ++seen[at];
        EXPECT(from.of[1] + o[1] == at / 2560 * 64 + at / 64 % 40 * 1000000 + at % 64);
        EXPECT(from.of[2] + o[2] == at / 64 % 40);
      }
      for (int k = 0; k < 2; ++k) EXPECT(from.of[k] % 16 == 0);
    });
    for (int each : seen) EXPECT(each == 1);
    EXPECT((count == 1) == (most == 100000000));
  }
}

// The inputs of an output are numbered from 0, and there is room for their number and for the outputs'.
void check_counts(const Window& w) {
  for (int64_t o = 0; o < w.out; ++o) {
    int64_t number = 0;
    for (int64_t i = w.inputs(o).begin; i < w.inputs(o).end; i += w.step()) {
      EXPECT(w.number(o, i) == number++);
    }
    EXPECT(number <= w.most_inputs());
  }
  for (int64_t i = 0; i < w.in; ++i) {
    EXPECT(w.outputs(i).end - w.outputs(i).begin <= w.most_outputs());
  }
}

// outputs(i) must be exactly the outputs among whose inputs i is.
void check_windows() {
  for (int64_t in = 1; in <= 9; ++in) {
    for (int64_t out = 1; out <= 9; ++out) {
      Window w;
      w.in = in;
      w.out = out;
      w.adaptive = true;
      for (int64_t i = 0; i < in; ++i) {
        for (int64_t o = 0; o < out; ++o) {
          const Span from = w.inputs(o), to = w.outputs(i);
          EXPECT((from.begin <= i && i < from.end) == (to.begin <= o && o < to.end));
        }
      }
      check_counts(w);
    }
  }
  for (int code = 0; code < 9 * 4 * 3 * 3 * 3 * 2; ++code) {
    Window w;
    w.in = code % 9 + 1;
    w.kernel = code / 9 % 4 + 1;
    w.stride = code / 36 % 3 + 1;
    w.padding = code / 108 % 3;
    w.dilation = code / 324 % 3 + 1;
    w.out = w.padding <= w.kernel / 2 ? w.expected_out(code / 972 != 0) : -1;
    for (int64_t o = 0; o < w.out; ++o) {
      const int64_t first = o * w.stride - w.padding, last = first + (w.kernel - 1) * w.dilation;
      const Span whole = w.whole();
      EXPECT((whole.begin <= o && o < whole.end) == (first >= 0 && last < w.in));
    }
    check_counts(w);
    for (int64_t i = 0; i < w.in; ++i) {
      for (int64_t o = 0; o < w.out; ++o) {
        bool inside = false;
        const Span from = w.inputs(o), to = w.outputs(i);
        for (int64_t j = from.begin; j < from.end; j += w.step()) inside = inside || i == j;
        EXPECT(inside == (to.begin <= o && o < to.end && w.sees(o, i)));
      }
    }
  }
}

void check_halves() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float half = half_to_float(bits), bfloat = bfloat_to_float(bits);
    EXPECT(std::isnan(half) || float_to_half(half) == bits);
    EXPECT(std::isnan(bfloat) || float_to_bfloat(bfloat) == bits);
  }
  EXPECT(half_to_float(0x3c00) == 1.0f && half_to_float(0x0001) == 0x1p-24f);
  EXPECT(float_to_half(65520.0f) == 0x7c00 && float_to_half(65519.0f) == 0x7bff);
}

void check_shares() {
  const Shares<float> s = shares(1.0f, -3.0f), zero = shares(0.0f, 0.0f);
  EXPECT(s.a == 0.25f && s.b == 0.75f && zero.a == 0.5f && zero.b == 0.5f);
  const Shares<float> huge = shares(3e38f, 3e38f), tiny = shares(1e-45f, 1e-45f);
  EXPECT(huge.a == 0.5f && tiny.a == 0.5f);
}

// Several threads on neighbouring pieces of the same tensors, as the CPU kernels run them.
void check_rows() {
  constexpr int64_t count = 10007, threads = 4;
  std::vector<float> x(count), g(count), q(count), s(count), a(count), b(count);
  for (int64_t i = 0; i < count; ++i) {
    x[i] = static_cast<float>(i % 17 - 8);
    g[i] = static_cast<float>(i % 5 - 2);
  }
  std::vector<int32_t> seen(threads);
  std::vector<std::thread> pool;
  for (int64_t t = 0; t < threads; ++t) {
    pool.emplace_back([&, t] {
      const int64_t from = t * count / threads, n = (t + 1) * count / threads - from;
      using Function = Split<float, false>;
      map_row<float, Multiply<float, true>, true>(n, {&q[from]}, {&x[from], &g[from]}, nullptr);
      seen[t] = map_row<float, Divide<float>, true>(n, {&s[from]}, {&x[from], &q[from]}, nullptr);
      map_row<float, Function, true>(n, {&a[from], &b[from]}, {&x[from], &g[from], &q[from]}, nullptr);
    });
  }
  for (std::thread& thread : pool) thread.join();
  float largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    EXPECT(q[i] == std::abs(x[i]) * g[i]);
    EXPECT(s[i] == (q[i] == 0 ? 0 : x[i] / q[i]));
    EXPECT(std::abs(a[i] + b[i] - q[i]) <= 1e-5f);
    largest = std::max(largest, std::abs(s[i]));
  }
  EXPECT(*std::max_element(seen.begin(), seen.end()) == magnitude(largest));
  EXPECT(magnitude(-3.0f) == magnitude(3.0f) && magnitude(INFINITY) > magnitude(3e38f));
  EXPECT(magnitude(static_cast<float>(NAN)) > magnitude(INFINITY));
}

// One thread per input, as on the GPU: what all inputs win together is what came in.
void check_pooling() {
  Pooling p;
  p.batch = p.channels = 1;
  for (int axis = 1; axis < 3; ++axis) {
    p.axis[axis].in = 7;
    p.axis[axis].kernel = 3;
    p.axis[axis].stride = 2;
    p.axis[axis].padding = 1;
    p.axis[axis].out = p.axis[axis].expected_out(false);
  }
  std::vector<float> x(p.in_plane()), r(p.out_plane(), 1.0f), scattered(x.size(), 0.0f);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i * 7 % 5);
  std::vector<uint8_t> winners(r.size());
  const Window &down = p.axis[1], &along = p.axis[2];
  for (int64_t h = 0; h < down.out; ++h) {
    for (int64_t w = 0; w < along.out; ++w) {
      const auto [values, numbers] = winner(p, x.data(), 1, 0, h, w);
      const int64_t number = numbers[0];
      const int64_t i = down.inputs(h).begin + number / 3, j = along.inputs(w).begin + number % 3;
      EXPECT(x[p.in_index(0, i, j)] == values.at[0]);
      winners[p.out_index(0, h, w)] = static_cast<uint8_t>(number);
      scattered[p.in_index(0, i, j)] += r[p.out_index(0, h, w)];
    }
  }
  float spread = 0;
  for (int64_t h = 0; h < 7; ++h) {
    for (int64_t w = 0; w < 7; ++w) {
      EXPECT(won(p, winners.data(), r.data(), 1, 0, h, w).at[0] == scattered[p.in_index(0, h, w)]);
      spread += averaged(p, AverageRule{false, 0}, r.data(), 1, 0, h, w).at[0];
    }
  }
  EXPECT(std::abs(spread - static_cast<float>(p.out_plane())) < 1e-4f);
}

int main() {
  check_axes();
  check_parts();
  check_windows();
  check_halves();
  check_shares();
  check_rows();
  check_pooling();
  std::puts("cores: all checks passed");
}
