"""Files that hold images: atomic outputs, holes, ranges, locks, VHD footers."""
