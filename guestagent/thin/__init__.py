"""Thin provisioning: pools on two disks, and volumes in them. Imported at its first request."""
