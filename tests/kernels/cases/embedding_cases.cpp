#include "kernels/ops/embedding.h"
#include "tests/support/op_case.h"

namespace support {

namespace {

struct EmbeddingShape {
  int64_t rows, vocabulary, width, context;  // context 0: no position table
};

// Every token turns up several times, some rows have none.
std::vector<double> some_tokens(const EmbeddingShape& s) {
  std::vector<double> tokens(static_cast<size_t>(s.rows));
  for (int64_t i = 0; i < s.rows; ++i)
    tokens[static_cast<size_t>(i)] = static_cast<double>(i % 5 == 3 ? -1 : i * 7 % s.vocabulary);
  return tokens;
}

std::vector<double> some_positions(const EmbeddingShape& s) {
  std::vector<double> positions(static_cast<size_t>(s.rows));
  for (int64_t i = 0; i < s.rows; ++i) positions[static_cast<size_t>(i)] = static_cast<double>(i % s.context);
  return positions;
}

OpInput table_input(const char* name, int64_t rows, int64_t width) {
  return {
      .name = name, .shape = {rows, width}, .gradient = Gradient::accumulated, .gradient_type = Type::main};
}

OpCase embedding_case(std::string name, EmbeddingShape s, int64_t padding) {
  OpCase op{.operation = "embedding", .name = std::move(name), .inputs = {}, .outputs = {}, .forward = {}};
  const bool learned = s.context > 0;
  op.inputs = {{.name = "tokens", .shape = {s.rows}, .type = Type::i32, .values = some_tokens(s)},
               table_input("table", s.vocabulary, s.width)};
  if (learned) {
    op.inputs.push_back(
        {.name = "positions", .shape = {s.rows}, .type = Type::i32, .values = some_positions(s)});
    op.inputs.push_back(table_input("position_table", s.context, s.width));
  }
  op.outputs = {{.name = "y", .shape = {s.rows, s.width}, .padding = padding}};
  const auto given = [learned](const OpTensors& t, const char* tensor) {
    return learned ? t[tensor] : kernels::Tensor{};
  };
  op.forward = [given](const kernels::Context& ctx, const OpTensors& t) {
    kernels::embedding(ctx, t["tokens"], t["table"], given(t, "positions"), given(t, "position_table"),
                       t["y"]);
  };
  op.backward = [given](const kernels::Context& ctx, const OpTensors& t) {
    kernels::embedding_backward(ctx, t["dy"], t["tokens"], t["dtable"], given(t, "positions"),
                                given(t, "dposition_table"));
  };
  op.sum_length = s.rows;
  return op;
}

}  // namespace

std::vector<OpCase> embedding_cases() {
  return {
      embedding_case("plain", {.rows = 23, .vocabulary = 7, .width = 20, .context = 0}, 0),
      embedding_case("positions", {.rows = 17, .vocabulary = 5, .width = 13, .context = 6}, 4),
      embedding_case("threads", {.rows = 120, .vocabulary = 11, .width = 200, .context = 9}, 0),
      // Runs of one token over many pieces of the sorted list, and more rows than a grid's second dimension.
      large(embedding_case("long_runs", {.rows = 3000, .vocabulary = 3, .width = 72, .context = 1024}, 0)),
      large(embedding_case("many_rows", {.rows = 66001, .vocabulary = 5003, .width = 8, .context = 0}, 0)),
  };
}

}  // namespace support
