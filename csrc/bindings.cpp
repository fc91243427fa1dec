// Python's view of the native engine: raw addresses and sizes in, no ownership of anybody's memory.
#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <exception>
#include <tuple>
#include <vector>

#include "bindings.hpp"
#include "copier.hpp"
#include "crc32c.hpp"
#include "file.hpp"
#include "gather.hpp"
#include "gloo_waits.hpp"
#include "parity.hpp"
#include "publish.hpp"
#include "scatter.hpp"

namespace nb = nanobind;
namespace rt = resilient_train;

namespace {

using resilient_train::bind_device;

std::uint64_t* aligned(std::uintptr_t address) {
  if (address == 0 || address % 8 != 0) throw nb::value_error("address must be non-zero and a multiple of 8");
  return reinterpret_cast<std::uint64_t*>(address);
}

rt::cuda::StreamHandle stream_handle(std::uintptr_t stream) {
  return reinterpret_cast<rt::cuda::StreamHandle>(stream);
}

using PieceTuple = std::tuple<std::uint64_t, std::uint64_t, std::uint64_t, bool>;

using RowsTuple = std::tuple<std::uint64_t, std::uint64_t, std::uint64_t, std::uint64_t>;
using PlacedTuple =
    std::tuple<std::uint64_t, std::uint64_t, std::uint64_t, std::uint64_t, std::uint64_t, std::uint64_t>;

std::vector<rt::Rows> rows_of(const std::vector<RowsTuple>& tuples) {
  std::vector<rt::Rows> rows;
  rows.reserve(tuples.size());
  for (const auto& [at, size, stride, count] : tuples) rows.push_back({at, size, stride, count, 0, 0});
  return rows;
}

std::vector<rt::Rows> rows_of(const std::vector<PlacedTuple>& tuples) {
  std::vector<rt::Rows> rows;
  rows.reserve(tuples.size());
  for (const auto& [at, size, stride, count, target, spread] : tuples)
    rows.push_back({at, size, stride, count, target, spread});
  return rows;
}

std::vector<rt::Segment> segments_of(const std::vector<std::tuple<std::uint64_t, std::uint64_t>>& tuples) {
  std::vector<rt::Segment> segments;
  segments.reserve(tuples.size());
  for (const auto& [target, size] : tuples) segments.push_back({target, size});
  return segments;
}

void bind_file(nb::module_& m) {
  nb::register_exception_translator(
      [](const std::exception_ptr& thrown, void*) {
        try {
          std::rethrow_exception(thrown);
        } catch (const rt::FileError& error) {
          PyErr_SetObject(PyExc_OSError, nb::make_tuple(error.code, error.what()).ptr());
        } catch (const rt::EndOfFile& error) {
          PyErr_SetString(PyExc_EOFError, error.what());
        }
      });
  m.def(
      "scatter_file",
      [](int handle, std::uint64_t offset, const std::vector<std::tuple<std::uint64_t, std::uint64_t>>& tuples,
         const std::vector<std::uint32_t>& sums) {
        const std::vector<rt::Segment> segments = segments_of(tuples);
        nb::gil_scoped_release unlocked;
        return rt::scatter_file(handle, offset, segments, sums);
      },
      nb::arg("handle"), nb::arg("offset"), nb::arg("segments"), nb::arg("sums"),
      "Read consecutive blocks of an image to where they belong; the first that fails its checksum, or -1.");
  m.def(
      "place_file_rows",
      [](int handle, std::uint64_t offset, std::uint64_t total, const std::vector<PlacedTuple>& tuples,
         const std::vector<std::uint32_t>& sums) {
        const std::vector<rt::Rows> rows = rows_of(tuples);
        nb::gil_scoped_release unlocked;
        return rt::place_file_rows(handle, offset, total, rows, sums);
      },
      nb::arg("handle"), nb::arg("offset"), nb::arg("total"), nb::arg("rows"), nb::arg("sums"),
      "Read rows of blocks to where they belong; the first block that fails its checksum, or -1.");
}

void bind_gather(nb::module_& m) {
  m.def(
      "crc32c_zeros", [](std::uint32_t size, std::uint32_t crc) { return rt::crc32c_zeros(crc, size); },
      nb::arg("size"), nb::arg("crc") = 0, "CRC32C of `size` zero bytes, for tests.");
  m.def(
      "gather_rows",
      [](std::uintptr_t source, std::uint64_t total, const std::vector<RowsTuple>& tuples, std::uintptr_t target) {
        const std::vector<rt::Rows> rows = rows_of(tuples);
        nb::gil_scoped_release unlocked;
        return rt::gather_rows(reinterpret_cast<const unsigned char*>(source), total, rows,
                               reinterpret_cast<unsigned char*>(target));
      },
      nb::arg("source"), nb::arg("total"), nb::arg("rows"), nb::arg("target"),
      "Copy rows of blocks one behind the other; what the gaps between them add to the blocks' checksums.");
  m.def(
      "scatter_rows",
      [](std::uintptr_t source, std::uint64_t total, const std::vector<PlacedTuple>& tuples,
         const std::vector<std::uint32_t>& gaps, const std::vector<std::uint32_t>& sums) {
        const std::vector<rt::Rows> rows = rows_of(tuples);
        nb::gil_scoped_release unlocked;
        return rt::scatter_rows(reinterpret_cast<const unsigned char*>(source), total, rows, gaps, sums);
      },
      nb::arg("source"), nb::arg("total"), nb::arg("rows"), nb::arg("gaps"), nb::arg("sums"),
      "Put gathered rows where they belong; the first block that fails its checksum, or -1.");
  m.def(
      "place_rows",
      [](std::uintptr_t source, std::uint64_t total, const std::vector<PlacedTuple>& tuples,
         const std::vector<std::uint32_t>& sums) {
        const std::vector<rt::Rows> rows = rows_of(tuples);
        nb::gil_scoped_release unlocked;
        return rt::place_rows(reinterpret_cast<const unsigned char*>(source), total, rows, sums);
      },
      nb::arg("source"), nb::arg("total"), nb::arg("rows"), nb::arg("sums"),
      "Put rows of blocks where they belong; the first block that fails its checksum, or -1.");
}

void bind_copier(nb::module_& m) {
  using Unlocked = nb::call_guard<nb::gil_scoped_release>;
  nb::class_<rt::Copier>(m, "Copier", "Fills images of one layout in the background.")
      .def(
          "__init__",
          [](rt::Copier* self, const std::vector<PieceTuple>& pieces, std::size_t data_start, std::size_t table_start,
             unsigned threads, std::shared_ptr<rt::cuda::Device> device, const std::vector<std::size_t>& remote) {
            std::vector<rt::Piece> copied;
            copied.reserve(pieces.size());
            for (const auto& [at, source, size, now] : pieces) copied.push_back({at, source, size, now, false});
            for (const std::size_t index : remote) copied.at(index).remote = true;
            new (self) rt::Copier(std::move(copied), data_start, table_start, threads, std::move(device));
          },
          nb::arg("pieces"), nb::arg("data_start"), nb::arg("table_start"), nb::arg("threads") = 1,
          nb::arg("device") = nb::none(), nb::arg("remote") = std::vector<std::size_t>())
      .def(
          "start",
          [](rt::Copier& self, std::uintptr_t image, bool all_now, std::uintptr_t stream) {
            self.start(reinterpret_cast<unsigned char*>(image), all_now, stream_handle(stream));
          },
          nb::arg("image"), nb::arg("all_now") = false, nb::arg("stream") = 0, Unlocked(),
          "Begin to fill the image at an address.")
      .def(
          "fence", [](rt::Copier& self, std::uintptr_t stream) { self.fence(stream_handle(stream)); },
          nb::arg("stream"), Unlocked(), "Let the sources be changed by what the stream is given from now on.")
      .def("running", &rt::Copier::running, "Whether a copy is running.")
      .def("wait", &rt::Copier::wait, Unlocked(), "Block until no copy is running.")
      .def("changed", &rt::Copier::changed, Unlocked(), "Indices of pieces whose source is not what was copied.");
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
      "publish", [](std::uintptr_t word, std::uint64_t value) { rt::publish(aligned(word), value); }, nb::arg("word"),
      nb::arg("value"), "Release-store a 64-bit word.");
  m.def(
      "retract", [](std::uintptr_t word) { rt::retract(aligned(word)); }, nb::arg("word"),
      "Store 0 with a full fence behind it.");
  m.def(
      "observe", [](std::uintptr_t word) { return rt::observe(aligned(word)); }, nb::arg("word"),
      "Acquire-load a 64-bit word.");
  m.def(
      "xor_into",
      [](std::uintptr_t target, std::uintptr_t source, std::size_t size) {
        nb::gil_scoped_release unlocked;
        rt::xor_into(reinterpret_cast<void*>(target), reinterpret_cast<const void*>(source), size);
      },
      nb::arg("target"), nb::arg("source"), nb::arg("size"), "target ^= source.");
  m.def(
      "scatter",
      [](std::uintptr_t source, const std::vector<std::tuple<std::uint64_t, std::uint64_t>>& segments,
         const std::vector<std::uint32_t>& sums) {
        const std::vector<rt::Segment> copied = segments_of(segments);
        nb::gil_scoped_release unlocked;
        return rt::scatter(reinterpret_cast<const unsigned char*>(source), copied, sums);
      },
      nb::arg("source"), nb::arg("segments"), nb::arg("sums"),
      "Put consecutive blocks of an image where they belong; the first that fails its checksum, or -1.");
  m.def("watch_gloo_waits", &rt::watch_gloo_waits, nb::call_guard<nb::gil_scoped_release>(),
        "Keep a list of all waits for gloo's transfers; False where torch has no gloo that is known here.");
  m.def("end_gloo_waits", &rt::end_gloo_waits, nb::call_guard<nb::gil_scoped_release>(),
        "Make all waits in the list fail; their number.");
  bind_file(m);
  bind_gather(m);
  bind_device(m);
  bind_copier(m);
  // At the end of a process Python does not promise to let go of everything, and there is nothing to flush.
  nb::set_leak_warnings(false);
}
