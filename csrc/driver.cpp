#include "driver.hpp"

#include <dlfcn.h>

namespace resilient_train::cuda {
namespace {

void* open(const std::string& path) {
  if (void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) return library;
  const char* why = dlerror();
  throw Error("no CUDA driver: " + std::string(why != nullptr ? why : path), 0);
}

int version_of(void* library) {
  const auto ask = reinterpret_cast<Status (*)(int*)>(dlsym(library, "cuDriverGetVersion"));
  int version = 0;
  return ask != nullptr && ask(&version) == 0 ? version : 0;
}

}  // namespace

Driver::Driver(const std::string& path)
    : path_(path),
      library_(open(path)),
      find_(reinterpret_cast<decltype(find_)>(dlsym(library_, "cuGetProcAddress_v2"))),
      version_(version_of(library_)) {
  init(0);
}

void* Driver::find(const char* name, int version, const char* exported) const {
  // An older driver may answer with a function of other parameters instead of saying that it has none.
  if (version > version_) return nullptr;
  void* found = nullptr;
  int answer = 0;
  if (find_ != nullptr && find_(name, &found, version, 0, &answer) == 0 && found != nullptr) return found;
  return dlsym(library_, exported);
}

void Driver::fail(const char* name, Status status) const {
  const char *code = nullptr, *text = nullptr;
  error_name.quietly(status, &code);
  error_text.quietly(status, &text);
  throw Error(std::string(name) + ": " + (code != nullptr ? code : "error " + std::to_string(status)) +
                  (text != nullptr ? std::string(" (") + text + ")" : ""),
              status);
}

}  // namespace resilient_train::cuda
