#include "kernels/core/error.h"
#include "trainer/decode/drafters/medusa.h"
#include "trainer/decode/drafters/mtp.h"
#include "trainer/decode/drafters/ngram.h"

namespace trainer {

namespace {

std::string lacks_medusa(const configs::Config& config) {
  return config.heads.medusa > 0 ? "" : "heads.medusa is 0";
}
std::string lacks_mtp(const configs::Config& config) { return config.heads.mtp > 0 ? "" : "heads.mtp is 0"; }
std::string lacks_nothing(const configs::Config&) { return ""; }

template <MedusaDrafter::Kind kind>
std::unique_ptr<Drafter> make_medusa(const Context& ctx, const Model& model, const DrafterParams& params) {
  return std::make_unique<MedusaDrafter>(ctx, model, params, kind);
}

}  // namespace

const std::vector<DrafterKind>& drafters() {
  static const std::vector<DrafterKind> kTable = {
      {"medusa", "chain", "the best token of each Medusa head", lacks_medusa,
       make_medusa<MedusaDrafter::Kind::chain>},
      {"medusa_tree", "tree", "combinations of the Medusa heads' best tokens", lacks_medusa,
       make_medusa<MedusaDrafter::Kind::tree>},
      {"mtp", "chain", "multi-token prediction modules, applied one after the other", lacks_mtp,
       [](const Context& ctx, const Model& model, const DrafterParams& params) -> std::unique_ptr<Drafter> {
         return std::make_unique<MtpDrafter>(ctx, model, params);
       }},
      {"ngram", "chain", "what followed the latest tokens when they last occurred", lacks_nothing,
       [](const Context&, const Model&, const DrafterParams& params) -> std::unique_ptr<Drafter> {
         return std::make_unique<NgramDrafter>(params);
       }},
  };
  return kTable;
}

const DrafterKind& find_drafter(const std::string& name, const configs::Config& config) {
  std::string known;
  for (const DrafterKind& kind : drafters()) {
    if (kind.name == name) {
      const std::string lack = kind.lacks(config);
      if (lack.empty()) return kind;
      throw kernels::ConfigError("drafter \"" + name + "\" cannot be used: " + lack +
                                 "; choose another drafter, or train with such heads");
    }
    known += known.empty() ? kind.name : std::string(", ") + kind.name;
  }
  throw kernels::ConfigError("unknown drafter \"" + name + "\": use none, " + known);
}

}  // namespace trainer
