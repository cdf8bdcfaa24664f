#pragma once
// A piece of text from each checkpoint, so that a person sees the model learn.
#include <condition_variable>
#include <filesystem>
#include <mutex>
#include <stop_token>
#include <thread>

#include "configs/config.h"

namespace launch {

// Appends to RUN/samples.txt how a checkpoint continues the start of the first validation document. The text
// is generated on CPU cores. A failure is a warning: it must not end the training.
class Samples {
 public:
  // beside: by a thread of its own on one core, for training that leaves the cores free.
  Samples(const configs::Config& config, bool beside);
  ~Samples();  // gives up what is not written yet, once its model is loaded
  Samples(const Samples&) = delete;
  Samples& operator=(const Samples&) = delete;

  // Returns at once where a thread of its own does it. Of checkpoints that have to wait for the sample under
  // way, only the newest gets one.
  void append(const std::filesystem::path& checkpoint);
  // Waits for the last sample.
  void finish();

 private:
  void work(const std::stop_token& stop);

  const configs::Config config_;
  const bool beside_;
  std::mutex mutex_;
  std::condition_variable_any changed_;
  std::filesystem::path waiting_;  // a checkpoint without a sample, or empty
  bool busy_ = false;
  std::jthread thread_;  // ends ahead of what it uses
};

}  // namespace launch
