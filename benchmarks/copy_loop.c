/* The yardstick of a full copy: what plain C reaches that reads, sends, receives and writes, and
 * does nothing else: no digest, no framing, no look for zeros, no way to go on after an error.
 *
 *   copy_loop receive DEVICE CONNECTIONS          prints its port, serves one copy, flushes
 *   copy_loop send DEVICE CONNECTIONS PORT        returns when the receiver has flushed
 *
 * Each connection carries one stretch of the device in order. It begins with one byte, which
 * stretch it is; the receiver answers with one byte when everything is durable. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define PIECE (1 << 20)
#define MOST 64

static int device;
static long long size;
static int connections;
static int sockets[MOST];

static void fail(const char *what) {
    fprintf(stderr, "copy_loop: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void *piece(void) {
    void *buffer;
    errno = posix_memalign(&buffer, 4096, PIECE);
    if (errno)
        fail("posix_memalign");
    return buffer;
}

static long long boundary(int index) {
    long long pieces = (size + PIECE - 1) / PIECE;
    long long offset = pieces * index / connections * PIECE;
    return offset < size ? offset : size;
}

static void send_all(int fd, const char *bytes, size_t count) {
    while (count > 0) {
        ssize_t sent = send(fd, bytes, count, 0);
        if (sent <= 0)
            fail("send");
        bytes += sent;
        count -= (size_t)sent;
    }
}

static void receive_all(int fd, char *bytes, size_t count) {
    while (count > 0) {
        ssize_t received = recv(fd, bytes, count, MSG_WAITALL);
        if (received <= 0)
            fail("recv");
        bytes += received;
        count -= (size_t)received;
    }
}

static void *send_stretch(void *argument) {
    int index = (int)(long)argument, fd = sockets[index];
    char *buffer = piece(), name = (char)index;
    send_all(fd, &name, 1);
    for (long long at = boundary(index), end = boundary(index + 1); at < end; at += PIECE) {
        size_t length = end - at < PIECE ? (size_t)(end - at) : PIECE;
        if (pread(device, buffer, length, at) != (ssize_t)length)
            fail("pread");
        send_all(fd, buffer, length);
    }
    free(buffer);
    return NULL;
}

static void *receive_stretch(void *argument) {
    int fd = sockets[(long)argument];
    char *buffer = piece(), name;
    receive_all(fd, &name, 1);
    if (name < 0 || name >= connections)
        fail("no such stretch");
    for (long long at = boundary(name), end = boundary(name + 1); at < end; at += PIECE) {
        size_t length = end - at < PIECE ? (size_t)(end - at) : PIECE;
        receive_all(fd, buffer, length);
        if (pwrite(device, buffer, length, at) != (ssize_t)length)
            fail("pwrite");
    }
    free(buffer);
    return NULL;
}

static void in_threads(void *(*work)(void *)) {
    pthread_t threads[MOST];
    for (long i = 0; i < connections; i++) {
        errno = pthread_create(&threads[i], NULL, work, (void *)i);
        if (errno)
            fail("pthread_create");
    }
    for (int i = 0; i < connections; i++)
        pthread_join(threads[i], NULL);
}

static void set_nodelay(int fd) {
    int on = 1;
    if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on)) != 0)
        fail("TCP_NODELAY");
}

static void receive_copy(void) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t length = sizeof(address);
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, length) != 0 ||
        listen(listener, MOST) != 0 ||
        getsockname(listener, (struct sockaddr *)&address, &length) != 0)
        fail("listen");
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    for (int i = 0; i < connections; i++) {
        sockets[i] = accept(listener, NULL, NULL);
        if (sockets[i] < 0)
            fail("accept");
        set_nodelay(sockets[i]);
    }
    in_threads(receive_stretch);
    if (fsync(device) != 0)
        fail("fsync");
    send_all(sockets[0], "d", 1);
}

static void send_copy(int port) {
    struct sockaddr_in address = {.sin_family = AF_INET,
                                  .sin_addr = {htonl(INADDR_LOOPBACK)},
                                  .sin_port = htons((unsigned short)port)};
    char done;
    for (int i = 0; i < connections; i++) {
        sockets[i] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (sockets[i] < 0 || connect(sockets[i], (struct sockaddr *)&address, sizeof(address)))
            fail("connect");
        set_nodelay(sockets[i]);
    }
    in_threads(send_stretch);
    /* The receiver accepts in the order of the connects, so the answer comes on the first. */
    receive_all(sockets[0], &done, 1);
}

int main(int count, char **words) {
    int sends = count == 5 && strcmp(words[1], "send") == 0;
    if (!sends && (count != 4 || strcmp(words[1], "receive") != 0))
        return 2;
    connections = atoi(words[3]);
    if (connections < 1 || connections > MOST)
        return 2;
    device = open(words[2], (sends ? O_RDONLY : O_WRONLY) | O_DIRECT | O_CLOEXEC);
    if (device < 0)
        fail(words[2]);
    size = lseek(device, 0, SEEK_END);
    if (sends)
        send_copy(atoi(words[4]));
    else
        receive_copy();
    return 0;
}
