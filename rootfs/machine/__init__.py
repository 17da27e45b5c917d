"""Virtual machines: QEMU, its control socket and console, and configurations of other VMMs."""
