#pragma once
// Requests to stop that come from outside.

namespace launch {

// From now on SIGUSR1, SIGTERM and SIGINT ask the run to save and stop; a second SIGINT ends the process.
void watch_stop_signals();
bool stop_requested();

}  // namespace launch
