// Ordered stores of the words through which processes tell each other that shared memory is complete.
#pragma once

#include <cstdint>

namespace resilient_train {

// Stores `value` so that whoever reads it also sees every write made before. `word` is 8-byte aligned.
void publish(std::uint64_t* word, std::uint64_t value) noexcept;

// Stores 0 so that no later write becomes visible before it. `word` is 8-byte aligned.
void retract(std::uint64_t* word) noexcept;

// Reads a word so that everything written before it was published is visible. `word` is 8-byte aligned.
std::uint64_t observe(const std::uint64_t* word) noexcept;

}  // namespace resilient_train
