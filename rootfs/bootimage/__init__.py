"""The boot image: interpreter, libraries, kernel modules and the guest's own modules as a cpio."""
