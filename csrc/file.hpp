// Bytes of open files, and memory that is about to take them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <system_error>

namespace resilient_train {

// A call on a file failed.
struct FileError : std::runtime_error {
  FileError(const std::string& call, int code)
      : std::runtime_error(call + ": " + std::generic_category().message(code)), code(code) {}
  int code;  // errno
};

// There are fewer bytes than were asked for.
struct EndOfFile : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Reads `size` bytes at byte `at` of an open file. Throws FileError and EndOfFile.
void read_file(int handle, std::uint64_t at, unsigned char* target, std::size_t size);

// As many bytes as a block has, which nobody but the calling thread uses and nothing stays in.
unsigned char* scratch();

// Has the system find pages at once for those of `size` bytes at `target`, about to be written, that have none: memory
// that was never touched costs a trap into the kernel for each page otherwise. A hint: what fails costs those traps.
void populate(unsigned char* target, std::size_t size) noexcept;

}  // namespace resilient_train
