// Parity of buffers: what was lost is the exclusive or of everything that is left.
#pragma once

#include <cstddef>

namespace resilient_train {

// Replaces `size` bytes at `target` by their exclusive or with those at `source`. The two are the same or do not overlap.
// Thread-safe for different targets; never fails.
void xor_into(void* target, const void* source, std::size_t size) noexcept;

}  // namespace resilient_train
