#include "gloo_waits.hpp"

#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <mutex>
#include <stdexcept>

namespace resilient_train {

namespace {

// As in gloo/transport/tcp/unbound_buffer.h: members are functions whose first argument is the object.
using Timeout = std::chrono::milliseconds;
using Wait = bool (*)(void* buffer, int* rank, Timeout timeout);
using Abort = void (*)(void* buffer);

constexpr char LIBRARY[] = "libtorch_cpu.so";
constexpr char TABLE[] = "_ZTVN4gloo9transport3tcp13UnboundBufferE";
constexpr char WAIT_RECV[] =
    "_ZN4gloo9transport3tcp13UnboundBuffer8waitRecvEPiNSt6chrono8durationIlSt5ratioILl1ELl1000EEEE";
constexpr char WAIT_SEND[] =
    "_ZN4gloo9transport3tcp13UnboundBuffer8waitSendEPiNSt6chrono8durationIlSt5ratioILl1ELl1000EEEE";
constexpr char ABORT_RECV[] = "_ZN4gloo9transport3tcp13UnboundBuffer13abortWaitRecvEv";
constexpr char ABORT_SEND[] = "_ZN4gloo9transport3tcp13UnboundBuffer13abortWaitSendEv";

// One of the two things that can be waited for.
struct Kind {
  Wait wait = nullptr;
  Abort abort = nullptr;
};

Kind recv_of_gloo;
Kind send_of_gloo;

std::mutex guard;

// A wait under way, on the stack of the thread that waits.
class Waiting {
 public:
  Waiting(const Kind& kind, void* buffer) : kind_(kind), buffer_(buffer) {
    const std::lock_guard<std::mutex> locked(guard);
    next_ = first;
    if (next_ != nullptr) next_->before_ = this;
    first = this;
  }
  // Nobody can be aborting it any more when the wait returns to whoever owns the buffer.
  ~Waiting() {
    const std::lock_guard<std::mutex> locked(guard);
    if (next_ != nullptr) next_->before_ = before_;
    (before_ != nullptr ? before_->next_ : first) = next_;
  }
  Waiting(const Waiting&) = delete;
  Waiting& operator=(const Waiting&) = delete;

  bool ended() const {
    const std::lock_guard<std::mutex> locked(guard);
    return ended_;
  }

  static std::size_t end_all() {
    const std::lock_guard<std::mutex> locked(guard);
    std::size_t count = 0;
    for (Waiting* waiting = first; waiting != nullptr; waiting = waiting->next_, ++count) {
      waiting->ended_ = true;
      waiting->kind_.abort(waiting->buffer_);
    }
    return count;
  }

 private:
  static Waiting* first;
  const Kind& kind_;
  void* buffer_;
  bool ended_ = false;
  Waiting* next_ = nullptr;
  Waiting* before_ = nullptr;
};

Waiting* Waiting::first = nullptr;

bool wait_for(const Kind& kind, void* buffer, int* rank, Timeout timeout) {
  bool done;
  {
    Waiting waiting(kind, buffer);
    done = kind.wait(buffer, rank, timeout);
    if (!waiting.ended()) return done;
  }
  // Gloo's algorithms do not look at what is returned: an aborted wait must throw, or they go on with what is not there.
  // A wait that runs out of time does, and closes the group's connections while the buffer is still there; a connection
  // that outlives a buffer which it was filling never reads again, and keeps gloo's thread busy for nothing.  The first
  // time may only take back an abort that came when the wait was over.
  for (int attempt = 0; attempt < 2; ++attempt) kind.wait(buffer, rank, Timeout(0));
  throw std::runtime_error("gloo: a transfer was aborted before its end");
}

bool wait_recv(void* buffer, int* rank, Timeout timeout) { return wait_for(recv_of_gloo, buffer, rank, timeout); }

bool wait_send(void* buffer, int* rank, Timeout timeout) { return wait_for(send_of_gloo, buffer, rank, timeout); }

// Whether the page of an address can be written to.
bool writable(std::uintptr_t address) {
  std::FILE* maps = std::fopen("/proc/self/maps", "re");
  if (maps == nullptr) return false;
  char line[512];
  bool found = false;
  while (!found && std::fgets(line, sizeof line, maps) != nullptr) {
    unsigned long begin = 0, end = 0;
    char rights[5] = "";
    if (std::sscanf(line, "%lx-%lx %4s", &begin, &end, rights) == 3 && begin <= address && address < end)
      found = rights[1] == 'w';
  }
  std::fclose(maps);
  return found;
}

// Tables of virtual functions are read-only once their library is loaded.
bool replace(void** slot, void* function) {
  const auto address = reinterpret_cast<std::uintptr_t>(slot);
  const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  void* const begin = reinterpret_cast<void*>(address / page * page);
  const bool opened = !writable(address);
  if (opened && mprotect(begin, page, PROT_READ | PROT_WRITE) != 0) return false;
  std::atomic_ref<void*>(*slot).store(function, std::memory_order_release);
  if (opened) mprotect(begin, page, PROT_READ);
  return true;
}

void** find(void** table, std::size_t entries, void* function) {
  for (std::size_t index = 0; index < entries; ++index)
    if (table[index] == function) return table + index;
  return nullptr;
}

// What torch's library calls `name`; null if it has no such thing.
template <typename Function>
Function named(void* library, const char* name) {
  return reinterpret_cast<Function>(dlsym(library, name));
}

bool install_in(void* library) {
  void** const table = named<void**>(library, TABLE);
  recv_of_gloo = {named<Wait>(library, WAIT_RECV), named<Abort>(library, ABORT_RECV)};
  send_of_gloo = {named<Wait>(library, WAIT_SEND), named<Abort>(library, ABORT_SEND)};
  if (table == nullptr || recv_of_gloo.wait == nullptr || recv_of_gloo.abort == nullptr ||
      send_of_gloo.wait == nullptr || send_of_gloo.abort == nullptr)
    return false;
  Dl_info info;
  const ElfW(Sym)* symbol = nullptr;
  if (dladdr1(table, &info, reinterpret_cast<void**>(const_cast<ElfW(Sym)**>(&symbol)), RTLD_DL_SYMENT) == 0 ||
      symbol == nullptr || info.dli_saddr != table)
    return false;
  const std::size_t entries = symbol->st_size / sizeof(void*);
  void** const recv_slot = find(table, entries, reinterpret_cast<void*>(recv_of_gloo.wait));
  void** const send_slot = find(table, entries, reinterpret_cast<void*>(send_of_gloo.wait));
  if (recv_slot == nullptr || send_slot == nullptr) return false;
  // One alone does no harm: what is in the list can be ended, and what is not is as before.
  return replace(recv_slot, reinterpret_cast<void*>(wait_recv)) &&
         replace(send_slot, reinterpret_cast<void*>(wait_send));
}

bool install() {
  void* const library = dlopen(LIBRARY, RTLD_NOW | RTLD_NOLOAD);
  if (library == nullptr) return false;
  const bool installed = install_in(library);
  dlclose(library);
  return installed;
}

}  // namespace

bool watch_gloo_waits() {
  static std::mutex once;
  static bool installed = false;
  const std::lock_guard<std::mutex> locked(once);
  // Torch may be loaded later than this was first asked for.
  if (!installed) installed = install();
  return installed;
}

std::size_t end_gloo_waits() { return Waiting::end_all(); }

}  // namespace resilient_train
