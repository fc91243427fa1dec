#include "parity.hpp"

#include <cstdint>
#include <cstring>

namespace resilient_train {

void xor_into(void* target, const void* source, std::size_t size) noexcept {
  auto* to = static_cast<unsigned char*>(target);
  const auto* from = static_cast<const unsigned char*>(source);
  // Lines of constant length, through memcpy: the compiler makes vector loads of any alignment of it.
  constexpr std::size_t kLine = 64;
  for (; size >= kLine; size -= kLine, to += kLine, from += kLine) {
    std::uint64_t a[kLine / 8], b[kLine / 8];
    std::memcpy(a, to, kLine);
    std::memcpy(b, from, kLine);
    for (std::size_t i = 0; i < kLine / 8; ++i) a[i] ^= b[i];
    std::memcpy(to, a, kLine);
  }
  for (; size > 0; --size) *to++ ^= *from++;
}

}  // namespace resilient_train
