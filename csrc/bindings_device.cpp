#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "device.hpp"
#include "fingerprints.hpp"
#include "upload.hpp"

namespace nb = nanobind;

namespace resilient_train {
namespace {

using Unlocked = nb::call_guard<nb::gil_scoped_release>;

void* pointer(std::uintptr_t address) { return reinterpret_cast<void*>(address); }

std::vector<std::uint64_t> fingerprints(std::shared_ptr<cuda::Device> device,
                                        const std::vector<std::pair<std::uint64_t, std::size_t>>& ranges,
                                        std::uintptr_t stream) {
  if (device->kernels() == nullptr) throw cuda::Error("no fingerprints: " + device->why_no_kernels(), 0);
  std::vector<cuda::Range> taken;
  for (const auto& [address, size] : ranges) taken.push_back({address, size});
  cuda::Fingerprints prints(std::move(device), taken);
  prints.take(0, reinterpret_cast<cuda::StreamHandle>(stream));
  return prints.values(0);
}

using CopyTuple = std::tuple<std::uint64_t, std::uint64_t, std::size_t>;

cuda::Upload* upload(std::shared_ptr<cuda::Device> device, const std::vector<CopyTuple>& copies, std::uintptr_t stream,
                     unsigned threads) {
  std::vector<cuda::Copy> planned;
  planned.reserve(copies.size());
  for (const auto& [target, source, size] : copies) planned.push_back({target, source, size});
  return new cuda::Upload(std::move(device), planned, reinterpret_cast<cuda::StreamHandle>(stream), threads);
}

}  // namespace

void bind_device(nb::module_& m) {
  nb::exception<cuda::Error>(m, "CudaError", PyExc_RuntimeError);
  nb::class_<cuda::Upload>(m, "Upload", "Copies to a device that are under way.")
      .def("wait", &cuda::Upload::wait, Unlocked(), "Block until everything is on the device.");
  nb::class_<cuda::Device>(m, "Device", "A CUDA device: its primary context, and page-locked memory of the host.")
      .def(
          "__init__",
          [](cuda::Device* self, int index, const std::string& library, std::optional<nb::bytes> kernels) {
            const std::string image =
                kernels ? std::string(kernels->c_str(), kernels->size()) : cuda::embedded_kernels();
            new (self) cuda::Device(index, library, image);
          },
          nb::arg("index"), nb::arg("library") = "libcuda.so.1", nb::arg("kernels") = nb::none())
      .def(
          "lock", [](cuda::Device& self, std::uintptr_t at, std::size_t size) { self.lock(pointer(at), size); },
          nb::arg("address"), nb::arg("size"), Unlocked(), "Page-lock mapped memory.")
      .def(
          "unlock", [](cuda::Device& self, std::uintptr_t at) { self.unlock(pointer(at)); }, nb::arg("address"),
          Unlocked(), "Undo lock().")
      .def(
          "locked",
          [](const cuda::Device& self, std::uintptr_t at, std::size_t size) { return self.locked(pointer(at), size); },
          nb::arg("address"), nb::arg("size"), "Whether memory is page-locked by lock().")
      .def("fingerprints", &fingerprints, nb::arg("ranges"), nb::arg("stream"), Unlocked(),
           "64-bit fingerprints of (address, size) on the device, as they are when the stream gets there.")
      .def("upload", &upload, nb::arg("copies"), nb::arg("stream"), nb::arg("threads") = 1, Unlocked(),
           nb::rv_policy::take_ownership, "Begin to copy (target on the device, source, size).")
      .def_prop_ro("has_kernels", [](const cuda::Device& self) { return self.kernels() != nullptr; })
      .def_prop_ro("why_no_kernels", &cuda::Device::why_no_kernels);
}

}  // namespace resilient_train
