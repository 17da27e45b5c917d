"""Byte streams and MessagePack-RPC between a host and its virtual machines."""
