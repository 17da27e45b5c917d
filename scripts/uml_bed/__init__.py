"""User Mode Linux as a test bed: a real kernel as a process."""
