/* disk [/dev/…]: times what a disk does, past the guest's page cache, and says "NAME SECONDS" for each. Without a path it is a machine's init, and takes the disk of SIZE bytes.
   With $alone in its environment, as from the kernel's arguments, init measures itself; else a child does, as a pod's agent has one. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/fs.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static const char *path;

/* leave ends a container; a machine whose init ends panics, so that it waits to be killed. */
static void leave(int code) {
	while (!path) pause();
	exit(code);
}

static void fail(const char *what) {
	printf("failed: %s: %m\n", what);
	leave(1);
}

/* open_disk opens it once it is there: the kernel looks for disks while init runs already. */
static int open_disk(void) {
	static const char *paths[] = {"/dev/vda", "/dev/sda", "/dev/sdb", "/dev/sdc", "/dev/sdd", "/dev/sde", "/dev/sdf", "/dev/sdg", "/dev/sdh"};
	if (path) {
		int fd = open(path, O_RDWR | O_DIRECT);
		if (fd < 0) fail(path);
		return fd;
	}
	if (mount("dev", "/dev", "devtmpfs", 0, NULL)) fail("mount /dev");
	for (int tries = 0; tries < 3000; tries++, usleep(10000))
		for (unsigned i = 0; i < sizeof paths / sizeof *paths; i++) {
			uint64_t size;
			int fd = open(paths[i], O_RDWR | O_DIRECT);
			if (fd >= 0 && !ioctl(fd, BLKGETSIZE64, &size) && size == SIZE) return fd;
			if (fd >= 0) close(fd);
		}
	fail("no disk of the size");
	return -1;
}

/* pass_on returns in a child whose output init passes on. */
static void pass_on(void) {
	char text[4096];
	int ends[2];
	ssize_t n;
	pid_t child;
	if (pipe(ends)) fail("pipe");
	if ((child = fork()) < 0) fail("fork");
	if (!child) {
		if (dup2(ends[1], 1) < 0) fail("dup2");
		return;
	}
	close(ends[1]);
	while ((n = read(ends[0], text, sizeof text)) > 0)
		if (write(1, text, n) != n) fail("console");
	printf("failed: what measures has ended\n");
	leave(1);
}

enum { DEPTH = 16, LARGEST = 1 << 20 };

/* transfer keeps so many requests of a block each at the disk, until count have been answered. */
static void transfer(const char *name, int fd, int opcode, int64_t block, int random, int depth, int count) {
	static char *buffer;
	static uint64_t seed = 88172645463325252u;
	struct iocb all[DEPTH] = {0}, *one;
	struct io_event done[DEPTH];
	struct timespec from, to;
	aio_context_t context = 0;
	int64_t blocks = SIZE / block, next = 0;
	int asked = 0, answered = 0;
	if (!buffer && posix_memalign((void **)&buffer, 4096, (size_t)DEPTH * LARGEST)) fail("memory");
	memset(buffer, 0x5a, (size_t)depth * block);
	if (syscall(SYS_io_setup, DEPTH, &context)) fail("io_setup");
	clock_gettime(CLOCK_MONOTONIC, &from);
	for (int i = 0, got = depth; answered < count; answered += got) {
		for (int k = 0; k < got && asked < count; k++, asked++) {
			one = asked < depth ? &all[i++] : (struct iocb *)(uintptr_t)done[k].obj;
			if (random) {
				seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
				next = seed % blocks;
			}
			*one = (struct iocb){.aio_fildes = fd, .aio_lio_opcode = opcode, .aio_buf = (uintptr_t)buffer + (one - all) * block, .aio_nbytes = block, .aio_offset = next * block};
			next = (next + 1) % blocks;
			if (syscall(SYS_io_submit, context, 1, &one) != 1) fail(name);
		}
		got = syscall(SYS_io_getevents, context, 1, DEPTH, done, NULL);
		if (got < 1) fail(name);
		for (int k = 0; k < got; k++)
			if (done[k].res != block) fail("short");
	}
	clock_gettime(CLOCK_MONOTONIC, &to);
	syscall(SYS_io_destroy, context);
	printf("%s %.6f\n", name, to.tv_sec - from.tv_sec + (to.tv_nsec - from.tv_nsec) / 1e9);
}

int main(int argc, char **argv) {
	setvbuf(stdout, NULL, _IOLBF, 0);
	if (!strncmp(argv[argc - 1], "/dev/", 5)) path = argv[argc - 1]; /* an init has what the kernel's arguments leave */
	if (!path && !getenv("alone")) pass_on();
	int fd = open_disk();
	sleep(3); /* what has just started comes to rest */
	transfer("warm", fd, IOCB_CMD_PREAD, 4096, 1, DEPTH, 5000);
	transfer("warm", fd, IOCB_CMD_PWRITE, 4096, 1, DEPTH, 5000);
	transfer("random-read", fd, IOCB_CMD_PREAD, 4096, 1, DEPTH, RANDOM);
	transfer("random-write", fd, IOCB_CMD_PWRITE, 4096, 1, DEPTH, RANDOM);
	transfer("read", fd, IOCB_CMD_PREAD, LARGEST, 0, 4, SEQUENTIAL);
	transfer("write", fd, IOCB_CMD_PWRITE, LARGEST, 0, 4, SEQUENTIAL);
	printf("end\n");
	leave(0);
}
