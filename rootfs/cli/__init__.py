"""The commands that join guestctl: images, layers, packs, signatures, machines."""
