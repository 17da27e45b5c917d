"""The agent's boot hook inside a distribution's own initramfs: initramfs-tools and dracut."""
