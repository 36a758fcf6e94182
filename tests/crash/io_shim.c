/* Stands between a process and its disk (LD_PRELOAD): records what is written below one folder, or makes it fail.

   Every call that changes a file, a folder or the disk below `root` is numbered, written to a log with its data (see
   `Operation` in recorder.py), and can be made to fail, once or from then on. Calls go to the kernel by syscall(), so
   whatever opened the file (Python, NumPy, SQLite) is seen alike. What is not wrapped here is not seen: the tests
   compare the folder that the log describes with the one on the disk. One thread, one root. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define SHORT_WRITE (-1)
#define MOST_DESCRIPTORS 4096
#define MOST_FAULTS 255

static char root[4096];
static int log_fd = -1;
static char tracked[MOST_DESCRIPTORS]; /* descriptors of files and folders below root */
static long count, fail_at;            /* fail_at 0: never */
static int fail_errno, fail_for_ever, fail_reads, faults;
static char failed[MOST_FAULTS + 1];
static int no_exchange, ignore_sync;

struct record {
    uint32_t operation, unused;
    uint64_t inode;
    int64_t value; /* offset, size or mode */
    uint32_t length, length2;
};

void shim_start(const char *folder, const char *log, int without_exchange, int without_sync) {
    snprintf(root, sizeof root, "%s", folder);
    log_fd = (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    no_exchange = without_exchange;
    ignore_sync = without_sync;
}

void shim_fail(long at, int number, int for_ever, int reads) {
    fail_at = at, fail_errno = number, fail_for_ever = for_ever, fail_reads = reads;
}

/* Kinds of the calls that were made to fail. */
const char *shim_failed(void) { return failed; }

static void record(char operation, uint64_t inode, int64_t value, const void *data, size_t length,
                   const void *data2, size_t length2) {
    if (log_fd < 0)
        return;
    struct record head = {operation, 0, inode, value, length, length2};
    struct iovec parts[3] = {{&head, sizeof head}, {(void *)data, length}, {(void *)data2, length2}};
    int kept = errno;
    if (syscall(SYS_writev, log_fd, parts, 3) != (long)(sizeof head + length + length2))
        syscall(SYS_exit_group, 99);
    errno = kept;
}

void shim_mark(long n) { record('!', 0, n, "", 0, "", 0); }

/* The absolute path if it lies below root, else NULL. */
static const char *below(int folder, const char *path, char *full, size_t size) {
    if (!root[0] || !path)
        return NULL;
    if (path[0] == '/')
        snprintf(full, size, "%s", path);
    else {
        char base[4096];
        if (folder == AT_FDCWD) {
            if (syscall(SYS_getcwd, base, sizeof base) < 0)
                return NULL;
        } else {
            char link[64];
            snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
            long n = syscall(SYS_readlinkat, AT_FDCWD, link, base, sizeof base - 1);
            if (n < 0)
                return NULL;
            base[n] = 0;
        }
        snprintf(full, size, "%s/%s", base, path);
    }
    size_t n = strlen(root);
    return !strncmp(full, root, n) && (full[n] == '/' || !full[n]) ? full : NULL;
}

static int is_tracked(int fd) { return fd >= 0 && fd < MOST_DESCRIPTORS && tracked[fd]; }

static uint64_t inode(int fd) {
    struct stat status;
    return fstat(fd, &status) ? 0 : status.st_ino;
}

/* Whether this call, the next to be numbered, is to fail; R: a read. */
static int fails(char kind) {
    if (kind == 'R' && !fail_reads)
        return 0;
    count++;
    if (!fail_at || (fail_for_ever ? count < fail_at : count != fail_at) || (fail_errno == SHORT_WRITE && kind != 'w'))
        return 0;
    if (faults < MOST_FAULTS)
        failed[faults++] = kind;
    errno = fail_errno;
    return 1;
}

static int open_at(int folder, const char *path, int flags, mode_t mode) {
    char buffer[8192];
    const char *full = below(folder, path, buffer, sizeof buffer);
    if (!full)
        return (int)syscall(SYS_openat, folder, path, flags, mode);
    if (fails(flags & (O_WRONLY | O_RDWR | O_CREAT) ? 'o' : 'R'))
        return -1;
    struct stat status;
    int existed = !fstatat(folder, path, &status, AT_SYMLINK_NOFOLLOW);
    int fd = (int)syscall(SYS_openat, folder, path, flags, mode);
    if (fd >= 0) {
        if (fd < MOST_DESCRIPTORS)
            tracked[fd] = 1;
        fstat(fd, &status);
        if (!existed)
            record('c', status.st_ino, status.st_mode, full, strlen(full), "", 0);
        else if (flags & O_TRUNC)
            record('t', status.st_ino, 0, "", 0, "", 0);
    }
    return fd;
}

#define WITH_MODE                                                                                                      \
    mode_t mode = 0;                                                                                                   \
    if (flags & (O_CREAT | O_TMPFILE)) {                                                                               \
        va_list more;                                                                                                  \
        va_start(more, flags);                                                                                         \
        mode = va_arg(more, mode_t);                                                                                   \
        va_end(more);                                                                                                  \
    }

int open(const char *path, int flags, ...) { WITH_MODE return open_at(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { WITH_MODE return open_at(AT_FDCWD, path, flags, mode); }
int openat(int folder, const char *path, int flags, ...) { WITH_MODE return open_at(folder, path, flags, mode); }
int openat64(int folder, const char *path, int flags, ...) { WITH_MODE return open_at(folder, path, flags, mode); }

int close(int fd) {
    if (fd == log_fd && fd >= 0)
        return 0;
    if (fd >= 0 && fd < MOST_DESCRIPTORS)
        tracked[fd] = 0;
    return (int)syscall(SYS_close, fd);
}

static ssize_t write_at(int fd, const void *data, size_t size, off_t offset, int positioned) {
    if (is_tracked(fd)) {
        if (fails('w')) {
            if (fail_errno != SHORT_WRITE)
                return -1;
            size = (size + 1) / 2;
        }
        if (!positioned)
            offset = syscall(SYS_lseek, fd, 0, SEEK_CUR);
    }
    ssize_t n = positioned ? syscall(SYS_pwrite64, fd, data, size, offset) : syscall(SYS_write, fd, data, size);
    if (is_tracked(fd) && n > 0)
        record('w', inode(fd), offset, data, n, "", 0);
    return n;
}

ssize_t write(int fd, const void *data, size_t size) { return write_at(fd, data, size, 0, 0); }
ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) { return write_at(fd, data, size, offset, 1); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) { return write_at(fd, data, size, offset, 1); }

#define READING(fd)                                                                                                    \
    if (is_tracked(fd) && fails('R'))                                                                            \
        return -1;

ssize_t read(int fd, void *data, size_t size) { READING(fd) return syscall(SYS_read, fd, data, size); }
ssize_t pread(int fd, void *data, size_t size, off_t offset) {
    READING(fd) return syscall(SYS_pread64, fd, data, size, offset);
}
ssize_t pread64(int fd, void *data, size_t size, off64_t offset) {
    READING(fd) return syscall(SYS_pread64, fd, data, size, offset);
}
ssize_t preadv(int fd, const struct iovec *parts, int n, off_t offset) {
    READING(fd) return syscall(SYS_preadv, fd, parts, n, offset, 0);
}
ssize_t preadv64(int fd, const struct iovec *parts, int n, off64_t offset) {
    READING(fd) return syscall(SYS_preadv, fd, parts, n, offset, 0);
}

static int sync_file(int fd, long call) {
    if (!is_tracked(fd))
        return (int)syscall(call, fd);
    /* The kernel takes the pages for clean after a failed sync: what they held may never reach the disk. */
    if (fails('s')) {
        record('x', inode(fd), 0, "", 0, "", 0);
        return -1;
    }
    if (!ignore_sync)
        record('s', inode(fd), 0, "", 0, "", 0);
    return 0; /* the disk itself is simulated */
}

int fsync(int fd) { return sync_file(fd, SYS_fsync); }
int fdatasync(int fd) { return sync_file(fd, SYS_fdatasync); }

static int truncate_file(int fd, off_t size) {
    if (is_tracked(fd) && fails('t'))
        return -1;
    int result = (int)syscall(SYS_ftruncate, fd, size);
    if (is_tracked(fd) && !result)
        record('t', inode(fd), size, "", 0, "", 0);
    return result;
}

int ftruncate(int fd, off_t size) { return truncate_file(fd, size); }
int ftruncate64(int fd, off64_t size) { return truncate_file(fd, size); }

static int rename_at(int from_folder, const char *from, int to_folder, const char *to, unsigned flags) {
    char one[8192], other[8192];
    const char *a = below(from_folder, from, one, sizeof one), *b = below(to_folder, to, other, sizeof other);
    if (a && b) {
        if (flags && no_exchange) {
            errno = ENOSYS;
            return -1;
        }
        if (fails('r'))
            return -1;
    }
    int result = (int)syscall(SYS_renameat2, from_folder, from, to_folder, to, flags);
    if (a && b && !result)
        record(flags ? 'e' : 'r', 0, 0, a, strlen(a), b, strlen(b));
    return result;
}

int rename(const char *from, const char *to) { return rename_at(AT_FDCWD, from, AT_FDCWD, to, 0); }
int renameat(int a, const char *from, int b, const char *to) { return rename_at(a, from, b, to, 0); }
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
    return rename_at(a, from, b, to, flags);
}

static int unlink_at(int folder, const char *path, int flags) {
    char buffer[8192];
    const char *full = below(folder, path, buffer, sizeof buffer);
    if (full && fails('u'))
        return -1;
    int result = (int)syscall(SYS_unlinkat, folder, path, flags);
    if (full && !result)
        record('u', 0, 0, full, strlen(full), "", 0);
    return result;
}

int unlink(const char *path) { return unlink_at(AT_FDCWD, path, 0); }
int remove(const char *path) { return unlink_at(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlink_at(AT_FDCWD, path, AT_REMOVEDIR); }
int unlinkat(int folder, const char *path, int flags) { return unlink_at(folder, path, flags); }

static int mkdir_at(int folder, const char *path, mode_t mode) {
    char buffer[8192];
    const char *full = below(folder, path, buffer, sizeof buffer);
    if (full && fails('d'))
        return -1;
    int result = (int)syscall(SYS_mkdirat, folder, path, mode);
    struct stat status;
    if (full && !result && !fstatat(folder, path, &status, AT_SYMLINK_NOFOLLOW))
        record('d', status.st_ino, status.st_mode, full, strlen(full), "", 0);
    return result;
}

int mkdir(const char *path, mode_t mode) { return mkdir_at(AT_FDCWD, path, mode); }
int mkdirat(int folder, const char *path, mode_t mode) { return mkdir_at(folder, path, mode); }

int fchmod(int fd, mode_t mode) {
    if (is_tracked(fd) && fails('m'))
        return -1;
    int result = (int)syscall(SYS_fchmod, fd, mode);
    if (is_tracked(fd) && !result)
        record('m', inode(fd), mode, "", 0, "", 0);
    return result;
}

int fchmodat(int folder, const char *path, mode_t mode, int flags) {
    char buffer[8192];
    const char *full = below(folder, path, buffer, sizeof buffer);
    if (full && fails('m'))
        return -1;
    int result = (int)syscall(SYS_fchmodat, folder, path, mode);
    struct stat status;
    if (full && !result && !fstatat(folder, path, &status, flags & AT_SYMLINK_NOFOLLOW))
        record('m', status.st_ino, mode, "", 0, "", 0);
    return result;
}

int chmod(const char *path, mode_t mode) { return fchmodat(AT_FDCWD, path, mode, 0); }
