#include "trainer/decode/charts.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace trainer {

std::string escape_html(const std::string& text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      case '\'':
        out += "&#39;";
        break;
      default:
        // Control characters are no part of HTML.
        if (static_cast<unsigned char>(c) >= 32 || c == '\n' || c == '\t') out += c;
    }
  }
  return out;
}

std::string short_number(double value) {
  const double size = std::abs(value);
  if (!std::isfinite(value)) return "-";
  // From where the last digit that is written rounds up to the next form.
  if (size >= 999999.5) return short_number(value / 1e6) + "M";
  if (size >= 999.5) {
    const auto whole = static_cast<long long>(std::llround(value));
    return fmt::format("{},{:03}", whole / 1000, std::abs(whole % 1000));
  }
  return fmt::format("{:.3g}", value);
}

namespace {

constexpr double kWidth = 720, kLeft = 78, kRight = 14, kTop = 10, kBottom = 44, kPlot = 230;
constexpr int kColours = 6;

struct Axis {
  double low, high;
  double from, to;  // pixels
  double at(double value) const { return from + (value - low) / (high - low) * (to - from); }
};

// About `count` round numbers between low and high.
std::vector<double> ticks(double low, double high, int count) {
  const double raw = (high - low) / count, power = std::pow(10.0, std::floor(std::log10(raw)));
  const double digit = raw / power;
  const double step = power * (digit <= 1 ? 1 : digit <= 2 ? 2 : digit <= 5 ? 5 : 10);
  std::vector<double> values;
  for (double v = std::ceil(low / step - 1e-9) * step; v <= high + step * 1e-9; v += step)
    values.push_back(std::abs(v) < step * 1e-9 ? 0 : v);
  return values;
}

std::string text(double x, double y, const std::string& anchor, const std::string& content,
                 const std::string& extra = "") {
  return fmt::format("<text x='{:.1f}' y='{:.1f}' text-anchor='{}' {}>{}</text>\n", x, y, anchor, extra,
                     escape_html(content));
}

std::string line(double x1, double y1, double x2, double y2, const std::string& look) {
  return fmt::format("<line x1='{:.1f}' y1='{:.1f}' x2='{:.1f}' y2='{:.1f}' {}/>\n", x1, y1, x2, y2, look);
}

std::string svg(double height, const std::string& body) {
  return fmt::format("<svg viewBox='0 0 {:.0f} {:.0f}' role='img'>\n{}</svg>\n", kWidth, height, body);
}

std::string legend(const std::vector<std::string>& names, int first_colour = 0) {
  std::string html = "<p class='legend'>";
  for (size_t i = 0; i < names.size(); ++i)
    html += fmt::format("<span><i style='background:var(--c{})'></i>{}</span>",
                        (first_colour + static_cast<int>(i)) % kColours, escape_html(names[i]));
  return html + "</p>\n";
}

// Neighbours averaged until at most `most` points are left.
std::vector<std::pair<double, double>> thinned(const std::vector<std::pair<double, double>>& points,
                                               size_t most) {
  if (points.size() <= most) return points;
  std::vector<std::pair<double, double>> result;
  for (size_t i = 0; i < most; ++i) {
    const size_t begin = i * points.size() / most, end = (i + 1) * points.size() / most;
    double x = 0, y = 0;
    int count = 0;
    for (size_t j = begin; j < end; ++j) {
      if (!std::isfinite(points[j].second)) continue;
      x += points[j].first;
      y += points[j].second;
      ++count;
    }
    if (count > 0) result.emplace_back(x / count, y / count);
  }
  return result;
}

struct Bounds {
  double x_low = std::numeric_limits<double>::infinity(), x_high = -x_low, y_low = x_low, y_high = -x_low;
};

Bounds bounds_of(const std::vector<Series>& series) {
  Bounds b;
  for (const Series& s : series)
    for (const auto& [x, y] : s.points) {
      if (!std::isfinite(x) || !std::isfinite(y)) continue;
      b.x_low = std::min(b.x_low, x);
      b.x_high = std::max(b.x_high, x);
      b.y_low = std::min(b.y_low, y);
      b.y_high = std::max(b.y_high, y);
    }
  return b;
}

std::string path(const Series& series, const Axis& x, const Axis& y, int colour, bool dots) {
  std::string d, circles;
  bool drawing = false;
  for (const auto& [px, py] : series.points) {
    if (!std::isfinite(px) || !std::isfinite(py)) {
      drawing = false;
      continue;
    }
    d += fmt::format("{}{:.1f} {:.1f}", drawing ? "L" : "M", x.at(px), y.at(py));
    drawing = true;
    if (dots)
      circles += fmt::format(
          "<circle cx='{:.1f}' cy='{:.1f}' r='4' fill='var(--c{})'><title>{}: {} at {}</title>"
          "</circle>\n",
          x.at(px), y.at(py), colour, escape_html(series.name), short_number(py), short_number(px));
  }
  return fmt::format(
             "<path d='{}' fill='none' stroke='var(--c{})' stroke-width='2' stroke-linejoin='round'/>\n", d,
             colour) +
         circles;
}

}  // namespace

std::string to_svg(const LineChart& chart) {
  LineChart drawn = chart;
  std::vector<std::string> names;
  for (Series& s : drawn.series) {
    names.push_back(s.name);
    if (!chart.powers_of_two) s.points = thinned(s.points, 400);
    if (chart.powers_of_two)
      for (auto& [x, y] : s.points) y = y > 0 ? std::log2(y) : std::numeric_limits<double>::quiet_NaN();
  }
  const Bounds b = bounds_of(drawn.series);
  if (!(b.x_high >= b.x_low)) return "<p>Nothing was recorded.</p>\n";
  const double y_low = chart.from_zero ? 0 : b.y_low;
  const double margin = std::max((b.y_high - y_low) * 0.06, b.y_high == y_low ? 1.0 : 0.0);
  const Axis x{b.x_low, b.x_high > b.x_low ? b.x_high : b.x_low + 1, kLeft + 8, kWidth - kRight - 8};
  const Axis y{chart.from_zero ? 0 : y_low - margin, b.y_high + margin, kTop + kPlot, kTop};
  std::string body;
  for (double v : ticks(y.low, y.high, 5)) {
    if (chart.powers_of_two && v != std::floor(v)) continue;
    body += line(kLeft, y.at(v), kWidth - kRight, y.at(v), "stroke='var(--grid)'");
    body += text(kLeft - 6, y.at(v) + 4, "end",
                 chart.powers_of_two ? short_number(std::exp2(v)) : short_number(v));
  }
  for (double v : ticks(x.low, x.high, 8))
    if (!chart.dots || v == std::floor(v))
      body += text(x.at(v), kTop + kPlot + 18, "middle", short_number(v));
  body += text((kLeft + kWidth - kRight) / 2, kTop + kPlot + 38, "middle", chart.x_label);
  body += text(0, 0, "middle", chart.y_label,
               fmt::format("transform='translate(16 {:.0f}) rotate(-90)'", kTop + kPlot / 2));
  for (double mark : chart.marks)
    body += line(x.at(mark), kTop, x.at(mark), kTop + kPlot, "stroke='var(--mark)' stroke-dasharray='3 3'");
  for (size_t i = 0; i < drawn.series.size(); ++i)
    body += path(drawn.series[i], x, y, static_cast<int>(i) % kColours, chart.dots);
  std::string html = names.size() > 1 ? legend(names) : "";
  if (!chart.marks.empty())
    html += fmt::format("<p class='legend'><span><i style='background:var(--mark)'></i>{}</span></p>\n",
                        escape_html(chart.mark_name));
  return html + svg(kTop + kPlot + kBottom, body);
}

std::string to_svg(const BarChart& chart) {
  constexpr double kRow = 28, kLabels = 200, kNotes = 140;
  double most = chart.reference;
  for (const Bar& bar : chart.bars) {
    double sum = 0;
    for (const double part : bar.parts) sum += part;
    most = std::max({most, sum, bar.high});
  }
  if (most <= 0) return "<p>Nothing was measured.</p>\n";
  const double bottom = kTop + kRow * static_cast<double>(chart.bars.size());
  const Axis x{0, most * 1.02, kLabels, kWidth - kNotes};
  std::string body;
  for (double v : ticks(0, most, 6)) {
    body += line(x.at(v), kTop, x.at(v), bottom, "stroke='var(--grid)'");
    body += text(x.at(v), bottom + 16, "middle", short_number(v));
  }
  body += text((x.from + x.to) / 2, bottom + 36, "middle", chart.unit);
  for (size_t i = 0; i < chart.bars.size(); ++i) {
    const Bar& bar = chart.bars[i];
    const double top = kTop + kRow * static_cast<double>(i) + 5, middle = top + (kRow - 10) / 2;
    double from = 0;
    for (size_t p = 0; p < bar.parts.size(); ++p) {
      const std::string name = chart.part_names.empty() ? bar.label : chart.part_names[p];
      body += fmt::format(
          "<rect x='{:.1f}' y='{:.1f}' width='{:.1f}' height='{:.1f}' fill='var(--c{})'><title>{}: "
          "{} {}</title></rect>\n",
          x.at(from), top, x.at(from + bar.parts[p]) - x.at(from), kRow - 10,
          (chart.colour + static_cast<int>(p)) % kColours, escape_html(name), short_number(bar.parts[p]),
          escape_html(chart.unit));
      from += bar.parts[p];
    }
    body += text(kLabels - 8, middle + 4, "end", bar.label);
    body += text(x.at(std::max(from, bar.high)) + 8, middle + 4, "start", bar.note);
    if (bar.high > bar.low)
      body += line(x.at(bar.low), middle, x.at(bar.high), middle, "stroke='var(--ink)' stroke-width='2'");
  }
  if (chart.reference > 0)
    body += line(x.at(chart.reference), kTop, x.at(chart.reference), bottom,
                 "stroke='var(--ink)' stroke-dasharray='4 3'");
  return (chart.part_names.size() > 1 ? legend(chart.part_names, chart.colour) : "") +
         svg(bottom + kBottom, body);
}

}  // namespace trainer
