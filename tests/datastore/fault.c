// Preloaded: the call number `at` of those watched, on files below a folder, fails or kills the process.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static char folder[4096];
static int calls, at = -1, number, sticky;
static char names[4096];

// Counts from 0 again; an `error` of 0 kills. A sticky one is that of all later calls as well, but for unlink.
void fault_arm(const char *below, int call, int error, int stays) {
    snprintf(folder, sizeof folder, "%s", below);
    calls = 0, at = call, number = error, sticky = stays, names[0] = 0;
}

// The calls since then, by name.
const char *fault_calls(void) { return names; }

static int below_path(const char *path) { return folder[0] && path && strstr(path, folder) == path; }

static int below(int file) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return below_path(path);
}

static int strikes(const char *name) {
    int call = calls++;
    if (strlen(names) + strlen(name) + 2 < sizeof names) strcat(strcat(names, name), " ");
    if (at < 0 || !(call == at || (sticky && call > at && strcmp(name, "unlink")))) return 0;
    if (number == 0) kill(getpid(), SIGKILL);
    errno = number;
    return 1;
}

#define WATCH(result, name, parameters, arguments, watched, failure)                             \
    result name parameters {                                                                     \
        static result(*real) parameters;                                                         \
        if (!real) real = (result(*) parameters)dlsym(RTLD_NEXT, #name);                         \
        if ((watched) && strikes(#name)) return failure;                                         \
        return real arguments;                                                                   \
    }

WATCH(ssize_t, write, (int f, const void *b, size_t n), (f, b, n), below(f), -1)
WATCH(ssize_t, read, (int f, void *b, size_t n), (f, b, n), below(f), -1)
WATCH(ssize_t, pread, (int f, void *b, size_t n, off_t o), (f, b, n, o), below(f), -1)
WATCH(ssize_t, pread64, (int f, void *b, size_t n, off64_t o), (f, b, n, o), below(f), -1)
WATCH(int, fsync, (int f), (f), below(f), -1)
WATCH(off_t, lseek, (int f, off_t o, int w), (f, o, w), below(f), -1)
WATCH(off64_t, lseek64, (int f, off64_t o, int w), (f, o, w), below(f), -1)
WATCH(int, unlink, (const char *a), (a), below_path(a), -1)
WATCH(int, rename, (const char *a, const char *b), (a, b), below_path(a), -1)
WATCH(int, renameat, (int x, const char *a, int y, const char *b), (x, a, y, b), below_path(a), -1)
WATCH(int, renameat2, (int x, const char *a, int y, const char *b, unsigned f), (x, a, y, b, f), below_path(a), -1)
WATCH(void *, mmap, (void *a, size_t n, int p, int f, int d, off_t o), (a, n, p, f, d, o), d >= 0 && below(d), MAP_FAILED)
WATCH(void *, mmap64, (void *a, size_t n, int p, int f, int d, off64_t o), (a, n, p, f, d, o), d >= 0 && below(d), MAP_FAILED)

#define WATCH_OPEN(name)                                                                         \
    int name(const char *path, int flags, ...) {                                                 \
        static int (*real)(const char *, int, ...);                                              \
        if (!real) real = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, #name);              \
        va_list rest;                                                                            \
        va_start(rest, flags);                                                                   \
        mode_t mode = va_arg(rest, mode_t);                                                      \
        va_end(rest);                                                                            \
        if (below_path(path) && strikes(#name)) return -1;                                       \
        return real(path, flags, mode);                                                          \
    }

WATCH_OPEN(open)
WATCH_OPEN(open64)
