"""Looking into what is mounted: trees, files and devices, read-only, whatever they hold."""
