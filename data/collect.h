#pragma once
// The documents that `prepare` works on: read, without duplicates, split.
#include <functional>
#include <string>
#include <vector>

#include "data/formats/reader.h"
#include "data/prepare.h"

namespace data {

struct Collection {
  std::vector<Document> train, validation;
};

// Fills the counts of files, documents, duplicates and skipped. DataError if nothing is usable.
Collection collect_documents(const PrepareParams& params, PrepareSummary& summary,
                             const std::function<void(const std::string&, double)>& progress);

}  // namespace data
