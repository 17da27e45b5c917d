"""The debug console: a person's way into the guest, over vsock or a serial line.

Off unless ``guestagent.console=`` says where; nothing of this package is imported before.
"""
