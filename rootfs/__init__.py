"""What the guest boots and mounts: hash trees, images, packs, initramfs. Host side only."""
