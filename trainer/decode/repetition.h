#pragma once
// A guard against loops in greedy decoding: no run of `length` tokens is written that the text already holds.
// A function of the text before a token alone, so that speculation and plain decoding choose the same.
#include <cstdint>
#include <span>
#include <vector>

namespace trainer {

// Whether the last `length` - 1 tokens and `next` stand in `tokens` already.
bool repeats_run(std::span<const int32_t> tokens, int32_t next, int64_t length);

// The token of the largest of `logits` that repeats no run, ties by the smaller index; `choice` where it does
// not, and when every token would.
int32_t without_repeats(std::span<const int32_t> tokens, std::span<const float> logits, int32_t choice,
                        int64_t length);

}  // namespace trainer
