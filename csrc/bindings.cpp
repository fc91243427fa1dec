// Python's view of the native engine: raw addresses and sizes in, no ownership of anybody's memory.
#include <nanobind/nanobind.h>

#include <cstdint>

#include "crc32c.hpp"
#include "publish.hpp"

namespace nb = nanobind;
namespace rt = resilient_train;

namespace {

std::uint64_t* aligned(std::uintptr_t address) {
  if (address == 0 || address % 8 != 0) throw nb::value_error("address must be non-zero and a multiple of 8");
  return reinterpret_cast<std::uint64_t*>(address);
}

}  // namespace

NB_MODULE(_native, m) {
  m.def(
      "crc32c",
      [](std::uintptr_t data, std::size_t size, std::uint32_t crc) {
        nb::gil_scoped_release unlocked;
        return rt::crc32c(crc, reinterpret_cast<const void*>(data), size);
      },
      nb::arg("data"), nb::arg("size"), nb::arg("crc") = 0, "CRC32C of `size` bytes at address `data`.");
  m.def(
      "crc32c_portable",
      [](std::uintptr_t data, std::size_t size, std::uint32_t crc) {
        nb::gil_scoped_release unlocked;
        return rt::crc32c_portable(crc, reinterpret_cast<const void*>(data), size);
      },
      nb::arg("data"), nb::arg("size"), nb::arg("crc") = 0, "The same by tables, for tests.");
  m.def(
      "copy_crc32c",
      [](std::uintptr_t target, std::uintptr_t source, std::size_t size, std::uint32_t crc) {
        nb::gil_scoped_release unlocked;
        return rt::copy_crc32c(crc, reinterpret_cast<void*>(target), reinterpret_cast<const void*>(source), size);
      },
      nb::arg("target"), nb::arg("source"), nb::arg("size"), nb::arg("crc") = 0,
      "Copy `size` bytes and return their CRC32C.");
  m.def(
      "publish", [](std::uintptr_t word, std::uint64_t value) { rt::publish(aligned(word), value); }, nb::arg("word"),
      nb::arg("value"), "Release-store a 64-bit word.");
  m.def(
      "retract", [](std::uintptr_t word) { rt::retract(aligned(word)); }, nb::arg("word"),
      "Store 0 with a full fence behind it.");
  m.def(
      "observe", [](std::uintptr_t word) { return rt::observe(aligned(word)); }, nb::arg("word"),
      "Acquire-load a 64-bit word.");
}
