#include "trainer/decode/report.h"

#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <fstream>
#include <nlohmann/json.hpp>
#include <system_error>

#include "data/files.h"
#include "kernels/core/error.h"
#include "trainer/decode/evaluate.h"

namespace trainer {

using Json = nlohmann::ordered_json;

ReportResult summarise(const Trial& trial, const std::vector<Trial>& trials) {
  const Trial& baseline = baseline_of(trials, trial);
  const DecodeRun& run = trial.totals;
  const double steps = static_cast<double>(std::max<int64_t>(run.steps, 1)), ms = 1e3 / steps;
  ReportResult result;
  result.drafter = trial.drafter;
  result.shape = trial.shape;
  result.acceptance = to_string(trial.settings.acceptance);
  result.temperature = trial.settings.temperature;
  result.drafts = trial.drafts;
  result.tokens_per_second = trial.speed();
  result.speedup = speedup(trial, baseline);
  result.mean_accepted_length =
      static_cast<double>(run.tokens) / static_cast<double>(std::max<int64_t>(run.sequence_steps, 1));
  for (size_t d = 0; d < run.proposed.size() && run.proposed[d] > 0; ++d)
    result.acceptance_by_position.push_back(static_cast<double>(run.reached[d]) /
                                            static_cast<double>(run.proposed[d]));
  result.time_ms = {run.times.draft * ms, run.times.verify * ms, run.times.sample * ms,
                    run.times.commit * ms};
  result.time_to_first_token_ms = spread_of(trial.first_token_ms).median;
  result.distinct_4 = distinct_4(trial.texts);
  if (trial.settings.acceptance == Acceptance::greedy) result.identical_to_baseline = trial.identical;
  result.predicted_speedup = trial.choice.predicted_speedup;
  result.predicted_speedups = trial.choice.speedups;
  return result;
}

std::vector<TrainingPoint> read_training(const std::filesystem::path& run) {
  std::vector<TrainingPoint> points;
  std::ifstream in(run / "metrics.jsonl");
  std::string line;
  const auto number = [](const Json& json, const char* key) {
    return json.contains(key) && json[key].is_number() ? json[key].get<double>()
                                                       : std::numeric_limits<double>::quiet_NaN();
  };
  while (std::getline(in, line)) {
    const Json json = Json::parse(line, nullptr, false);
    // A line cut short by a crash, and validation lines, are left out.
    if (!json.is_object() || !json.contains("loss")) continue;
    TrainingPoint point{number(json, "step"), number(json, "loss"), number(json, "loss_scale"), false, {}};
    point.skipped = json.contains("skipped") && json["skipped"].is_boolean() && json["skipped"].get<bool>();
    if (json.contains("losses") && json["losses"].is_object())
      for (const auto& [name, value] : json["losses"].items())
        if (value.is_number()) point.losses.emplace_back(name, value.get<double>());
    points.push_back(std::move(point));
  }
  return points;
}

namespace {

Json to_json(const ReportResult& r) {
  return {{"drafter", r.drafter},
          {"shape", r.shape},
          {"acceptance", r.acceptance},
          {"temperature", r.temperature},
          {"batch", r.batch},
          {"drafts", r.drafts},
          {"tokens_per_second", r.tokens_per_second.median},
          {"tokens_per_second_spread", {r.tokens_per_second.low, r.tokens_per_second.high}},
          {"speedup", r.speedup.median},
          {"speedup_spread", {r.speedup.low, r.speedup.high}},
          {"mean_accepted_length", r.mean_accepted_length},
          {"acceptance_by_position", r.acceptance_by_position},
          {"time_ms",
           {{"draft", r.time_ms.draft},
            {"verify", r.time_ms.verify},
            {"sample", r.time_ms.sample},
            {"commit", r.time_ms.commit}}},
          {"time_to_first_token_ms", r.time_to_first_token_ms},
          {"distinct_4", r.distinct_4},
          {"identical_to_baseline", r.identical_to_baseline ? Json(*r.identical_to_baseline) : Json(nullptr)},
          {"predicted_speedup", r.predicted_speedup},
          {"predicted_speedup_by_drafts", r.predicted_speedups}};
}

}  // namespace

std::string report_json(const Report& report) {
  Json json = {{"checkpoint", report.checkpoint},
               {"step", report.step},
               {"device", report.device},
               {"date", report.date},
               {"model", report.model},
               {"validation_perplexity", report.validation_perplexity},
               {"validation_tokens", report.validation_tokens}};
  for (const auto& [name, loss] : report.validation_losses) json["validation_losses"][name] = loss;
  if (report.validation_bits_per_byte) {
    json["validation_bits_per_byte"] = *report.validation_bits_per_byte;
    json["anchors"] = Json::array();
    for (const TextAnchor& anchor : report.anchors)
      json["anchors"].push_back({{"model", anchor.model}, {"bits_per_byte", anchor.bits_per_byte}});
  } else {
    json["no_bits_per_byte"] = kNoBitsPerByte;
  }
  const double speed = report.baseline.median;
  json["baseline"] = {{"tokens_per_second", speed},
                      {"tokens_per_second_spread", {report.baseline.low, report.baseline.high}},
                      {"ms_per_token", speed > 0 ? 1e3 / speed : 0},
                      {"time_to_first_token_ms", report.baseline_first_token_ms},
                      {"distinct_4", report.baseline_distinct_4},
                      {"weight_bytes", report.weight_bytes},
                      {"weight_bytes_per_second", static_cast<double>(report.weight_bytes) * speed}};
  json["step_cost_ms"] = report.step_cost_ms;
  json["prompts"] = {{"count", report.prompts},         {"prompt_tokens", report.prompt_tokens},
                     {"max_tokens", report.max_tokens}, {"text_distinct_4", report.text_distinct_4},
                     {"no_repeat", report.no_repeat},   {"rounds", report.rounds}};
  json["results"] = Json::array();
  for (const ReportResult& result : report.results) json["results"].push_back(to_json(result));
  return json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
}

void check_writable(const std::filesystem::path& folder) {
  const auto refuse = [&](const std::string& why) {
    throw kernels::DataError("cannot write the report into " + folder.string() + " (" + why +
                             "): name another folder with --output");
  };
  std::filesystem::path there = std::filesystem::absolute(folder).lexically_normal();
  std::error_code error;
  while (!std::filesystem::exists(there, error)) {
    if (error) refuse(error.message());
    there = there.parent_path();
  }
  if (!std::filesystem::is_directory(there)) refuse(there.string() + " is not a folder");
  if (::access(there.c_str(), W_OK | X_OK) != 0)
    refuse(there.string() + ": " + std::generic_category().message(errno));
}

namespace {

// Columns padded to their widest cell; the first `left` columns are words.
std::string align(const std::vector<std::vector<std::string>>& rows, size_t left) {
  std::vector<size_t> widths(rows.front().size());
  for (const auto& row : rows)
    for (size_t c = 0; c < row.size(); ++c) widths[c] = std::max(widths[c], row[c].size());
  std::string text;
  for (const auto& row : rows) {
    std::string line;
    for (size_t c = 0; c < row.size(); ++c)
      line +=
          c < left ? fmt::format("{:<{}}  ", row[c], widths[c]) : fmt::format("{:>{}}  ", row[c], widths[c]);
    line.erase(line.find_last_not_of(' ') + 1);
    text += line + "\n";
  }
  return text;
}

std::vector<std::string> table_row(const Json& r) {
  const Json& same = r.at("identical_to_baseline");
  return {r.at("drafter") == "none" ? "plain" : r.at("drafter").get<std::string>(),
          r.at("shape"),
          r.at("acceptance"),
          fmt::format("{:g}", r.at("temperature").get<double>()),
          fmt::format("{}", r.at("drafts").get<int64_t>()),
          fmt::format("{:.0f}", r.at("tokens_per_second").get<double>()),
          fmt::format("{:.0f}-{:.0f}", r.at("tokens_per_second_spread").at(0).get<double>(),
                      r.at("tokens_per_second_spread").at(1).get<double>()),
          fmt::format("{:.2f}x", r.at("speedup").get<double>()),
          fmt::format("{:.2f}x", r.at("predicted_speedup").get<double>()),
          fmt::format("{:.2f}", r.at("mean_accepted_length").get<double>()),
          fmt::format("{:.2f}", r.at("distinct_4").get<double>()),
          same.is_null()     ? "-"
          : same.get<bool>() ? "yes"
                             : "NO"};
}

}  // namespace

std::string report_table(const std::filesystem::path& report_json) {
  const Json json = Json::parse(data::read_file(report_json), nullptr, false);
  if (!json.is_object() || !json.contains("results"))
    throw kernels::DataError(report_json.string() + " is not a report: run foretell evaluate again");
  try {
    std::string text =
        fmt::format("validation perplexity {:.2f}", json.at("validation_perplexity").get<double>());
    if (json.contains("validation_bits_per_byte"))
      text += fmt::format(", {:.3f} bits per byte", json["validation_bits_per_byte"].get<double>());
    else
      text += "; " + json.at("no_bits_per_byte").get<std::string>();
    for (const Json& anchor : json.value("anchors", Json::array()))
      text += fmt::format("; {} {:.3f}", anchor.at("model").get<std::string>(),
                          anchor.at("bits_per_byte").get<double>());
    text += fmt::format("\nplain decoding {:.0f} tokens/s, {:.3f} ms per token, on {}\n",
                        json.at("baseline").at("tokens_per_second").get<double>(),
                        json.at("baseline").at("ms_per_token").get<double>(),
                        json.at("device").get<std::string>());
    const Json& prompts = json.at("prompts");
    text += fmt::format("distinct-4 of the held-out text itself: {:.2f}; greedy text {}\n\n",
                        prompts.at("text_distinct_4").get<double>(),
                        prompts.at("no_repeat") == 0 ? "may repeat itself"
                                                     : fmt::format("repeats no run of {} tokens",
                                                                   prompts.at("no_repeat").get<int64_t>()));
    std::vector<std::vector<std::string>> rows = {{"drafter", "shape", "acceptance", "temp", "drafts",
                                                   "tokens/s", "spread", "speedup", "predicted",
                                                   "tokens/step", "distinct-4", "same as plain"}};
    for (const Json& result : json.at("results")) rows.push_back(table_row(result));
    return text + align(rows, 3);
  } catch (const Json::exception& error) {
    throw kernels::DataError(report_json.string() + " lacks fields of a report: run foretell evaluate again");
  }
}

}  // namespace trainer
