// LD_PRELOAD: counts the calls that change files below FAULT_BELOW (all files when it is not set).
// KILL_AT=n kills the process at call n, before the call or, when KILL_TORN is set, after half of a write.
// FULL_AT=n lets every write from call n on fail as on a full disk. KILL_AT=0 prints the count at exit.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

enum Fault { kNone, kTorn, kFull };

static atomic_long calls;

static long number(const char* variable) {
  const char* text = getenv(variable);
  return text ? atol(text) : -1;
}

static void die(void) {
  kill(getpid(), SIGKILL);
  pause();
}

// What shall happen to this call; does not come back when the process dies before it.
static enum Fault count(int is_write) {
  const long call = atomic_fetch_add(&calls, 1) + 1;
  if (call == number("KILL_AT")) {
    if (is_write && getenv("KILL_TORN")) return kTorn;
    die();
  }
  return is_write && number("FULL_AT") > 0 && call >= number("FULL_AT") ? kFull : kNone;
}

static int path_counts(int folder, const char* path) {
  const char* below = getenv("FAULT_BELOW");
  if (!below) return 1;
  if (path[0] == '/' || folder == AT_FDCWD) return strncmp(path, below, strlen(below)) == 0;
  char link[64], target[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
  const ssize_t length = readlink(link, target, sizeof target - 1);
  if (length < 0) return 0;
  target[length] = 0;
  return strncmp(target, below, strlen(below)) == 0;
}

static enum Fault on_path(int folder, const char* path) {
  return path_counts(folder, path) ? count(0) : kNone;
}

static enum Fault on_file(int fd, int is_write) { return path_counts(fd, "") ? count(is_write) : kNone; }

__attribute__((destructor)) static void report(void) {
  if (number("KILL_AT") == 0) fprintf(stderr, "calls %ld\n", atomic_load(&calls));
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define WRITES(name, parameters, whole, half)    \
  ssize_t name parameters {                      \
    const enum Fault fault = on_file(fd, 1);     \
    if (fault == kTorn) {                        \
      (void)!NEXT(name) half;                    \
      die();                                     \
    }                                            \
    if (fault == kNone) return NEXT(name) whole; \
    errno = ENOSPC;                              \
    return -1;                                   \
  }

WRITES(write, (int fd, const void* data, size_t bytes), (fd, data, bytes), (fd, data, bytes / 2))
WRITES(pwrite, (int fd, const void* data, size_t bytes, off_t at), (fd, data, bytes, at),
       (fd, data, bytes / 2, at))
WRITES(pwrite64, (int fd, const void* data, size_t bytes, off64_t at), (fd, data, bytes, at),
       (fd, data, bytes / 2, at))

#define COUNTED(name, parameters, counted, arguments) \
  int name parameters {                               \
    counted;                                          \
    return NEXT(name) arguments;                      \
  }

COUNTED(fsync, (int fd), on_file(fd, 0), (fd))
COUNTED(ftruncate, (int fd, off_t bytes), on_file(fd, 0), (fd, bytes))
COUNTED(ftruncate64, (int fd, off64_t bytes), on_file(fd, 0), (fd, bytes))
COUNTED(truncate, (const char* path, off_t bytes), on_path(AT_FDCWD, path), (path, bytes))
COUNTED(truncate64, (const char* path, off64_t bytes), on_path(AT_FDCWD, path), (path, bytes))
COUNTED(rename, (const char* from, const char* to), on_path(AT_FDCWD, from), (from, to))
COUNTED(renameat2, (int from_fd, const char* from, int to_fd, const char* to, unsigned flags),
        on_path(from_fd, from), (from_fd, from, to_fd, to, flags))
COUNTED(unlink, (const char* path), on_path(AT_FDCWD, path), (path))
COUNTED(unlinkat, (int fd, const char* path, int flags), on_path(fd, path), (fd, path, flags))
COUNTED(rmdir, (const char* path), on_path(AT_FDCWD, path), (path))
COUNTED(mkdir, (const char* path, mode_t mode), on_path(AT_FDCWD, path), (path, mode))
