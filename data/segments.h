#pragma once
// How text is cut before SentencePiece sees it, in training and in encoding alike: a segment is a word
// (letters, digits, underscores and all beyond ASCII) with whatever stands before it, and no piece crosses
// segments. Of the cuts tried on C++ headers (before white space, before words, around punctuation, line by
// line) this one gives the longest tokens but for whole lines, which train far slower. Characters that
// SentencePiece keeps for itself, NUL and bytes that are not UTF-8 stand apart and become byte tokens.
#include <string>
#include <string_view>

#include "data/utf8.h"

namespace data {

// SentencePiece uses the tab as a boundary mark inside and reads lines: pieces hold private-use characters
// instead.
inline constexpr std::string_view kTabStandIn = "\uE009", kNewlineStandIn = "\uE00A";
// What SentencePiece writes for a space.
inline constexpr std::string_view kSpaceMark = "\u2581";
inline constexpr std::string_view kUnknownMark = "\u2585";
inline constexpr size_t kLongestSegment = 512;

inline bool reserved(std::string_view character) {
  return character == kSpaceMark || character == kUnknownMark || character == kTabStandIn ||
         character == kNewlineStandIn || character[0] == '\0';
}

// Calls fn(bytes, plain) on each segment in order; plain is false for bytes that stand apart.
template <typename Fn>
void for_each_segment(std::string_view text, Fn&& fn) {
  const auto in_word = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c < 0;
  };
  size_t begin = 0;
  const auto flush = [&](size_t end) {
    if (end > begin) fn(text.substr(begin, end - begin), true);
    begin = end;
  };
  for (size_t at = 0; at < text.size();) {
    const int length = utf8_length(text.substr(at, 4));
    const size_t next = at + static_cast<size_t>(length == 0 ? 1 : length);
    if (length == 0 || reserved(text.substr(at, next - at))) {
      flush(at);
      fn(text.substr(at, next - at), false);
      begin = next;
    } else if (at > begin &&
               ((in_word(text[at - 1]) && !in_word(text[at])) || next - begin > kLongestSegment)) {
      flush(at);
    }
    at = next;
  }
  flush(text.size());
}

inline std::string with_stand_ins(std::string_view text) {
  std::string result;
  for (char c : text) {
    if (c == '\t') {
      result += kTabStandIn;
    } else if (c == '\n') {
      result += kNewlineStandIn;
    } else {
      result += c;
    }
  }
  return result;
}

// The text behind a piece: the space mark becomes a space, and stand-ins what they stand for.
inline std::string without_stand_ins(std::string_view piece, bool has_stand_ins) {
  std::string result;
  while (!piece.empty()) {
    size_t length = kSpaceMark.size();
    if (piece.starts_with(kSpaceMark)) {
      result += ' ';
    } else if (has_stand_ins && piece.starts_with(kTabStandIn)) {
      result += '\t';
    } else if (has_stand_ins && piece.starts_with(kNewlineStandIn)) {
      result += '\n';
    } else {
      result += piece[0];
      length = 1;
    }
    piece.remove_prefix(length);
  }
  return result;
}

}  // namespace data
