// CRC32C (Castagnoli), by the processor's instruction where it has one, by tables elsewhere.
#pragma once

#include <cstddef>
#include <cstdint>

namespace resilient_train {

// Extends `crc` (0 to begin) over `size` bytes at `data`. Thread-safe; never fails.
std::uint32_t crc32c(std::uint32_t crc, const void* data, std::size_t size) noexcept;

// Copies `size` bytes from `source` to `target` (which do not overlap) and returns crc32c(crc, source, size), reading
// the source once. Thread-safe; never fails.
std::uint32_t copy_crc32c(std::uint32_t crc, void* target, const void* source, std::size_t size) noexcept;

// The table-driven implementation, callable everywhere so that tests can hold the two against each other.
std::uint32_t crc32c_portable(std::uint32_t crc, const void* data, std::size_t size) noexcept;

}  // namespace resilient_train
