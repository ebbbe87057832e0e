"""The HTTP server: disks by GET and PUT, and the Xen API that goes with them (docs/http.md).

Each connection has a thread of its own and a socket that blocks: what does the work below (libvirt, storage daemons, files)
blocks as well, and the kernel moves files into such a socket by itself. h11 reads and writes HTTP/1.1.
"""
