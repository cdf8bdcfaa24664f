#pragma once
// XXH3-128 of bytes: the identity of documents and tokenizers, and the proof that a file is whole.
#include <compare>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

namespace data {

struct Checksum {
  uint64_t high = 0, low = 0;
  auto operator<=>(const Checksum&) const = default;
  std::string hex() const;  // 32 digits
};

Checksum checksum(std::string_view bytes);

// The same over a stream of pieces.
class ChecksumStream {
 public:
  ChecksumStream();
  ~ChecksumStream();
  ChecksumStream(const ChecksumStream&) = delete;
  ChecksumStream& operator=(const ChecksumStream&) = delete;
  void add(std::string_view bytes);
  Checksum result() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace data
