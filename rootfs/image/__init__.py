"""Sources (directories, tars, container images) and the file systems made from them."""
