#pragma once
// Over one row of fp32 numbers on the host, as long as a vocabulary: every sum in fp64, in one order on every
// machine. A sum number by number would wait for each addition: 60 us for 50,000 of them.
#include <cstdint>

namespace kernels {

// sum of x_i y_i, i < n
double row_dot(const float* x, const float* y, int64_t n);
// The first index of the largest of n >= 1 numbers; some index where there are NaN.
int64_t row_argmax(const float* x, int64_t n);
// The first index i at which x_0 + ... + x_i exceeds u times the sum of all: a draw in proportion to x for a
// uniform u in [0, 1). Numbers that are not positive are passed over; one has to be.
int64_t row_draw(const float* x, int64_t n, float u);

// to_i = max(x_i - y_i, 0), i < n; to may be x.
void row_subtract(const float* x, const float* y, float* to, int64_t n);
// Divides n numbers by their sum; false, and nothing done, where that is not positive.
bool row_normalise(float* x, int64_t n);

}  // namespace kernels
