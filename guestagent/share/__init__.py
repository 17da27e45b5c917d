"""Directories of the host: mounted by their tag, listed, unmounted, adopted after a restart."""
