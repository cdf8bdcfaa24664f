// Every benchmark program's main: results carry the device they were measured on.
#include <benchmark/benchmark.h>

#include "kernels/core/device.h"

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  benchmark::AddCustomContext("device", kernels::describe({}));
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
