#pragma once
// A small prepared data set, and a configuration of a tiny model that trains on it in
// seconds.
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "configs/config.h"
#include "tests/support/temporary_folder.h"

namespace support {

// Documents of many lengths, words repeated often enough to be learned: the same text on every call.
void write_tiny_text(const std::filesystem::path& folder, int documents = 60);
// write_tiny_text and data::prepare with the byte tokenizer, into folder / "data".
void prepare_tiny_data(const std::filesystem::path& folder);
// 2 layers of width 32, linear and softmax attention, two sequential Medusa heads, one MTP depth; run
// directory folder / "run".
configs::Config tiny_config(const std::filesystem::path& folder);
// Every tensor of the newest checkpoint of a run, byte for byte.
std::map<std::string, std::vector<char>> stored_state(const std::filesystem::path& run);
// The value of `key` on every whole line of RUN/metrics.jsonl that has it.
std::vector<double> metric(const std::filesystem::path& run, const std::string& key);

}  // namespace support
