/* Preloaded into a daemon of the campaign: moves its wall clock and lets its syncs fail, as a shared page says.
 *
 * The page: how many seconds to add to the wall clock; whether syncs fail; how many have failed so far. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

struct page { long long seconds; long long fails; long long failed; };

static volatile struct page *page(void) {
    static volatile struct page *mapped;
    if (mapped) return mapped;
    const char *name = getenv("MIRRORVM_CAMPAIGN_PAGE");
    int file = name ? open(name, O_RDWR | O_CLOEXEC) : -1;
    if (file < 0) return 0;
    void *at = mmap(0, sizeof(struct page), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (at == MAP_FAILED) return 0;
    return mapped = at;
}

/* While the program may still open any file. One that was to go by a page and cannot must not pass for one whose clock
 * nobody set. */
__attribute__((constructor)) static void begin(void) {
    if (getenv("MIRRORVM_CAMPAIGN_PAGE") && !page()) abort();
}

int clock_gettime(clockid_t id, struct timespec *t) {
    int result = syscall(SYS_clock_gettime, id, t);
    if (result == 0 && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE) && page()) t->tv_sec += page()->seconds;
    return result;
}

int gettimeofday(struct timeval *restrict t, void *restrict zone) {
    struct timespec now;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    t->tv_sec = now.tv_sec;
    t->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}

static int fails(void) {
    if (!page() || !page()->fails) return 0;
    __sync_fetch_and_add(&page()->failed, 1);
    errno = EIO;
    return 1;
}

int fsync(int file) { return fails() ? -1 : syscall(SYS_fsync, file); }
int fdatasync(int file) { return fails() ? -1 : syscall(SYS_fdatasync, file); }
