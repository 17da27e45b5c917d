"""Packs: many layers in one device, with a manifest and signatures."""
