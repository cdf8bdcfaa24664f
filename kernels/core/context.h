#pragma once
// What every operation is given first.
#include "kernels/core/arena.h"
#include "kernels/core/device.h"

namespace kernels {

struct Context {
  Device device;
  Stream stream;
  Arena* scratch = nullptr;  // LIFO working memory: take an ArenaScope around its use
  // True while memory is being measured: operations check their arguments and return without touching data.
  bool rehearsal = false;
};

}  // namespace kernels
