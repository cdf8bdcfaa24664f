#pragma once
// Small charts as inline SVG. Colours are CSS variables (--ink, --grid, --c0 to --c5) that the page defines,
// so one picture serves light and dark.
#include <string>
#include <utility>
#include <vector>

namespace trainer {

std::string escape_html(const std::string& text);
// A number with few digits: 0.213, 4.1, 5,300, 1.25M.
std::string short_number(double value);

struct Series {
  std::string name;
  std::vector<std::pair<double, double>> points;  // values that are not finite leave a gap
};
struct LineChart {
  std::string x_label, y_label;
  std::vector<Series> series;
  std::vector<double> marks;  // x of vertical marks
  std::string mark_name;
  bool from_zero = false;      // of y
  bool powers_of_two = false;  // y on a logarithmic scale
  bool dots = false;           // and whole numbers below
};
std::string to_svg(const LineChart& chart);

struct Bar {
  std::string label, note;    // note: text after the bar
  std::vector<double> parts;  // stacked
  double low = 0, high = 0;   // whisker; none where equal
};
struct BarChart {
  std::string unit;
  std::vector<std::string> part_names;  // legend, where there is more than one
  std::vector<Bar> bars;
  double reference = 0;  // a vertical line; 0 draws none
  int colour = 0;        // of the first part
};
std::string to_svg(const BarChart& chart);

}  // namespace trainer
