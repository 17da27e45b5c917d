"""A virtio-vsock device in user space: the vhost-user back-end of QEMU, User Mode Linux and others.

The host needs no vhost-vsock module and no AF_VSOCK: each guest port is reached through one Unix
socket (``CONNECT <port>\\n`` answered by ``OK <port>\\n``), and a guest that dials port P of CID 2
reaches the listener on ``<that socket>_<P>``.

    vhost_user   messages of the control socket        memory       the guest's memory, mapped
    backend      what each message does                virtqueue    split rings, checked
    vring        a ring with its notifications         packet       the header of each packet
    hybrid       the Unix-socket side                  connections  states and credit, no sockets
    switchboard  packets from the guest, lives         outbox       packets to the guest
    line         a connection with its Unix socket     loop         epoll and timers
    device       all of it in one process              process      start and end that process
"""
