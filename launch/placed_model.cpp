#include "launch/placed_model.h"

namespace launch {

PlacedModel load_alone(Job& job, const std::string& command, const po::variables_map& values) {
  comm::Session& session = job.join_alone(command);
  PlacedModel model;
  model.loaded = trainer::load_model_on(
      [&](const configs::Config& config) {
        model.placement = place(session, true, config.train.device, config.train.threads);
        return model.placement.ctx;
      },
      value<std::string>(values, "RUN"), list(values, "set"));
  return model;
}

}  // namespace launch
