// What each command says of itself.
#include <gtest/gtest.h>

#include "configs/config.h"
#include "tests/launch/program.h"

namespace launch {
namespace {

TEST(Commands, HelpNamesEveryCommandAndEachExplainsItself) {
  const Outcome usage = foretell("--help");
  EXPECT_EQ(usage.exit_code, 0);
  for (const char* name : {"prepare", "train", "evaluate", "generate", "inspect", "plan", "config"}) {
    EXPECT_NE(usage.output.find(std::string("\n  ") + name), std::string::npos) << name;
    const Outcome help = foretell(std::string(name) + " --help");
    EXPECT_EQ(help.exit_code, 0) << name;
    EXPECT_EQ(help.errors, "") << name;
    EXPECT_EQ(help.output.rfind("usage: foretell " + std::string(name), 0), 0u) << help.output;
    EXPECT_NE(help.output.find("Examples:\n  foretell " + std::string(name)), std::string::npos) << name;
  }
}

TEST(Commands, Version) {
  const Outcome outcome = foretell("--version");
  EXPECT_EQ(outcome.exit_code, 0);
  EXPECT_EQ(outcome.output.rfind("foretell 0.", 0), 0u) << outcome.output;
}

TEST(Commands, WithoutArgumentsUsageAndExitCodeTwo) {
  const Outcome outcome = foretell("");
  EXPECT_EQ(outcome.exit_code, 2);
  EXPECT_NE(outcome.output.find("usage: foretell COMMAND"), std::string::npos);
}

TEST(Commands, ConfigListIsAFileWithTheDefaults) {
  const Outcome outcome = foretell("config list");
  ASSERT_EQ(outcome.exit_code, 0);
  const configs::Config parsed = configs::parse_config(outcome.output, "list");
  EXPECT_EQ(configs::to_ini(parsed), configs::to_ini(configs::Config{}));
}

TEST(Commands, ConfigDescribe) {
  const Outcome key = foretell("config describe model.norm");
  EXPECT_EQ(key.exit_code, 0);
  EXPECT_NE(key.output.find("rms | layer"), std::string::npos) << key.output;
  const Outcome section = foretell("config describe optim");
  EXPECT_NE(section.output.find("optim.warmup"), std::string::npos) << section.output;
  EXPECT_EQ(section.output.find("model."), std::string::npos) << section.output;
}

}  // namespace
}  // namespace launch
