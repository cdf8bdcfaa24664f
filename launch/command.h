#pragma once
// The subcommands of `foretell`: one file per subcommand below commands/, one row each in the table of
// foretell.cpp.
#include <string>
#include <vector>

#include "launch/job.h"

namespace launch {

using Arguments = std::vector<std::string>;

// Returns the exit code; an exception is reported by main in one line.
int prepare_command(const Arguments& arguments, Job& job);
int train_command(const Arguments& arguments, Job& job);
int evaluate_command(const Arguments& arguments, Job& job);
int generate_command(const Arguments& arguments, Job& job);
int inspect_command(const Arguments& arguments, Job& job);
int plan_command(const Arguments& arguments, Job& job);
int config_command(const Arguments& arguments, Job& job);

}  // namespace launch
