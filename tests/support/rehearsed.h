#pragma once
// A context with the working memory that a call asks for, as a plan would place it.
#include "kernels/core/arena.h"
#include "kernels/core/context.h"
#include "kernels/core/stream.h"

namespace support {

struct Rehearsed {
  kernels::Arena scratch;
  kernels::Context ctx;

  template <typename Call>
  Rehearsed(kernels::Device device, kernels::Stream stream, const Call& call)
      : scratch("scratch", device),
        ctx{.device = device, .stream = stream, .scratch = &scratch, .rehearsal = true} {
    call(ctx);
    scratch.place();
    ctx.rehearsal = false;
  }
};

// Rehearses call(ctx), then makes it and waits for it.
template <typename Call>
void run_rehearsed(kernels::Device device, kernels::Stream stream, const Call& call) {
  const Rehearsed rehearsed(device, stream, call);
  call(rehearsed.ctx);
  kernels::synchronize(device, stream);
}

}  // namespace support
