#pragma once
// The model of `foretell COMMAND RUN|CHECKPOINT [--set ...]`.
#include "launch/command_line.h"
#include "launch/job.h"
#include "trainer/model/load.h"

namespace launch {

struct PlacedModel {
  Placement placement;
  trainer::LoadedModel loaded;
  const kernels::Context& ctx() const { return placement.ctx; }
};
// Joins the job, which is to be one process, and loads the model to where its configuration wants it.
PlacedModel load_alone(Job& job, const std::string& command, const po::variables_map& values);

}  // namespace launch
