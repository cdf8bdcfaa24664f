#pragma once
// The exceptions of Foretell. Each carries one line that says what is wrong and what to do; the command line
// maps the type to an exit code (ConfigError 2; DataError and CheckpointError 74; everything else 1).
#include <cerrno>
#include <stdexcept>
#include <string>

namespace kernels {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct ConfigError : Error {
  using Error::Error;
};
struct DataError : Error {
  using Error::Error;
};
struct ShapeError : Error {
  using Error::Error;
};
struct DeviceError : Error {
  using Error::Error;
};
struct CommError : Error {
  using Error::Error;
};
struct CheckpointError : Error {
  using Error::Error;
};

// What to do about a failed system call, to end a line with; empty where its reason says it.
inline const char* remedy_of(int error) {
  if (error == ENOSPC || error == EDQUOT || error == EFBIG)
    return "; free some space or choose another place";
  if (error == EMFILE || error == ENFILE) return "; raise the limit of open files (ulimit -n)";
  return error == EACCES || error == EPERM || error == EROFS ? "; check its permissions" : "";
}

}  // namespace kernels
