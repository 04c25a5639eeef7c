// Lets the system calls of a child fail, one after the other, or kills it before one: those of all its threads between
// two calls of close(MARK). x86-64 Linux.
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MARK = 54321, MOST = 256, PATH = 512, THREADS = 8 };

struct call {
    long number;
    char path[PATH];  // of the file descriptor, where it has one
};

// What a save or a load does with files, and calls that others may come to use for it. Memory is not among them.
static const long WATCHED[] = {
    SYS_read, SYS_write, SYS_open, SYS_close, SYS_stat, SYS_fstat, SYS_lstat, SYS_lseek, SYS_pread64, SYS_pwrite64,
    SYS_readv, SYS_writev, SYS_access, SYS_sendfile, SYS_fsync, SYS_fdatasync, SYS_truncate, SYS_ftruncate,
    SYS_getdents64, SYS_rename, SYS_mkdir, SYS_rmdir, SYS_creat, SYS_link, SYS_unlink, SYS_symlink, SYS_chmod,
    SYS_fchmod, SYS_flock, SYS_openat, SYS_mkdirat, SYS_newfstatat, SYS_unlinkat, SYS_renameat, SYS_linkat,
    SYS_fchmodat, SYS_faccessat, SYS_sync_file_range, SYS_fallocate, SYS_renameat2, SYS_copy_file_range, SYS_statx,
    SYS_syncfs, SYS_sync, SYS_openat2, SYS_ioctl, SYS_fcntl,
};

static int watched(long number) {
    for (unsigned i = 0; i < sizeof WATCHED / sizeof *WATCHED; i++)
        if (WATCHED[i] == number) return 1;
    return 0;
}

static int by_descriptor(long number) {
    return number == SYS_read || number == SYS_write || number == SYS_close || number == SYS_fsync ||
           number == SYS_fdatasync || number == SYS_writev || number == SYS_pwrite64;
}

int follow_me(void) { return ptrace(PTRACE_TRACEME, 0, 0, 0) ? -errno : raise(SIGSTOP); }

// Follows `pid`, which has called follow_me(), to its end. Its watched call number `at`, if it comes to that, fails with
// `error`, and with `sticky` all later ones that do not tidy up; if `error` is 0 it is killed there. Returns the number
// of watched calls; its wait status comes to stand in `status`.
int trace(int pid, int at, int error, int sticky, struct call *log, int *status) {
    int count = 0, inside = 0, failing[THREADS] = {0};
    if (waitpid(pid, status, 0) != pid || !WIFSTOPPED(*status)) return -1;
    if (ptrace(PTRACE_SETOPTIONS, pid, 0, PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACECLONE | PTRACE_O_EXITKILL)) return -1;
    for (int thread = pid, signal = 0;;) {
        // a thread that was killed meanwhile is no error
        if (ptrace(PTRACE_SYSCALL, thread, 0, signal) && errno != ESRCH) return -1;
        do {
            thread = waitpid(-1, status, __WALL);
            if (thread < 0) return -1;
            if (thread == pid && !WIFSTOPPED(*status)) return count;
        } while (!WIFSTOPPED(*status));
        signal = WSTOPSIG(*status);
        if (signal != (SIGTRAP | 0x80)) {
            // a thread that has made another, and one that begins
            if (*status >> 16 || signal == SIGSTOP) signal = 0;
            continue;
        }
        signal = 0;
        struct __ptrace_syscall_info info;
        struct user_regs_struct regs;
        if (ptrace(PTRACE_GET_SYSCALL_INFO, thread, sizeof info, &info) <= 0) continue;
        if (ptrace(PTRACE_GETREGS, thread, 0, &regs)) continue;
        if (info.op == PTRACE_SYSCALL_INFO_EXIT) {
            for (int i = 0; i < THREADS; i++) {
                if (failing[i] != thread) continue;
                failing[i] = 0;
                regs.rax = -error;
                if (ptrace(PTRACE_SETREGS, thread, 0, &regs)) return -1;
            }
            continue;
        }
        long number = regs.orig_rax;
        if (number == SYS_close && regs.rdi == MARK) inside = !inside;
        if (!inside || !watched(number) || (number == SYS_close && regs.rdi == MARK)) continue;
        int me = count++;
        if (me < MOST) {
            log[me].number = number;
            log[me].path[0] = 0;
            if (by_descriptor(number)) {
                char link[64];
                snprintf(link, sizeof link, "/proc/%d/fd/%d", pid, (int)regs.rdi);
                ssize_t length = readlink(link, log[me].path, PATH - 1);
                log[me].path[length < 0 ? 0 : length] = 0;
            }
        }
        int tidies = number == SYS_unlink || number == SYS_unlinkat || number == SYS_close;
        if (at < 0 || !(me == at || (sticky && me > at && !tidies))) continue;
        if (error == 0) {
            kill(pid, SIGKILL);
            continue;
        }
        for (int i = 0; i < THREADS; i++) {
            if (failing[i]) continue;
            failing[i] = thread;
            break;
        }
        regs.orig_rax = -1;
        if (ptrace(PTRACE_SETREGS, thread, 0, &regs)) return -1;
    }
}
