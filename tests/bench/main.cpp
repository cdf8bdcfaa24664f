// Every benchmark program's main: results carry the device they were measured on.
#include <benchmark/benchmark.h>

#include "kernels/core/device.h"

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  benchmark::AddCustomContext("device", kernels::describe({}));
  if (kernels::cuda_device_count() > 0)
    benchmark::AddCustomContext("gpu", kernels::describe({kernels::Device::Kind::cuda, 0}));
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
