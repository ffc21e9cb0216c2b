/* Fails, delays, stops or kills chosen system calls of a process, and shifts its clock; loaded with LD_PRELOAD.

   FAULTS holds one rule per line: "OPERATION PATTERN N ACTION".
     OPERATION  open, read, write, fsync, truncate, rename, link, unlink (also rmdir) or mkdir
     PATTERN    of fnmatch(3), for the path; for a rename or link, the source or the target
     N          the N-th match fails; "N+" also fails all later ones
     ACTION     a number (errno), "sleep:SECONDS", "stop", "kill"; "after-stop" and "after-kill" follow the call
   Fired rules are appended to the file FAULTS_LOG.  CLOCK_SHIFT is added to the wall clock, in seconds. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define MAX_RULES 16
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

struct rule {
    char operation[16], pattern[PATH_MAX], action[32];
    int n, repeats;
    atomic_int matches;
};

static struct rule rules[MAX_RULES];
static int count;
static long shift;

/* Read the rules; a forked process calls this again after it has changed its environment. */
__attribute__((constructor)) void faults_parse(void) {
    const char *text = getenv("FAULTS"), *seconds = getenv("CLOCK_SHIFT");
    shift = seconds ? atol(seconds) : 0;
    count = 0;
    while (text && *text && count < MAX_RULES) {
        struct rule *rule = &rules[count];
        char n[16];
        if (sscanf(text, "%15s %4095s %15s %31s", rule->operation, rule->pattern, n, rule->action) == 4) {
            rule->n = atoi(n);
            rule->repeats = strchr(n, '+') != NULL;
            atomic_store(&rule->matches, 0);
            count++;
        }
        text = strchr(text, '\n');
        text = text ? text + 1 : NULL;
    }
}

static void note(const struct rule *rule, const char *path) {
    const char *log = getenv("FAULTS_LOG");
    char line[PATH_MAX + 80];
    if (!log)
        return;
    int length = snprintf(line, sizeof line, "%d %s %s %s\n", getpid(), rule->operation, rule->action, path);
    int file = (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
    if (file >= 0) {
        syscall(SYS_write, file, line, (size_t)length);
        syscall(SYS_close, file);
    }
}

/* Act on the rules for a call.  Returns an errno, 0 to go on, or -SIGNAL to send after the call. */
static int act(const char *operation, const char *path, const char *other) {
    for (int i = 0; i < count; i++) {
        struct rule *rule = &rules[i];
        if (strcmp(rule->operation, operation) != 0)
            continue;
        if (fnmatch(rule->pattern, path, 0) != 0 && (!other || fnmatch(rule->pattern, other, 0) != 0))
            continue;
        int match = atomic_fetch_add(&rule->matches, 1) + 1;
        if (match != rule->n && !(rule->repeats && match > rule->n))
            continue;
        note(rule, path);
        if (strncmp(rule->action, "sleep:", 6) == 0)
            usleep((useconds_t)(atof(rule->action + 6) * 1e6));
        else if (strcmp(rule->action, "stop") == 0)
            kill(getpid(), SIGSTOP);
        else if (strcmp(rule->action, "kill") == 0)
            kill(getpid(), SIGKILL);
        else if (strcmp(rule->action, "after-stop") == 0)
            return -SIGSTOP;
        else if (strcmp(rule->action, "after-kill") == 0)
            return -SIGKILL;
        else
            return atoi(rule->action);
    }
    return 0;
}

static const char *named(int file, char *buffer) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, buffer, PATH_MAX - 1);
    buffer[length < 0 ? 0 : length] = 0;
    return buffer;
}

static const char *below(int folder, const char *path, char *buffer) {
    if (path[0] == '/' || folder == AT_FDCWD)
        return path;
    named(folder, buffer);
    size_t length = strlen(buffer);
    snprintf(buffer + length, PATH_MAX - length, "/%s", path);
    return buffer;
}

#define GUARDED(type, operation, path, other, call)             \
    do {                                                        \
        int fault_ = act(operation, path, other);               \
        if (fault_ > 0) {                                       \
            errno = fault_;                                     \
            return -1;                                          \
        }                                                       \
        type result_ = call;                                    \
        if (fault_ < 0)                                         \
            kill(getpid(), -fault_);                            \
        return result_;                                         \
    } while (0)

#define MODE(flags, last)                                       \
    mode_t mode = 0;                                            \
    if ((flags) & (O_CREAT | __O_TMPFILE)) {                    \
        va_list more;                                           \
        va_start(more, last);                                   \
        mode = va_arg(more, mode_t);                            \
        va_end(more);                                           \
    }

#define DEFINE_OPEN(name)                                       \
    int name(const char *path, int flags, ...) {                \
        MODE(flags, flags)                                      \
        GUARDED(int, "open", path, NULL, REAL(name)(path, flags, mode)); \
    }
DEFINE_OPEN(open)
DEFINE_OPEN(open64)

#define DEFINE_OPENAT(name)                                     \
    int name(int folder, const char *path, int flags, ...) {    \
        char buffer[PATH_MAX];                                  \
        MODE(flags, flags)                                      \
        GUARDED(int, "open", below(folder, path, buffer), NULL, REAL(name)(folder, path, flags, mode)); \
    }
DEFINE_OPENAT(openat)
DEFINE_OPENAT(openat64)

#define DEFINE_ON_FILE(type, operation, name, parameters, arguments) \
    type name parameters {                                      \
        char buffer[PATH_MAX];                                  \
        if (count == 0)                                         \
            return REAL(name) arguments;                        \
        GUARDED(type, operation, named(file, buffer), NULL, REAL(name) arguments); \
    }
DEFINE_ON_FILE(ssize_t, "read", read, (int file, void *data, size_t size), (file, data, size))
DEFINE_ON_FILE(ssize_t, "read", pread64, (int file, void *data, size_t size, off64_t at), (file, data, size, at))
DEFINE_ON_FILE(ssize_t, "read", preadv64, (int file, const struct iovec *parts, int n, off64_t at),
               (file, parts, n, at))
DEFINE_ON_FILE(ssize_t, "read", preadv64v2, (int file, const struct iovec *parts, int n, off64_t at, int flags),
               (file, parts, n, at, flags))
DEFINE_ON_FILE(ssize_t, "write", write, (int file, const void *data, size_t size), (file, data, size))
DEFINE_ON_FILE(ssize_t, "write", pwrite64, (int file, const void *data, size_t size, off64_t at),
               (file, data, size, at))
DEFINE_ON_FILE(ssize_t, "write", writev, (int file, const struct iovec *parts, int n), (file, parts, n))
DEFINE_ON_FILE(int, "fsync", fsync, (int file), (file))
DEFINE_ON_FILE(int, "fsync", fdatasync, (int file), (file))
DEFINE_ON_FILE(int, "truncate", ftruncate64, (int file, off64_t size), (file, size))

int rename(const char *from, const char *to) { GUARDED(int, "rename", from, to, REAL(rename)(from, to)); }

int renameat(int from_folder, const char *from, int to_folder, const char *to) {
    char one[PATH_MAX], two[PATH_MAX];
    GUARDED(int, "rename", below(from_folder, from, one), below(to_folder, to, two),
            REAL(renameat)(from_folder, from, to_folder, to));
}

int link(const char *from, const char *to) { GUARDED(int, "link", from, to, REAL(link)(from, to)); }
int linkat(int from_folder, const char *from, int to_folder, const char *to, int flags) {
    char one[PATH_MAX], two[PATH_MAX];
    GUARDED(int, "link", below(from_folder, from, one), below(to_folder, to, two),
            REAL(linkat)(from_folder, from, to_folder, to, flags));
}

int unlink(const char *path) { GUARDED(int, "unlink", path, NULL, REAL(unlink)(path)); }
int rmdir(const char *path) { GUARDED(int, "unlink", path, NULL, REAL(rmdir)(path)); }
int unlinkat(int folder, const char *path, int flags) {
    char buffer[PATH_MAX];
    GUARDED(int, "unlink", below(folder, path, buffer), NULL, REAL(unlinkat)(folder, path, flags));
}

int mkdir(const char *path, mode_t mode) { GUARDED(int, "mkdir", path, NULL, REAL(mkdir)(path, mode)); }

int clock_gettime(clockid_t clock, struct timespec *now) {
    int result = REAL(clock_gettime)(clock, now);
    if (result == 0 && clock == CLOCK_REALTIME)
        now->tv_sec += shift;
    return result;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out)
        *out = now.tv_sec;
    return now.tv_sec;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    int result = REAL(gettimeofday)(now, zone);
    if (result == 0)
        now->tv_sec += shift;
    return result;
}
