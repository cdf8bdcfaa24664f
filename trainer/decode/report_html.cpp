// report.html: one page without outside parts. Charts come from charts.h.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "trainer/decode/charts.h"
#include "trainer/decode/report.h"

namespace trainer {

namespace {

constexpr const char* kStyle = R"css(
:root{--paper:#fcfcfb;--ink:#1c1c1a;--soft:#5c5b57;--grid:#e3e2de;--mark:#d03b3b;
--c0:#2a78d6;--c1:#eb6834;--c2:#1baf7a;--c3:#c98a00;--c4:#c2558a;--c5:#4a3aa7;
--g1:transparent;--g2:#d3e5fa;--g3:#a5cbf4;--g4:#ffd9a8;--g5:#ffb86b}
@media(prefers-color-scheme:dark){:root{--paper:#1a1a19;--ink:#ecebe6;--soft:#a9a79f;--grid:#383835;--mark:#e66767;
--c0:#5598e7;--c1:#ef8354;--c2:#35c48f;--c3:#dba520;--c4:#e087b0;--c5:#9085e9;
--g2:#16365c;--g3:#1f5596;--g4:#6b4310;--g5:#a05f08}}
*{box-sizing:border-box}
body{margin:0 auto;padding:24px 20px 60px;max-width:1000px;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
h1{font-size:1.7em;margin:0 0 4px}h2{font-size:1.2em;margin:44px 0 6px}
p{margin:6px 0}.soft,figcaption{color:var(--soft);font-size:.92em}
svg{width:100%;height:auto;display:block;font:12px system-ui,sans-serif}svg text{fill:var(--ink)}
.legend{font-size:.88em}.legend span{margin-right:16px;white-space:nowrap}
.legend i{display:inline-block;width:11px;height:11px;border-radius:2px;margin-right:6px}
.cards{display:flex;flex-wrap:wrap;gap:12px;margin:18px 0}
.cards div{flex:1 1 150px;border:1px solid var(--grid);border-radius:8px;padding:10px 14px}
.cards b{display:block;font-size:1.5em;font-weight:600}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.82em;width:100%}
th,td{padding:5px 6px;text-align:right;border-bottom:1px solid var(--grid);white-space:nowrap}
th:first-child,td:first-child{text-align:left}
pre{white-space:pre-wrap;word-break:break-word;border:1px solid var(--grid);border-radius:8px;padding:14px;
font:13px/1.6 ui-monospace,"SFMono-Regular",Consolas,monospace}
pre .p{color:var(--soft)}.g2{background:var(--g2)}.g3{background:var(--g3)}.g4{background:var(--g4)}
.g5{background:var(--g5)}.key{padding:1px 7px;border-radius:3px;border:1px solid var(--grid);margin-right:6px}
)css";

std::string label(const ReportResult& r) {
  const std::string name = r.drafter == "none" ? "plain" : r.drafter;
  const std::string rule = r.drafter == "none" ? (r.temperature > 0 ? "sampling" : "greedy") : r.acceptance;
  return r.temperature > 0 ? fmt::format("{}, {}, T = {:g}", name, rule, r.temperature) : name + ", " + rule;
}

std::string section(const std::string& title, const std::string& explanation, const std::string& body) {
  return fmt::format("<h2>{}</h2>\n<p class='soft'>{}</p>\n{}", title, explanation, body);
}

const ReportResult* fastest_greedy(const Report& report) {
  const ReportResult* best = nullptr;
  for (const ReportResult& r : report.results)
    if (r.drafter != "none" && r.acceptance == "greedy" &&
        (best == nullptr || r.speedup.median > best->speedup.median))
      best = &r;
  return best;
}

std::string header(const Report& report) {
  std::string html = fmt::format(
      "<h1>Speculative decoding report</h1>\n<p class='soft'>{}<br>Checkpoint {} (step {})<br>{}<br>{}</p>\n",
      escape_html(report.model), escape_html(report.checkpoint), report.step, escape_html(report.device),
      escape_html(report.date));
  const auto card = [](const std::string& number, const std::string& what) {
    return fmt::format("<div><b>{}</b>{}</div>\n", number, what);
  };
  html += "<div class='cards'>\n";
  if (const ReportResult* best = fastest_greedy(report))
    html += card(fmt::format("{:.2f}&times;", best->speedup.median),
                 fmt::format("as fast as plain decoding with {}, same text", escape_html(best->drafter)));
  html += card(short_number(report.baseline.median), "tokens per second, plain");
  if (report.validation_bits_per_byte)
    html += card(fmt::format("{:.3f}", *report.validation_bits_per_byte), "bits per byte on held-out text");
  html += card(fmt::format("{:.1f}", report.validation_perplexity), "perplexity per token on held-out text");
  return html + "</div>\n" +
         "<p>A language model writes one token at a time, and every token costs one pass through all its "
         "weights. "
         "A <em>drafter</em> guesses the next few tokens cheaply; the model then checks all guesses in one "
         "pass and "
         "keeps those it agrees with. Checking several tokens costs little more than computing one, so every "
         "accepted guess is time saved. With greedy acceptance and with rejection sampling the text is what "
         "the "
         "model alone would have written (the same tokens, or the same distribution); typical acceptance "
         "trades "
         "some of that for speed.</p>\n";
}

std::string speedups(const Report& report) {
  BarChart chart;
  chart.unit = "speedup over plain decoding at the same temperature (times)";
  chart.reference = 1;
  for (const ReportResult& r : report.results)
    if (r.drafter != "none")
      chart.bars.push_back(
          {label(r),
           fmt::format("{:.2f}x, {} draft{}", r.speedup.median, r.drafts, r.drafts == 1 ? "" : "s"),
           {r.speedup.median},
           r.speedup.low,
           r.speedup.high});
  return section(
      "How much faster",
      fmt::format("Bars show the median of {} interleaved rounds over {} held-out prompts of {} tokens, up "
                  "to {} tokens each; the dark line is the spread from the slowest to the fastest round. "
                  "The dashed line is plain decoding: bars that end left of it lose time.",
                  report.rounds, report.prompts, report.prompt_tokens, report.max_tokens),
      to_svg(chart));
}

std::string table(const Report& report) {
  std::string html =
      "<div class='scroll'><table><tr><th>way of "
      "decoding</th><th>tokens/s</th><th>spread</th><th>speedup</th>"
      "<th>predicted</th><th>tokens per step</th><th>first token, ms</th><th>distinct-4</th><th>same as "
      "plain</th>"
      "</tr>\n";
  for (const ReportResult& r : report.results)
    html += fmt::format(
        "<tr><td>{}</td><td>{}</td><td>{}&ndash;{}</td><td>{:.2f}</td><td>{:.2f}</td><td>{:.2f}</td>"
        "<td>{:.2f}</td><td>{:.2f}</td><td>{}</td></tr>\n",
        escape_html(label(r)), short_number(r.tokens_per_second.median),
        short_number(r.tokens_per_second.low), short_number(r.tokens_per_second.high), r.speedup.median,
        r.predicted_speedup, r.mean_accepted_length, r.time_to_first_token_ms, r.distinct_4,
        r.identical_to_baseline ? (*r.identical_to_baseline ? "yes" : "NO") : "&ndash;");
  return section(
      "All figures",
      "Tokens per step count the token that the model adds itself. Distinct-4 is the share of different "
      "ones among all sequences of four tokens of a text: low values mean that the text loops, and looping "
      "text is easy to guess; the held-out text itself has " +
          fmt::format("{:.2f}", report.text_distinct_4) +
          (report.no_repeat > 0
               ? fmt::format(", and greedy decoding writes no run of {} tokens twice", report.no_repeat)
               : std::string()) +
          ". Predicted: from the measured cost of a step and the acceptance on other "
          "prompts. Speeds are for one text at a time; they shrink when many are decoded together.",
      html + "</table></div>\n");
}

std::string acceptance(const Report& report) {
  LineChart chart;
  chart.x_label = "position of the draft (1 is the token right after the known text)";
  chart.y_label = "accepted drafts, share";
  chart.from_zero = chart.dots = true;
  for (const ReportResult& r : report.results) {
    if (r.acceptance_by_position.empty() || r.acceptance != "greedy" || r.drafter == "none") continue;
    Series series{r.drafter, {}};
    for (size_t d = 0; d < r.acceptance_by_position.size(); ++d)
      series.points.emplace_back(static_cast<double>(d + 1), r.acceptance_by_position[d]);
    chart.series.push_back(series);
  }
  return section(
      "Acceptance by position",
      "Of the drafts tried at each position, with all before them accepted, the share that the model "
      "agreed with (greedy decoding). A tree counts as right when any of its branches is.",
      to_svg(chart));
}

std::string time_split(const Report& report) {
  BarChart chart;
  chart.unit = "milliseconds per step";
  chart.part_names = {"draft", "verify (the model)", "sample", "commit"};
  for (const ReportResult& r : report.results) {
    const PhaseTimes& t = r.time_ms;
    chart.bars.push_back({label(r),
                          fmt::format("{:.3f} ms, {:.2f} tokens", t.total(), r.mean_accepted_length),
                          {t.draft, t.verify, t.sample, t.commit},
                          0,
                          0});
  }
  return section(
      "Where the time goes",
      "One step of each way of decoding, and how many tokens it yields. Verify is the pass through "
      "the model, above temperature 0 with the decision which drafts are accepted; sample is what "
      "the host does with its answer, such as comparing drafts with the likeliest tokens; commit "
      "keeps the accepted rows of the caches.",
      to_svg(chart));
}

std::string step_costs(const Report& report) {
  LineChart chart;
  chart.x_label = "tokens checked in one step";
  chart.y_label = "cost, plain step = 1";
  chart.from_zero = chart.dots = true;
  Series series{"cost of a step", {}};
  for (size_t n = 0; n < report.step_cost_ms.size(); ++n)
    series.points.emplace_back(static_cast<double>(n + 1), report.step_cost_ms[n] / report.step_cost_ms[0]);
  chart.series.push_back(series);
  const double bytes = static_cast<double>(report.weight_bytes) * report.baseline.median;
  return section(
      "What checking several tokens costs",
      fmt::format("Relative to one token ({:.3f} ms). While the curve is flat, drafts are nearly free; where "
                  "it rises by one per token, nothing is gained. The number of drafts of each drafter is "
                  "chosen from this curve and from what drafting and its acceptance rule take beside it. "
                  "Plain decoding reads {:.1f} MB of weights per token, {:.1f} GB "
                  "per second.",
                  report.step_cost_ms.empty() ? 0 : report.step_cost_ms[0],
                  static_cast<double>(report.weight_bytes) / 1e6, bytes / 1e9),
      to_svg(chart));
}

std::string anchors(const Report& report) {
  constexpr const char* kTitle = "How good the model is";
  if (!report.validation_bits_per_byte)
    return section(kTitle,
                   fmt::format("Perplexity {:.1f} per token of held-out text; {}.",
                               report.validation_perplexity, kNoBitsPerByte),
                   "");
  BarChart chart;
  chart.unit = "bits per byte on held-out text (lower is better)";
  chart.colour = 2;
  const auto add = [&](const std::string& name, double bits) {
    chart.bars.push_back({name, fmt::format("{:.3f}", bits), {bits}, 0, 0});
  };
  for (const TextAnchor& anchor : report.anchors) add("n-gram, " + anchor.model, anchor.bits_per_byte);
  add("this model", *report.validation_bits_per_byte);
  return section(
      kTitle,
      "Bits needed to write down one byte of text it has never seen. The n-gram models count sequences of "
      "bytes in the same training text; they show what simple statistics reach.",
      to_svg(chart));
}

std::string training(const Report& report) {
  if (report.training.empty()) return "";
  LineChart loss{"training step", "loss, nats per token", {{"next token", {}}}, {}, "", false, false, false};
  LineChart scale{
      "training step", "loss scale", {{"loss scale", {}}}, {}, "skipped step (overflow)", false, true, false};
  for (const TrainingPoint& point : report.training) {
    loss.series[0].points.emplace_back(point.step, point.loss);
    scale.series[0].points.emplace_back(point.step, point.loss_scale);
    if (point.skipped) scale.marks.push_back(point.step);
    for (size_t i = 0; i < point.losses.size(); ++i) {
      if (loss.series.size() <= i + 1) loss.series.push_back({point.losses[i].first, {}});
      loss.series[i + 1].points.emplace_back(point.step, point.losses[i].second);
    }
  }
  return section(
             "Training: loss",
             "Mean loss of a training batch for the next token, and for each head that looks further ahead: "
             "further is harder.",
             to_svg(loss)) +
         section(
             "Training: loss scale",
             "Losses are multiplied by this before 16-bit gradients are computed. It halves when a gradient "
             "overflows (that step is skipped) and doubles after a long clean stretch.",
             to_svg(scale));
}

std::string sample(const Report& report) {
  std::string legend = "<p>";
  for (int gained = 1; gained <= 5; ++gained)
    legend += fmt::format("<span class='key g{}'>{}{} token{}</span>", gained, gained,
                          gained == 5 ? " or more" : "", gained == 1 ? "" : "s");
  std::string text = "<pre><span class='p'>" + escape_html(report.sample_prompt) + "</span>";
  for (const TextPiece& piece : report.sample)
    text += fmt::format("<span class='g{}' title='{} tokens in one step'>{}</span>",
                        std::clamp<int64_t>(piece.tokens, 1, 5), piece.tokens, escape_html(piece.text));
  const std::string name = report.sample_drafter == "none" ? "plain decoding" : report.sample_drafter;
  return section(
      "What it wrote",
      fmt::format("Greedy decoding with {}. Grey: the held-out prompt. The colour of a piece says how many "
                  "tokens one step of the model gained there.",
                  escape_html(name)),
      legend + "</p>\n" + text + "</pre>\n");
}

}  // namespace

std::string report_html(const Report& report) {
  return fmt::format(
             "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>\n"
             "<meta name='viewport' content='width=device-width,initial-scale=1'>\n"
             "<meta name='color-scheme' content='light dark'>\n"
             "<title>Speculative decoding report</title>\n<style>{}</style></head>\n<body>\n",
             kStyle) +
         header(report) + speedups(report) + table(report) + sample(report) + acceptance(report) +
         time_split(report) + step_costs(report) + anchors(report) + training(report) + "</body></html>\n";
}

}  // namespace trainer
