#include "file.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <iterator>
#include <string>
#include <vector>

#include "piece.hpp"

#ifndef MADV_POPULATE_WRITE  // Linux 5.14; older ones refuse it.
#define MADV_POPULATE_WRITE 23
#endif

namespace resilient_train {
namespace {

constexpr std::size_t kWorthIt = 64 << 10;  // bytes, below which the calls cost as much as the traps
constexpr std::size_t kPagesAtOnce = 512;   // of which is asked in one call: those of 2 MiB

}  // namespace

void read_file(int handle, std::uint64_t at, unsigned char* target, std::size_t size) {
  for (std::size_t done = 0; done < size;) {
    const ssize_t count = pread(handle, target + done, size - done, static_cast<off_t>(at + done));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) throw FileError("pread", errno);
    if (count == 0)
      throw EndOfFile(std::to_string(size - done) + " bytes asked for at its end, byte " + std::to_string(at + done));
    done += static_cast<std::size_t>(count);
  }
}

unsigned char* scratch() {
  thread_local std::vector<unsigned char> bytes(kBlock);
  return bytes.data();
}

void populate(unsigned char* target, std::size_t size) noexcept {
  if (size < kWorthIt) return;
  static const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  unsigned char there[kPagesAtOnce];
  const auto address = reinterpret_cast<std::uintptr_t>(target);
  const std::uintptr_t end = (address + size + page - 1) / page * page;
  for (std::uintptr_t at = address / page * page; at < end;) {
    const std::size_t pages = std::min(kPagesAtOnce, (end - at) / page);
    if (mincore(reinterpret_cast<void*>(at), pages * page, there) != 0) return;
    const auto missing = [](unsigned char state) { return (state & 1) == 0; };
    const std::size_t first = std::find_if(there, there + pages, missing) - there;
    if (first < pages) {
      const auto last = std::find_if(std::reverse_iterator(there + pages), std::reverse_iterator(there), missing);
      const std::size_t behind = last.base() - there;
      if (madvise(reinterpret_cast<void*>(at + first * page), (behind - first) * page, MADV_POPULATE_WRITE) != 0) return;
    }
    at += pages * page;
  }
}

}  // namespace resilient_train
