// CRC32C (Castagnoli), by the processor's instruction where it has one, by tables elsewhere.
#pragma once

#include <cstddef>
#include <cstdint>

namespace resilient_train {

// Extends `crc` (0 to begin) over `size` bytes at `data`. Thread-safe; never fails.
std::uint32_t crc32c(std::uint32_t crc, const void* data, std::size_t size) noexcept;

// The same as crc32c() over `size` zero bytes, in a time that grows with the logarithm of `size`. Thread-safe; never
// fails.
std::uint32_t crc32c_zeros(std::uint32_t crc, std::uint32_t size) noexcept;

// Copies `size` bytes from `source` to `target` (which do not overlap) past the caches, so that the copy of a large
// image neither reads the target's old bytes nor evicts what the program is working with; returns
// crc32c(crc, source, size). The copy is visible to other threads when this returns. Thread-safe; never fails.
std::uint32_t stream_crc32c(std::uint32_t crc, void* target, const void* source, std::size_t size) noexcept;

// The same for one of many short rows; the copies are visible to other threads after rows_done().
std::uint32_t row_crc32c(std::uint32_t crc, void* target, const void* source, std::size_t size) noexcept;
void rows_done() noexcept;

// Copies `size` bytes from `source` to `target` (which do not overlap) and returns crc32c(crc, source, size), reading
// the source once. Thread-safe; never fails.
std::uint32_t copy_crc32c(std::uint32_t crc, void* target, const void* source, std::size_t size) noexcept;

// The table-driven implementation, callable everywhere so that tests can hold the two against each other.
std::uint32_t crc32c_portable(std::uint32_t crc, const void* data, std::size_t size) noexcept;

}  // namespace resilient_train
