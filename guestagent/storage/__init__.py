"""The kernel's storage interfaces, one leaf module each: ioctls, mounts, sysfs. Usable alone."""
