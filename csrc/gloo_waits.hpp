// Frees threads that wait for a transfer of gloo's which can never end.
//
// When a connection fails, gloo (up to torch 2.13 at least) tells all buffers whose transfers had not begun, and none
// whose transfer was under way: `Pair::signalException` passes over the unbound buffers of `tx_` and `rx_`.  Whoever waits
// for one of those waits until the collective's timeout, with no connection left through which it could be freed.  The
// larger the tensors, the likelier that is.
//
// Gloo can abort a wait, and closes all connections of a group where a wait runs out of time; what it lacks is a list of
// the buffers that somebody waits for.  So the two functions that wait are replaced in the class's table of virtual
// functions by ones that keep this list, and whose aborted waits run out of time.
#pragma once

#include <cstddef>

namespace resilient_train {

// Begins to keep the list; false where this process's torch has no such gloo.  May be called often, from any thread.
bool watch_gloo_waits();

// Makes all waits of this process that are in the list fail; returns their number.
std::size_t end_gloo_waits();

}  // namespace resilient_train
