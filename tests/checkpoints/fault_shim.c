// LD_PRELOAD: counts the calls that change files below FAULT_BELOW (all files when it is not set).
// KILL_AT=n kills the process at call n, before the call or, when KILL_TORN is set, after half of a write.
// FULL_AT=n lets every write from call n on fail as on a full disk. KILL_AT=0 prints the count at exit.
// CALLS_TO=file gets a line for each of them: the call, its path and, where it moves something, where to.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
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

// The path of a file, or of `path` seen from a folder.
static void resolve(int folder, const char* path, char* to, size_t most) {
  to[0] = 0;
  if (path[0] != '/' && folder != AT_FDCWD) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    const ssize_t length = readlink(link, to, most - 1);
    to[length < 0 ? 0 : length] = 0;
    if (path[0]) strncat(to, "/", most - strlen(to) - 1);
  }
  strncat(to, path, most - strlen(to) - 1);
}

static void write_down(const char* call, const char* path, const char* moved_to) {
  const char* file = getenv("CALLS_TO");
  if (!file) return;
  char line[9000];
  const int length = snprintf(line, sizeof line, "%s %s %s\n", call, path, moved_to);
  const int fd = (int)syscall(SYS_openat, AT_FDCWD, file, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  (void)!syscall(SYS_write, fd, line, (size_t)length);
  syscall(SYS_close, fd);
}

static enum Fault on(const char* call, int folder, const char* path, const char* moved_to, int is_write) {
  char whole[4096];
  resolve(folder, path, whole, sizeof whole);
  const char* below = getenv("FAULT_BELOW");
  if (below && strncmp(whole, below, strlen(below)) != 0) return kNone;
  write_down(call, whole, moved_to);
  return count(is_write);
}

__attribute__((destructor)) static void report(void) {
  if (number("KILL_AT") == 0) fprintf(stderr, "calls %ld\n", atomic_load(&calls));
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define WRITES(name, parameters, whole, half)          \
  ssize_t name parameters {                            \
    const enum Fault fault = on(#name, fd, "", "", 1); \
    if (fault == kTorn) {                              \
      (void)!NEXT(name) half;                          \
      die();                                           \
    }                                                  \
    if (fault == kNone) return NEXT(name) whole;       \
    errno = ENOSPC;                                    \
    return -1;                                         \
  }

WRITES(write, (int fd, const void* data, size_t bytes), (fd, data, bytes), (fd, data, bytes / 2))
WRITES(pwrite, (int fd, const void* data, size_t bytes, off_t at), (fd, data, bytes, at),
       (fd, data, bytes / 2, at))
WRITES(pwrite64, (int fd, const void* data, size_t bytes, off64_t at), (fd, data, bytes, at),
       (fd, data, bytes / 2, at))

#define COUNTED(name, parameters, folder, path, moved_to, arguments) \
  int name parameters {                                              \
    on(#name, folder, path, moved_to, 0);                            \
    return NEXT(name) arguments;                                     \
  }

COUNTED(fsync, (int fd), fd, "", "", (fd))
COUNTED(ftruncate, (int fd, off_t bytes), fd, "", "", (fd, bytes))
COUNTED(ftruncate64, (int fd, off64_t bytes), fd, "", "", (fd, bytes))
COUNTED(truncate, (const char* path, off_t bytes), AT_FDCWD, path, "", (path, bytes))
COUNTED(truncate64, (const char* path, off64_t bytes), AT_FDCWD, path, "", (path, bytes))
COUNTED(rename, (const char* from, const char* to), AT_FDCWD, from, to, (from, to))
COUNTED(renameat2, (int from_fd, const char* from, int to_fd, const char* to, unsigned flags), from_fd, from,
        to, (from_fd, from, to_fd, to, flags))
COUNTED(unlink, (const char* path), AT_FDCWD, path, "", (path))
COUNTED(unlinkat, (int fd, const char* path, int flags), fd, path, "", (fd, path, flags))
COUNTED(rmdir, (const char* path), AT_FDCWD, path, "", (path))
COUNTED(mkdir, (const char* path, mode_t mode), AT_FDCWD, path, "", (path, mode))
