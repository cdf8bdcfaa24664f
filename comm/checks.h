#pragma once
// Argument checks shared by the communicators.
#include "comm/communicator.h"

namespace comm {

void check_dense(const char* operation, const Tensor& t);
void check_host_dense(const char* operation, const Tensor& t);
// Dense, and of a type that can be reduced; in host or device memory.
void check_reducible(const char* operation, const Tensor& t);
void check_root(const char* operation, int root, int size);
// (stripes, size, n)
void check_stripes(const char* operation, const Tensor& t, int size);

}  // namespace comm
