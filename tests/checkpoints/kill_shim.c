// LD_PRELOAD: counts the calls that change files and kills the process at call number KILL_AT, before the
// call or, when KILL_TORN is set, after half of a write. Prints the count at exit when KILL_AT is 0.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/types.h>
#include <unistd.h>

static atomic_long calls;

static long kill_at(void) {
  const char* text = getenv("KILL_AT");
  return text ? atol(text) : -1;
}

static void die(void) {
  kill(getpid(), SIGKILL);
  pause();
}

// True when this call is the last one and must be done by half.
static int count(int can_be_torn) {
  if (atomic_fetch_add(&calls, 1) + 1 != kill_at()) return 0;
  if (can_be_torn && getenv("KILL_TORN")) return 1;
  die();
  return 0;
}

__attribute__((destructor)) static void report(void) {
  if (kill_at() == 0) fprintf(stderr, "calls %ld\n", atomic_load(&calls));
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void* data, size_t bytes) {
  if (count(1)) {
    (void)!NEXT(write)(fd, data, bytes / 2);
    die();
  }
  return NEXT(write)(fd, data, bytes);
}

ssize_t pwrite(int fd, const void* data, size_t bytes, off_t at) {
  if (count(1)) {
    (void)!NEXT(pwrite)(fd, data, bytes / 2, at);
    die();
  }
  return NEXT(pwrite)(fd, data, bytes, at);
}

ssize_t pwrite64(int fd, const void* data, size_t bytes, off64_t at) {
  if (count(1)) {
    (void)!NEXT(pwrite64)(fd, data, bytes / 2, at);
    die();
  }
  return NEXT(pwrite64)(fd, data, bytes, at);
}

#define COUNTED(name, parameters, arguments) \
  int name parameters {                      \
    count(0);                                \
    return NEXT(name) arguments;             \
  }

COUNTED(fsync, (int fd), (fd))
COUNTED(ftruncate, (int fd, off_t bytes), (fd, bytes))
COUNTED(ftruncate64, (int fd, off64_t bytes), (fd, bytes))
COUNTED(truncate, (const char* path, off_t bytes), (path, bytes))
COUNTED(truncate64, (const char* path, off64_t bytes), (path, bytes))
COUNTED(rename, (const char* from, const char* to), (from, to))
COUNTED(renameat2, (int from_fd, const char* from, int to_fd, const char* to, unsigned flags),
        (from_fd, from, to_fd, to, flags))
COUNTED(unlink, (const char* path), (path))
COUNTED(unlinkat, (int fd, const char* path, int flags), (fd, path, flags))
COUNTED(rmdir, (const char* path), (path))
COUNTED(mkdir, (const char* path, mode_t mode), (path, mode))
